"""A user's own scenario: what their function gives, and how it is checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from clnp_search.errors import InputError
from clnp_search.importing import described, imported
from clnp_search.tasks.data import RawData, label_faults, require

ARRAYS = ("train_inputs", "train_labels", "test_inputs", "test_labels")


class OwnTask(Protocol):
    """One task of a user's own scenario; the function that a sweep names returns a sequence of such objects.

    Any object with these attributes will do. Arrays are numpy arrays or torch tensors on the CPU:

    - inputs: uint8 raw values 0 to 255, of equal sample shape in all tasks: images [N, C, H, W], grey images
      [N, H, W], or flat samples [N, values];
    - labels: integers [N], 0 to `num_classes` - 1 within the task; those of the test are in training too.
    """

    name: str
    train_inputs: Any
    train_labels: Any
    test_inputs: Any
    test_labels: Any
    num_classes: int


def load_own(
    path: str, modules: Sequence[Path], arguments: Mapping[str, Any], tasks: int | None
) -> tuple[tuple[RawData, ...], tuple[str, ...]]:
    """The data and the name of each task that the function at an import path gives.

    Args:
        path: `package.module:function`.
        modules: The folders where its module may lie, if it is not installed.
        arguments: What it is called with, by name.
        tasks: How many of its tasks are wanted; None for all.

    Raises:
        InputError: There is no such function, it fails, or what it gives has faults; names them all.
    """
    key = f"scenario.name: {path!r}"
    with imported("scenario.name", path, modules) as function:
        try:
            found = function(**arguments)
            keep = _kept if isinstance(found, Iterator) else lambda task: task
            given: list[OwnTask] = [keep(task) for task in islice(found, tasks)]
        except (Exception, SystemExit) as error:  # a user's function may raise anything
            raise InputError(f"{key}: calling it raised {described(error)}") from error
    if not given:
        raise InputError(f"{key}: it gave no task")
    if tasks is not None and tasks > len(given):
        raise InputError(f"scenario.tasks: {tasks}; {path} gives {len(given)}")
    require((fault for index, task in enumerate(given) for fault in _faults(index, task, given[0])), path)
    raw = tuple(
        RawData(
            np.ascontiguousarray(task.train_inputs),
            np.asarray(task.train_labels).astype(np.int64),
            np.ascontiguousarray(task.test_inputs),
            np.asarray(task.test_labels).astype(np.int64),
            int(task.num_classes),
        )
        for task in given
    )
    require((f"task {index}: {fault}" for index, each in enumerate(raw) for fault in label_faults(each)), path)
    return raw, tuple(str(task.name) for task in given)


def _kept(task: OwnTask) -> OwnTask:
    """A task with arrays of its own: a generator may fill the same ones again for the next task."""
    try:
        values = {name: getattr(task, name) for name in OwnTask.__annotations__}
        return SimpleNamespace(**values | {name: np.array(values[name]) for name in ARRAYS})
    except Exception:  # what it lacks is said of all tasks at once
        return task


def _faults(index: int, task: OwnTask, first: OwnTask) -> Iterator[str]:
    """What keeps a task from being read at all."""
    where = f"task {index}"
    needed = OwnTask.__annotations__
    if missing := [name for name in needed if not hasattr(task, name)]:
        yield f"{where}: a {type(task).__name__} without {', '.join(missing)}; a task has {', '.join(needed)}"
        return
    arrays: dict[str, NDArray[Any]] = {}
    for name in ARRAYS:
        try:
            arrays[name] = np.asarray(getattr(task, name))
        except Exception as error:  # rows of unequal lengths, tensors of a GPU: numpy and torch raise many kinds
            yield f"{where}: {name} is no array: {error}"
    if len(arrays) < len(ARRAYS):
        return
    try:
        shape = np.shape(first.train_inputs)[1:]
    except Exception:  # that it is no array, the first task's own fault says
        return
    for name in ("train_inputs", "test_inputs"):
        array = arrays[name]
        if array.dtype != np.uint8:
            yield f"{where}: {name} is {array.dtype}; allowed: uint8, raw values 0 to 255"
        if not 2 <= array.ndim <= 4 or 0 in array.shape[1:]:
            yield f"{where}: {name} has shape {array.shape}; allowed: [N, C, H, W], [N, H, W] or [N, values]"
        elif array.ndim == 4 and _has_channels_last(*array.shape[1:]):
            yield f"{where}: {name} has shape {array.shape}, as [N, H, W, C] would; images are [N, C, H, W]"
        elif array.shape[1:] != shape:
            yield f"{where}: {name} has samples of shape {array.shape[1:]}, task 0 trains on {shape}"
    for split in ("train", "test"):
        inputs, labels = arrays[f"{split}_inputs"], arrays[f"{split}_labels"]
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            yield f"{where}: {split}_labels is {labels.dtype} of shape {labels.shape}; allowed: integers [N]"
        elif inputs.ndim and not len(labels) == len(inputs) > 0:
            yield f"{where}: {len(labels)} {split}_labels for {len(inputs)} {split}_inputs"
    classes, most = task.num_classes, arrays["train_labels"].size
    if isinstance(classes, bool) or not isinstance(classes, int | np.integer) or not 1 <= classes <= most:
        yield f"{where}: num_classes is {classes!r:.80}; allowed: 1 to {most}, the number of training samples"


def _has_channels_last(height: int, width: int, channels: int) -> bool:
    """Whether a sample's shape is that of an image whose channels come last; few signals are as wide as long."""
    return min(height, width) > channels and (channels == 3 or (channels in (1, 4) and height == width))
