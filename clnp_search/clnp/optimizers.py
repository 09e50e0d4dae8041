"""A pack's optimizer: one fused kernel for each learning rate.

`torch.optim` calls the same kernels, but its first optimizer imports torch.compile's machinery, which takes longer than
many a training (4 s of CPU time in every new process with torch 2.15), and its bookkeeping costs a narrow pack 3% of
every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class Optimizer:
    """Adam, AdamW or SGD with momentum, as `torch.optim` defines them.

    Args:
        parameters: Tensors [P, ...] with gradients.
        learning_rates: One for each of the P points; equal ones that stand together share a kernel call.
        kind: `adam`, `adamw` or `sgd`.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        learning_rates: Sequence[float],
        kind: str,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
    ) -> None:
        self._kind, self._weight_decay, self._momentum = kind, weight_decay, momentum
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        moments = {"adam": 2, "adamw": 2, "sgd": int(momentum > 0)}[kind]
        buffers = [[torch.zeros_like(parameter) for parameter in parameters] for _ in range(moments)]
        self._count = torch.zeros((), device=parameters[0].device) if parameters else torch.zeros(())
        self._state = {
            f"{moment}.{index}": each for moment, row in enumerate(buffers) for index, each in enumerate(row)
        }
        self._groups = [
            (
                learning_rates[start],
                [[each[start:stop] for each in row if each.numel()] for row in (parameters, gradients, *buffers)],
            )
            for start, stop in _runs(learning_rates)
        ]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's whole state, by name."""
        return {"count": self._count, **self._state}

    def step(self, factor: float) -> None:
        """Moves the parameters along their gradients, at `factor` times each learning rate."""
        self._count += 1
        for rate, (parameters, gradients, *buffers) in self._groups:
            if not parameters:
                continue
            if self._kind == "sgd":
                torch._fused_sgd_(
                    parameters,
                    gradients,
                    buffers[0] if buffers else [],
                    weight_decay=self._weight_decay,
                    momentum=self._momentum,
                    lr=rate * factor,
                    dampening=0.0,
                    nesterov=False,
                    maximize=False,
                    is_first_step=False,  # the buffers start at zero, which comes to the same
                )
                continue
            kernel = torch._fused_adam_ if self._kind == "adam" else torch._fused_adamw_
            kernel(
                parameters,
                gradients,
                buffers[0],
                buffers[1],
                [],
                [self._count] * len(parameters),
                lr=rate * factor,
                beta1=BETAS[0],
                beta2=BETAS[1],
                weight_decay=self._weight_decay,
                eps=EPSILON,
                amsgrad=False,
                maximize=False,
            )


def _runs(values: Sequence[float]) -> Iterator[tuple[int, int]]:
    start = 0
    for stop in range(1, len(values) + 1):
        if stop == len(values) or values[stop] != values[start]:
            yield start, stop
            start = stop
