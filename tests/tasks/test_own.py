"""A user's own scenario by import path: their module, their function, and what it may give."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from clnp_search.config import load_sweep
from clnp_search.errors import InputError
from clnp_search.tasks import Scenario
from clnp_search.tasks.own import load_own

Load = Callable[..., Scenario]


@pytest.fixture
def load(tmp_path: Path, request: pytest.FixtureRequest) -> Load:
    """Loads the scenario of a sweep file that lies beside a module of the given source."""

    def loaded(source: str, function: str = "tasks", **scenario: Any) -> Scenario:
        module = f"own_{abs(hash(request.node.name))}"  # each test's own, because modules stay imported
        (tmp_path / f"{module}.py").write_text(source)
        lines = [f"  {key}: {value}" for key, value in {"name": f'"{module}:{function}"', **scenario}.items()]
        sweep = tmp_path / "sweep.yaml"
        sweep.write_text("\n".join(["network: {hidden: [4]}", "scenario:", *lines]))
        return load_sweep(sweep).load_scenario()

    return loaded


@pytest.mark.parametrize("package", ["", "own_things."])
def test_a_module_that_was_edited_or_lies_in_another_folder_is_read_again(tmp_path: Path, package: str) -> None:
    def groups_in(folder: str, units: int) -> dict[str, int]:
        sweep = tmp_path / folder / "sweep.yaml"
        place = sweep.parent / package.strip(".")
        place.mkdir(exist_ok=True, parents=True)
        (place / "unit_counts.py").write_text(f"units = {units}")
        (place / "own_network.py").write_text(NETWORK.format(package=package))
        sweep.write_text(f"scenario: {{name: permuted_digits}}\nnetwork: {{module: '{package}own_network:make'}}")
        return load_sweep(sweep).graph((64,)).groups

    assert [groups_in("one", 4), groups_in("two", 7), groups_in("two", 11), groups_in("one", 4)] == [
        {"0": units} for units in (4, 7, 11, 4)
    ]


NETWORK = """
from torch.nn import Linear, Sequential
from {package}unit_counts import units

def make():
    return Sequential(Linear(64, units), Linear(units, 2))
"""
MODULE = """
from dataclasses import dataclass
import numpy as np

@dataclass
class Stripes:
    name: str
    train_inputs: np.ndarray
    train_labels: np.ndarray
    test_inputs: np.ndarray
    test_labels: np.ndarray
    num_classes: int = 2

def tasks(num=3, width=6):
    for index in range(num):
        labels = np.arange(20) % 2
        inputs = (labels[:, None, None, None] + 10 * index + np.zeros((20, 3, 4, width))).astype("uint8")
        yield Stripes(f"stripes-{index}", inputs, labels, inputs[:10], labels[:10])

def broken():
    raise LookupError("no camera")

def ends():
    raise SystemExit(0)
"""


def make_task(**fields: Any) -> SimpleNamespace:
    values = {
        "name": "task",
        "train_inputs": np.zeros((6, 2, 3, 3), np.uint8),
        "train_labels": [0, 1, 2] * 2,
        "test_inputs": np.zeros((3, 2, 3, 3), np.uint8),
        "test_labels": [2, 1, 0],
        "num_classes": 3,
    }
    return SimpleNamespace(**(values | fields))


given: list[Any] = []


def give() -> list[Any]:
    """What a test put into `given`, as a user's function."""
    return given


