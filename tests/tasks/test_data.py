"""The data sets that are known by name."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import pickle
import re
import shutil
import sys
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from builders import make_raw, make_sweep
from PIL import Image

from clnp_search.errors import InputError
from clnp_search.tasks.cifar import load_cifar
from clnp_search.tasks.data import load_digits, load_mnist
from clnp_search.tasks.images import load_torchvision
from clnp_search.tasks.torchvision_sets import train_and_test


def test_a_data_sets_digest_changes_with_any_sample_or_label() -> None:
    raw = make_raw()
    digests = {raw.digest, make_raw().digest}
    for name in ("train_inputs", "train_labels", "test_inputs", "test_labels"):
        array = getattr(raw, name).copy()
        array.flat[-1] += 1
        digests.add(replace(raw, **{name: array}).digest)
    assert len(digests) == 5


def test_the_digits_are_1797_samples_of_which_400_are_for_testing() -> None:
    raw = load_digits(Path("unused"))
    assert raw.train_inputs.shape == (1397, 8, 8)
    assert raw.test_inputs.shape == (400, 8, 8)
    assert (raw.train_inputs.max(), raw.scale) == (16, 16.0)
    assert set(raw.test_labels) == set(range(10))
    # Part of the definition: the seeded shuffle must never change under a run that is resumed.
    assert raw.digest == load_digits(Path("elsewhere")).digest


def test_mnist_is_read_from_the_root_folder(shared_data: Path) -> None:
    raw = load_mnist(shared_data)
    assert (raw.train_inputs.shape, raw.test_inputs.shape) == ((60000, 28, 28), (10000, 28, 28))
    assert raw.train_labels[:5].tolist() == [5, 0, 4, 1, 9]


def test_mnist_is_downloaded_to_the_root_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import MNIST

    served, values = tmp_path / "served", np.arange(20 * 28 * 28).astype(np.uint8).reshape(20, 28, 28)
    served.mkdir()
    digests = []
    for name, array in (
        ("train-images-idx3-ubyte", values),
        ("train-labels-idx1-ubyte", np.arange(20, dtype=np.uint8) % 10),
        ("t10k-images-idx3-ubyte", values[:7]),
        ("t10k-labels-idx1-ubyte", np.arange(7, dtype=np.uint8)),
    ):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        packed = gzip.compress(header + array.tobytes())
        (served / f"{name}.gz").write_bytes(packed)
        digests.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
    handler = partial(SimpleHTTPRequestHandler, directory=str(served))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(MNIST, "resources", digests)
        raw = load_mnist(tmp_path / "root")
        server.shutdown()
    assert np.array_equal(raw.train_inputs, values)
    assert raw.test_labels.tolist() == list(range(7))
    assert load_mnist(tmp_path / "root").digest == raw.digest  # the server has ended: read from the folder


@pytest.mark.parametrize("keep", [0, 3, 100])
def test_a_damaged_mnist_is_refused_with_the_folder(shared_data: Path, tmp_path: Path, keep: int) -> None:
    raw = tmp_path / "MNIST" / "raw"
    shutil.copytree(shared_data / "MNIST" / "raw", raw)
    damaged = raw / "t10k-labels-idx1-ubyte"
    damaged.chmod(0o644)
    damaged.write_bytes(damaged.read_bytes()[:keep])
    with pytest.raises(InputError, match=rf"scenario.root: MNIST under {tmp_path} can be neither read"):
        load_mnist(tmp_path)


def test_an_mnist_that_cannot_be_had_is_refused_with_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match=r"scenario.root: MNIST under .*file can be neither read nor downloaded"):
        load_mnist(tmp_path / "file")


def test_a_torchvision_that_does_not_fit_torch_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)  # its import fails
    with pytest.raises(InputError, match=r"torchvision cannot be imported: .*\n.*uv sync"):
        load_mnist(Path("anywhere"))


# CIFAR


def write_cifar(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Tiny pickles as torchvision's files of both data sets; gives the training images [N, 3, 32, 32]."""
    written = {}
    for name, base, key, classes in (
        ("CIFAR10", "cifar-10-batches-py", "labels", 10),
        ("CIFAR100", "cifar-100-python", "fine_labels", 100),
    ):
        data_set = getattr(importlib.import_module("torchvision.datasets"), name)
        place = folder / base
        place.mkdir(parents=True)
        md5 = {}
        for file, num in (("train", 2 * classes), ("test", classes), ("meta", 0)):
            content: dict[str, Any] = {"data": np.arange(num * 3072).astype(np.uint8).reshape(num, 3072)}
            content |= {key: [index % classes for index in range(num)]}
            content |= {"label_names": list("abcdefghij"), "fine_label_names": [str(label) for label in range(100)]}
            packed = pickle.dumps(content)
            (place / file).write_bytes(packed)
            md5[file] = hashlib.md5(packed).hexdigest()
            if file == "train":
                written[name] = content["data"].reshape(-1, 3, 32, 32)
        monkeypatch.setattr(data_set, "train_list", [["train", md5["train"]]])
        monkeypatch.setattr(data_set, "test_list", [["test", md5["test"]]])
        monkeypatch.setattr(data_set, "meta", data_set.meta | {"filename": "meta", "md5": md5["meta"]})
    return written


