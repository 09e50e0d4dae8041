"""What a person sees: the live view of a run, and tables of what it chose."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from clnp_search.cli.console import count, duration
from clnp_search.cli.publisher import BEHIND
from clnp_search.config import Sweep
from clnp_search.listener import Listener
from clnp_search.records import PackProgress, PointRecord, Summary, TaskPlan, TaskResult, Units, layer_values

LINE_EVERY_S = 60.0
SCARCE = 0.05  # of a group's units: with fewer free ones it is nearly full
MAX_GROUPS = 4  # that are shown one by one
MAX_VALUES = MAX_GROUPS + 1  # of layers; and the head
LABEL_WIDTH, BAR_WIDTH, TEXT_WIDTH = 16, 40, 42  # at most; a bar has what the others leave of the terminal


class LiveView(Listener):
    """How far the sequence and its task are, the best point, what failed, what is free: live, or in lines elsewhere.

    Args:
        name: The run's.
        results: Tasks that are committed as the run starts.
        tracking: Says what is behind, or how MLflow is doing; nothing if there is nothing to say.
        finished: Whether nothing is left to train.
    """

    def __init__(
        self,
        console: Console,
        sweep: Sweep,
        name: str,
        results: Sequence[TaskResult],
        tracking: Callable[[], str] = lambda: "",
        finished: bool = False,
    ) -> None:
        self._console, self._sweep, self._name, self._tracking = console, sweep, name, tracking
        self._grows = sweep.method == "clnp"  # a baseline uses all units at once, and has nothing to say of them
        self._units: Mapping[str, Units] = results[-1].units if results and self._grows else {}
        self._tasks_done = len(results)
        self._samples: Sequence[int] = ()  # that each task trains on
        # Of the last task, what a point took.
        self._pace = (results[-1].index, results[-1].seconds / results[-1].points) if results else None
        self._stage = "nothing is left to train" if finished else "starting Ray"
        self._plan: TaskPlan | None = None
        self._records: dict[int, PointRecord] = {}  # of this task, by point, as far as they are known here
        self._progress = PackProgress({})
        self._started = self._task_started = self._stage_started = self._line_at = time.monotonic()
        self._share_before = 0.0  # of the stage's training, when it began here
        self._points_here = 0.0  # that the task's search still had to train then
        self._tracking_said = ""
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveView:
        if self._console.is_terminal:
            self._live.start()
        done = f", {self._tasks_done} done" if self._tasks_done else ""
        scenario = self._sweep.scenario
        tasks = count(scenario.tasks, "task") if scenario.tasks else "tasks"  # of a user's own, its data say how many
        self._line(f"{self._name}: {tasks} of {scenario.name}{done}; {self._stage}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def loaded(self, samples: Sequence[int]) -> None:
        """Has estimates go by the tasks' sizes."""
        self._samples = samples

    def task_planned(self, plan: TaskPlan, finished: Sequence[PointRecord]) -> None:
        """Shows the task."""
        rounds = self._sweep.forgetting.finetune_rounds
        self._stage = f"fine-tuning, round {plan.round} of {rounds}" if plan.round else "training"
        begins = self._plan is None or self._plan.task != plan.task
        self._plan, self._stage_started = plan, time.monotonic()
        self._records, self._progress = {record.point.index: record for record in finished}, PackProgress({})
        self._share_before = self._share()
        if begins:
            self._task_started = self._stage_started
            self._points_here = 0.0 if plan.round else self._num_points * (1 - self._share_before)
        note = f", {len(finished)} of them finished before" if finished else ""
        number = len(plan.trained)
        of_all = f" of {self._num_points}" if number < self._num_points else ""
        points, packs = f"{count(number, 'point')}{of_all}", count(len(plan.packs), "pack")
        stage = f"{self._stage}: " if plan.round else ""
        self._line(f"{self._task()} ({plan.name}): {stage}{points} in {packs}{note}{self._left('; ')}")
        self._say_tracking()

    def training(self, progress: PackProgress) -> None:
        """Moves the bars."""
        self._progress = progress
        if time.monotonic() - self._line_at > LINE_EVERY_S:
            self._line("; ".join(filter(None, (f"{self._task()}: {self._trained()}", self._best(), self._left()))))

    def points_finished(self, records: Sequence[PointRecord]) -> None:
        """Shows that the threshold scans begin, if there are any: what was retrained last is committed as it is."""
        assert self._plan is not None, "a task is planned first"
        scans = self._grows and (not self._plan.round or self._plan.round < self._sweep.forgetting.finetune_rounds)
        self._records = {record.point.index: record for record in records}
        self._stage = "scanning thresholds" if scans else "choosing"
        for record in records:
            if record.status == "failed":
                self._line(f"{self._task()}: {record.point.name} failed: {record.reason}", "✗", "red")
        if best := self._best():
            self._line(f"{self._task()}: {self._stage}; {best}")

    def scanning(self, done: int, total: int, models: int) -> None:
        """Counts the models of the scans under way."""
        self._stage = f"scanning thresholds, {done} of {total} ({models:,} models)"
        if time.monotonic() - self._line_at > LINE_EVERY_S:
            self._line(f"{self._task()}: {self._stage}")

    def scanned(self, done: int, total: int) -> None:
        """Counts the scans."""
        self._stage = f"scanning thresholds, {done} of {total}"

    def committed(self, summary: Summary, seconds: float) -> None:
        """Shows what the task chose, and which units become scarce."""
        result = summary.tasks[-1]
        if self._points_here:  # of one whose points were there before, nothing is learned
            self._pace = (result.index, seconds / self._points_here)
        self._units, self._tasks_done = result.units if self._grows else {}, len(summary.tasks)
        free = f"{_free(_all(result.units))}, " if self._grows else ""
        self._line(
            f"{self._task()}: {result.selected.point} kept, test accuracy {result.test_accuracy:.2%}, "
            f"{free}{duration(seconds)}",
            "✓",
            "green",
        )
        scarce = [
            f"{name} {units.free} of {units.total}" for name, units in _scarcest(self._units) if _is_scarce(units)
        ]
        if scarce:
            self._line(f"{self._task()}: less than {SCARCE:.0%} free: {_some(scarce)}", "!", "yellow")
        self._say_tracking()

    def _line(self, text: str, mark: str = "", style: str = "") -> None:
        """Prints a line that stays; on a terminal, where all else is live, only one with a mark."""
        self._line_at = time.monotonic()
        if not self._console.is_terminal:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif mark:
            self._console.print(Text.assemble((mark, style), " ", text))

    def _say_tracking(self) -> None:
        """Prints what is behind when that is new."""
        said, self._tracking_said = self._tracking_said, self._tracking()
        if BEHIND in self._tracking_said and self._tracking_said != said:
            self._line(self._tracking_said, "!", "yellow")

    # What is shown, as text

    @property
    def _num_tasks(self) -> int:
        """Of the sequence; one of a user's own says it with its data, and until then at least one task is left."""
        return self._sweep.scenario.tasks or len(self._samples) or self._tasks_done + 1

    def _task(self) -> str:
        assert self._plan is not None
        return f"task {self._plan.task} of {self._num_tasks}"

    @property
    def _num_epochs(self) -> int:
        """Of each point, in the search or in a fine-tune round."""
        in_round = self._plan is not None and self._plan.round
        return self._sweep.forgetting.finetune_epochs if in_round else self._sweep.training.epochs

    @property
    def _num_searched(self) -> int:
        """Of the search of this task."""
        assert self._plan is not None
        search, points = self._sweep.search, len(self._plan.points)
        grows = search.algorithm == "optuna" and (search.tasks == "every" or self._plan.task == 0)
        return max(points, search.num_points) if grows else points

    @property
    def _num_points(self) -> int:
        """Of this task, or of its fine-tune round; Optuna's are not all known from the start."""
        assert self._plan is not None
        return len(self._plan.trained) if self._plan.round else self._num_searched

    def _epochs(self, point: int) -> int:
        """Finished epochs of a point of this task."""
        if point in self._records:
            return self._num_epochs
        return self._progress.epochs_done.get(point, 0)

    def _share(self) -> float:
        """Of this task's training, what is done."""
        if self._plan is None:
            return 0.0
        done = sum(self._epochs(point.index) for point in self._plan.trained)
        return done / (self._num_epochs * self._num_points)

    def _trained(self) -> str:
        assert self._plan is not None
        points, epochs = self._plan.trained, self._num_epochs
        trained = sum(self._epochs(point.index) == epochs for point in points)
        return f"{trained} of {count(self._num_points, 'point')} trained, {self._share():.0%} of the epochs"

    def _best(self) -> str:
        """The point that is ahead, with what it was trained with."""
        done = [(index, record.val_accuracy) for index, record in self._records.items() if record.status == "done"]
        best = max([*done, *filter(None, [self._progress.best])], key=lambda each: each[1], default=None)
        if best is None or self._plan is None:
            return ""
        point = self._plan.points[best[0]]
        name = "alpha" if self._grows else "strength"
        settings = f"{name} {layer_values(point.alpha, MAX_VALUES, ' ')}, learning rate {point.learning_rate:g}"
        return f"best validation accuracy {best[1]:.2%} by {point.name} ({settings})"

    def _failed(self) -> str:
        recorded = {index for index, record in self._records.items() if record.status == "failed"}
        failed = recorded | set(self._progress.failed)
        if not failed or self._plan is None:
            return ""
        return f"{count(len(failed), 'point')}: {_some([self._plan.points[index].name for index in sorted(failed)])}"

    def _left(self, before: str = "") -> str:
        """What the whole sequence will still take, by the pace of this task, or of the last one as long as need be."""
        if self._plan is None:
            return ""
        task, now, share = self._plan.task, time.monotonic(), self._share()
        elapsed = now - self._stage_started
        points = self._num_points * (1 - self._share_before)  # that were left to train
        point_s = self._pace[1] * self._size(task) / self._size(self._pace[0]) if self._pace else None
        if share < 1 and share - self._share_before > 0.05:
            rest = elapsed * (1 - share) / (share - self._share_before)
        elif point_s is not None:
            rest = max(0.0, points * point_s - elapsed)
        elif share == 1 and points:
            rest = 0.0
        else:
            return ""
        if point_s is None:
            if not self._points_here:
                return ""
            point_s = (now - self._task_started + rest) / self._points_here
        later = sum(self._size(each) for each in range(task + 1, self._num_tasks)) / self._size(task)
        later_points = 1 if self._sweep.search.tasks == "first" else self._num_searched
        return f"{before}about {duration(max(1.0, rest + later * later_points * point_s))} left"

    def _size(self, task: int) -> int:
        """Of a task: its samples, or the same for all as long as they are not known."""
        return self._samples[task] if task < len(self._samples) else 1

    # What is shown, as a picture

    def _render(self) -> RenderableType:
        task = f"{self._task()} ({self._plan.name}), " if self._plan else ""
        tasks, elapsed = self._num_tasks, duration(time.monotonic() - self._started)
        open_task = self._plan is not None and self._plan.task == self._tasks_done
        share = self._share() if open_task else 0.0
        done = f"{self._tasks_done} of {count(tasks, 'task')}, {elapsed}{self._left(', ') if open_task else ''}"
        bars = [_Bar("sequence", self._tasks_done + share, tasks, done)]
        if open_task:
            bars.append(_Bar("task", share, 1.0, self._trained()))
        return Group(
            _cut(Text(f"{self._name}: {task}{self._stage}", style="bold")),
            _grid([*bars, *_unit_bars(self._units)], self._console.width),
            *(_cut(Text(text, style)) for text, style in self._notes()),
        )

    def _notes(self) -> Iterator[tuple[str, str]]:
        if best := self._best():
            yield best, ""
        if failed := self._failed():
            yield f"failed {failed}", "red"
        if tracking := self._tracking():
            yield tracking, "yellow" if BEHIND in tracking else "dim"


