"""How a sequence goes on, as metrics of Ray, whose agent on each node serves them to Prometheus.

They are gauges, told from records, so that a run that was interrupted goes on where it was. Where no agent listens, Ray
drops them.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from clnp_search.listener import Listener
from clnp_search.records import PackProgress, PointRecord, Summary, TaskPlan

# Name to what it is, and its tags besides `run`; Ray puts `ray_` before the names.
METRICS = {
    "clnp_search_points": ("Points of a task, or of its fine-tune round", "task"),
    "clnp_search_points_done": ("Points of it that have ended, failed ones included", "task"),
    "clnp_search_points_failed": ("Points of it that failed", "task"),
    "clnp_search_epoch_seconds": ("Seconds of a trial that an epoch of one point took, on average", "task"),
    "clnp_search_tasks_committed": ("Tasks that are committed", ""),
    "clnp_search_free_units": ("Units of a group that no task uses yet", "group"),
}


class RayMetrics(Listener):
    """Sets a run's metrics. Ray must be there when the first event comes."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Any] = {}
        self._plan: TaskPlan | None = None
        self._finished: dict[int, PointRecord] = {}

    def task_planned(self, plan: TaskPlan, finished: Sequence[PointRecord]) -> None:
        """Counts the task's points."""
        self._plan, self._finished = plan, {record.point.index: record for record in finished}
        self._count(PackProgress({}))

    def training(self, progress: PackProgress) -> None:
        """Counts those that have ended."""
        self._count(progress)

    def points_finished(self, records: Sequence[PointRecord]) -> None:
        """Counts all of them, and the seconds of their epochs."""
        self._finished = {record.point.index: record for record in records}
        self._count(PackProgress({}))
        if seconds := [record.seconds / len(record.epochs) for record in records if record.epochs]:
            self._set("clnp_search_epoch_seconds", statistics.fmean(seconds), self._task)

    def committed(self, summary: Summary, seconds: float) -> None:
        """Counts tasks and free units."""
        self._set("clnp_search_tasks_committed", len(summary.tasks))
        for group, units in summary.tasks[-1].units.items():
            self._set("clnp_search_free_units", units.free, {"group": group})

    @property
    def _task(self) -> dict[str, str]:
        assert self._plan is not None, "a task is planned first"
        return {"task": str(self._plan.task)}

    def _count(self, progress: PackProgress) -> None:
        assert self._plan is not None, "a task is planned first"
        failed = {index for index, record in self._finished.items() if record.status == "failed"} | {*progress.failed}
        self._set("clnp_search_points", len(self._plan.trained), self._task)
        self._set("clnp_search_points_done", len(self._finished.keys() | failed | {*progress.ended}), self._task)
        self._set("clnp_search_points_failed", len(failed), self._task)

    def _set(self, name: str, value: float, tags: Mapping[str, str] = {}) -> None:
        if not self._gauges:
            from ray.util.metrics import Gauge

            for each, (what, tag) in METRICS.items():
                self._gauges[each] = Gauge(each, what, ("run", *filter(None, [tag])))
        self._gauges[name].set(value, {"run": self._run, **tags})
