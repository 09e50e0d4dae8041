"""Data sets as plain arrays. Nothing is loaded or downloaded before it is asked for."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clnp_search.errors import InputError

DIGITS_TEST_SAMPLES = 400


@dataclass(frozen=True)
class RawData:
    """A data set as it is stored: samples [N, ...] in raw pixel values and labels [N] int64.

    Args:
        scale: The largest raw pixel value.
    """

    train_inputs: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_inputs: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    num_classes: int
    scale: float

    @cached_property
    def mean_and_std(self) -> tuple[float, float]:
        """Mean and standard deviation over all values of all training samples."""
        # In chunks, because numpy widens what it counts to eight times the bytes.
        chunks = np.array_split(self.train_inputs.reshape(-1), len(self.train_inputs) // 1000 + 1)
        counts = np.array([np.bincount(chunk, minlength=256) for chunk in chunks]).sum(0).astype(np.float64)
        values = np.arange(len(counts))
        mean = float(counts @ values / counts.sum())
        return mean, float(np.sqrt(counts @ (values - mean) ** 2 / counts.sum()))

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
    from sklearn.datasets import load_digits as load

    bunch = load()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    inputs = bunch.images.astype(np.uint8)[order]
    labels = bunch.target.astype(np.int64)[order]
    cut = len(labels) - DIGITS_TEST_SAMPLES
    return RawData(inputs[:cut], labels[:cut], inputs[cut:], labels[cut:], num_classes=10, scale=16.0)


def load_mnist(root: Path) -> RawData:
    """MNIST (28 x 28, values 0 to 255), read from `root/MNIST/raw` or downloaded to it, by torchvision.

    Raises:
        InputError: It is not there and cannot be downloaded, or is damaged, or torchvision does not fit torch.
    """
    try:
        from torchvision.datasets import MNIST
    except Exception as error:  # a torchvision built for another torch fails in many ways
        raise InputError(
            f"torchvision cannot be imported: {error}\n"
            "Its build does not fit the installed torch; install both in one step, for example `uv sync`."
        ) from error
    try:
        train, test = (MNIST(str(root), train=train, download=True) for train in (True, False))
    except Exception as error:  # torchvision and urllib raise many kinds
        raise InputError(
            f"scenario.root: MNIST under {root} can be neither read nor downloaded: {type(error).__name__}: {error}\n"
            f"Put its four IDX files into {root / 'MNIST' / 'raw'} (a damaged one, deleted, is downloaded again), "
            "or point scenario.root to where it is."
        ) from error
    return RawData(
        train.data.numpy(), train.targets.numpy(), test.data.numpy(), test.targets.numpy(), num_classes=10, scale=255.0
    )
