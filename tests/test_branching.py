"""Choices made again, and runs that branch off: what is shared is not trained again, and still proven."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import make_sweep
from in_process import SECTIONS, SWEEP, make, run_in_process

from clnp_search.branching import fork, points_taken_over, reselect
from clnp_search.config import AUTO_MARGINS, Sweep
from clnp_search.errors import InputError
from clnp_search.records import PointRecord
from clnp_search.report.figures import scans_of
from clnp_search.search import trial
from clnp_search.sequence import TaskSequence
from clnp_search.storage import RunFolder, run_folder
from clnp_search.verification import verify


@pytest.fixture
def new(copy: RunFolder) -> RunFolder:
    """A folder for a run beside the copy."""
    return run_folder(copy.storage, "new")


def ids(records: list[PointRecord]) -> list[int]:
    return [record.point.index for record in records]


# Choosing again


def test_the_runs_own_rules_choose_what_the_run_has_chosen(copy: RunFolder) -> None:
    for task in range(2):
        found = reselect(copy, SWEEP, task, SWEEP.forgetting)
        assert found.choice == found.recorded == copy.read_selection(task)
        assert found.evaluated == 0


@pytest.mark.parametrize("task", [0, 1])
@pytest.mark.parametrize("changes", [{"margin": 0.2}, {"theta": "per_layer"}, {"sparsity": "weights", "margin": 0.0}])
def test_other_rules_choose_what_a_run_by_them_does(
    copy: RunFolder, new: RunFolder, task: int, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make(forgetting=changes)
    if task:
        fork(copy, other, 0, new)
    run_in_process(other, new)
    monkeypatch.setattr(trial, "Training", None)  # nothing is trained
    found = reselect(copy, SWEEP, task, other.forgetting)
    assert found.choice == new.read_selection(task)
    assert [replace(scan, seconds=0.0) for scan in found.scans] == [
        replace(scan, seconds=0.0)
        for point in found.choice.candidates
        if (scan := new.read_scan(task, point, other.forgetting.rule, found.choice.min_correct)) is not None
    ]
    assert found.recorded == copy.read_selection(task)


def test_a_run_that_spends_what_lasts_is_proven_and_chooses_the_same_again(new: RunFolder) -> None:
    sweep = make(scenario={"tasks": 3}, forgetting={"margin": "auto"})
    summary = run_in_process(sweep, new)
    assert all(check.passed for check in verify(new))
    assert all(result.margin in AUTO_MARGINS for result in summary.tasks)
    for task in range(3):
        assert reselect(new, sweep, task, sweep.forgetting).choice == new.read_selection(task)
    reasons = new.read_selection(0).reasons  # type: ignore[union-attr]
    assert reasons[0].startswith("Margin 0.00%: ")


def test_scans_that_were_made_for_it_are_kept(copy: RunFolder) -> None:
    rules = make(forgetting={"margin": "20%"}).forgetting
    seen = list[tuple[int, int]]()
    first = reselect(copy, SWEEP, 1, rules, lambda done, total: seen.append((done, total)))
    assert first.evaluated == len(first.scans) == len(seen) > 0
    again = reselect(copy, SWEEP, 1, rules)
    assert (again.evaluated, again.scans) == (0, first.scans)
    assert all(check.passed for check in verify(copy))


def test_a_task_that_is_not_committed_is_refused(copy: RunFolder) -> None:
    with pytest.raises(InputError, match="task 2 is not committed"):
        reselect(copy, SWEEP, 2, SWEEP.forgetting)


def test_no_scan_is_made_by_settings_that_were_changed_by_hand(copy: RunFolder) -> None:
    before = list(copy.read_scans(1))
    with pytest.raises(InputError, match=r"sweep\.yaml was changed since task 0 was planned: seed 0 -> 1"):
        reselect(copy, set_seed(SWEEP), 1, make(forgetting={"margin": "20%"}).forgetting)
    assert list(copy.read_scans(1)) == before


def test_no_scan_is_made_on_other_data_than_the_task_was_planned_with(copy: RunFolder) -> None:
    before, plan = list(copy.read_scans(1)), copy.read_plan(1)
    assert plan is not None
    copy.write_plan(replace(plan, data_digest="0" * 64))
    with pytest.raises(InputError, match="task 1 was planned on another data set: its digest was 000000000000"):
        reselect(copy, SWEEP, 1, make(forgetting={"margin": "20%"}).forgetting)
    assert list(copy.read_scans(1)) == before


def test_after_fine_tuning_the_measure_alone_can_be_chosen_again(new: RunFolder) -> None:
    sweep = make(scenario={"tasks": 1}, forgetting={"margin": "10%", "finetune_rounds": 1, "finetune_epochs": 1})
    run_in_process(sweep, new)
    found = reselect(new, sweep, 0, sweep.forgetting.model_copy(update={"sparsity": "weights"}))
    assert found.evaluated == 0
    assert "(weights)" in found.choice.reasons[2]
    with pytest.raises(InputError, match="was fine-tuned"):
        reselect(new, sweep, 0, sweep.forgetting.model_copy(update={"margin": 0.2}))


def test_after_fine_tuning_at_a_margin_that_the_measure_chose_nothing_can_be_chosen_again(new: RunFolder) -> None:
    sweep = make(scenario={"tasks": 1}, forgetting={"margin": "auto", "finetune_rounds": 1, "finetune_epochs": 1})
    run_in_process(sweep, new)
    found = reselect(new, sweep, 0, sweep.forgetting)
    assert replace(found.choice, reasons=found.recorded.reasons) == found.recorded
    with pytest.raises(InputError, match="of a fixed margin"):
        reselect(new, sweep, 0, sweep.forgetting.model_copy(update={"sparsity": "weights"}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_of_a_machine_with_a_gpu_is_chosen_again_without_one(copy: RunFolder) -> None:
    plan = copy.read_plan(1)
    assert plan is not None
    copy.write_plan(replace(plan, environment=replace(plan.environment, device="cuda")))
    rules = make(forgetting={"margin": "20%"}).forgetting
    assert reselect(copy, SWEEP, 1, rules).evaluated > 0


# Branching off


def test_a_fork_with_the_same_settings_trains_nothing_and_ends_the_same(
    copy: RunFolder, new: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork(copy, SWEEP, 0, new)
    monkeypatch.setattr(trial, "Training", None)
    monkeypatch.setattr(trial, "scan", None)
    summary = run_in_process(SWEEP, new)
    assert summary.state_digest == copy.read_results()[-1].state_digest
    assert points_taken_over(new) == (2, 0)
    assert all(check.passed for check in verify(new))


@pytest.mark.parametrize("after_task", [0, 1])
def test_a_fork_shares_its_first_tasks_to_the_byte(copy: RunFolder, new: RunFolder, after_task: int) -> None:
    fork(copy, make(forgetting={"margin": "1%"}), after_task, new)
    for task in range(after_task + 1):
        theirs, mine = (
            {
                path.relative_to(folder.local_path): path.read_bytes()
                for path in folder.local_path.glob(f"tasks/{task:03d}/**/*.*")
            }
            for folder in (copy, new)
            if folder.local_path is not None
        )
        assert mine == theirs
        assert mine
    assert len(new.read_results()) == after_task + 1


def test_a_fork_takes_over_fine_tune_rounds_too(new: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = make(forgetting={"margin": "10%", "finetune_rounds": 2, "finetune_epochs": 1})
    undisturbed = run_in_process(rounds, new)
    newest = run_folder(new.storage, "newest")
    fork(new, rounds, -1, newest)
    monkeypatch.setattr(trial, "Training", None)
    monkeypatch.setattr(trial, "scan", None)
    assert run_in_process(rounds, newest).state_digest == undisturbed.state_digest
    assert points_taken_over(newest) == (4, 0)
    assert all(check.passed for check in verify(newest))


def test_a_fork_that_was_interrupted_with_more_tasks_is_not_mixed_with_another(copy: RunFolder, new: RunFolder) -> None:
    plan = copy.read_plan(0)
    assert plan is not None
    new.write_plan(plan)  # and no more of the task
    with pytest.raises(InputError, match="has something of task 0, as of a fork that was interrupted"):
        fork(copy, SWEEP, -1, new)
    fork(copy, SWEEP, 0, new)
    assert new.read_results() == copy.read_results()[:1]


def test_an_overlapping_grid_trains_only_its_new_points(copy: RunFolder, new: RunFolder) -> None:
    wider = make(search={"alpha": [1e-4, 1e-3, 1e-5]})
    fork(copy, wider, 0, new)
    run_in_process(wider, new)
    assert points_taken_over(new) == (2, 1)
    records = [record for record in new.read_points(1) if record.origin]
    assert [(record.point.index, record.origin) for record in records] == [(1, copy.uri), (2, copy.uri)]
    for record in records:
        theirs = copy.read_point(1, {1: "p001", 2: "p000"}[record.point.index])
        assert theirs is not None
        assert (record.key, record.parameters_sha256) == (theirs.key, theirs.parameters_sha256)
    assert all(check.passed for check in verify(new))


def test_a_fork_is_whole_before_its_first_own_task(copy: RunFolder, new: RunFolder) -> None:
    fork(copy, make(forgetting={"margin": "1%"}), 0, new)
    assert [check.name for check in verify(new) if not check.passed] == []
    summary = new.read_summary()
    assert summary is not None
    assert summary.tasks == copy.read_results()[:1]


def test_figures_and_tables_of_shared_tasks_show_the_rule_that_they_were_chosen_by(
    copy: RunFolder, new: RunFolder
) -> None:
    other = make(forgetting={"theta": "per_layer"})
    fork(copy, other, 0, new)
    run_in_process(other, new)
    assert scans_of(new, 0) == scans_of(copy, 0) != []
    assert {scan.rule for task in range(2) for scan in scans_of(new, task)} == {"global", "per_layer"}


def test_a_fork_of_a_fork_keeps_the_settings_of_both(copy: RunFolder, new: RunFolder) -> None:
    second = make(scenario={"tasks": 3}, forgetting={"margin": "10%"})
    fork(copy, second, 0, new)
    run_in_process(second, new)
    third = make(scenario={"tasks": 3}, forgetting={"margin": "1%"}, training={"epochs": 2})
    newest = run_folder(copy.storage, "newest")
    fork(new, third, 1, newest)
    summary = run_in_process(third, newest)
    assert [result.margin for result in summary.tasks] == [0.03, 0.1, 0.01]
    assert points_taken_over(newest) == (0, 2)
    assert all(check.passed for check in verify(newest))


def test_a_fork_goes_on_without_the_run_that_it_came_from(copy: RunFolder, new: RunFolder) -> None:
    fork(copy, SWEEP, 0, new)
    assert copy.local_path is not None
    copy.local_path.rename(copy.local_path.with_name("moved"))
    assert run_in_process(SWEEP, new).status == "complete"
    assert points_taken_over(new) == (0, 2)


def test_a_damaged_point_is_trained_instead_of_taken_over(
    copy: RunFolder, new: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    copy.write("tasks/001/points/p000.safetensors", b"damaged")
    fork(copy, SWEEP, 0, new)
    assert run_in_process(SWEEP, new).status == "complete"
    assert points_taken_over(new) == (1, 1)  # the point beside it is whole
    assert "p000.safetensors: damaged" in caplog.text


def set_seed(sweep: Sweep) -> Sweep:
    return sweep.model_copy(update={"seed": 1})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (set_seed, "seed: 1 here, 0 there"),
        (lambda _: make(network={"hidden": [12, 9]}), r"network.hidden: \[12, 9\] here"),
        (lambda _: make(scenario={"validation": 200}), "scenario.validation: 200 here"),
        (lambda _: make(scenario={"tasks": 1}), "scenario.tasks: 1 is fewer"),
        (lambda _: make(search={"alpha": [[1.0, 1.0]]}), "search.alpha"),
    ],
)
def test_what_would_change_the_shared_tasks_is_refused_and_nothing_is_written(
    copy: RunFolder, new: RunFolder, change: Callable[[Sweep], Sweep], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        fork(copy, change(SWEEP), 1, new)
    assert not new.exists()


def test_a_fork_of_a_run_whose_settings_were_changed_by_hand_is_refused_and_nothing_is_written(
    copy: RunFolder, new: RunFolder
) -> None:
    changed = set_seed(SWEEP)
    copy.write_sweep(changed.to_yaml())
    with pytest.raises(InputError, match=r"sweep\.yaml was changed since task 0 was planned: seed 0 -> 1"):
        fork(copy, changed, 0, new)
    assert not new.exists()


def test_a_task_that_is_not_there_or_a_name_that_is_taken_is_refused(copy: RunFolder, new: RunFolder) -> None:
    with pytest.raises(InputError, match="--after-task 2: not committed; allowed: -1 to 1"):
        fork(copy, SWEEP, 2, new)
    fork(copy, SWEEP, 0, new)
    with pytest.raises(InputError, match="there is a run of that name already"):
        fork(copy, SWEEP, 0, new)


def test_a_setting_of_a_shared_task_that_was_changed_by_hand_is_found(copy: RunFolder, new: RunFolder) -> None:
    fork(copy, SWEEP, 0, new)
    new.write_sweep(make(network={"hidden": [12, 8], "activation": "tanh"}).to_yaml())
    with pytest.raises(InputError, match=r"network\.activation"):
        run_in_process(make(network={"hidden": [12, 8], "activation": "tanh"}), new)


MODULE = """
from torch import nn