def test_cifar_is_read_from_torchvisions_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_cifar(tmp_path, monkeypatch)
    (tmp_path / "cifar10.zip").write_text("not looked at")
    for name, classes in (("CIFAR10", 10), ("CIFAR100", 100)):
        raw = load_cifar(name, tmp_path, 10)
        assert np.array_equal(raw.train_inputs, written[name])
        assert raw.train_labels.tolist() == [*range(classes), *range(classes)]
        assert (raw.test_inputs.shape, raw.num_classes) == ((classes, 3, 32, 32), classes)


def test_split_cifar_is_cifar10_and_then_ten_classes_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch)
    scenario = make_sweep(scenario={"name": "split_cifar", "root": str(tmp_path), "tasks": 11}).load_scenario()
    assert [task.name for task in scenario.tasks[:2]] == ["cifar10", "cifar100-0-9"]
    assert [(len(data.train), len(data.test)) for data in map(scenario.data, range(11))] == [(18, 10)] * 11
    assert scenario.tasks[10].classes == tuple(range(90, 100))


def test_a_cifar_that_cannot_be_had_is_refused_with_what_may_be_put_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(
        InputError, match=r"CIFAR10 under .*\n.*cifar-10-batches-py, or a zip .* named cifar10.zip, there"
    ):
        load_cifar("CIFAR10", tmp_path / "file", 10)


# The published digests of the decoded images, [N, 32, 32, 3], in the order of the zips.
CIFAR_DIGESTS = {
    ("CIFAR10", "train"): "61bea91e73ac2b02dfb856e685981dce64abe13d4e780aa98a1ac1e7c056d03b",
    ("CIFAR10", "test"): "52a9dc125982c0440d5eed87474b2f521e96c45a98df08e4329aa42c692b9d9d",
    ("CIFAR100", "train"): "e5586961f13fbd0672aca25e8bb9c9333e90faa5f5c6d10535b308d64e6dafca",
    ("CIFAR100", "test"): "c140dbbd73f5f7a67b9d57afadacd892141517630f990be4d1bea953db36d531",
}


