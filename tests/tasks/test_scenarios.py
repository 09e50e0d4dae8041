"""Which samples each task of a sequence has."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import sys
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from torch import Tensor

from clnp_search.errors import InputError
from clnp_search.tasks import SCENARIOS, RawData, Task
from clnp_search.tasks.data import load_digits, load_mnist

PERMUTED, SPLIT = SCENARIOS["permuted_digits"], SCENARIOS["split_digits"]


def make_raw(num_train: int = 60, num_test: int = 20) -> RawData:
    """2 x 2 samples that are all different, of ten classes in turn; training samples come first."""
    values = np.arange(num_train + num_test, dtype=np.uint8)
    inputs = np.stack([values, values + 1, values * 2, values * 0 + 7], axis=1).reshape(-1, 2, 2)
    labels = np.arange(num_train + num_test, dtype=np.int64) % 10
    return RawData(inputs[:num_train], labels[:num_train], inputs[num_train:], labels[num_train:], 10, 255.0)


def identities(inputs: Tensor) -> set[int]:
    return set(inputs[:, 0, 0].tolist())


# Splits


@pytest.mark.parametrize("task", [PERMUTED.task(1, 5), SPLIT.task(1, 5)], ids=["permuted", "split"])
def test_validation_and_training_samples_are_the_training_set_once(task: Task) -> None:
    raw = make_raw()
    data = task.data(raw, 5, "unit", seed=0)
    own = raw.train_inputs if task.classes is None else raw.train_inputs[np.isin(raw.train_labels, task.classes)]
    train, validation = identities(data.train.inputs), identities(data.validation.inputs)
    assert not train & validation
    assert train | validation == set(own[:, 0, 0].tolist())
    assert (len(data.validation), len(data.train)) == (5, len(own) - 5)


@pytest.mark.parametrize("task", [PERMUTED.task(1, 5), SPLIT.task(1, 5)], ids=["permuted", "split"])
def test_test_samples_are_never_in_training_or_validation(task: Task) -> None:
    raw = make_raw()
    data = task.data(raw, 5, "unit", seed=0)
    test = identities(data.test.inputs)
    assert test <= set(raw.test_inputs[:, 0, 0].tolist())
    assert not test & (identities(data.train.inputs) | identities(data.validation.inputs))


def test_the_validation_split_is_seeded() -> None:
    task, raw = PERMUTED.task(0, 5), make_raw()
    splits = [task.data(raw, 20, "unit", seed).validation.inputs for seed in (0, 0, 1)]
    assert torch.equal(splits[0], splits[1])
    assert identities(splits[0]) != identities(splits[2])


def test_every_task_of_a_permuted_sequence_holds_out_the_same_samples() -> None:
    raw = make_raw()
    held_out = [PERMUTED.task(index, 5).data(raw, 20, "unit", 0).validation.inputs for index in range(2)]
    assert torch.equal(*held_out)


def test_samples_keep_their_labels() -> None:
    data = PERMUTED.task(0, 5).data(make_raw(), 20, "unit", 0)
    for split in (data.train, data.validation, data.test):
        assert torch.equal(split.labels, split.inputs[:, 0, 0] % 10)


@pytest.mark.parametrize("validation", [0, 60, 100])
def test_a_validation_split_that_leaves_nothing_is_refused_with_the_allowed_sizes(validation: int) -> None:
    with pytest.raises(InputError, match=f"scenario.validation: {validation} samples .* allowed: 1 to 59"):
        PERMUTED.task(0, 5).data(make_raw(), validation, "unit", 0)


# Permuted tasks


def permutation(index: int, seed: int) -> Tensor:
    raw = replace(make_raw(), train_inputs=np.zeros((60, 8, 8), np.uint8))
    found = PERMUTED.task(index, 5).data(raw, 5, "unit", seed).info.transform.permutation
    assert found is not None
    return found


def test_a_permutation_holds_each_feature_once() -> None:
    assert sorted(permutation(3, 0).tolist()) == list(range(64))


def test_permutations_differ_between_tasks_and_between_seeds() -> None:
    found = [permutation(index, seed) for index in range(4) for seed in range(4)]
    assert len({tuple(each.tolist()) for each in found}) == 16


def test_a_permutation_is_the_same_when_asked_for_again() -> None:
    assert torch.equal(permutation(2, 3), permutation(2, 3))


def test_permuted_tasks_keep_all_classes_and_raw_samples_in_order_of_pixels() -> None:
    data = PERMUTED.task(1, 5).data(make_raw(), 5, "unit", 0)
    assert data.info.num_classes == 10
    assert data.info.input_shape == (2, 2)
    assert data.train.inputs.dtype == torch.uint8
    assert (data.train.inputs[:, 1, 1] == 7).all()


def test_permuted_tasks_do_not_depend_on_the_length_of_the_sequence() -> None:
    assert PERMUTED.task(1, 2) == PERMUTED.task(1, 10)


# Split tasks


def test_split_tasks_share_out_the_classes_in_order() -> None:
    assert [SPLIT.task(index, 5).classes for index in range(5)] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert [SPLIT.task(index, 2).classes for index in range(2)] == [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]


def test_split_tasks_count_their_labels_from_zero() -> None:
    data = SPLIT.task(3, 5).data(make_raw(), 3, "unit", 0)
    assert data.info.num_classes == 2
    for split in (data.train, data.validation, data.test):
        assert torch.equal(split.labels, split.inputs[:, 0, 0] % 10 - 6)


def test_labels_follow_the_order_of_the_tasks_classes() -> None:
    data = Task(0, "two", (7, 2)).data(make_raw(), 3, "unit", 0)
    assert torch.equal(data.test.labels, (data.test.inputs[:, 0, 0] % 10 == 2).long())


def test_split_tasks_are_not_permuted() -> None:
    assert SPLIT.task(0, 5).data(make_raw(), 3, "unit", 0).info.transform.permutation is None


# Scaling


def test_unit_scaling_divides_by_the_largest_pixel_value() -> None:
    info = PERMUTED.task(0, 5).data(make_raw(), 5, "unit", 0).info
    assert (info.transform.mean, info.transform.std) == (0.0, 255.0)


@pytest.mark.parametrize("scenario", [PERMUTED, SPLIT], ids=["permuted", "split"])
def test_standard_scaling_is_over_all_training_pixels_and_no_test_pixel(scenario: object) -> None:
    raw = make_raw()
    assert scenario in (PERMUTED, SPLIT)
    task = PERMUTED.task(1, 5) if scenario is PERMUTED else SPLIT.task(1, 5)
    transform = task.data(raw, 5, "standard", 0).info.transform
    assert transform.mean == pytest.approx(raw.train_inputs.mean(), rel=1e-12)
    assert transform.std == pytest.approx(raw.train_inputs.std(), rel=1e-12)


# Data sets


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
    assert raw.mean_and_std == pytest.approx((0.1306604762738429 * 255, 0.30810780717887876 * 255))


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


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_gives_as_many_tasks_as_it_says_by_default(name: str) -> None:
    scenario = SCENARIOS[name]
    tasks = [scenario.task(index, scenario.tasks) for index in range(scenario.tasks)]
    assert [task.index for task in tasks] == list(range(scenario.tasks))
    assert len({task.name for task in tasks}) == scenario.tasks
    assert not scenario.allowed_tasks or scenario.tasks in scenario.allowed_tasks