@dataclass(frozen=True)
class _Bar:
    label: str
    done: float
    total: float
    text: str
    style: str = ""


def _unit_bars(units: Mapping[str, Units]) -> Iterator[_Bar]:
    """Units in use of each group; of many groups, of all and of the scarcest."""
    shown = list(units.items())
    if len(shown) > MAX_GROUPS:
        shown = [(f"all {len(units)} groups", _all(units)), *_scarcest(units)[: MAX_GROUPS - 1]]
    for name, each in shown:
        style = "yellow" if _is_scarce(each) else "cyan"
        yield _Bar(name, each.active, each.total, _free(each), style)


def _grid(bars: Sequence[_Bar], width: int) -> Table:
    """Bars with their labels and texts, on a line each whatever the terminal's width."""
    labels = min(LABEL_WIDTH, max(len(bar.label) for bar in bars))
    length = max(4, min(BAR_WIDTH, width - labels - TEXT_WIDTH - 4))
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=labels, no_wrap=True)
    grid.add_column(width=length)
    grid.add_column(width=width - labels - length - 4, no_wrap=True, overflow="ellipsis")
    for bar in bars:
        progress = ProgressBar(bar.total, bar.done, length, complete_style=bar.style or "bar.complete")
        grid.add_row(_tail(bar.label, labels), progress, Text(bar.text, bar.style if bar.style == "yellow" else ""))
    return grid


