"""Task sequences made from a data set: the same classes under new permutations, or a few classes at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clnp_search.errors import InputError
from clnp_search.tasks.data import RawData, load_digits, load_mnist

if TYPE_CHECKING:
    from torch import Tensor

    from clnp_search.clnp.state import TaskInfo


@dataclass(frozen=True)
class Split:
    """Raw samples [N, ...] and labels [N] int64, labels from 0 within the task."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, number: int) -> Split:
        """At most so many of its samples."""
        return Split(self.inputs[:number], self.labels[:number])


@dataclass(frozen=True)
class TaskData:
    """One task, ready to train on. Validation samples come from the training set; the test split only reports."""

    info: TaskInfo
    train: Split
    validation: Split
    test: Split


@dataclass(frozen=True)
class Task:
    """What sets one task of a sequence apart.

    Args:
        classes: The raw labels that belong to it, in the order of its own labels; None for all.
        permuted: Whether its input features are shuffled, by the seed and its index.
    """

    index: int
    name: str
    classes: tuple[int, ...] | None = None
    permuted: bool = False

    def data(self, raw: RawData, validation: int, scaling: str, seed: int) -> TaskData:
        """The task's samples.

        Args:
            validation: Samples that are taken out of the training set, by a seeded split.
            scaling: Of the inputs: `standard` (mean 0, deviation 1 over all training pixels) or `unit` (0 to 1).

        Raises:
            InputError: The training set has too few samples for that.
        """
        import torch

        from clnp_search.clnp.seeds import generator
        from clnp_search.clnp.state import InputTransform, TaskInfo

        features = int(np.prod(raw.train_inputs.shape[1:]))
        permutation = None
        if self.permuted:
            permutation = torch.randperm(features, generator=generator(seed, "permutation", self.index))
        classes = self.classes or tuple(range(raw.num_classes))
        train = self._select(raw.train_inputs, raw.train_labels)
        if not 0 < validation < len(train):
            raise InputError(
                f"scenario.validation: {validation} samples cannot be taken from the {len(train)} training samples "
                f"of task {self.index}; allowed: 1 to {len(train) - 1}"
            )
        order = torch.randperm(len(train), generator=generator(seed, "split", len(train)))
        held_out, rest = order[:validation], order[validation:]
        mean, std = raw.mean_and_std if scaling == "standard" else (0.0, raw.scale)
        transform = InputTransform(mean, std, permutation)
        info = TaskInfo(self.name, len(classes), tuple(raw.train_inputs.shape[1:]), transform)
        return TaskData(
            info,
            Split(train.inputs[rest], train.labels[rest]),
            Split(train.inputs[held_out], train.labels[held_out]),
            self._select(raw.test_inputs, raw.test_labels),
        )

    def _select(self, inputs: np.ndarray, labels: np.ndarray) -> Split:
        import torch

        if self.classes is None:
            return Split(torch.from_numpy(inputs), torch.from_numpy(labels))
        kept = np.isin(labels, self.classes)
        position = {label: index for index, label in enumerate(self.classes)}
        own = np.array([position[label] for label in labels[kept]], dtype=np.int64)
        return Split(torch.from_numpy(inputs[kept]), torch.from_numpy(own))


@dataclass(frozen=True)
class Scenario:
    """A family of task sequences over one data set.

    Args:
        load: Reads the data set from a root folder.
        split: Whether each task has some of the classes, instead of all of them under its own permutation.
        validation: Default size of the validation split.
        allowed_tasks: The lengths that a sequence may have; empty for any.
    """

    load: Callable[[Path], RawData]
    split: bool
    tasks: int
    validation: int
    allowed_tasks: tuple[int, ...] = ()

    def task(self, index: int, num_tasks: int) -> Task:
        """Task `index` of a sequence of `num_tasks`."""
        if not self.split:
            return Task(index, f"permutation-{index}", permuted=True)
        per_task = 10 // num_tasks
        classes = tuple(range(index * per_task, (index + 1) * per_task))
        return Task(index, f"classes-{classes[0]}-{classes[-1]}", classes)


SCENARIOS = {
    "permuted_digits": Scenario(load_digits, split=False, tasks=5, validation=300),
    "permuted_mnist": Scenario(load_mnist, split=False, tasks=10, validation=10000),
    "split_digits": Scenario(load_digits, split=True, tasks=5, validation=60, allowed_tasks=(1, 2, 5)),
    "split_mnist": Scenario(load_mnist, split=True, tasks=5, validation=2000, allowed_tasks=(1, 2, 5)),
}
