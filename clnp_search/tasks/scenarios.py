"""Task sequences: which samples, classes and input transform each task has, and how a scenario's name becomes one."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clnp_search.errors import InputError
from clnp_search.importing import IMPORT_PATH
from clnp_search.tasks.cifar import load_cifar
from clnp_search.tasks.data import RawData, load_digits, load_mnist
from clnp_search.tasks.images import load_class_folders, load_torchvision
from clnp_search.tasks.own import load_own

if TYPE_CHECKING:
    from torch import Tensor

    from clnp_search.clnp.state import TaskInfo

TORCHVISION = "torchvision:"


@dataclass(frozen=True)
class Split:
    """Some samples of a data set.

    Args:
        source: All samples of the set, [all, ...].
        index: [N] which of them, in order.
        labels: [N] int64, from 0 within the task.
    """

    source: NDArray[np.uint8]
    index: NDArray[np.int64]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def inputs(self) -> Tensor:
        """The raw samples [N, ...] uint8, copied out of the set when they are first asked for."""
        import torch

        return torch.from_numpy(self.source[self.index])

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        """The raw samples, a thousand at a time."""
        return (self.source[self.index[start : start + 1000]] for start in range(0, len(self), 1000))

    def first(self, number: int) -> Split:
        """At most so many of its samples."""
        return Split(self.source, self.index[:number], self.labels[:number])


@dataclass(frozen=True)
class TaskData:
    """One task, ready to train on. Validation samples come from the training set; the test split only reports."""

    info: TaskInfo
    train: Split
    validation: Split
    test: Split

    @property
    def digest(self) -> str:
        """SHA-256 of all that this task's networks see: samples in order, labels, and the input transform."""
        transform = self.info.transform
        seen = (self.info.num_classes, transform.mean, transform.std, transform.shape)
        sha = hashlib.sha256(repr(seen).encode())
        if transform.permutation is not None:
            sha.update(transform.permutation.numpy().tobytes())
        for split in (self.train, self.validation, self.test):
            sha.update(repr((len(split), split.source.shape[1:])).encode() + split.labels.numpy().tobytes())
            for chunk in split.chunks():
                sha.update(chunk.tobytes())
        return sha.hexdigest()


@dataclass(frozen=True)
class Task:
    """What sets one task of a sequence apart.

    Args:
        classes: The raw labels that belong to it, in the order of its own labels; None for all.
        permuted: Whether its input values are shuffled, by the seed and its index.
        source: Which of the scenario's data sets it selects from.
    """

    index: int
    name: str
    classes: tuple[int, ...] | None = None
    permuted: bool = False
    source: int = 0


