"""A pack's optimizer: a fused kernel call for each part of a pack that moves at one learning rate.

`torch.optim` calls the same kernels, but its first optimizer imports torch.compile's machinery, which takes longer than
many a training (4 s of CPU time in every new process with torch 2.15), and its bookkeeping costs a narrow pack 3% of
every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from clnp_search.clnp.replay import Replay

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class Optimizer:
    """Adam, AdamW or SGD with momentum, as `torch.optim` defines them.

    Args:
        parts: Learning rates, and the tensors that move at each, with gradients.
        kind: `adam`, `adamw` or `sgd`.
    """

    def __init__(
        self,
        parts: Iterable[tuple[float, Sequence[Tensor]]],
        kind: str,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
    ) -> None:
        self._kind, self._weight_decay, self._momentum = kind, weight_decay, momentum
        moments = {"adam": 2, "adamw": 2, "sgd": int(momentum > 0)}[kind]
        used = [(rate, [each for each in own if each.numel()]) for rate, own in parts]
        self._parts = [
            (rate, own, [each.grad for each in own if each.grad is not None], _zeros_like(own, moments))
            for rate, own in used
        ]
        device = next((own[0].device for _, own in used if own), torch.device("cpu"))
        self._count, self._factor = (torch.zeros((), device=device) for _ in range(2))
        self._replay = Replay(device)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's whole state, by name."""
        return {"count": self._count} | {
            f"{part}.{moment}.{index}": each
            for part, (*_, moments) in enumerate(self._parts)
            for moment, row in enumerate(moments)
            for index, each in enumerate(row)
        }

    def step(self, factor: float) -> None:
        """Moves the parameters along their gradients, at `factor` times each learning rate."""
        if self._factor.device.type == "cpu":
            self._move(factor)
        else:
            self._factor.fill_(factor)
            self._replay("move", lambda: self._move(self._factor))

    def _move(self, factor: float | Tensor) -> None:
        self._count += 1
        for rate, parameters, gradients, buffers in self._parts:
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


def _zeros_like(tensors: Sequence[Tensor], times: int) -> list[list[Tensor]]:
    return [[torch.zeros_like(each) for each in tensors] for _ in range(times)]
