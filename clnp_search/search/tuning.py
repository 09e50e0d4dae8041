"""Packs as Ray Tune trials. A trial's process imports this module, so it imports nothing heavy besides Tune.

Ray starts a new process for each trial of an experiment, which takes longer than training a small network, and keeps
one for its next trial. So all tasks of a run are one experiment: Tune asks for a next trial, and is given the next
task's packs once the last task is committed. A trial holds no CPUs or GPUs while it waits for that; it watches over
its pack, which is trained by a Ray task with the resources of a trial.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray import tune
from ray.tune.search import Searcher

from clnp_search.records import PackProgress

if TYPE_CHECKING:
    from clnp_search.clnp.state import State
    from clnp_search.records import TaskPlan
    from clnp_search.search.trial import RunInputs

T = TypeVar("T")
# Of a trial's own process, which only watches.
WATCHER_BYTES = 256 << 20


@dataclass(frozen=True)
class Packs:
    """Packs of a task that are to be trained, by their index in its plan.

    Args:
        inputs: The task's plan and state, in the object store.
    """

    indices: tuple[int, ...]
    inputs: ray.ObjectRef


# Asks for packs to be trained, is sent the reason of each one that failed for good, and ends with a result.
Program = Generator[Packs, dict[int, str], T]


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
        listen: Is told how the packs go on.

    Returns:
        The program's result.
    """
    feed = _Feed(program, num_slots, listen)
    path, filesystem = ray_folder
    if not feed.finished:
        # A reference inside a list stays one: the trial hands it on without reading the inputs itself. The references
        # to a task's inputs come with its packs, as a part of the trials' configuration.
        trainable = tune.with_parameters(_train_trial, shared=[shared], options=options)
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
        except Exception as error:
            program.throw(error)  # it ends as by an error of its own
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
        self._errors: dict[int, str] = {}  # of each pack, the last; Tune may try again
        self._failed: dict[int, str] = {}
        self._advance(None)

    def result(self) -> Any:
        """What the program returned; raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._result

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's pack; None while there is none, or no slot for it."""
        if not self._waiting and not self._running and not self.finished:
            self._advance(self._failed)
        if self.finished:
            return Searcher.FINISHED
        if not self._waiting or len(self._running) >= self._num_slots:
            return None
        self._running[trial_id] = pack = self._waiting.pop(0)
        return {"pack": pack, "inputs": [self._packs.inputs]}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if "error" in result:
            self._errors[self._running[trial_id]] = result["error"]
            return
        self._accuracies |= result.get("accuracies", {})
        self._progress = PackProgress(
            self._progress.epochs_done | result.get("epochs_done", {}),
            max(self._accuracies.items(), key=lambda seen: seen[1], default=None),
            (*self._progress.failed, *result.get("failed", ())),
        )
        self._listen(self._progress)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pack = self._running.pop(trial_id)
        if error:
            self._failed[pack] = self._errors.get(pack, "the trial died")

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True  # there is nothing to optimise: the packs are given

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: a resumed run reads its own records."""

    def get_state(self) -> dict[str, Any]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its experiment; the program is of this process only

    def _advance(self, failed: dict[int, str] | None) -> None:
        try:
            self._packs = next(self._program) if failed is None else self._program.send(failed)
            self._waiting = list(self._packs.indices)
            self._progress, self._accuracies = PackProgress({}), {}
            self._errors, self._failed = {}, {}
        except StopIteration as end:
            self._result, self.finished = end.value, True
        except Exception as error:  # Tune would wrap it
            self._error, self.finished = error, True


def _train_trial(config: dict[str, Any], shared: list[ray.ObjectRef], options: dict[str, float]) -> None:
    """A Tune trial: has its pack trained and reports what comes of it."""
    # "DEFAULT" is outside the placement group of the trial itself, which has no cores.
    task = ray.remote(**options, max_retries=0, scheduling_strategy="DEFAULT")(_pack_task)
    try:
        for progress in task.remote(shared[0], config["inputs"][0], config["pack"]):
            tune.report(ray.get(progress))
    except Exception as error:
        tune.report({"error": (str(error).strip() or repr(error)).splitlines()[-1]})
        raise


def _pack_task(shared: RunInputs, of_task: tuple[TaskPlan, State], pack: int) -> Iterator[dict[str, Any]]:
    from clnp_search.search.trial import TaskInputs, run_pack
    from clnp_search.storage import RunFolder

    plan, state = of_task
    points = [plan.points[index] for index in plan.packs[pack]]
    for training in run_pack(TaskInputs(shared, plan, state), points):
        yield {
            "epochs_done": {point: seen.epoch + 1 for point, seen in training.items()},
            "accuracies": {point: seen.val_accuracy for point, seen in training.items()},
        }
    folder = RunFolder(shared.folder)
    records = [folder.read_point(plan.task, point.name) for point in points]
    # A trial without a result counts as failed; points that had been finished before give no other.
    yield {"failed": [record.point.index for record in records if record and record.status == "failed"]}
