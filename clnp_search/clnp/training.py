"""A pack's training: cross-entropy plus L1 on free weights, epoch by epoch, with exact checkpoints."""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from clnp_search.clnp.optimizers import Optimizer
from clnp_search.clnp.pack import L1, Features, Pack
from clnp_search.clnp.seeds import generator
from clnp_search.clnp.state import read_safetensors
from clnp_search.records import Epoch

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrainingSettings:
    """How every point of a sweep is trained.

    Args:
        optimizer: `adam`, `adamw` or `sgd`; a new one for every task.
        schedule: `constant`, or `cosine` from the learning rate to zero, step by step.
        precision: Of the matrix products: `float32`; `tf32` (on GPUs that have it, else float32); `bf16`, with
            parameters, gradients' sums and the optimizer in float32.
        l1: `subgradient` (the paper's) or `proximal`.
        l1_scales: What multiplies alpha for the scales of normalisation layers.
        compensate: Whether pruning folds what it takes away on average into biases that are still free.
    """

    epochs: int = 12
    batch_size: int = 256
    optimizer: str = "adam"
    schedule: str = "cosine"
    weight_decay: float = 0.0
    momentum: float = 0.9
    precision: str = "float32"
    l1: str = "subgradient"
    l1_scales: float = 1.0
    compensate: bool = False

    @property
    def penalty(self) -> L1:
        """How the L1 penalty acts."""
        return L1(self.l1 == "proximal", self.l1_scales)

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products."""
        return DTYPES[self.precision]


def set_precision(precision: str) -> None:
    """Sets up this process's products in float32, exact or as `tf32`; the same work then gives the same bits."""
    tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.deterministic = True


@contextmanager
def kept_memory() -> Iterator[None]:
    """Inside, this process keeps memory that was freed: a step frees what the next one asks for again.

    glibc would give large blocks back to the system, and clearing fresh pages takes a seventh of a step of resnet18.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another C library
        yield
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # as malloc.h numbers them
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
    try:
        yield
    finally:  # as it is by default after large blocks were freed
        mallopt(mmap_max, 1 << 16)
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 64 << 20)


class Training:
    """The training of a pack; `epoch` counts the finished epochs.

    Args:
        pack: The points.
        learning_rates: One for each point.
        train: The training split.
        validation: The validation split.
        seed: Of the data order, which all points share.
        task: Names the random stream, beside the seed.
    """

    def __init__(
        self,
        pack: Pack,
        learning_rates: list[float],
        train: Features,
        validation: Features,
        settings: TrainingSettings,
        seed: int,
        task: int | str,
    ) -> None:
        self.epoch = 0
        self.history: list[list[Epoch]] = []
        self.validation = validation
        self._pack, self._train, self._settings = pack, train, settings
        self._learning_rates = learning_rates
        self._seed, self._task = seed, task
        self._steps_per_epoch = math.ceil(len(train) / settings.batch_size)
        self._optimizer = Optimizer(
            pack.parts(learning_rates), settings.optimizer, settings.weight_decay, settings.momentum
        )

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self._settings.epochs

    @kept_memory()
    def run_epoch(self) -> list[Epoch]:
        """Trains one epoch and gives what was seen at its end, for each point."""
        order = torch.randperm(len(self._train), generator=generator(self._seed, "order", self._task, self.epoch))
        losses = torch.zeros(self._pack.num_points, device=self._pack.device)
        noise = generator(self._seed, "noise", self._task, self.epoch).initial_seed()
        factor, regulariser = 1.0, self._pack.regulariser
        for step, index in enumerate(order.to(self._pack.device).split(self._settings.batch_size)):
            factor = self._factor(self.epoch * self._steps_per_epoch + step)
            losses += self._pack.train_batch(self._train, index, seed=noise + (step << 8))  # a batch may have parts
            self._optimizer.step(factor)
            self._pack.shrink([rate * factor for rate in self._learning_rates])
            if regulariser is not None:
                self._pack.replay("stepped", regulariser.stepped)
        if regulariser is not None:
            regulariser.ended(self.epoch + 1, self._settings.epochs)
        accuracies = [correct / len(self.validation) for correct in self._pack.num_correct(self.validation)]
        rows = zip(self._learning_rates, losses.tolist(), accuracies, strict=True)
        seen = [Epoch(self.epoch, rate * factor, loss / len(self._train), value) for rate, loss, value in rows]
        self.epoch += 1
        self.history.append(seen)
        return seen

    def to_bytes(self) -> bytes:
        """A checkpoint from which `restore` goes on to the same bits."""
        history = [[asdict(seen) for seen in epoch] for epoch in self.history]
        header = {"of": self._identity, "epoch": self.epoch, "history": history}
        return safetensors.torch.save(self._tensors, {"training": json.dumps(header)})

    def restore(self, data: bytes) -> None:
        """Goes back to where `to_bytes` was called.

        Raises:
            ValueError: The bytes are no checkpoint of this pack; nothing was changed.
        """
        current = self._tensors
        try:
            header, tensors = read_safetensors(data, "training")
            history = [[Epoch(**seen) for seen in epoch] for epoch in header["history"]]
            if header["of"] != self._identity or header["epoch"] != len(history):
                raise ValueError("it is of other points or settings")
            if {name: each.shape for name, each in tensors.items()} != {
                name: each.shape for name, each in current.items()
            }:
                raise ValueError("its tensors have other names or shapes")
        except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"not a checkpoint of this pack: {error}") from error
        for name, tensor in tensors.items():
            current[name].copy_(tensor)
        self.epoch, self.history = header["epoch"], history

    @property
    def _identity(self) -> dict[str, Any]:
        """What tells this pack's checkpoints from others', as JSON gives it back."""
        return {
            "learning_rates": self._learning_rates,
            "settings": asdict(self._settings),
            "seed": self._seed,
            "task": self._task,
        }

    @property
    def _tensors(self) -> dict[str, Tensor]:
        """All that training changes."""
        parameters = {f"pack.{name}": tensor.detach() for name, tensor in self._pack.tensors.items()}
        return parameters | {f"optimizer.{name}": tensor for name, tensor in self._optimizer.tensors.items()}

    def _factor(self, step: int) -> float:
        """The share of the learning rate at a step."""
        if self._settings.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * step / (self._settings.epochs * self._steps_per_epoch)))