def test_genuine_cifar_is_read_from_its_zips_to_the_last_bit(shared_data: Path) -> None:
    scenario = make_sweep(scenario={"name": "split_cifar", "root": str(shared_data)}).load_scenario()
    for name, raw, classes in zip(("CIFAR10", "CIFAR100"), scenario.sets, (10, 50), strict=True):
        parts = {"train": (raw.train_inputs, raw.train_labels), "test": (raw.test_inputs, raw.test_labels)}
        for part, (inputs, labels) in parts.items():
            digest = hashlib.sha256(inputs.transpose(0, 2, 3, 1).tobytes()).hexdigest()
            assert digest == CIFAR_DIGESTS[name, part]
            assert labels.tolist() == sorted(labels.tolist())
            assert set(np.bincount(labels)) == {len(labels) // classes}
    assert [len(scenario.data(task).validation) for task in range(6)] == [5000, *[500] * 5]


def test_a_zip_of_too_few_classes_is_refused_before_it_is_decoded(shared_data: Path) -> None:
    with pytest.raises(InputError, match=r"first50.zip has 50 classes, 60 are asked for.* allowed: 1 to 6"):
        load_cifar("CIFAR100", shared_data, 60)


# torchvision's other data sets


class FakeSet:
    """As torchvision's data sets are: pairs of an image and a label."""

    classes = ("cat", "dog", "eel", "fox")

    def __init__(self, root: str, split: str, mode: str = "L", labels: Any = range(4)) -> None:
        assert split in ("train", "test")
        self.items = [(Image.new(mode, (5, 4), 10 * index), label) for index, label in enumerate(labels)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        return self.items[index]


@pytest.fixture
def fake_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("torchvision.datasets"), "SVHN", FakeSet)


@pytest.mark.usefixtures("fake_set")
@pytest.mark.parametrize(("mode", "shape"), [("L", (1, 4, 5)), ("RGB", (3, 4, 5))])
def test_a_torchvision_data_set_is_split_into_tasks(mode: str, shape: tuple[int, ...]) -> None:
    settings = {"name": "torchvision:SVHN", "tasks": 2, "arguments": {"mode": mode}}
    scenario = make_sweep(scenario=settings).load_scenario()
    assert scenario.sets[0].train_inputs.shape == (4, *shape)
    assert scenario.sets[0].train_inputs[:, 0, 0, 0].tolist() == [0, 10, 20, 30]
    assert [(task.name, task.classes) for task in scenario.tasks] == [
        ("classes-cat-dog", (0, 1)),
        ("classes-eel-fox", (2, 3)),
    ]


@pytest.mark.usefixtures("fake_set")
def test_an_argument_that_names_a_part_is_refused() -> None:
    sweep = make_sweep(scenario={"name": "torchvision:SVHN", "tasks": 2, "arguments": {"split": "train"}})
    with pytest.raises(InputError, match=r"scenario.arguments: split: both parts of SVHN are read"):
        sweep.load_scenario()


def test_parts_of_data_sets_that_are_read_as_mnist_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets, asked = importlib.import_module("torchvision.datasets"), []

    class Letters(datasets.MNIST):  # type: ignore[misc, name-defined]
        def __init__(self, root: str, split: str, **others: Any) -> None:  # as EMNIST has them
            asked.append((split, others))
            self.data, self.targets = [], []

    monkeypatch.setattr(datasets, "EMNIST", Letters)
    train_and_test("EMNIST", tmp_path, {"split": "letters"})
    assert asked == [("letters", {"download": True, "train": part}) for part in (True, False)]


@pytest.mark.usefixtures("fake_set")
def test_its_classes_are_named_by_name_or_number() -> None:
    settings = {"name": "torchvision:SVHN", "classes": [["fox", 1], [2, "cat"]]}
    scenario = make_sweep(scenario=settings).load_scenario()
    assert [task.classes for task in scenario.tasks] == [(3, 1), (2, 0)]


@pytest.mark.usefixtures("fake_set")
@pytest.mark.parametrize(
    ("labels", "fault"),
    [
        ([0, 1, 2, 4], "train labels are 0 to 4; allowed: 0 to 3"),
        ([(0, 1)], "SVHN: train sample 0: does not decode: TypeError"),
        ([0.5], "its label is 0.5, not a class number"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: list[Any], fault: str) -> None:
    with pytest.raises(InputError, match=re.escape(fault)):
        load_torchvision("SVHN", Path(), {"labels": labels})


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("FashionMINST", "torchvision has no such data set; did you mean 'FashionMNIST'?"),
        ("Caltech101", "it has no training and test part of its own"),
    ],
)
def test_a_data_set_that_torchvision_does_not_have_is_refused(name: str, fault: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(fault)):
        load_torchvision(name, tmp_path, {})


def test_a_class_without_a_sample_is_in_no_task(tmp_path: Path) -> None:
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "test"):
        for kind, array in (("images-idx3", np.zeros((52, 28, 28), np.uint8)), ("labels-idx1", np.arange(52) % 26 + 1)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (raw / f"emnist-letters-{part}-{kind}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())
    settings = {
        "name": "torchvision:EMNIST",
        "root": str(tmp_path),
        "arguments": {"split": "letters"},
        "validation": 2,
    }
    scenario = make_sweep(scenario={**settings, "tasks": 13}).load_scenario()
    assert [task.name for task in scenario.tasks][::12] == ["classes-a-b", "classes-y-z"]
    assert scenario.data(12).test.labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(InputError, match=r"scenario\.classes: no class N/A; there are: a, b, c"):
        make_sweep(scenario={**settings, "classes": [["N/A", "a"]]}).load_scenario()


def test_arguments_that_a_data_set_does_not_take_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"scenario.arguments: \{\}: EMNIST cannot be made .* argument: 'split'"):
        load_torchvision("EMNIST", tmp_path, {})


def test_torchvisions_mnist_is_one_grey_channel(shared_data: Path) -> None:
    raw, names = load_torchvision("MNIST", shared_data, {})
    assert raw.train_inputs.shape == (60000, 1, 28, 28)
    assert np.array_equal(raw.test_inputs[:, 0], load_mnist(shared_data).test_inputs)
    assert names[1] == "1 - one"