def faults(*tasks: Any) -> list[str]:
    """The lines of the message about these tasks, without the headline."""
    given[:] = tasks
    with pytest.raises(InputError) as caught:
        load_own(f"{__name__}:give", (), {}, None)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_a_module_beside_the_sweep_file_gives_the_tasks(load: Load) -> None:
    before = list(sys.path)
    scenario = load(MODULE)
    assert [task.name for task in scenario.tasks] == ["stripes-0", "stripes-1", "stripes-2"]
    assert (scenario.data(2).train.inputs // 10 == 2).all()
    assert scenario.data(1).info.input_shape == (3, 4, 6)
    assert sys.path == before


def test_a_module_in_the_current_folder_gives_the_tasks(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "data.py").write_text(MODULE)
    (tmp_path / "sweeps").mkdir()
    sweep = tmp_path / "sweeps" / "sweep.yaml"
    sweep.write_text("{scenario: {name: 'own_package.data:tasks'}, network: {hidden: [4]}}")
    assert len(load_sweep(sweep).load_scenario()) == 3


def test_a_generator_may_fill_the_same_arrays_for_each_task(load: Load) -> None:
    tasks = "def again():\n    for task in tasks():\n        shared[:] = task.train_inputs\n"
    source = f"{MODULE}\nshared = np.zeros((20, 3, 4, 6), 'uint8')\n{tasks}        task.train_inputs = shared\n"
    scenario = load(f"{source}        yield task\n", "again")
    assert [int(scenario.data(index).train.inputs.max()) // 10 for index in range(3)] == [0, 1, 2]


def test_arguments_are_handed_to_the_function(load: Load) -> None:
    scenario = load(MODULE, arguments="{num: 2, width: 5}", validation="25%")
    assert len(scenario) == 2
    assert scenario.data(0).info.input_shape == (3, 4, 5)
    assert (len(scenario.data(0).validation), len(scenario.data(0).train)) == (5, 15)


def test_the_first_of_its_tasks_can_be_asked_for(load: Load) -> None:
    assert len(load(MODULE, tasks=2)) == 2
    with pytest.raises(InputError, match=r"scenario.tasks: 4; own_\d+:tasks gives 3"):
        load(MODULE, tasks=4)


def test_the_module_may_import_another_one_beside_it_when_it_is_called(load: Load, tmp_path: Path) -> None:
    (tmp_path / "own_neighbour.py").write_text(MODULE)
    assert len(load("def tasks():\n    import own_neighbour\n    return own_neighbour.tasks()")) == 3


def test_what_workers_are_given_needs_nothing_of_the_module(load: Load) -> None:
    scenario = load(MODULE)
    sent = pickle.dumps(scenario)
    assert b"clnp_search.tasks" in sent
    assert b"own_" not in sent
    # A deep copy is put together from the same parts as what Ray sends between its processes.
    assert copy.deepcopy(scenario).data(1).digest == scenario.data(1).digest


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("shape", [(7,), (3, 3), (1, 3, 3)])
def test_arrays_and_tensors_of_images_and_of_flat_samples_are_taken(kind: str, shape: tuple[int, ...]) -> None:
    inputs: Any = np.arange(6, dtype=np.uint8).repeat(np.prod(shape)).reshape(6, *shape)
    labels: Any = np.array([0, 1, 2] * 2, np.int32)
    if kind == "torch":
        inputs, labels = torch.from_numpy(inputs), torch.from_numpy(labels)
    given[:] = [make_task(train_inputs=inputs, train_labels=labels, test_inputs=inputs, test_labels=labels)]
    (raw,), names = load_own(f"{__name__}:give", (), {}, None)
    assert names == ("task",)
    assert raw.train_inputs.reshape(6, -1)[:, 0].tolist() == list(range(6))
    assert raw.test_labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert (raw.train_labels.dtype, raw.scale, raw.num_classes) == (np.int64, 255.0, 3)


# Faults


@pytest.mark.parametrize(
    ("source", "function", "fault"),
    [
        (MODULE, "task", "has no 'task'; did you mean 'tasks'?"),
        (MODULE, "broken", r"calling it raised LookupError: no camera \(.*own_\d+.py, line 21\)"),
        (MODULE, "np.zeros", "calling it raised TypeError"),
        (MODULE, "ends", "calling it raised SystemExit: 0"),
        ("import sys; sys.exit()", "tasks", "importing own_.* raised SystemExit"),
        ("import nowhere_to_be_found", "tasks", "needs 'nowhere_to_be_found', which is not there"),
        ("1 / 0", "tasks", r"raised ZeroDivisionError: division by zero \(.*own_\d+.py, line 1\)"),
        ("def tasks(:", "tasks", "raised SyntaxError"),
        ("def tasks(): return []", "tasks", "it gave no task"),
        ("def tasks(): return 3", "tasks", "calling it raised TypeError"),
        ("tasks = 3", "tasks", "calling it raised TypeError"),
    ],
)
def test_a_function_that_gives_no_tasks_is_refused_with_the_reason(
    load: Load, source: str, function: str, fault: str
) -> None:
    before = list(sys.path)
    with pytest.raises(InputError, match=rf"^scenario.name: 'own_\d+:{function}': .*{fault}"):
        load(source, function)
    assert sys.path == before


def test_a_module_that_is_not_there_is_refused_with_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"'gone.deep:f': no module 'gone', neither in {tmp_path} or / nor installed"):
        load_own("gone.deep:f", (tmp_path, Path("/")), {}, None)


def test_every_fault_of_every_task_is_named_at_once() -> None:
    found = faults(
        make_task(train_inputs=np.zeros((6, 2, 3, 3)), test_labels=[0, 1]),
        make_task(test_inputs=np.zeros((3, 2, 3, 4), np.uint8), train_labels=np.zeros((6, 1), int)),
        SimpleNamespace(name="bare", num_classes=2),
        make_task(train_labels=[0.0] * 6, test_inputs=np.zeros(3, np.uint8)),
    )
    assert found == [
        "task 0: train_inputs is float64; allowed: uint8, raw values 0 to 255",
        "task 0: 2 test_labels for 3 test_inputs",
        "task 1: test_inputs has samples of shape (2, 3, 4), task 0 trains on (2, 3, 3)",
        "task 1: train_labels is int64 of shape (6, 1); allowed: integers [N]",
        "task 2: a SimpleNamespace without train_inputs, train_labels, test_inputs, test_labels; "
        "a task has name, train_inputs, train_labels, test_inputs, test_labels, num_classes",
        "task 3: test_inputs has shape (3,); allowed: [N, C, H, W], [N, H, W] or [N, values]",
        "task 3: train_labels is float64 of shape (6,); allowed: integers [N]",
    ]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_whose_channels_come_last_are_told_apart(channels: int) -> None:
    shape = (8, 9 if channels == 3 else 8, channels)
    photographs = {"train_inputs": np.zeros((6, *shape), np.uint8), "test_inputs": np.zeros((3, *shape), np.uint8)}
    wanted = f"task 0: train_inputs has shape {(6, *shape)}, as [N, H, W, C] would; images are [N, C, H, W]"
    assert wanted in faults(make_task(**photographs))
    narrow = {"train_inputs": np.zeros((6, 64, 3, 3), np.uint8), "test_inputs": np.zeros((3, 64, 3, 3), np.uint8)}
    assert not any("would" in fault for fault in faults(make_task(**narrow), make_task()))


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"train_labels": [0, 1, 2, 3, 0, 0]}, "train labels are 0 to 3; allowed: 0 to 2"),
        ({"test_labels": [-1, 1, 2]}, "test labels are -1 to 2; allowed: 0 to 2"),
        ({"test_labels": [1, 1, 2]}, "class 0 is in train but not in test"),
        ({"train_labels": [0, 0, 1, 1, 0, 1]}, "class 2 is in test but not in train"),
        (
            {"train_labels": np.arange(0), "train_inputs": np.zeros((0, 2, 3, 3), np.uint8)},
            "0 train_labels for 0 train_inputs",
        ),
    ],
)
def test_labels_that_do_not_fit_the_task_are_refused(fields: dict[str, Any], fault: str) -> None:
    assert f"task 1: {fault}" in faults(make_task(), make_task(**fields))
