"""Data sets as plain arrays. Nothing is loaded or downloaded before it is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clnp_search.errors import InputError
from clnp_search.tasks.torchvision_sets import train_and_test

DIGITS_TEST_SAMPLES = 400
MAX_FAULTS_SHOWN = 20


@dataclass(frozen=True)
class RawData:
    """A data set as it is stored: samples [N, ...] in raw pixel values and labels [N] int64.

    Args:
        train_inputs: [N, C, H, W], [N, H, W] or [N, values].
        scale: The largest raw pixel value.
    """

    train_inputs: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_inputs: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    num_classes: int
    scale: float = 255.0

    @property
    def digest(self) -> str:
        """SHA-256 of all samples and labels, of their scale and of the number of classes."""
        sha = hashlib.sha256(f"{self.scale} {self.num_classes}".encode())
        for array in (self.train_inputs, self.train_labels, self.test_inputs, self.test_labels):
            sha.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()


def load_digits(root: Path) -> RawData:
    """The 1,797 handwritten digits (8 x 8, values 0 to 16) that ship inside scikit-learn; `root` is not used.

    The last 400 are the test split, by a seeded shuffle that is part of this definition.
    """
    # Its file alone: to import scikit-learn takes two seconds of every command.
    path = metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = np.loadtxt(str(path), np.uint8, delimiter=",")
    order = np.random.default_rng(0).permutation(len(table))
    inputs, labels = table[order, :-1].reshape(-1, 8, 8), table[order, -1].astype(np.int64)
    cut = len(labels) - DIGITS_TEST_SAMPLES
    return RawData(inputs[:cut], labels[:cut], inputs[cut:], labels[cut:], num_classes=10, scale=16.0)


def load_mnist(root: Path) -> RawData:
    """MNIST (28 x 28, values 0 to 255), read from `root/MNIST/raw` or downloaded to it, by torchvision.

    Raises:
        InputError: It is not there and cannot be downloaded, or is damaged, or torchvision does not fit torch.
    """
    hint = f"Put its four IDX files into {root / 'MNIST' / 'raw'} (a damaged one, deleted, is downloaded again)"
    train, test = train_and_test("MNIST", root, hint=hint)
    return RawData(train.data.numpy(), train.targets.numpy(), test.data.numpy(), test.targets.numpy(), num_classes=10)


def label_faults(raw: RawData) -> Iterator[str]:
    """What is wrong with a data set's labels: out of range, or in one of its two parts alone."""
    train, test = np.unique(raw.train_labels), np.unique(raw.test_labels)
    for name, labels in (("train", train), ("test", test)):
        if len(labels) and not 0 <= labels[0] <= labels[-1] < raw.num_classes:
            yield f"{name} labels are {labels[0]} to {labels[-1]}; allowed: 0 to {raw.num_classes - 1}"
    yield from (f"class {label} is in test but not in train" for label in np.setdiff1d(test, train))
    yield from (f"class {label} is in train but not in test" for label in np.setdiff1d(train, test))


def require(faults: Iterable[str], source: str) -> None:
    """Names the faults of a data set, the first of them and their number, if there are any.

    Raises:
        InputError: There are.
    """
    if found := list(faults):
        listed = "".join(f"\n  {fault}" for fault in found[:MAX_FAULTS_SHOWN])
        more = f"\n  and {len(found) - MAX_FAULTS_SHOWN} more" if len(found) > MAX_FAULTS_SHOWN else ""
        raise InputError(f"scenario: {source} has {len(found)} fault(s){listed}{more}")
