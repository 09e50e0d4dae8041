"""What a person sees: the live view of a run, and tables of what it chose."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from clnp_search.config import Sweep
from clnp_search.listener import Listener
from clnp_search.records import PackProgress, PointRecord, Summary, TaskPlan, TaskResult, Units

LINE_EVERY_S = 60.0


class LiveView(Listener):
    """Task, points done, best validation accuracy, capacity of each layer, time: live on a terminal, else in lines.

    Args:
        results: Tasks that are committed as the run starts.
    """

    def __init__(self, console: Console, sweep: Sweep, results: Sequence[TaskResult]) -> None:
        self._console, self._sweep = console, sweep
        self._units: dict[str, Units] = results[-1].units if results else {}
        self._tasks_done = len(results)
        self._plan: TaskPlan | None = None
        self._finished_points = 0
        self._share = 0.0
        self._best = 0.0
        self._stage = "starting Ray"
        self._point_s: float | None = None  # what a point of the last task took
        self._started = self._task_started = self._line_at = time.monotonic()
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def task_planned(self, plan: TaskPlan, finished_points: int) -> None:
        """Shows the task."""
        self._plan, self._finished_points = plan, finished_points
        self._share, self._best = finished_points / len(plan.points), 0.0
        self._task_started = time.monotonic()
        self._stage = "training"
        note = f", {finished_points} of them finished before" if finished_points else ""
        self._line(f"{self._title()}: {len(plan.points)} points in {len(plan.packs)} packs{note}")

    def training(self, progress: PackProgress) -> None:
        """Moves the bar."""
        assert self._plan is not None
        points = sum(
            len(self._plan.packs[pack]) * epochs / self._sweep.training.epochs
            for pack, epochs in progress.epochs_done.items()
        )
        self._share = min(1.0, (self._finished_points + points) / len(self._plan.points))
        self._best = max(self._best, progress.best_val_accuracy)
        if time.monotonic() - self._line_at > LINE_EVERY_S:
            self._line(
                f"{self._title()}: {self._share:.0%} of the training, best validation accuracy {self._best:.2%}, "
                f"remaining {self._remaining()}"
            )

    def points_finished(self, records: Sequence[PointRecord]) -> None:
        """Shows that the threshold scans begin."""
        self._stage, self._share = "scanning thresholds", 1.0
        self._best = max(record.val_accuracy for record in records)
        failed = [record for record in records if record.status == "failed"]
        for record in failed:
            self._line(f"{self._title()}: {record.point.name} failed: {record.reason}")
        self._line(f"{self._title()}: best validation accuracy {self._best:.2%}; scanning thresholds")

    def scanned(self, done: int, total: int) -> None:
        """Counts the scans."""
        self._stage = f"scanning thresholds, {done} of {total}"

    def committed(self, summary: Summary, seconds: float) -> None:
        """Shows what the task chose."""
        result = summary.tasks[-1]
        self._point_s = seconds / result.points
        self._units, self._tasks_done = result.units, len(summary.tasks)
        grown = ", ".join(f"{name} +{units.new} ({units.free} free)" for name, units in result.units.items())
        line = (
            f"{self._title()}: {result.selected.point} kept, "
            f"test accuracy {result.test_accuracy:.2%}; {grown}; {_duration(seconds)}"
        )
        if self._console.is_terminal:
            self._console.print(f"[green]✓[/] {line}", highlight=False)
        else:
            self._line(line)

    def _line(self, text: str) -> None:
        self._line_at = time.monotonic()
        if not self._console.is_terminal:
            self._console.print(text, highlight=False, soft_wrap=True)

    def _title(self) -> str:
        assert self._plan is not None
        of_all = f" of {self._sweep.scenario.tasks}" if self._sweep.scenario.tasks else ""
        return f"task {self._plan.task}{of_all} ({self._plan.name})"

    def _remaining(self) -> str:
        """By the pace of the last task, or of this one if it is the first."""
        assert self._plan is not None
        points, elapsed = len(self._plan.points), time.monotonic() - self._task_started
        if self._point_s is not None:
            whole = points * self._point_s
        elif self._share > 0.05 and self._stage == "training":
            whole = elapsed / self._share
        else:
            return "…"
        later = (self._sweep.scenario.tasks or self._tasks_done + 1) - self._tasks_done - 1
        later_points = 1 if self._sweep.search.tasks == "first" else points
        return _duration(max(0.0, whole * (1 + later * later_points / points) - elapsed))

    def _render(self) -> RenderableType:
        elapsed = _duration(time.monotonic() - self._started)
        if self._plan is None:
            return Text(f"{self._stage} … {elapsed}")
        head = Table.grid(padding=(0, 2))
        points = len(self._plan.points)
        done = self._finished_points if self._share < 1 else points
        head.add_row(
            Text(self._title(), style="bold"),
            self._stage,
            f"points {max(done, int(self._share * points))}/{points}",
            f"best val {self._best:.2%}" if self._best else "",
            f"elapsed {elapsed}",
            f"remaining {self._remaining()}",
        )
        bars = Table.grid(padding=(0, 2))
        bars.add_row("grid", ProgressBar(total=1.0, completed=self._share, width=40), f"{self._share:.0%}")
        for name, units in self._units.items():
            bar = ProgressBar(total=units.total, completed=units.active, width=40, complete_style="cyan")
            bars.add_row(name, bar, f"{units.active} of {units.total} units used, {units.free} free")
        return Group(head, bars)


def summary_table(summary: Summary) -> Table:
    """What every task chose and what it costs; `pruned` and `val` are validation accuracies, `now` is the last test."""
    layers = list(summary.tasks[0].units) if summary.tasks else []
    table = Table(
        title=f"{summary.name}: {summary.status}",
        title_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in ("task", "alpha", "xi", "theta", "val", "pruned", "test", "now"):
        table.add_column(column, justify="left" if column in {"task", "alpha", "theta"} else "right", no_wrap=True)
    for layer in layers:
        table.add_column(f"{layer}\nnew/free", justify="right", no_wrap=True)
    last = summary.tasks[-1].test_accuracies if summary.tasks else ()
    for result in summary.tasks:
        chosen = result.selected
        table.add_row(
            str(result.index),
            _compact(chosen.alpha),
            f"{chosen.learning_rate:g}",
            _compact(chosen.theta),
            f"{100 * result.best_val_accuracy:.2f}",
            f"{100 * chosen.val_accuracy:.2f}",
            f"{100 * result.test_accuracy:.2f}",
            f"{100 * last[result.index]:.2f}",
            *(f"{units.new}/{units.free}" for units in result.units.values()),
        )
    return table


def summary_line(summary: Summary) -> str:
    """The sequence in one line."""
    return (
        f"average test accuracy {summary.average_test_accuracy:.2%}, "
        f"forgetting {summary.max_forgetting:.2%} (largest over tasks), state {summary.state_digest[:12]}"
    )


def _compact(values: Sequence[float]) -> str:
    distinct = dict.fromkeys(f"{value:.3g}" for value in values)
    return next(iter(distinct)) if len(distinct) == 1 else "\n".join(f"{value:.3g}" for value in values)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
