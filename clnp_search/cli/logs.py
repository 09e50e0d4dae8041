"""Standard error as one JSON object a line, for what collects the logs of a cluster."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

from clnp_search.cli.console import err
from clnp_search.cli.publisher import BEHIND
from clnp_search.listener import Listener
from clnp_search.records import PackProgress, PointRecord, Summary, TaskPlan, TaskResult

if TYPE_CHECKING:
    from clnp_search.config import Sweep

VARIABLE = "CLNP_SEARCH_LOG_FORMAT"
PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

logger = logging.getLogger(__name__)
_context: dict[str, Any] = {}  # the run and the task that this process is at


def use_json() -> None:
    """Has this process say everything as JSON from now on."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonFormatter())
    package = logging.getLogger("clnp_search")
    package.setLevel(min(package.level or logging.INFO, logging.INFO))
    logging.captureWarnings(True)
    err.file = _Lines()  # type: ignore[assignment]  # Console writes and flushes, and that is all


def is_json() -> bool:
    """Whether this process says everything as JSON."""
    return isinstance(err.file, _Lines)


def relay(text: str) -> None:
    """Shows what another process of ours has said, which is JSON where this one says it."""
    if is_json():
        sys.stderr.write(text)
    else:
        err.print(text, end="", markup=False, highlight=False, soft_wrap=True)


class JsonFormatter(logging.Formatter):
    """A record as a JSON object: time, level, logger, message, run and task where known, and what it has as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """The object, on one line."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = {"time": time, "level": record.levelname.lower(), "logger": record.name}
        fields |= {"message": record.getMessage()} | _context
        fields |= {name: value for name, value in vars(record).items() if name not in PLAIN and name[0] != "_"}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


class _Lines:
    """A stream whose lines are logged."""

    def __init__(self) -> None:
        self._begun = ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in filter(None, lines):
            logger.info("%s", line)
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()


class EventLog(Listener):
    """Logs how a sequence goes on, with the figures that the live view shows.

    Args:
        name: The run's.
        results: Tasks that are committed as the run starts.
        tracking: Says what is behind, or how MLflow is doing; nothing if there is nothing to say.
    """

    def __init__(
        self, sweep: Sweep, name: str, results: Sequence[TaskResult], tracking: Callable[[], str] = lambda: ""
    ) -> None:
        self._sweep, self._name, self._results, self._tracking = sweep, name, results, tracking
        self._plan: TaskPlan | None = None
        self._done: set[int] = set()  # points of the task that have ended

    def __enter__(self) -> EventLog:
        _context["run"] = self._name
        self._log("run started", tasks=self._sweep.scenario.tasks, tasks_done=len(self._results))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log("run ended" if error is None else "run cut short")
        _context.clear()

    def task_planned(self, plan: TaskPlan, finished: Sequence[PointRecord]) -> None:
        """Logs the task, or its next fine-tune round."""
        _context["task"] = plan.task
        self._plan, self._done = plan, {record.point.index for record in finished}
        self._log("task planned", task_name=plan.name, round=plan.round, packs=len(plan.packs), **self._counts)
        if BEHIND in (tracking := self._tracking()):
            self._log(tracking, logging.WARNING)

    def training(self, progress: PackProgress) -> None:
        """Logs points that have ended."""
        if not self._done.issuperset(progress.ended):
            self._done.update(progress.ended)
            self._log("points done", best_val_accuracy=progress.best and progress.best[1], **self._counts)

    def points_finished(self, records: Sequence[PointRecord]) -> None:
        """Logs that all points of the task have ended, and which have failed."""
        for record in records:
            if record.status == "failed":
                self._log("point failed", logging.WARNING, point=record.point.name, reason=record.reason)
        self._done = {record.point.index for record in records}
        failed = sum(record.status == "failed" for record in records)
        self._log("points finished", points_failed=failed, **self._counts)

    def scanned(self, done: int, total: int) -> None:
        """Logs that all candidates are scanned."""
        if done == total:
            self._log("thresholds scanned", candidates=total)

    def committed(self, summary: Summary, seconds: float) -> None:
        """Logs what the task has chosen."""
        result = summary.tasks[-1]
        self._log(
            "task committed",
            point=result.selected.point,
            val_accuracy=result.selected.val_accuracy,
            test_accuracy=result.test_accuracy,
            average_test_accuracy=summary.average_test_accuracy,
            max_forgetting=summary.max_forgetting,
            free_units={group: units.free for group, units in result.units.items()},
            seconds=round(seconds, 3),
            state_digest=result.state_digest,
        )

    @property
    def _counts(self) -> dict[str, Any]:
        assert self._plan is not None, "a task is planned first"
        return {"points_done": len(self._done), "points": len(self._plan.trained)}

    def _log(self, message: str, level: int = logging.INFO, **fields: Any) -> None:
        logger.log(level, message, extra=fields)
