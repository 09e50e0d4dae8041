"""Packs as Ray Tune trials. A trial's process imports this module, so it imports nothing heavy besides Tune.

Ray starts a new process for each trial of an experiment, which takes longer than training a small network, and keeps
one for its next trial. So all tasks of a run are one experiment: Tune asks for a next trial, and is given the next
task's packs once the last task is committed. A trial holds no CPUs or GPUs while it waits for that; it watches over
its pack, which is trained by a Ray task with the resources of a trial.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray import tune
from ray.tune.search import Searcher

from clnp_search.errors import MachineFault
from clnp_search.records import PackProgress
from clnp_search.search.retries import cause_of, in_new_process, pause, tried

if TYPE_CHECKING:
    from clnp_search.search.trial import OfTask, RunInputs

logger = logging.getLogger(__name__)
T = TypeVar("T")
# Of a trial's own process, which only watches.
WATCHER_BYTES = 256 << 20


@dataclass(frozen=True)
class Packs:
    """Packs of a task that are to be trained.

    Args:
        indices: Of the packs, in the task's plan.
        inputs: The task's plan and state, in the object store.
    """

    task: int
    indices: tuple[int, ...]
    inputs: ray.ObjectRef


# Asks for packs to be trained, goes on when every point of them has a record, and ends with a result.
Program = Generator[Packs, None, T]


class _Ended(BaseException):
    """A pack failed for good, by this fault. Not an `Exception`, which Tune would take for a failure of the trial."""

    def __init__(self, fault: MachineFault) -> None:
        self.fault = fault


def run_trials(
    program: Program[T],
    shared: ray.ObjectRef,
    options: dict[str, float],
    num_slots: int,
    ray_folder: tuple[str, Any],
    max_failures: int,
    listen: Callable[[PackProgress], None],
) -> T:
    """Runs a program, and one trial for each pack that it asks for.

    Args:
        shared: The run's inputs (`RunInputs`).
        options: Of the Ray task that trains a pack: its resources.
        num_slots: How many packs are trained at a time.
        ray_folder: Where Tune keeps its experiments: a path, and its pyarrow filesystem.
        max_failures: How often a pack is tried again, and its trial started again.
        listen: Is told how the packs go on.

    Returns:
        The program's result.

    Raises:
        MachineFault: A pack failed more often than that, by no fault of its points. The others are cut short.
    """
    feed = _Feed(program, num_slots, listen)
    path, filesystem = ray_folder
    if not feed.finished:
        # A reference inside a list stays one: the trial hands it on without reading the inputs itself. The references
        # to a task's inputs come with its packs, as a part of the trials' configuration.
        trainable = tune.with_parameters(_train_trial, shared=[shared], options=options, max_failures=max_failures)
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"memory": WATCHER_BYTES}),
            tune_config=tune.TuneConfig(
                search_alg=feed,
                num_samples=-1,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name=f"{time.time_ns():x}",  # a new one, because Tune mixes trials of equal names
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=tune.FailureConfig(max_failures=max_failures),
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        except (Exception, _Ended) as error:  # the program ends as by an error of its own
            program.throw(error.fault if isinstance(error, _Ended) else error)
    return feed.result()


class _Feed(Searcher):
    """Gives Tune a program's packs as trials, and goes on with the program when all of a request are done.

    It also hands Tune's results on. A callback could do that, but for any callback Tune imports MLflow, which takes
    seconds, to see whether it is one of its own.
    """

    def __init__(self, program: Program[Any], num_slots: int, listen: Callable[[PackProgress], None]) -> None:
        super().__init__()
        self.finished = False
        self._program, self._num_slots, self._listen = program, num_slots, listen
        self._result: Any = None
        self._error: Exception | None = None
        self._waiting: list[int] = []
        self._running: dict[str, int] = {}  # the pack of each trial
        self._progress, self._accuracies = PackProgress({}), dict[int, float]()
        self._advance()

    def result(self) -> Any:
        """What the program returned; raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._result

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's pack; None while there is none, or no slot for it."""
        if not self._waiting and not self._running and not self.finished:
            self._advance()
        if self.finished:
            return Searcher.FINISHED
        if not self._waiting or len(self._running) >= self._num_slots:
            return None
        self._running[trial_id] = pack = self._waiting.pop(0)
        return {"pack": pack, "inputs": [self._packs.inputs]}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if "failures" in result:
            fault = f"pack {self._running[trial_id]} of task {self._packs.task}: {result['cause']}"
            if result["given_up"]:
                raise _Ended(MachineFault(fault + tried(result["failures"])))
            logger.warning("%s; trying again", fault, extra={"pack": self._running[trial_id]})
            return
        points = result.get("points", ())
        self._accuracies |= {point: accuracy for point, _, accuracy in points}
        self._progress = PackProgress(
            self._progress.epochs_done | {point: epochs for point, epochs, _ in points},
            # Of equal ones the first.
            max(self._accuracies.items(), key=lambda seen: (seen[1], -seen[0]), default=None),
            (*self._progress.failed, *result.get("failed", ())),
            (*self._progress.ended, *result.get("ended", ())),
        )
        self._listen(self._progress)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pack = self._running.pop(trial_id)
        if error:
            raise _Ended(MachineFault(f"pack {pack} of task {self._packs.task}: the process that watches over it died"))

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True  # there is nothing to optimise: the packs are given

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: a resumed run reads its own records."""

    def get_state(self) -> dict[str, Any]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its experiment; the program is of this process only

    def _advance(self) -> None:
        try:
            self._packs = next(self._program)
            self._waiting = list(self._packs.indices)
            self._progress, self._accuracies = PackProgress({}), {}
        except StopIteration as end:
            self._result, self.finished = end.value, True
        except Exception as error:  # Tune would wrap it
            self._error, self.finished = error, True


def _train_trial(
    config: dict[str, Any], shared: list[ray.ObjectRef], options: dict[str, float], max_failures: int
) -> None:
    """A Tune trial: has its pack trained, tries again if that fails, and reports what comes of it."""
    # "DEFAULT" is outside the placement group of the trial itself, which has no cores.
    task = ray.remote(**options, max_retries=0, scheduling_strategy="DEFAULT")(_pack_task)
    for failures in range(1, max_failures + 2):
        given_up, cause = failures > max_failures, ""
        try:
            for item in task.options(**in_new_process(failures - 1)).remote(
                shared[0], config["inputs"][0], config["pack"], failures > 1 or given_up
            ):
                report = ray.get(item)
                cause = report.get("cause", "")
                if not cause:
                    tune.report(report)
            return
        except Exception as error:
            tune.report({"failures": failures, "given_up": given_up, "cause": cause or cause_of(error)})
            if not given_up:
                pause(failures)


def _pack_task(shared: RunInputs, of_task: OfTask, pack: int, believed: bool) -> Iterator[dict[str, Any]]:
    try:
        yield from _train_points(shared, of_task, pack, believed)
    except Exception as error:
        yield {"cause": cause_of(error)}
        sys.exit(1)  # the process might go on with modules that were half imported when it ran out of memory


def _train_points(shared: RunInputs, of_task: OfTask, pack: int, believed: bool) -> Iterator[dict[str, Any]]:
    from clnp_search.search.trial import TaskInputs, run_pack
    from clnp_search.storage import RunFolder

    inputs = TaskInputs(shared, *of_task)
    plan = inputs.plan
    points = [plan.points[index] for index in plan.packs[pack]]
    for training in run_pack(inputs, points, believed):
        # A list: Tune flattens dictionaries on their way to the searcher.
        yield {"points": [(point, seen.epoch + 1, seen.val_accuracy) for point, seen in training.items()]}
    folder = RunFolder(shared.folder)
    records = [folder.read_point(plan.task, point.name_in(plan.round)) for point in points]
    # A trial without a result counts as failed; points that had been finished before give no other.
    failed = [record.point.index for record in records if record and record.status == "failed"]
    yield {"failed": failed, "ended": [point.index for point in points]}
