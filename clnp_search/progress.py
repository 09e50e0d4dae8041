"""How far a run has come, told from its folder alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from clnp_search.config import Sweep, sweep_of
from clnp_search.errors import Damaged, InputError
from clnp_search.lease import STILL_S, is_alive
from clnp_search.records import RunStatus, Summary, summarise
from clnp_search.storage import RunFolder, join_uri

CLOCKS_S = 300.0  # by which this machine's clock may be ahead of the storage's: as much as Kerberos allows


@dataclass(frozen=True)
class FailedPoint:
    """A grid point that could not be trained, and why."""

    task: int
    point: str
    reason: str


@dataclass(frozen=True)
class Cost:
    """How long a task has kept trials busy; points that were taken over from another run cost nothing here.

    Args:
        training_s: Seconds of the trials that trained its points, fine-tune rounds included.
        scans_s: Seconds of its threshold scans.
    """

    task: int
    training_s: float
    scans_s: float


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Args:
        status: As in the summary, which has the reason of a failure; `interrupted` if it should be running and no
            process drives it.
        summary: Its figures so far, also if `summary.json` is missing.
        task: The task that comes next, or None.
        points_done: Of this task, the points that have a record.
        points: Of this task; 0 if it is not planned yet.
        failed_points: Of all tasks.
    """

    sweep: Sweep
    status: RunStatus | Literal["interrupted"]
    summary: Summary
    task: int | None
    points_done: int
    points: int
    failed_points: tuple[FailedPoint, ...]

    @property
    def has_no_model(self) -> bool:
        """Whether every point of the next task has failed."""
        failed = [each for each in self.failed_points if each.task == self.task and "-round" not in each.point]
        return 0 < self.points == len(failed)


def progress_of(folder: RunFolder) -> Progress:
    """Where a run stands.

    Raises:
        InputError: This is no run folder.
    """
    sweep, summary = sweep_of(folder), folder.read_summary()
    results = folder.read_results()
    if summary is None or len(summary.tasks) < len(results):  # the results are the truth
        status: RunStatus = "complete" if len(results) == sweep.scenario.tasks else "running"
        digest = results[-1].state_digest if results else ""
        summary = summarise(folder.name, status, sweep.seed, digest, results)
    ended = summary.status in ("complete", "depleted")
    task = None if ended else len(summary.tasks)
    plan = folder.read_plan(task) if task is not None else None
    records = [folder.read_point(plan.task, point.name) for point in plan.points] if plan else []
    running = not ended and is_running(folder)
    return Progress(
        sweep=sweep,
        status="running" if running else "interrupted" if summary.status == "running" else summary.status,
        summary=summary,
        task=task,
        points_done=sum(record is not None for record in records),
        points=len(records),
        failed_points=failed_points(folder),
    )


def failed_points(folder: RunFolder) -> tuple[FailedPoint, ...]:
    """The points of all tasks that failed."""
    return tuple(
        FailedPoint(task, record.point.name_in(record.round), record.reason) for task, record in folder.read_failed()
    )


def costs_of(folder: RunFolder) -> tuple[Cost, ...]:
    """What each task has cost so far."""
    costs: list[Cost] = []
    branch = folder.read_fork()
    shared = branch.after_task + 1 if branch else 0
    while folder.read_plan(task := len(costs)) is not None:
        records = [record for record in folder.read_points(task) if not record.origin and task >= shared]
        points = {record.point.index for record in records}
        scans = [scan for scan in folder.read_scans(task) if scan.point in points]
        costs.append(Cost(task, sum(each.seconds for each in records), sum(each.seconds for each in scans)))
    return tuple(costs)


def is_running(folder: RunFolder) -> bool:
    """Whether a process drives the run: it is seen to live, or if that cannot be seen from here, renews its lease."""
    holder = folder.read_lease()
    if holder is None:
        return False
    alive = is_alive(holder)
    return time.time() - folder.written_at("lease.json") < STILL_S + CLOCKS_S if alive is None else alive


def runs_under(storage: str) -> Iterator[tuple[RunFolder, Progress | None]]:
    """All runs under a storage, by name; None for the progress of a run that cannot be read."""
    root = RunFolder(storage)
    for name in root.folders():
        folder = RunFolder(join_uri(storage, name))
        try:
            if folder.exists("sweep.yaml"):
                yield folder, progress_of(folder)
        except (InputError, Damaged, OSError):
            yield folder, None
