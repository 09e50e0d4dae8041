"""Which samples and which input transform each task of a sequence has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import make_raw
from torch import Tensor

from clnp_search.errors import InputError
from clnp_search.tasks import SCENARIOS, RawData, Scenario, Task, TaskData, Wanted, kind_of
from clnp_search.tasks.scenarios import Split
from clnp_search.tasks.torchvision_sets import train_and_test

SPLIT = tuple(Task(index, f"classes-{index}", (2 * index, 2 * index + 1)) for index in range(5))
PERMUTED = tuple(Task(index, f"permutation-{index}", permuted=True) for index in range(5))
SEQUENCES = pytest.mark.parametrize("tasks", [PERMUTED, SPLIT], ids=["permuted", "split"])


def make_scenario(tasks: tuple[Task, ...] = PERMUTED, raw: RawData | None = None, **settings: Any) -> Scenario:
    return Scenario((raw or make_raw(),), tasks, **({"validation": 5, "scaling": "unit"} | settings))


def identities(split: Split) -> set[int]:
    return set(split.inputs[:, 0, 0].tolist())


def splits(data: TaskData) -> tuple[Split, Split, Split]:
    return data.train, data.validation, data.test


# Splits


@SEQUENCES
def test_validation_and_training_samples_are_the_training_set_once(tasks: tuple[Task, ...]) -> None:
    data, raw = make_scenario(tasks).data(1), make_raw()
    classes = tasks[1].classes
    own = raw.train_inputs if classes is None else raw.train_inputs[np.isin(raw.train_labels, classes)]
    train, validation = identities(data.train), identities(data.validation)
    assert not train & validation
    assert train | validation == set(own[:, 0, 0].tolist())
    assert (len(data.validation), len(data.train)) == (5, len(own) - 5)


@SEQUENCES
def test_test_samples_are_never_in_training_or_validation(tasks: tuple[Task, ...]) -> None:
    data = make_scenario(tasks).data(1)
    test = identities(data.test)
    assert test <= set(make_raw().test_inputs[:, 0, 0].tolist())
    assert not test & (identities(data.train) | identities(data.validation))


def test_the_validation_split_is_seeded() -> None:
    found = [make_scenario(validation=20, seed=seed).data(0).validation for seed in (0, 0, 1)]
    assert torch.equal(found[0].inputs, found[1].inputs)
    assert identities(found[0]) != identities(found[2])


def test_every_task_of_a_permuted_sequence_holds_out_the_same_samples() -> None:
    scenario = make_scenario(validation=20)
    assert torch.equal(*(scenario.data(index).validation.inputs for index in range(2)))


def test_samples_keep_their_labels() -> None:
    for split in splits(make_scenario().data(0)):
        assert torch.equal(split.labels, split.inputs[:, 0, 0] % 10)


def test_a_validation_share_is_of_each_tasks_own_training_set() -> None:
    tasks = (Task(0, "many", (0, 1, 2, 3)), Task(1, "few", (4,)))
    scenario = make_scenario(tasks, validation=0.25)
    assert [len(scenario.data(index).validation) for index in range(2)] == [6, 2]


@pytest.mark.parametrize("validation", [0, 60, 100, 0.001, 0.999])
def test_a_validation_split_that_leaves_nothing_is_refused_with_the_allowed_sizes(validation: float) -> None:
    with pytest.raises(InputError, match=r"scenario.validation: \d+ samples .* allowed: 1 to 59"):
        make_scenario(validation=validation).data(0)


def test_samples_are_not_copied_before_they_are_asked_for() -> None:
    raw = make_raw()
    for split in splits(make_scenario(raw=raw).data(0)):
        assert split.source is raw.train_inputs or split.source is raw.test_inputs
        assert "inputs" not in vars(split)
        assert split.inputs is split.inputs


# Permuted tasks


def permutation(index: int, seed: int) -> Tensor:
    raw = replace(make_raw(), train_inputs=np.zeros((60, 8, 8), np.uint8))
    found = make_scenario(raw=raw, seed=seed).data(index).info.transform.permutation
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
    data = make_scenario().data(1)
    assert data.info.num_classes == 10
    assert data.info.input_shape == (2, 2)
    assert data.train.inputs.dtype == torch.uint8
    assert (data.train.inputs[:, 1, 1] == 7).all()


# Split tasks


@pytest.mark.parametrize("num_tasks", [5, 2])
def test_split_tasks_share_out_the_classes_in_order(num_tasks: int) -> None:
    wanted = Wanted("split_digits", num_tasks, root=None)  # type: ignore[arg-type]
    digits = {str(label): label for label in range(10)}
    tasks = wanted.shares([*digits], digits)
    assert [label for task in tasks for label in task.classes or ()] == list(range(10))
    assert {len(task.classes or ()) for task in tasks} == {10 // num_tasks}


def test_split_tasks_count_their_labels_from_zero() -> None:
    data = make_scenario(SPLIT).data(3)
    assert data.info.num_classes == 2
    for split in splits(data):
        assert torch.equal(split.labels, split.inputs[:, 0, 0] % 10 - 6)


def test_labels_follow_the_order_of_the_tasks_classes() -> None:
    data = make_scenario((Task(0, "two", (7, 2)),)).data(0)
    assert torch.equal(data.test.labels, (data.test.inputs[:, 0, 0] % 10 == 2).long())


def test_split_tasks_are_not_permuted() -> None:
    assert make_scenario(SPLIT).data(0).info.transform.permutation is None


def test_a_task_selects_from_its_own_data_set() -> None:
    raw = make_raw()
    other = replace(raw, train_inputs=raw.train_inputs + 100, num_classes=10)
    scenario = Scenario((raw, other), (Task(0, "a"), Task(1, "b", (3, 4), source=1)), 5)
    assert min(identities(scenario.data(1).train)) > 100
    assert set(scenario.data(1).train.labels.tolist()) == {0, 1}


# Scaling


def test_unit_scaling_divides_by_the_largest_pixel_value() -> None:
    transform = make_scenario(raw=replace(make_raw(), scale=16.0)).data(0).info.transform
    assert (transform.mean, transform.std) == ((0.0,), (16.0,))


@SEQUENCES
def test_standard_scaling_is_over_the_first_tasks_own_training_split(tasks: tuple[Task, ...]) -> None:
    scenario = make_scenario(tasks, scaling="standard")
    seen = scenario.data(0).train.inputs.double()
    for index in (0, 3):
        transform = scenario.data(index).info.transform
        assert transform.mean == pytest.approx([seen.mean().item()], rel=1e-12)
        assert transform.std == pytest.approx([seen.std(correction=0).item()], rel=1e-12)


def test_scaling_reads_no_validation_sample_no_later_class_and_no_test_sample() -> None:
    raw = make_raw()
    held_out = make_scenario(SPLIT, raw, scaling="standard").data(0).validation.index
    changed = raw.train_inputs.copy()
    changed[held_out] = 255
    changed[raw.train_labels > 1] = 255
    other = replace(raw, train_inputs=changed, test_inputs=raw.test_inputs * 0)
    found = [make_scenario(SPLIT, each, scaling="standard").data(2).info.transform for each in (raw, other)]
    assert found[0] == found[1]


def make_images(channels: int = 3) -> RawData:
    """60 random images [channels, 4, 5], each channel in a range of its own."""
    values = np.random.default_rng(0).integers(0, 50, (60, channels, 4, 5)).astype(np.uint8)
    values += 60 * np.arange(channels, dtype=np.uint8)[:, None, None]
    labels = np.arange(60) % 10
    return RawData(values[:40], labels[:40], values[40:], labels[40:], 10)


def test_standard_scaling_is_for_each_channel() -> None:
    data = make_scenario(raw=make_images(), scaling="standard", tasks=SPLIT, flatten=False, validation=2).data(0)
    values = data.info.transform(data.train.inputs)
    assert values.mean((0, 2, 3)).numpy() == pytest.approx(0, abs=1e-5)
    assert values.std((0, 2, 3), correction=0).numpy() == pytest.approx(1, rel=1e-5)


def test_a_channel_of_one_value_only_becomes_zero() -> None:
    raw = replace(make_raw(), train_inputs=np.full((60, 2, 2), 9, np.uint8))
    data = make_scenario(raw=raw, scaling="standard").data(0)
    assert (data.info.transform(data.train.inputs) == 0).all()


# The input transform


@pytest.mark.parametrize("raw_shape", [(12,), (3, 4), (3, 2, 2)])
def test_a_network_sees_flat_samples_or_images(raw_shape: tuple[int, ...]) -> None:
    inputs = np.zeros((60, *raw_shape), np.uint8)
    raw = RawData(inputs, np.arange(60) % 10, inputs, np.arange(60) % 10, 10)
    found = []
    for flatten in (True, False):
        data = make_scenario(raw=raw, flatten=flatten).data(0)
        assert data.info.input_shape == raw_shape
        found.append(tuple(data.info.transform(data.test.inputs).shape))
    images = {1: (12,), 2: (1, 3, 4), 3: (3, 2, 2)}[len(raw_shape)]
    assert found == [(60, 12), (60, *images)]


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("tasks", [PERMUTED, SPLIT], ids=["permuted", "split"])
def test_a_transform_is_scaling_by_channel_and_then_taking_values_in_order(
    flatten: bool, tasks: tuple[Task, ...]
) -> None:
    data = make_scenario(tasks, make_images(), scaling="standard", flatten=flatten, validation=2).data(1)
    transform, raw = data.info.transform, data.test.inputs
    channels = [
        (raw[:, index].float() - mean) / std
        for index, (mean, std) in enumerate(zip(transform.mean, transform.std, strict=True))
    ]
    expected = torch.stack(channels, 1).flatten(1)
    if transform.permutation is not None:
        expected = expected[:, transform.permutation]
    assert torch.equal(transform(raw).flatten(1), expected)


# The digest


def test_a_tasks_digest_changes_with_any_sample_label_or_setting() -> None:
    raw = make_raw()
    tasks = (Task(0, "a", tuple(range(10))),)
    digests = {make_scenario(tasks, raw).data(0).digest, make_scenario(tasks, make_raw()).data(0).digest}
    for name in ("train_inputs", "test_inputs", "train_labels", "test_labels"):
        array = getattr(raw, name).copy()
        array.flat[3] -= 1
        digests.add(make_scenario(tasks, replace(raw, **{name: array})).data(0).digest)
    for settings in ({"validation": 6}, {"seed": 1}, {"scaling": "standard"}):
        digests.add(make_scenario(tasks, raw, **settings).data(0).digest)
    digests.add(make_scenario(tasks, replace(raw, scale=100.0)).data(0).digest)
    digests.add(make_scenario((replace(tasks[0], permuted=True),), raw).data(0).digest)
    digests.add(make_scenario((replace(tasks[0], classes=tuple(range(10))[::-1]),), raw).data(0).digest)
    assert len(digests) == 11


def test_a_tasks_digest_does_not_depend_on_what_other_tasks_there_are() -> None:
    more = replace(make_raw(), num_classes=12)
    assert make_scenario(SPLIT[:2]).data(1).digest == make_scenario(SPLIT, more).data(1).digest


# Kinds


@pytest.mark.parametrize("name", ["permuted_digits", "split_digits"])
def test_every_scenario_gives_as_many_tasks_as_it_says_by_default(name: str, tmp_path: Any) -> None:
    kind = SCENARIOS[name]
    sets, tasks = kind.load(Wanted(name, kind.tasks, tmp_path))
    assert [task.index for task in tasks] == list(range(kind.tasks or 0))
    assert len({task.name for task in tasks}) == kind.tasks
    assert len(sets) == 1


@pytest.mark.parametrize("name", ["permuted_dogs", "torchvision:", "a:", ":b", "a.:b", "a b:c", "a/b:c", ""])
def test_another_name_is_of_no_kind(name: str) -> None:
    assert kind_of(name) is None


@pytest.mark.parametrize("name", ["torchvision:FashionMNIST", "a:b", "a.b_1:c.d"])
def test_torchvisions_data_sets_and_import_paths_are_kinds(name: str) -> None:
    assert kind_of(name) is not None


def test_a_class_that_a_task_has_twice_under_two_names_is_refused() -> None:
    wanted = Wanted("torchvision:some", 1, Path(), (("cat", "0"),))
    with pytest.raises(InputError, match=r"scenario.classes\[0\]: cat more than once"):
        wanted.shares(("cat", "dog"), {"0": 0, "1": 1, "cat": 0, "dog": 1})


def test_a_part_of_qmnist_is_not_chosen_by_hand(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"scenario\.arguments: what: both parts of QMNIST are read"):
        train_and_test("QMNIST", tmp_path, {"what": "test10k"})
