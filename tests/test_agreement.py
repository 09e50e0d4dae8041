"""A run goes on only from files that follow from one another, under the settings and data that it was begun with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import make_scan
from in_process import SWEEP, InProcess, make, run_in_process

from clnp_search import sequence
from clnp_search.agreement import check_commit, check_sweep
from clnp_search.branching import reselect
from clnp_search.clnp.state import State
from clnp_search.config import Sweep
from clnp_search.errors import Damaged, InputError
from clnp_search.records import ScanRecord, Units
from clnp_search.sequence import Runner, TaskSequence
from clnp_search.storage import RunFolder, run_folder
from clnp_search.verification import verify


@pytest.fixture
def cut_short(copy: RunFolder) -> RunFolder:
    """The same run, as if killed right before its last task was committed."""
    uncommit(copy, 1)
    return copy


def uncommit(folder: RunFolder, task: int = 0) -> None:
    """Leaves a run as if it had been killed right before a task was committed."""
    folder.delete(f"tasks/{task:03d}/result.json")
    folder.delete(f"tasks/{task:03d}/state.safetensors")


def files(folder: RunFolder) -> dict[Path, bytes]:
    assert folder.local_path is not None
    return {path: path.read_bytes() for path in folder.local_path.rglob("*") if path.is_file()}


def refused(folder: RunFolder, sweep: Sweep, kind: type[Exception], match: str) -> None:
    """Going on is refused with a message, and nothing of the run but its summary's status is written."""
    before = files(folder)
    with pytest.raises(kind, match=match):
        run_in_process(sweep, folder)
    changed = {path.name for path, data in files(folder).items() if data != before.get(path)}
    assert changed <= {"summary.json"}


# Going on


def test_a_run_that_was_cut_short_goes_on_to_the_same_digest(whole: RunFolder, cut_short: RunFolder) -> None:
    undisturbed = whole.read_results()[-1].state_digest
    assert run_in_process(SWEEP, cut_short).state_digest == undisturbed


def test_a_finished_run_changes_no_file(copy: RunFolder) -> None:
    before = files(copy)
    run_in_process(SWEEP, copy)
    assert files(copy) == before


# The sweep

CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "margin": ({"forgetting": {"margin": "1%"}}, r"forgetting.margin 0.03 -> 0.01"),
    "threshold": ({"forgetting": {"theta": "per_layer"}}, r"forgetting.theta global -> per_layer"),
    "grid": ({"search": {"alpha": [1e-5]}}, r"search.alpha \[1e-05, 0.001\] -> \[1e-05\]"),
    "epochs": ({"training": {"epochs": 4}}, r"training.epochs 3 -> 4"),
    "two": ({"training": {"epochs": 4, "batch_size": 32}}, r"training.epochs 3 -> 4, training.batch_size 64 -> 32"),
    "head": ({"head": {"kind": "single"}}, r"head.kind multi -> single"),
    "network": ({"network": {"hidden": [12, 9]}}, r"network.hidden \[12, 8\] -> \[12, 9\]"),
    "validation": ({"scenario": {"validation": 200}}, r"scenario.validation 300 -> 200"),
    "scenario": ({"scenario": {"name": "split_digits"}}, r"scenario.name permuted_digits -> split_digits"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_that_was_changed_under_committed_tasks_is_named(copy: RunFolder, name: str) -> None:
    sections, message = CHANGES[name]
    refused(copy, make(**sections), InputError, rf"sweep.yaml was changed since task 0 was planned: .*{message}")


def test_a_setting_that_was_changed_within_a_task_is_named(cut_short: RunFolder) -> None:
    plan = cut_short.read_plan(1)
    assert plan is not None
    cut_short.write_plan(replace(plan, settings=plan.settings | {"training.epochs": 12}))
    refused(cut_short, SWEEP, InputError, r"since task 1 was planned: training.epochs 12 -> 3")


@pytest.mark.parametrize(
    "sections",
    [
        {"resources": {"cpu": 2}},
        {"capacity": {"on_depletion": "stop"}},
        {"search": {"points_per_trial": 1, "max_failures": 0}},
        {"scenario": {"root": "elsewhere"}},
    ],
)
def test_what_decides_no_task_may_be_changed(copy: RunFolder, sections: dict[str, Any]) -> None:
    check_sweep(copy, make(**sections))


def test_fewer_tasks_than_are_committed_are_refused(copy: RunFolder) -> None:
    refused(copy, make(scenario={"tasks": 1}), InputError, r"scenario.tasks is 1, but 2 are committed")


def test_more_tasks_go_on_and_train_nothing_again(whole: RunFolder, copy: RunFolder) -> None:
    before = files(copy)
    longer = make(scenario={"tasks": 3})
    summary = run_in_process(longer, copy)
    assert (summary.status, len(summary.tasks)) == ("complete", 3)
    assert summary.tasks[:2] == whole.read_results()
    changed = {path.name for path, data in before.items() if path.read_bytes() != data}
    assert changed == {"summary.json"}


def test_more_tasks_give_the_same_as_a_run_that_had_them_from_the_start(copy: RunFolder, tmp_path: Path) -> None:
    longer = make(scenario={"tasks": 3})
    at_once = run_in_process(longer, run_folder(str(tmp_path), "at-once"))
    assert run_in_process(longer, copy).state_digest == at_once.state_digest


def test_fewer_tasks_of_your_own_than_are_committed_are_refused(copy: RunFolder) -> None:
    shorter = TaskSequence(SWEEP)
    shorter.scenario = replace(shorter.scenario, tasks=shorter.scenario.tasks[:1])
    with pytest.raises(InputError, match=r"permuted_digits gives 1 task\(s\), but 2 are committed"):
        Runner(shorter, copy, InProcess()).run()  # type: ignore[arg-type]


def test_without_a_number_of_tasks_any_number_may_be_committed(copy: RunFolder) -> None:
    check_sweep(copy, SWEEP.model_copy(update={"scenario": SWEEP.scenario.model_copy(update={"tasks": None})}))


# The data


@pytest.mark.parametrize("change", ["labels", "inputs", "test labels", "classes"])
def test_other_data_are_refused(copy: RunFolder, change: str) -> None:
    changed = TaskSequence(SWEEP)
    (raw,) = changed.scenario.sets
    labels, inputs, test_labels = (each.copy() for each in (raw.train_labels, raw.train_inputs, raw.test_labels))
    labels[0], inputs[0, 0, 0], test_labels[0] = (labels[0] + 1) % 10, inputs[0, 0, 0] + 1, (test_labels[0] + 1) % 10
    other = {
        "labels": replace(raw, train_labels=labels),
        "inputs": replace(raw, train_inputs=inputs),
        "test labels": replace(raw, test_labels=test_labels),
        "classes": replace(raw, num_classes=11),
    }[change]
    changed.scenario = replace(changed.scenario, sets=(other,))
    with pytest.raises(InputError, match="task 0 was planned on another data set: its digest was"):
        Runner(changed, copy, InProcess()).run()  # type: ignore[arg-type]


# The code


def test_a_task_begun_by_code_of_other_bits_is_refused(cut_short: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "NUMERICS", sequence.NUMERICS + 1)
    refused(cut_short, SWEEP, InputError, "task 1 was begun by clnp-search .*, whose results differ")


def test_tasks_committed_by_code_of_other_bits_stay(copy: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "NUMERICS", sequence.NUMERICS + 1)
    assert run_in_process(SWEEP, copy).status == "complete"


# Files that are whole, but do not follow from one another


def test_a_state_with_a_changed_weight_is_refused_by_name(copy: RunFolder) -> None:
    state = copy.read_state(1)
    first = state.tensors["hidden0"]
    copy.write_state(1, replace(state, tensors=state.tensors | {"hidden0": first | {"weight": 3 * first["weight"]}}))
    for longer in (SWEEP, make(scenario={"tasks": 3})):
        refused(copy, longer, Damaged, r"tasks/001/state.safetensors: damaged, or not the file")


def test_a_state_of_another_task_is_refused(copy: RunFolder) -> None:
    result = copy.read_results()[0]
    copy.write_result(replace(result, state_digest="0" * 64))
    refused(copy, SWEEP, InputError, "task 1 was planned on another state than the one before it")


def test_a_committed_task_without_a_plan_is_refused(copy: RunFolder) -> None:
    copy.delete("tasks/000/plan.json")
    refused(copy, SWEEP, RuntimeError, r"task 0: plan.json is missing")


def test_a_record_of_another_point_is_refused(cut_short: RunFolder) -> None:
    record = cut_short.read_point(1, "p000")
    assert record is not None
    cut_short.write_point(1, replace(record, key="other"), None)
    refused(cut_short, SWEEP, InputError, "task 1, p000: the record is of another point")


def chosen(folder: RunFolder) -> int:
    choice = folder.read_selection(1)
    assert choice is not None
    return choice.chosen


def test_other_parameters_under_the_chosen_name_are_refused(cut_short: RunFolder) -> None:
    name = f"p{chosen(cut_short):03d}"
    other = f"p{1 - chosen(cut_short):03d}"
    cut_short.write(f"tasks/001/points/{name}.safetensors", cut_short.read(f"tasks/001/points/{other}.safetensors"))
    refused(cut_short, SWEEP, Damaged, rf"tasks/001/points/{name}.safetensors: damaged, or not the file")


def rewrite_scans(folder: RunFolder, change: Callable[[ScanRecord], ScanRecord]) -> None:
    for path in folder._list("tasks/001/scans"):
        point, rule, limit = path.rsplit("/", 1)[-1].removesuffix(".json").split("-")
        scan = folder.read_scan(1, int(point), rule, int(limit))
        assert scan is not None
        folder.write_scan(1, change(scan))


def test_a_scan_with_another_theta_is_never_committed(cut_short: RunFolder) -> None:
    cut_short.delete("tasks/001/selection.json")
    rewrite_scans(cut_short, lambda scan: replace(scan, theta=(1e9, 1e9)))
    refused(cut_short, SWEEP, RuntimeError, r"the scan of point \d left \(.*\) units active, the commit")


def test_a_scan_with_another_count_is_never_committed(cut_short: RunFolder) -> None:
    cut_short.delete("tasks/001/selection.json")
    rewrite_scans(cut_short, lambda scan: replace(scan, val_correct=scan.val_correct + 2))
    refused(cut_short, SWEEP, RuntimeError, r"validation samples right, the scan of point \d counted")


@pytest.mark.parametrize("field", ["key", "parameters_sha256"])
def test_a_scan_of_something_else_is_done_again(
    whole: RunFolder, cut_short: RunFolder, field: str, caplog: pytest.LogCaptureFixture
) -> None:
    fields: dict[str, Any] = {field: "other", "theta": (1e9, 1e9)}
    rewrite_scans(cut_short, lambda scan: replace(scan, **fields))
    summary = run_in_process(SWEEP, cut_short)
    assert summary.state_digest == whole.read_results()[-1].state_digest
    assert "p000 is scanned again: its scan was of other parameters" in caplog.text


def test_a_choice_that_does_not_follow_is_refused(cut_short: RunFolder) -> None:
    choice = cut_short.read_selection(1)
    assert choice is not None
    cut_short.write_selection(1, replace(choice, chosen=1 - choice.chosen))
    refused(
        cut_short,
        SWEEP,
        RuntimeError,
        rf"task 1: selection.json, which keeps point {1 - choice.chosen}, does not follow",
    )


def test_a_first_choice_that_does_not_follow_is_not_reused(copy: RunFolder, tmp_path: Path) -> None:
    sweep = make(search={"tasks": "first"})
    folder = run_folder(str(tmp_path), "first")
    run_in_process(make(search={"tasks": "first"}, scenario={"tasks": 1}), folder)
    choice = folder.read_selection(0)
    assert choice is not None
    folder.write_selection(0, replace(choice, chosen=1 - choice.chosen))
    refused(folder, sweep, RuntimeError, rf"task 0: selection.json, which keeps point {1 - choice.chosen}")
    folder.write_selection(0, choice)
    assert run_in_process(sweep, folder).tasks[1].selected.alpha == (sweep.search.alpha[choice.chosen],) * 3


# Failed points, tried again


def test_a_task_with_a_point_that_failed_chooses_again_once_it_is_trained(cut_short: RunFolder) -> None:
    record = cut_short.read_point(1, f"p{chosen(cut_short):03d}")
    other = cut_short.read_selection(1)
    assert record is not None
    assert other is not None
    cut_short.delete_point(1, record)
    cut_short.write_point(1, replace(record, status="failed", val_correct=0, reason="no luck"), None)
    cut_short.write_selection(1, replace(other, chosen=1 - other.chosen))
    runner = Runner(TaskSequence(SWEEP), cut_short, InProcess())  # type: ignore[arg-type]
    assert (runner.forget_failed(), runner.forget_failed()) == (1, 0)
    assert runner.run().status == "complete"
    assert all(check.passed for check in verify(cut_short))


def test_a_kill_while_failed_points_are_forgotten_leaves_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = {"margin": "20%", "finetune_rounds": 1, "finetune_epochs": 1}
    sweep = make(scenario={"tasks": 1}, forgetting=rounds, search={"alpha": [1e-3, 3e-3]})
    folder = run_folder(str(tmp_path), "run")
    undisturbed = run_in_process(sweep, folder).state_digest
    best = max(folder.read_points(0), key=lambda record: record.val_correct * (record.round == 0))
    for record in folder.read_points(0):
        if record.round:
            folder.delete_point(0, record)
    uncommit(folder)
    folder.delete_selection(0)
    folder.write_point(0, replace(best, status="failed", val_correct=0, reason="no luck"), None)
    run_in_process(sweep, folder)  # without the best point, the other is pruned further before its round
    uncommit(folder)
    delete = RunFolder.delete_point

    def killed(*arguments: Any) -> None:
        delete(*arguments)
        raise KeyboardInterrupt

    runner = Runner(TaskSequence(sweep), folder, InProcess())  # type: ignore[arg-type]
    monkeypatch.setattr(RunFolder, "delete_point", killed)
    with pytest.raises(KeyboardInterrupt):
        runner.forget_failed()
    monkeypatch.undo()
    run_in_process(sweep, folder)
    uncommit(folder)
    runner.forget_failed()
    assert run_in_process(sweep, folder).state_digest == undisturbed


@pytest.mark.parametrize(("failed", "since"), [(1, "before fine-tuning"), (2, "after fine-tune round 1")])
def test_where_a_round_leaves_no_candidate_the_choice_is_among_those_before_it(
    tmp_path: Path, failed: int, since: str
) -> None:
    rounds = {"margin": "10%", "finetune_rounds": 2, "finetune_epochs": 1}
    sweep = make(scenario={"tasks": 1}, forgetting=rounds)
    folder = run_folder(str(tmp_path), "run")
    run_in_process(sweep, folder)
    uncommit(folder)
    folder.delete_selection(0)
    for record in folder.read_points(0):
        if record.round >= failed:
            folder.delete_point(0, record)
        if record.round == failed:
            folder.write_point(0, replace(record, status="failed", val_correct=0, reason="no luck"), None)
    [task] = run_in_process(sweep, folder).tasks
    choice = folder.read_selection(0)
    assert choice is not None
    assert choice.reasons[0] == f"The choice is among those {since}: every model failed in round {failed}."
    rules = sweep.forgetting.model_copy(update={"sparsity": "weights"})
    assert reselect(folder, sweep, 0, rules).choice.reasons[0] == choice.reasons[0]
    scan = folder.read_scan(0, choice.chosen, "global", choice.min_correct, failed - 1)
    assert scan is not None
    assert (task.selected.theta, task.selected.val_accuracy) == (scan.theta, scan.val_accuracy)
    assert tuple(units.active for units in task.units.values()) == scan.active
    assert all(check.passed for check in verify(folder))


def test_another_network_than_the_run_began_with_is_said_to_be_that(cut_short: RunFolder) -> None:
    class Changed(TaskSequence):
        def empty_state(self) -> State:
            return replace(super().empty_state(), parent="of another module")

    with pytest.raises(InputError, match="begun with another network than its sweep gives now"):
        Runner(Changed(SWEEP), cut_short, InProcess()).run()  # type: ignore[arg-type]


# A commit against its scan

UNITS = {"hidden0": Units(4, 2, 2, 2), "hidden1": Units(4, 3, 3, 1)}


@pytest.mark.parametrize(("total", "allowed"), [(300, 1), (10_000, 2), (4999, 1), (60_000, 12)])
def test_a_commit_may_differ_from_its_scan_by_what_rounding_does(total: int, allowed: int) -> None:
    scan = replace(make_scan(0, 200, (2, 3)), val_total=total)
    for correct in (200 - allowed, 200, 200 + allowed):
        check_commit(UNITS, correct, scan)
    for correct in (199 - allowed, 201 + allowed):
        with pytest.raises(RuntimeError, match=f"gets {correct} of {total} validation samples right.* counted 200"):
            check_commit(UNITS, correct, scan)


def test_a_commit_has_the_units_of_its_scan() -> None:
    with pytest.raises(RuntimeError, match=r"left \(2, 2\) units active, the commit \(2, 3\)"):
        check_commit(UNITS, 200, make_scan(0, 200, (2, 2)))
