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
        """SHA-256 of all samples and labels."""
        sha = hashlib.sha256()
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
    """MNIST (28 x 28, values 0 to 255), read from `root/MNIST/raw`; torchvision downloads it to there.

    Raises:
        InputError: It is not there and cannot be downloaded, or a file is damaged, or torchvision does not fit torch.
    """
    folder = root / "MNIST" / "raw"
    names = [f"{split}-{kind}" for split in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    if not all((folder / name).exists() for name in names):
        _download_mnist(root)
    images, labels, test_images, test_labels = (_read_idx(folder / name) for name in names)
    return RawData(
        images, labels.astype(np.int64), test_images, test_labels.astype(np.int64), num_classes=10, scale=255.0
    )


def _download_mnist(root: Path) -> None:
    # torchvision is imported for this alone: its import takes longer than many a training (4 s with 0.29).
    try:
        from torchvision.datasets import MNIST
    except Exception as error:  # a torchvision built for another torch fails in many ways
        raise InputError(
            f"torchvision cannot be imported: {error}\n"
            "Its build does not fit the installed torch; install both in one step, for example `uv sync`."
        ) from error
    try:
        MNIST(str(root), download=True)
    except Exception as error:  # torchvision and urllib raise many kinds
        raise InputError(
            f"scenario.root: MNIST is not under {root} and could not be downloaded: {error}\n"
            f"Put its four IDX files into {root / 'MNIST' / 'raw'}, or point scenario.root to where it is."
        ) from error


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """An IDX file of bytes: magic number 0 0 8 and the number of dimensions, each size as big-endian int32, values."""
    data = np.fromfile(path, np.uint8)
    dimensions = int(data[3]) if len(data) > 4 and bytes(data[:3]) == b"\0\0\x08" else 0
    start = 4 + 4 * dimensions
    shape = tuple(data[4:start].view(">i4").tolist()) if dimensions else ()
    if not dimensions or len(data) - start != np.prod(shape):
        raise InputError(f"scenario.root: {path} is damaged; delete it to have it downloaded again")
    return data[start:].reshape(shape)