def make(gain=1.0):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    nn.init.normal_(network[1].weight, std=gain / 8)
    return network
"""


def test_a_point_whose_module_draws_other_weights_is_not_taken_over(tmp_path: Path, new: RunFolder) -> None:
    (tmp_path / "drawing_network.py").write_text(MODULE)

    def with_gain(gain: float) -> Sweep:
        network = {"module": "drawing_network:make", "arguments": {"gain": gain}}
        return make_sweep(**SECTIONS | {"network": network, "modules": [str(tmp_path)], "search": {"alpha": [1e-4]}})

    run_in_process(with_gain(1.0), new)
    for gain, expected in ((1.0, (4, 0)), (2.0, (0, 4))):
        other = run_folder(new.storage, f"gain-{gain:g}")
        fork(new, with_gain(gain), -1, other)
        run_in_process(with_gain(gain), other)
        assert points_taken_over(other) == expected
    # As the rounding of another machine could have it: what is committed stays, and is proven all the same.
    (tmp_path / "drawing_network.py").write_text(MODULE.replace("gain / 8", "gain / 8.5"))
    plan = new.read_plan(0)
    assert plan is not None
    assert TaskSequence(with_gain(1.0)).drawn_digest != plan.drawn_digest
    assert all(check.passed for check in verify(new))


def test_a_fork_of_a_fork_takes_over_what_the_first_run_has(copy: RunFolder, new: RunFolder) -> None:
    other = make(search={"alpha": [1e-4]})
    fork(copy, other, 0, new)
    run_in_process(other, new)
    newest = run_folder(copy.storage, "newest")
    both = make(search={"alpha": [1e-5, 1e-4, 1e-3]})
    fork(new, both, 0, newest)
    run_in_process(both, newest)
    assert points_taken_over(newest) == (3, 0)
    assert {record.origin for record in newest.read_points(1)} == {copy.uri, new.uri}
    # Where nothing of the run between can be read, what the first one has is taken over all the same.
    new.write("tasks/001/points/p000.json", b"damaged")
    again = run_folder(copy.storage, "again")
    fork(new, both, 0, again)
    run_in_process(both, again)
    assert points_taken_over(again) == (2, 1)
