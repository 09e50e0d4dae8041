"""Whom a sequence tells how it goes on: the live view, the figures, MLflow."""

from __future__ import annotations

from collections.abc import Sequence

from clnp_search.records import PackProgress, PointRecord, Summary, TaskPlan


class Listener:
    """What is told how a sequence goes on; each method may be left as it is."""

    def loaded(self, samples: Sequence[int]) -> None:
        """The data set is there: how many samples each task trains on."""

    def task_planned(self, plan: TaskPlan, finished: Sequence[PointRecord]) -> None:
        """A task's grid is decided; some of its points may be recorded already."""

    def training(self, progress: PackProgress) -> None:
        """Packs in flight have reported."""

    def points_finished(self, records: Sequence[PointRecord]) -> None:
        """All points of the task are recorded."""

    def scanning(self, done: int, total: int, models: int) -> None:
        """Threshold scans are under way, and have tried so many models; as many candidates are done."""

    def scanned(self, done: int, total: int) -> None:
        """Some of the candidates' threshold scans are done."""

    def committed(self, summary: Summary, seconds: float) -> None:
        """A task is committed and reported."""
