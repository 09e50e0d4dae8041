"""Baselines task after task, in this process: what they forget, how they are chosen, resumed and verified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_record
from in_process import SWEEP, make, run_in_process

from clnp_search.agreement import check_sweep
from clnp_search.api import load
from clnp_search.branching import fork, points_taken_over, reselect
from clnp_search.clnp.subnetwork import Subnetwork
from clnp_search.config import Sweep, network_state, overridden, parse_sweep
from clnp_search.errors import InputError
from clnp_search.listener import Listener
from clnp_search.records import Point, PointRecord, Summary
from clnp_search.report.figures import draw_run
from clnp_search.search.points import point_key
from clnp_search.search.proposals import first_points
from clnp_search.selection import best_mean
from clnp_search.sequence import TaskSequence
from clnp_search.storage import RunFolder, run_folder
from clnp_search.verification import verify

METHODS = ["single_task", "finetune", "joint", "ewc", "si", "packnet"]
SPLIT: dict[str, Any] = {
    "scenario": {"name": "split_digits", "tasks": 5},
    "network": {"hidden": [40, 30]},
    "head": {"kind": "multi"},
    "training": {"epochs": 6, "batch_size": 32},
    "search": {"learning_rate": [0.005]},
}
PERMUTED: dict[str, Any] = {"head": {"kind": "single"}, "search": {"learning_rate": [0.02, 0.01]}}


def sweep_of_method(method: str, sections: dict[str, Any] = PERMUTED, strength: str = "") -> Sweep:
    return overridden(make(**sections), [f"method={method}", *([f"search.strength={strength}"] if strength else [])])


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[RunFolder, Summary]]:
    """The finished run of a method on split digits, by name."""
    storage, runs = str(tmp_path_factory.mktemp("split")), dict[str, tuple[RunFolder, Summary]]()

    def run(method: str) -> tuple[RunFolder, Summary]:
        if method not in runs:
            folder = run_folder(storage, method)
            runs[method] = folder, run_in_process(sweep_of_method(method, SPLIT), folder)
        return runs[method]

    return run


def test_finetuning_forgets_what_others_keep(split: Callable[[str], tuple[RunFolder, Summary]]) -> None:
    found = {method: split(method)[1] for method in METHODS}
    assert found["finetune"].average_forgetting > 0.05
    for method in ("single_task", "packnet"):
        assert found[method].max_forgetting == 0.0
    for method in ("joint", "ewc", "packnet", "single_task"):
        assert found[method].average_forgetting < found["finetune"].average_forgetting
        assert found[method].average_test_accuracy > found["finetune"].average_test_accuracy
    assert found["joint"].average_test_accuracy > 0.95


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_run_passes_all_its_checks(method: str, split: Callable[[str], tuple[RunFolder, Summary]]) -> None:
    folder, summary = split(method)
    checks = verify(folder)
    assert [check for check in checks if not check.passed] == []
    (claim,) = (check.detail for check in checks if check.name == "zero forgetting")
    assert claim.startswith("not claimed") == (method in ("finetune", "joint", "ewc", "si"))
    assert summary.status == "complete"
    assert summary.forward_transfer is None  # a head of its own is not there before its task
    assert [len(task.test_accuracies) for task in summary.tasks] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("method", METHODS)
def test_a_fork_with_the_same_settings_takes_over_all_points(
    method: str, split: Callable[[str], tuple[RunFolder, Summary]], tmp_path: Path
) -> None:
    origin, summary = split(method)
    sweep, forked = sweep_of_method(method, SPLIT), run_folder(str(tmp_path), "forked")
    fork(origin, sweep, 0, forked)
    assert run_in_process(sweep, forked).state_digest == summary.state_digest
    taken, trained = points_taken_over(forked)
    assert taken > 0 == trained
    assert [check for check in verify(forked) if not check.passed] == []


@pytest.mark.parametrize("method", ["finetune", "single_task"])
def test_the_matrix_is_that_of_the_networks_as_they_were(
    method: str, split: Callable[[str], tuple[RunFolder, Summary]]
) -> None:
    folder, summary = split(method)
    sequence = TaskSequence(sweep_of_method(method, SPLIT))
    for result in summary.tasks:
        for task, accuracy in enumerate(result.test_accuracies):
            state = folder.read_state(task if method == "single_task" else result.index)
            test = sequence.data(task).test
            assert Subnetwork(state, task).accuracy(test.inputs, test.labels) == accuracy
    now = summary.tasks[-1].test_accuracies
    for task, accuracy in enumerate(now):
        test, network = sequence.data(task).test, load(folder.uri).subnetwork(task)
        assert network.accuracy(test.inputs, test.labels) == accuracy


def test_a_changed_result_fails_the_checks(tmp_path: Path) -> None:
    folder, sweep = run_folder(str(tmp_path), "run"), sweep_of_method("ewc")
    summary = run_in_process(sweep, folder)
    last = summary.tasks[-1]
    folder.write_result(replace(last, test_accuracies=(last.test_accuracies[0] + 0.1, last.test_accuracies[1])))
    failed = {check.name for check in verify(folder) if not check.passed}
    assert failed == {"subnetworks of all tasks so far", "summary follows from the results"}
    folder.write_result(replace(last, accuracy_before=0.9))
    assert "state follows from the choice" in {check.name for check in verify(folder) if not check.passed}


class Killed(Exception):  # noqa: N818 - as it is not an error
    pass


class Kills(Listener):
    """Ends a run at its n-th event."""

    def __init__(self, after: int) -> None:
        self.left = after

    def task_planned(self, *arguments: Any) -> None:
        self._count()

    def points_finished(self, *arguments: Any) -> None:
        self._count()

    def committed(self, *arguments: Any) -> None:
        self._count()

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_killed_anywhere_ends_with_the_same_digest(method: str, tmp_path: Path) -> None:
    sweep = sweep_of_method(method)
    whole = run_in_process(sweep, run_folder(str(tmp_path), "whole"))
    for events in range(0, 6, 2 if method == "si" else 3):
        folder = run_folder(str(tmp_path), f"killed-{events}")
        with pytest.raises(Killed):
            run_in_process(sweep, folder, [Kills(events)])
        assert run_in_process(sweep, folder).state_digest == whole.state_digest
    assert all(check.passed for check in verify(run_folder(str(tmp_path), "killed-0")))


def test_all_methods_start_their_first_task_alike_but_for_what_they_prune(tmp_path: Path) -> None:
    digests = set()
    for method in ("finetune", "single_task", "joint", "si", "ewc"):
        folder = run_folder(str(tmp_path), method)
        sweep = sweep_of_method(method, PERMUTED | {"scenario": {"tasks": 1}, "search": {"learning_rate": [0.02]}})
        run_in_process(sweep, folder)
        digests.add(folder.read_results()[0].digest)
    assert len(digests) == 1


@pytest.mark.parametrize("method", ["finetune", "joint"])
def test_forward_transfer_of_a_shared_head_is_against_the_untrained_network(method: str, tmp_path: Path) -> None:
    folder, sweep = run_folder(str(tmp_path), "run"), sweep_of_method(method)
    summary = run_in_process(sweep, folder)
    second, test = summary.tasks[1], TaskSequence(sweep).data(1).test
    state = folder.read_state(0)
    ahead = replace(state, tasks=(TaskSequence(sweep).data(1).info,))
    assert second.accuracy_before == Subnetwork(ahead, 0).accuracy(test.inputs, test.labels)
    assert second.accuracy_untrained is not None
    assert second.accuracy_untrained < 0.3
    assert summary.forward_transfer == second.accuracy_before - second.accuracy_untrained


def test_a_run_draws_its_figures_and_a_table_of_points(tmp_path: Path) -> None:
    folder = run_folder(str(tmp_path), "run")
    draw_run(folder, run_in_process(sweep_of_method("ewc", strength="[5, 50]"), folder))
    assert any(path.endswith("accuracy.png") for path in folder.figures())
    run = load(folder.uri)
    assert run.points.alpha.loc[0].tolist() == [(5.0,), (5.0,), (50.0,), (50.0,)]
    assert run.points.selected.groupby("task").sum().tolist() == [1, 1]
    assert run.tasks.theta.tolist() == [(), ()]


def test_a_choice_is_not_made_again(tmp_path: Path) -> None:
    folder, sweep = run_folder(str(tmp_path), "run"), sweep_of_method("finetune")
    run_in_process(sweep, folder)
    with pytest.raises(InputError, match="method finetune prunes by no margin"):
        reselect(folder, sweep, 0, sweep.forgetting)


def test_a_joint_run_has_another_key_with_other_earlier_data(tmp_path: Path) -> None:
    joint, other = (TaskSequence(sweep_of_method("joint", PERMUTED | {"scenario": {"tasks": 2}})) for _ in range(2))
    assert joint.data_digest(1) == other.data_digest(1)
    assert joint.data_digest(1) != TaskSequence(sweep_of_method("finetune")).data_digest(1)


# The choice


def record_of(index: int, accuracies: tuple[float, ...], strength: float = 1.0, **fields: Any) -> PointRecord:
    point = Point(index, (strength,), 0.01)
    return make_record(
        index,
        round(100 * sum(accuracies)),
        100 * max(1, len(accuracies)),
        point=point,
        val_accuracies=accuracies,
        **fields,
    )


def test_the_choice_is_by_the_mean_over_all_tasks() -> None:
    last_is_best, mean_is_best = record_of(0, (0.5, 1.0)), record_of(1, (0.8, 0.8))
    choice = best_mean([last_is_best, mean_is_best])
    assert (choice.chosen, choice.best_val_accuracy, choice.candidates) == (1, 0.8, (1,))
    assert "80.0000%, 80.0000%" in choice.reasons[1]


def test_ties_go_to_the_smaller_strength_and_failures_are_left_out() -> None:
    records = [record_of(0, (0.7, 0.7), 2.0), record_of(1, (0.6, 0.8), 1.0), record_of(2, (), status="failed")]
    choice = best_mean(records)
    assert (choice.chosen, choice.candidates) == (1, (0, 1))
    with pytest.raises(RuntimeError, match="every grid point of this task failed"):
        best_mean(records[2:])


# Settings


def test_a_grid_is_strength_by_learning_rate() -> None:
    sweep = sweep_of_method("si", strength="[0.1, 1]")
    points = first_points(sweep, 0, None, ("hidden0", "hidden1", "head"))
    assert [(point.alpha, point.learning_rate) for point in points] == [
        ((0.1,), 0.02),
        ((0.1,), 0.01),
        ((1.0,), 0.02),
        ((1.0,), 0.01),
    ]
    assert len(first_points(sweep_of_method("joint"), 0, None, ())) == 2
    assert sweep.num_points == 4
    assert SWEEP.num_points == len(first_points(SWEEP, 0, None, SWEEP.network.layer_names))


def test_what_clnp_is_planned_with_is_as_it_was_without_methods() -> None:
    assert "method" not in SWEEP.settings
    assert not any("strength" in key for key in SWEEP.settings)
    settings = sweep_of_method("ewc", strength="3").settings
    assert settings["method"] == "ewc"
    assert settings["search.strength"] == [3.0]
    assert not any(key.startswith("forgetting") or key == "search.alpha" for key in settings)


@pytest.mark.parametrize("method", ["finetune", "joint"])
def test_later_tasks_of_a_baseline_with_one_head_are_packed_by_their_work(method: str) -> None:
    sequence = TaskSequence(sweep_of_method(method))
    architecture, sizes = sequence.architecture, [sequence.sizes(index)[0] for index in range(2)]
    assert sizes[1] == sizes[0] * (2 if method == "joint" else 1)
    full = architecture.graph.groups  # as the state after a baseline's first task has it
    work = [sequence.point_flop(architecture, {}, 0), sequence.point_flop(architecture, full, 1)]
    assert work[1] / work[0] == sizes[1] / sizes[0]


def test_methods_have_different_keys() -> None:
    sequence, point = TaskSequence(SWEEP), Point(0, (0.0,), 0.01)
    keys = {point_key("", sequence.task(0), "", "", sweep_of_method(method), point) for method in METHODS}
    assert len(keys) == len(METHODS)


def test_a_run_of_another_method_is_refused(tmp_path: Path) -> None:
    folder = run_folder(str(tmp_path), "run")
    run_in_process(sweep_of_method("ewc"), folder)
    assert sweep_of_method("si").differences(sweep_of_method("ewc"))[-1] == "method: si here, ewc there"
    with pytest.raises(InputError, match="method ewc -> si"):
        check_sweep(folder, sweep_of_method("si"))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"search": {"strength": 0.1}},
            "search.strength: [0.1]: method clnp has none; allowed: null, or of ewc, si, packnet",
        ),
        ({"method": "joint", "search": {"strength": 1}}, "search.strength: [1.0]: method joint has none"),
        ({"method": "packnet", "search": {"strength": [0.5, 1]}}, "search.strength: [0.5, 1.0]: a share of weights"),
        ({"method": "ewc", "search": {"strength": [2, 2]}}, "search.strength: [2.0, 2.0]: a value is there twice"),
        ({"method": "ewc", "search": {"strength": -1}}, "search.strength[0]: -1: input should be greater than"),
        (
            {"method": "si", "search": {"tasks": "first"}},
            "search.tasks: first: si holds to earlier tasks alone",
        ),
        ({"method": "si", "margins": ["1%", "2%"]}, "margins: method si prunes by no margin"),
        ({"method": "si", "capacity": {"on_depletion": "stop"}}, "capacity.on_depletion: stop: method si uses all"),
        ({"method": "si", "head": {"kind": "single", "bias": "per_task"}}, "head.bias: per_task: method si shares"),
        ({"method": "lwf"}, "method: 'lwf': input should be 'clnp', 'single_task', 'finetune'"),
    ],
)
def test_what_a_method_cannot_do_is_refused(changes: dict[str, Any], fault: str) -> None:
    raw = {"scenario": {"name": "permuted_digits"}, "network": {"hidden": [4]}}
    with pytest.raises(InputError) as error:
        parse_sweep(raw | changes, "test")
    assert fault in str(error.value)


def test_packnet_refuses_batch_normalisation() -> None:
    network = {"name": "conv", "layers": [4, "pool"], "batch_norm": True}
    raw = {"scenario": {"name": "split_digits"}, "network": network, "method": "packnet"}
    with pytest.raises(InputError, match="packnet: a batch normalisation's statistics are of all tasks"):
        parse_sweep(raw, "test").architecture((1, 8, 8))


def test_a_task_is_computed_from_the_latest_state_or_its_own(
    split: Callable[[str], tuple[RunFolder, Summary]],
) -> None:
    for method, own in (("finetune", 4), ("single_task", 1)):
        folder, summary = split(method)
        state = network_state(folder, sweep_of_method(method, SPLIT), 1)
        assert state.digest == summary.tasks[own].state_digest


@pytest.mark.parametrize("method", ["ewc", "si", "packnet", "joint"])
def test_networks_of_maps_are_trained_too(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sections = SPLIT | {"network": {"name": "conv", "layers": [4, "pool"], "dense": [8], "dropout": 0.1}}
    sweep = parse_sweep(
        sections | {"scenario": {"name": "split_digits", "tasks": 2}, "method": method, "training": {"epochs": 1}},
        "test",
    )
    folder = run_folder(str(tmp_path), "run")
    assert run_in_process(sweep, folder).status == "complete"
    assert all(check.passed for check in verify(folder))