@dataclass(frozen=True)
class Scenario:
    """A sequence of tasks, and the data sets that they select their samples from.

    Args:
        validation: Samples that are taken out of each task's training set, by a seeded split; or, below 1, the share
            of it.
        scaling: Of the inputs: `standard` (each channel's mean 0 and deviation 1 over the first task's training
            split, so that no validation sample and no later task is looked at) or `unit` (0 to 1).
        seed: Of splits and permutations.
        flatten: Whether the network sees flat samples, instead of images.
    """

    sets: tuple[RawData, ...]
    tasks: tuple[Task, ...]
    validation: int | float
    scaling: str = "standard"
    seed: int = 0
    flatten: bool = True

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample as the network sees it: (values,) or (C, H, W)."""
        shape = self.sets[0].train_inputs.shape[1:]
        if self.flatten or len(shape) == 1:
            return (math.prod(shape),)
        return (1, *shape) if len(shape) == 2 else shape

    def num_classes(self, index: int) -> int:
        """Classes of the task at `index`."""
        task = self.tasks[index]
        return self.sets[task.source].num_classes if task.classes is None else len(task.classes)

    def sizes(self, index: int) -> tuple[int, int]:
        """How many samples the task at `index` is trained on, and validated on."""
        train, validation = self._training_splits(self.tasks[index])
        return len(train), len(validation)

    def data(self, index: int) -> TaskData:
        """The task at `index`. Its samples are copied out of the data set when they are asked for.

        Raises:
            InputError: The training set has too few samples for the validation split.
        """
        import torch

        from clnp_search.clnp.seeds import generator
        from clnp_search.clnp.state import InputTransform, TaskInfo

        task = self.tasks[index]
        raw = self.sets[task.source]
        train, validation = self._training_splits(task)
        permutation = None
        if task.permuted:
            values = math.prod(self.input_shape)
            permutation = torch.randperm(values, generator=generator(self.seed, "permutation", index))
        transform = InputTransform(*self._mean_and_std, self.input_shape, permutation)
        info = TaskInfo(task.name, self.num_classes(index), raw.train_inputs.shape[1:], transform)
        return TaskData(info, train, validation, self.test(index))

    def test(self, index: int) -> Split:
        """The test samples of the task at `index` alone."""
        task = self.tasks[index]
        raw = self.sets[task.source]
        return _select(task, raw, raw.test_inputs, raw.test_labels)

    def _training_splits(self, task: Task) -> tuple[Split, Split]:
        import torch

        from clnp_search.clnp.seeds import generator

        raw = self.sets[task.source]
        own = _select(task, raw, raw.train_inputs, raw.train_labels)
        held_out = round(self.validation * len(own)) if self.validation < 1 else int(self.validation)
        if not 0 < held_out < len(own):
            raise InputError(
                f"scenario.validation: {held_out} samples cannot be taken from the {len(own)} training samples "
                f"of task {task.index}; allowed: 1 to {len(own) - 1}"
            )
        order = torch.randperm(len(own), generator=generator(self.seed, "split", len(own)))
        validation, train = (
            Split(own.source, own.index[part.numpy()], own.labels[part])
            for part in (order[:held_out], order[held_out:])
        )
        return train, validation

    @cached_property
    def _mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """What is subtracted from, and what divides, the values of each channel."""
        shape = self.sets[0].train_inputs.shape[1:]
        channels = shape[0] if len(shape) == 3 else 1
        if self.scaling == "unit":
            return (0.0,) * channels, (self.sets[0].scale,) * channels
        counts = np.zeros((channels, 256))
        for chunk in self._training_splits(self.tasks[0])[0].chunks():
            for channel in range(channels):
                values = chunk.reshape(len(chunk), channels, -1)[:, channel]
                counts[channel] += np.bincount(values.reshape(-1), minlength=256)
        levels, total = np.arange(256), counts.sum(1)
        mean = counts @ levels / total
        std = np.sqrt((counts * (levels - mean[:, None]) ** 2).sum(1) / total)
        std[std == 0] = 1.0  # a channel of one value only: it becomes zero
        return tuple(mean.tolist()), tuple(std.tolist())


def _select(task: Task, raw: RawData, inputs: NDArray[np.uint8], labels: NDArray[np.int64]) -> Split:
    import torch

    if task.classes is None:
        return Split(inputs, np.arange(len(labels)), torch.from_numpy(labels.copy()))
    own = np.full(raw.num_classes, -1)
    own[list(task.classes)] = np.arange(len(task.classes))
    index = np.flatnonzero(own[labels] >= 0)
    return Split(inputs, index, torch.from_numpy(own[labels[index]]))


# Kinds of scenarios


@dataclass(frozen=True)
class Wanted:
    """What a sweep file says of its scenario's data.

    Args:
        tasks: How many; None for all that a user's own function gives.
        root: Where the data are.
        classes: The class names of each task, instead of equal shares.
        size: Height and width that images are resized to.
        arguments: Of a user's own function, or of torchvision's data set.
        modules: Folders where a user's own module may lie.
    """

    name: str
    tasks: int | None
    root: Path
    classes: tuple[tuple[str, ...], ...] | None = None
    size: tuple[int, int] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[Path, ...] = (Path(),)

    def shares(self, names: Sequence[str], known: Mapping[str, int]) -> tuple[Task, ...]:
        """The tasks that the classes make: those of each list, or equal shares in order.

        Args:
            names: Of all classes, by label.
            known: The label of each name that a list may hold; equal shares have each of these labels once.

        Raises:
            InputError: A list has a class that there is not, or the classes cannot be shared out evenly.
        """
        assert self.tasks is not None
        labels = sorted({*known.values()})
        if self.classes is None:
            if len(labels) % self.tasks:
                allowed = ", ".join(str(tasks) for tasks in range(1, len(labels) + 1) if len(labels) % tasks == 0)
                raise InputError(
                    f"scenario.tasks: {self.tasks} tasks cannot share {len(labels)} classes evenly; "
                    f"allowed: {allowed}, or scenario.classes: a list of classes for each task"
                )
            each = len(labels) // self.tasks
            lists = [tuple(labels[task * each : (task + 1) * each]) for task in range(self.tasks)]
        else:
            unknown = [name for classes in self.classes for name in classes if name not in known]
            if unknown:
                there = ", ".join(names[label] for label in labels)
                raise InputError(f"scenario.classes: no class {', '.join(unknown)}; there are: {there}")
            lists = [tuple(known[name] for name in classes) for classes in self.classes[: self.tasks]]
            for index, share in enumerate(lists):
                if twice := sorted({names[label] for label in share if share.count(label) > 1}):
                    raise InputError(f"scenario.classes[{index}]: {', '.join(twice)} more than once")
        return tuple(
            Task(index, f"classes-{names[classes[0]]}-{names[classes[-1]]}", classes)
            for index, classes in enumerate(lists)
        )


Loaded = tuple[tuple[RawData, ...], tuple[Task, ...]]


@dataclass(frozen=True)
class Kind:
    """A kind of scenario, as a sweep file may ask for it.

    Args:
        load: Reads the data sets and makes the tasks.
        tasks: Default number of tasks; None for all.
        validation: Default size of the validation split; below 1 a share.
        allowed_tasks: The lengths that a sequence may have; empty for any.
        keys: What it takes of `classes`, `size` and `arguments`.
        permuted: Whether tasks are permutations of the same data.
        extensible: Whether a longer sequence begins with the same tasks.
    """

    load: Callable[[Wanted], Loaded]
    tasks: int | None
    validation: int | float
    allowed_tasks: tuple[int, ...] = ()
    keys: tuple[str, ...] = ()
    permuted: bool = False
    extensible: bool = False


def _permuted(load: Callable[[Path], RawData]) -> Callable[[Wanted], Loaded]:
    def loaded(wanted: Wanted) -> Loaded:
        tasks = (Task(index, f"permutation-{index}", permuted=True) for index in range(wanted.tasks or 0))
        return (load(wanted.root),), tuple(tasks)

    return loaded


def _split(load: Callable[[Path], RawData]) -> Callable[[Wanted], Loaded]:
    def loaded(wanted: Wanted) -> Loaded:
        digits = {str(label): label for label in range(10)}
        return (load(wanted.root),), wanted.shares([*digits], digits)

    return loaded


def _split_cifar(wanted: Wanted) -> Loaded:
    """CIFAR-10, then CIFAR-100 ten classes at a time."""
    more = (wanted.tasks or 0) - 1
    sets = [load_cifar("CIFAR10", wanted.root, 10)]
    tasks = [Task(0, "cifar10")]
    if more:
        sets.append(load_cifar("CIFAR100", wanted.root, 10 * more))
    for start in range(0, 10 * more, 10):
        classes = tuple(range(start, start + 10))
        tasks.append(Task(len(tasks), f"cifar100-{start}-{start + 9}", classes, source=1))
    return tuple(sets), tuple(tasks)


def _class_folders(wanted: Wanted) -> Loaded:
    tasks: tuple[Task, ...] = ()

    def used(names: Sequence[str]) -> set[int]:
        nonlocal tasks
        tasks = wanted.shares(names, {name: label for label, name in enumerate(names)})
        return {label for task in tasks for label in task.classes or ()}

    return (load_class_folders(wanted.root, wanted.size, used),), tasks


def _torchvision(wanted: Wanted) -> Loaded:
    raw, names = load_torchvision(wanted.name.removeprefix(TORCHVISION), wanted.root, wanted.arguments, wanted.size)
    labels = np.unique(raw.train_labels).tolist()  # of EMNIST's letters, the first name has no sample
    known = {str(label): label for label in labels} | {names[label]: label for label in labels}
    return (raw,), wanted.shares(names, known)


def _own(wanted: Wanted) -> Loaded:
    sets, names = load_own(wanted.name, wanted.modules, wanted.arguments, wanted.tasks)
    return sets, tuple(Task(index, name, source=index) for index, name in enumerate(names))


SCENARIOS = {
    "permuted_digits": Kind(_permuted(load_digits), 5, 300, permuted=True, extensible=True),
    "permuted_mnist": Kind(_permuted(load_mnist), 10, 10000, permuted=True, extensible=True),
    "split_digits": Kind(_split(load_digits), 5, 60, allowed_tasks=(1, 2, 5)),
    "split_mnist": Kind(_split(load_mnist), 5, 2000, allowed_tasks=(1, 2, 5)),
    "split_cifar": Kind(_split_cifar, 6, 0.1, allowed_tasks=tuple(range(1, 12)), extensible=True),
    "class_folders": Kind(_class_folders, 5, 0.1, keys=("classes", "size")),
}
OTHER_SCENARIOS = {
    re.compile(rf"{TORCHVISION}\w+"): Kind(_torchvision, 5, 0.1, keys=("classes", "size", "arguments")),
    re.compile(IMPORT_PATH): Kind(_own, None, 0.1, keys=("arguments",), extensible=True),
}


def kind_of(name: str) -> Kind | None:
    """The kind of the scenario of that name, if there is one."""
    if name in SCENARIOS:
        return SCENARIOS[name]
    return next((kind for pattern, kind in OTHER_SCENARIOS.items() if pattern.fullmatch(name)), None)
