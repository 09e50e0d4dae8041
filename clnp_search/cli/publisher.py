"""Figures and MLflow, behind the search's back: one thread of the driver has figures drawn, and writes to MLflow."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from clnp_search.config import Sweep
from clnp_search.listener import Listener
from clnp_search.records import PointRecord, Summary, TaskPlan
from clnp_search.storage import RunFolder

if TYPE_CHECKING:
    from clnp_search.tracking.mlflow import MlflowTracker

logger = logging.getLogger(__name__)
BEHIND = " behind: "  # in what is said if it is to worry about
DRAW_EVERY_S = 20.0  # figures of the whole run; they are drawn when it ends in any case
LEAVE_S = 1.0  # that an interrupt waits for a request that is under way


class Publisher(Listener):
    """Projects the run folder whenever a task moves on; the end of its context waits for the last projection.

    While the tracking server is unreachable, records wait in the run folder: every later event tries again, and so
    does a resume.

    Attributes:
        beside: Calls a function with its arguments where it is not in the search's way, if there is such a place.
        behind: What of the last projection was not written, and why, in words; empty if all of it was.
    """

    def __init__(self, folder: RunFolder, sweep: Sweep) -> None:
        self.beside: Callable[..., None] = _here
        self.behind = ""
        self._busy = self._is_left = False
        self._folder, self._sweep = folder, sweep
        self._tracker: MlflowTracker | None = None
        self._summary: Summary | None = None  # that is projected
        self._drawn: Summary | None = None  # of which all figures are there
        self._drawn_at = -math.inf
        self._events: queue.SimpleQueue[bool] = queue.SimpleQueue()  # something moved; False is the end
        self._thread = threading.Thread(target=self._work, name="publisher", daemon=True)

    def __enter__(self) -> Publisher:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._events.put(False)
        # An interrupt waits for no server, whenever it comes: what is not written yet, a resume writes.
        if kind is not None and not issubclass(kind, Exception):
            self._is_left = True
            self._thread.join(LEAVE_S)
            return
        try:
            self._thread.join()
        except BaseException:
            self._is_left = True
            raise
        self._publish()  # what is left, here: nothing else needs the cores any more

    def state(self) -> str:
        """What is behind, or how MLflow is doing, in words; nothing if runs are not logged."""
        if self.behind or self._sweep.tracking.uri == "none":
            return self.behind
        return f"MLflow is {'being written' if self._busy or not self._events.empty() else 'up to date'}"

    def task_planned(self, plan: TaskPlan, finished: Sequence[PointRecord]) -> None:
        """Opens the task's run, so that it is seen from the start."""
        self._events.put(True)

    def points_finished(self, records: Sequence[PointRecord]) -> None:
        """Logs the task's points."""
        self._events.put(True)

    def committed(self, summary: Summary, seconds: float) -> None:
        """Draws and logs the task."""
        self._events.put(True)

    def _work(self) -> None:
        while self._moved() and not self._is_left:
            self._publish()

    def _publish(self) -> None:
        self._busy, faults = True, []
        for step, what in ((self._read, "what is shown is"), (self._draw, "figures are"), (self._log, "MLflow is")):
            try:
                step()
            except Exception as error:  # whatever it is, the search goes on and the run folder keeps the records
                faults.append(f"{what}{BEHIND}{type(error).__name__}: {error}")
                logger.debug("not published", exc_info=True)
        self.behind = "; ".join(faults)
        self._busy = False

    def _read(self) -> None:
        self._summary = None  # of which nothing is shown if it cannot be read
        self._summary = self._folder.read_summary()

    def _draw(self) -> None:
        # Imported with the first event: until then the search's own start needs the cores.
        from clnp_search.report.figures import draw_run

        summary = self._summary
        if summary is not None and summary.tasks and summary != self._drawn:
            # Small tasks take no longer than a figure of all of them.
            whole = summary.status != "running" or time.monotonic() - self._drawn_at >= DRAW_EVERY_S
            self.beside(draw_run, self._folder, summary, whole)
            if whole:
                self._drawn, self._drawn_at = summary, time.monotonic()

    def _log(self) -> None:
        from clnp_search.tracking.mlflow import MlflowTracker

        if self._summary is not None and self._sweep.tracking.uri != "none":
            self._tracker = self._tracker or MlflowTracker(self._folder, self._sweep)
            self._tracker.sync(self._summary, self._is_superseded)

    def _is_superseded(self) -> bool:
        """Whether a later event waits.

        Raises:
            InterruptedError: The sequence is left.
        """
        if self._is_left:
            raise InterruptedError("the sequence was interrupted")
        return not self._events.empty()

    def _moved(self) -> bool:
        """Waits for an event, and takes those behind it along: one projection includes them all. False at the end."""
        moved = self._events.get()
        while moved and not self._events.empty():
            if not self._events.get():
                self._events.put(False)
                break
        return moved


def _here(function: Callable[..., None], *arguments: Any) -> None:
    function(*arguments)
