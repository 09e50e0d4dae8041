"""What a person sees of a run: live on a terminal, in lines elsewhere."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from builders import make_point, make_sweep
from rich.console import Console

from clnp_search.cli import view
from clnp_search.cli.view import LiveView
from clnp_search.records import Environment, PackProgress, TaskPlan

ENVIRONMENT = Environment("cpu", 1, "float32", "2", "0")
PLAN = TaskPlan(0, "first", "", tuple(map(make_point, range(4))), ("",) * 4, ((0, 1), (2, 3)), ENVIRONMENT)


def shown(monkeypatch: pytest.MonkeyPatch, seconds: float, tasks: str = "every", terminal: bool = False) -> str:
    """What is printed of the first of three tasks when, after some seconds, one of its two packs is half done."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    scenario = {"name": "permuted_digits", "tasks": 3}
    search = {"alpha": [0.0], "learning_rate": [0.01], "tasks": tasks}
    clock = [0.0]
    monkeypatch.setattr(view, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with LiveView(console, make_sweep(scenario=scenario, training={"epochs": 10}, search=search), []) as seen:
        seen.task_planned(PLAN, 0)
        clock[0] = seconds
        seen.training(PackProgress({0: 5}, 0.875))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_terminal_shows_the_task_its_points_and_the_best_accuracy_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, 30, terminal=True)
    for part in ("task 0 of 3 (first)", "points 1/4", "best val 87.50%", "25%", "elapsed 0:30", "remaining 5:30"):
        assert part in text


def test_elsewhere_a_line_a_minute_says_how_far_a_long_training_is(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = "task 0 of 3 (first): 4 points in 2 packs\n"
    assert shown(monkeypatch, 30) == begun
    line = "task 0 of 3 (first): 25% of the training, best validation accuracy 87.50%, remaining 12:50\n"
    assert shown(monkeypatch, 70) == begun + line


def test_what_remains_counts_one_point_for_later_tasks_that_are_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "remaining 5:50" in shown(monkeypatch, 70, tasks="first")
