"""What a person sees of a run: live on a terminal, in lines elsewhere."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from builders import make_point, make_record, make_result, make_sweep
from rich.console import Console

from clnp_search.cli import view
from clnp_search.cli.view import LiveView, summary_table
from clnp_search.records import Environment, PackProgress, TaskPlan, TaskResult, Units, summarise

ENVIRONMENT = Environment("cpu", 1, "float32", "2", "0")
PLAN = TaskPlan(0, "first", "", tuple(map(make_point, range(4))), ("",) * 4, ((0, 1), (2, 3)), ENVIRONMENT)
RECORDS = [make_record(index, 9000 + index) for index in range(4)]
HALF = PackProgress({0: 5, 1: 5}, (1, 0.875))  # one of two packs is half done


class Clock:
    """Seconds that pass when a test says so."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(view, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def shown(
    happen: Callable[[LiveView], None],
    width: int = 80,
    terminal: bool = True,
    tasks: str = "every",
    results: Sequence[TaskResult] = (),
    publishing: str = "",
    rounds: int = 0,
) -> list[str]:
    """What is printed of a sequence of three tasks with ten epochs; of what is live, how it ends."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width)
    scenario = {"name": "permuted_digits", "tasks": 3}
    search = {"alpha": [0.0], "learning_rate": [0.01], "tasks": tasks}
    forgetting = {"finetune_rounds": rounds, "finetune_epochs": 10 * rounds}
    sweep = make_sweep(scenario=scenario, training={"epochs": 10}, search=search, forgetting=forgetting)
    with LiveView(console, sweep, "run", results, lambda: publishing) as seen:
        happen(seen)
    assert isinstance(console.file, io.StringIO)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue()).replace("\r", "\n").split("\n")
    return [line.rstrip() for line in lines if line.strip()]


def training(clock: Clock, seconds: float, progress: PackProgress = HALF, **plan: Any) -> Callable[[LiveView], None]:
    """The first task, some seconds after it began."""

    def happen(seen: LiveView) -> None:
        seen.task_planned(TaskPlan(**(vars(PLAN) | plan)), [])
        clock.now += seconds
        seen.training(progress)

    return happen


def committed(units: dict[str, Units]) -> Callable[[LiveView], None]:
    """The first task, trained and committed with these units in 40 seconds."""

    def happen(seen: LiveView) -> None:
        seen.task_planned(PLAN, [])
        seen.points_finished(RECORDS)
        seen.committed(summarise("run", "running", 0, "", (make_result(0, (0.955,), units),)), 40.0)

    return happen


def test_a_terminal_shows_sequence_task_and_the_best_point_so_far(clock: Clock) -> None:
    lines = shown(training(clock, 30))
    assert "run: task 0 of 3 (first), training" in lines
    assert any(line.startswith("sequence ") and line.endswith("0 of 3 tasks, 0:30, about 5:30 left") for line in lines)
    assert lines[-1] == "best validation accuracy 87.50% by p001 (alpha 1e-05, learning rate 0.001)"


def test_scans_say_how_many_models_they_have_tried(clock: Clock) -> None:
    def happen(seen: LiveView) -> None:
        seen.task_planned(PLAN, [])
        seen.points_finished(RECORDS)
        for models in (1000, 2000):
            clock.now += 40
            seen.scanning(1, 3, models)

    assert "run: task 0 of 3 (first), scanning thresholds, 1 of 3 (2,000 models)" in shown(happen)
    lines = [line for line in shown(happen, terminal=False) if "models" in line]
    assert lines == ["task 0 of 3: scanning thresholds, 1 of 3 (2,000 models)"]  # one a minute


def test_a_pack_that_is_half_trained_has_finished_no_point(clock: Clock) -> None:
    assert any("0 of 4 points trained, 25% of the epochs" in line for line in shown(training(clock, 30)))
    done = PackProgress({0: 10, 1: 10, 2: 1})
    assert any("2 of 4 points trained, 52% of the epochs" in line for line in shown(training(clock, 30, done)))


def test_points_that_were_finished_before_count_and_the_pace_is_of_the_others(clock: Clock) -> None:
    def happen(seen: LiveView) -> None:
        seen.task_planned(PLAN, RECORDS[:2])
        clock.now = 30
        seen.training(PackProgress({2: 5, 3: 5}, (2, 0.8)))

    lines = shown(happen)
    assert any("2 of 4 points trained, 75% of the epochs" in line for line in lines)
    assert any("about 4:30 left" in line for line in lines)  # 30 s a point: one, and two tasks of four
    assert any("90.01% by p001" in line for line in lines)


@pytest.mark.parametrize("taken_over", [False, True])
def test_points_that_were_there_before_make_no_task_look_quick(clock: Clock, taken_over: bool) -> None:
    first = RECORDS if taken_over else RECORDS[:3]

    def happen(seen: LiveView) -> None:
        seen.task_planned(PLAN, first)
        clock.now = 50.0 * (len(RECORDS) - len(first))
        seen.points_finished(RECORDS)
        seen.committed(
            summarise("run", "running", 0, "", (make_result(0, (0.955,), {"hidden0": Units(4, 1, 1, 3)}),)), clock.now
        )
        seen.task_planned(TaskPlan(**(vars(PLAN) | {"task": 1})), [])

    line = shown(happen, terminal=False)[-1]
    assert line.endswith("points in 2 packs" if taken_over else "about 6:40 left")  # two tasks of four points


def test_what_remains_in_a_fine_tune_round_counts_the_search_of_later_tasks(clock: Clock) -> None:
    def happen(seen: LiveView) -> None:
        seen.task_planned(PLAN, [])
        clock.now = 200.0
        seen.points_finished(RECORDS)
        seen.task_planned(TaskPlan(**(vars(PLAN) | {"round": 1, "cuts": dict.fromkeys(range(4), (0.0,))})), [])
        clock.now = 210.0
        seen.training(HALF)

    # Half a minute of this round is left; a later task takes as long as this one, 240 s.
    assert any("about 8:30 left" in line for line in shown(happen, rounds=1))


def test_what_remains_is_never_nothing_while_a_task_is_open(clock: Clock) -> None:
    results = [make_result(task, (0.9,) * (task + 1), {"hidden0": Units(4, 1, 1, 3)}) for task in (0, 1)]
    lines = shown(training(clock, 1000, PackProgress({}), task=2), results=results)
    assert any(line.endswith("2 of 3 tasks, 16:40, about 0:01 left") for line in lines)
    lines = shown(training(clock, 1000, PackProgress({}), task=1), results=results[:1])
    assert any(line.endswith("1 of 3 tasks, 16:40, about 0:02 left") for line in lines)


def test_what_remains_counts_one_point_for_later_tasks_that_are_not_searched(clock: Clock) -> None:
    assert any("about 5:50 left" in line for line in shown(training(clock, 70), tasks="first"))


def test_a_task_that_goes_on_after_others_is_estimated_by_their_pace(clock: Clock) -> None:
    [_, line] = shown(
        lambda seen: seen.task_planned(PLAN, []), terminal=False, results=[make_result(0, (0.9,), {}, seconds=40.0)]
    )
    assert line == "task 0 of 3 (first): 4 points in 2 packs; about 2:00 left"


def test_what_remains_goes_by_the_sizes_of_the_tasks(clock: Clock) -> None:
    def happen(seen: LiveView) -> None:
        seen.loaded([9000, 1000, 500])
        training(clock, 90)(seen)  # a quarter of the first task

    assert any("about 5:30 left" in line for line in shown(happen))  # 4:30 of it, a minute of the others
    earlier = [make_result(0, (0.9,), {}, seconds=360.0)]

    def goes_on(seen: LiveView) -> None:
        seen.loaded([9000, 1000, 500])
        seen.task_planned(TaskPlan(**(vars(PLAN) | {"task": 1})), [])

    [_, line] = shown(goes_on, terminal=False, results=earlier)
    assert line.endswith("about 1:00 left")


def test_failed_points_are_named_while_others_still_train(clock: Clock) -> None:
    lines = shown(training(clock, 30, PackProgress({0: 10}, failed=(1, 3))))
    assert "failed 2 points: p001, p003" in lines
    failed = make_record(1, 0, status="failed", reason="diverged: [nan]")

    def happen(seen: LiveView) -> None:
        seen.task_planned(PLAN, [])
        seen.points_finished([RECORDS[0], failed, *RECORDS[2:]])

    assert "✗ task 0 of 3: p001 failed: diverged: [nan]" in shown(happen)
    assert "task 0 of 3: p001 failed: diverged: [nan]" in shown(happen, terminal=False)


def test_where_every_point_failed_no_best_one_is_announced(clock: Clock) -> None:
    failed = [make_record(index, 0, status="failed", reason="diverged") for index in range(4)]

    def happen(seen: LiveView) -> None:
        seen.task_planned(PLAN, [])
        seen.points_finished(failed)

    assert shown(happen, terminal=False)[-1] == "task 0 of 3: p003 failed: diverged"


def test_a_terminal_says_how_mlflow_is_doing(clock: Clock) -> None:
    assert shown(training(clock, 30), publishing="MLflow is up to date")[-1] == "MLflow is up to date"
    for terminal in (True, False):
        lines = shown(training(clock, 30), terminal=terminal, publishing="MLflow is behind: nobody answers")
        assert any(line.endswith("MLflow is behind: nobody answers") for line in lines)


@pytest.mark.parametrize("width", [80, 60])
def test_every_line_fits_a_narrow_terminal(clock: Clock, width: int) -> None:
    units = {
        f"backbone.layer{stage}.{block}.conv2": Units(51200, 1, 1, 51199) for stage in range(1, 5) for block in range(6)
    }
    results = [make_result(0, (0.9,), units, seconds=36000.0)]
    progress = PackProgress({0: 10, 1: 9}, (1, 0.98765), tuple(range(4)))
    name = "a-permutation-with-a-name-that-does-not-end-before-the-line-does-although-it-should"
    lines = shown(
        training(clock, 7200, progress, task=1, name=name),
        width,
        results=results,
        publishing="MLflow is behind: " + "no " * 99,
    )
    live = lines[-10:]
    assert max(map(len, live)) <= width
    starts = ("run: task 1", "sequence", "task", "all 24 groups", "…", "…", "…", "best", "failed", "MLflow")
    assert [line.startswith(start) for line, start in zip(live, starts, strict=True)] == [True] * 10
    if width == 80:
        assert live[1].endswith(" left")


def test_of_many_groups_the_scarcest_are_shown(clock: Clock) -> None:
    units = {f"group{index}": Units(100, index, 1, 100 - index) for index in range(5, 50)}
    results = [make_result(0, (0.9,), units)]
    lines = shown(training(clock, 30, task=1), results=results)
    bars = [line.split()[0] for line in lines if line.endswith("units free")]
    assert bars == ["all", "group49", "group48", "group47"]
    assert any("3,285 of 4,500 units free" in line for line in lines)


def test_a_group_with_less_than_a_twentieth_free_is_warned_of(clock: Clock) -> None:
    units = {"hidden0": Units(100, 96, 96, 4), "hidden1": Units(100, 95, 95, 5)}
    lines = shown(committed(units))
    assert "✓ task 0 of 3: p000 kept, test accuracy 95.50%, 9 of 200 units free, 0:40" in lines
    assert "! task 0 of 3: less than 5% free: hidden0 4 of 100" in lines


def test_elsewhere_a_line_a_minute_says_how_far_a_long_training_is(clock: Clock) -> None:
    begun = ["run: 3 tasks of permuted_digits; starting Ray", "task 0 of 3 (first): 4 points in 2 packs"]
    assert shown(training(clock, 30), terminal=False) == begun
    best = "best validation accuracy 87.50% by p001 (alpha 1e-05, learning rate 0.001)"
    line = f"task 0 of 3: 0 of 4 points trained, 25% of the epochs; {best}; about 12:50 left"
    assert shown(training(clock, 70), terminal=False) == [*begun, line]


def test_the_table_of_a_network_with_many_groups_fits_a_terminal() -> None:
    units = {f"layer{index}.conv": Units(64, index, 1, 64 - index) for index in range(20)}
    console = Console(file=io.StringIO(), width=80)
    console.print(summary_table(summarise("run", "complete", 0, "", (make_result(0, (0.9,), units),))))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "20/1090" in text
    assert "45/64" in text
    assert "…" not in text
