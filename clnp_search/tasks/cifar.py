"""CIFAR-10 and CIFAR-100, from torchvision's files or from zips of class folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clnp_search.errors import InputError
from clnp_search.tasks.data import RawData
from clnp_search.tasks.images import load_class_folders
from clnp_search.tasks.torchvision_sets import train_and_test

# For each data set its number of classes, torchvision's folder, and zips that hold all or the first of its classes.
FILES = {
    "CIFAR10": (10, "cifar-10-batches-py", ("cifar10.zip",)),
    "CIFAR100": (100, "cifar-100-python", ("cifar100.zip", "cifar100-first50.zip")),
}


def load_cifar(name: str, root: Path, num_classes: int) -> RawData:
    """CIFAR-10 or CIFAR-100 as [N, 3, 32, 32]: torchvision's files in `root`, else a zip there, else a download to it.

    From a zip only the first `num_classes` classes are read. Labels are the official ones either way; the order of
    samples is that of the files.

    Args:
        name: `CIFAR10` or `CIFAR100`.

    Raises:
        InputError: It is not there and cannot be downloaded, or is damaged, or has fewer classes.
    """
    all_classes, folder, zips = FILES[name]
    archive = next((root / file for file in zips if (root / file).is_file()), None)
    if (root / folder).is_dir() or archive is None:
        hint = f"Put its folder {folder}, or a zip of class folders named {' or '.join(zips)}, there"
        train, test = train_and_test(name, root, hint=hint)
        return RawData(*_arrays(train), *_arrays(test), num_classes=all_classes)

    def first(names: Sequence[str]) -> range:
        if len(names) < num_classes:
            raise InputError(
                f"scenario.tasks: {archive} has {len(names)} classes, {num_classes} are asked for: at ten a task, "
                f"after CIFAR-10, allowed: 1 to {1 + len(names) // 10}"
            )
        return range(num_classes)

    return load_class_folders(archive, used=first)


def _arrays(part: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    return np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)), np.asarray(part.targets, np.int64)