def _cut(text: Text) -> Text:
    """On one line."""
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _all(units: Mapping[str, Units]) -> Units:
    """The units of all groups together."""
    counts = [(each.total, each.active, each.new, each.free) for each in units.values()]
    return Units(*map(sum, zip(*counts, strict=True)))


def _scarcest(units: Mapping[str, Units]) -> list[tuple[str, Units]]:
    """The groups, those with the smallest free share first."""
    return sorted(units.items(), key=lambda pair: pair[1].free / pair[1].total)


def _is_scarce(units: Units) -> bool:
    return units.free < SCARCE * units.total


def _free(units: Units) -> str:
    return f"{units.free:,} of {units.total:,} units free"


def summary_table(summary: Summary, status: str = "") -> Table:
    """What every task chose and what it costs; `pruned` and `val` are validation accuracies, `now` is the last test.

    Of a network with many groups of units, all together and the scarcest.

    Args:
        status: Where it is another one than the summary's, which cannot know that its run was interrupted.
    """
    groups = list(summary.tasks[0].units) if summary.tasks else []
    many = len(groups) > MAX_GROUPS
    table = Table(
        title=f"{escape(summary.name)}: {status or summary.status}",
        title_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in ("task", "alpha", "xi", "theta", "val", "pruned", "test", "now"):
        table.add_column(column, justify="left" if column in {"task", "alpha", "theta"} else "right", no_wrap=True)
    for column in (
        ("units\nnew/free", "scarcest\nfree/all") if many else (f"{escape(group)}\nnew/free" for group in groups)
    ):
        table.add_column(column, justify="right", no_wrap=True)
    last = summary.tasks[-1].test_accuracies if summary.tasks else ()
    for result in summary.tasks:
        chosen = result.selected
        units = [f"{each.new}/{each.free}" for each in ([_all(result.units)] if many else result.units.values())]
        if many:
            _, scarcest = _scarcest(result.units)[0]
            units.append(f"{scarcest.free}/{scarcest.total}")
        table.add_row(
            str(result.index),
            layer_values(chosen.alpha, MAX_VALUES, "\n"),
            f"{chosen.learning_rate:g}",
            layer_values(chosen.theta, MAX_VALUES, "\n"),
            f"{100 * result.best_val_accuracy:.2f}",
            f"{100 * chosen.val_accuracy:.2f}",
            f"{100 * result.test_accuracy:.2f}",
            f"{100 * last[result.index]:.2f}",
            *units,
        )
    return table


def summary_line(summary: Summary) -> str:
    """The sequence in one line."""
    return (
        f"average test accuracy {summary.average_test_accuracy:.2%}, "
        f"largest forgetting {summary.max_forgetting:.2%}, state {summary.state_digest[:12]}"
    )


def _some(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - MAX_GROUPS} more" if len(names) > MAX_GROUPS else ""
    return ", ".join(names[:MAX_GROUPS]) + more


def _tail(name: str, length: int) -> str:
    """A name, cut at its front if it is too long: names of layers differ at their ends."""
    return name if len(name) <= length else f"…{name[1 - length :]}"
