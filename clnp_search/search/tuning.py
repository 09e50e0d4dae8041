"""Packs as Ray Tune trials. A trial's process imports this module, so it imports nothing heavy besides Tune.

Ray starts a new process for each trial of an experiment, which takes longer than training a small network, and keeps
one for its next trial. So all tasks of a run are one experiment: Tune asks for a next trial, and is given the next
task's packs once the last task is committed. A trial holds no CPUs or GPUs while it waits for that; it watches over
its pack, which is trained by a Ray task with the resources of a trial.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray import tune
from ray.tune.search import Searcher

from clnp_search.records import PackProgress, Packs

if TYPE_CHECKING:
    from clnp_search.search.trial import RunInputs

T = TypeVar("T")
# Of a trial's own process, which only watches.
WATCHER_BYTES = 256 << 20
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
        shared: The run's inputs.
        options: Of the Ray task that trains a pack: its resources.
        num_slots: How many packs are trained at a time.
        ray_folder: Where Tune keeps its experiments: a path, and its pyarrow filesystem.
        listen: Is told how the packs go on.

    Returns:
        The program's result.
    """
    feed = _Feed(program, num_slots)
    path, filesystem = ray_folder
    if not feed.finished:
        # A reference inside a list stays one: the trial hands it on without reading the inputs itself.
        trainable = tune.with_parameters(_train_trial, shared=[shared], options=options)
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"memory": WATCHER_BYTES}),
            tune_config=tune.TuneConfig(search_alg=feed, num_samples=-1, reuse_actors=True),
            run_config=tune.RunConfig(
                name=f"{time.time_ns():x}",  # a new one, because Tune mixes trials of equal names
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=tune.FailureConfig(max_failures=max_failures),
                callbacks=[_Watcher(feed, listen)],
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        except Exception as error:
            program.throw(error)  # it ends as by an error of its own
    return feed.result()


class _Feed(Searcher):
    """Gives Tune a program's packs as trials, and goes on with the program when all of a request are done."""

    def __init__(self, program: Program[Any], num_slots: int) -> None:
        super().__init__()
        self.failed: dict[int, str] = {}
        self.finished = False
        self._program, self._num_slots = program, num_slots
        self._result: Any = None
        self._error: Exception | None = None
        self._task = 0
        self._waiting: list[int] = []
        self._running: set[str] = set()
        self._advance(None)

    def result(self) -> Any:
        """What the program returned; raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._result

    def suggest(self, trial_id: str) -> dict[str, int] | str | None:
        """The next trial's pack; None while there is none, or no slot for it."""
        if not self._waiting and not self._running and not self.finished:
            self._advance(self.failed)
        if self.finished:
            return Searcher.FINISHED
        if not self._waiting or len(self._running) >= self._num_slots:
            return None
        self._running.add(trial_id)
        return {"task": self._task, "pack": self._waiting.pop(0)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._running.discard(trial_id)

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
            packs = next(self._program) if failed is None else self._program.send(failed)
            self._task, self._waiting, self.failed = packs.task, list(packs.indices), {}
        except StopIteration as end:
            self._result, self.finished = end.value, True
        except Exception as error:  # Tune would wrap it
            self._error, self.finished = error, True


class _Watcher(tune.Callback):
    """Hands Tune's results on; runs in the driver."""

    def __init__(self, feed: _Feed, listen: Callable[[PackProgress], None]) -> None:
        self._feed, self._listen = feed, listen
        self._task, self._epochs, self._best = -1, dict[int, int](), 0.0

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "epochs_done" in result:
            if trial.config["task"] != self._task:
                self._task, self._epochs, self._best = trial.config["task"], {}, 0.0
            self._epochs[trial.config["pack"]] = result["epochs_done"]
            self._best = max(self._best, result["best_val_accuracy"])
            self._listen(PackProgress(dict(self._epochs), self._best))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # The trace's last line; `trial.get_error` would look for it in the storage, where it comes later.
        self._feed.failed[trial.config["pack"]] = Path(trial.error_file).read_text().strip().splitlines()[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as the feed


def _train_trial(config: dict[str, Any], shared: list[ray.ObjectRef], options: dict[str, float]) -> None:
    """A Tune trial: has its pack trained and reports what comes of it."""
    # "DEFAULT" is outside the placement group of the trial itself, which has no cores.
    task = ray.remote(**options, max_retries=0, scheduling_strategy="DEFAULT")(_pack_task)
    for progress in task.remote(shared[0], config["task"], config["pack"]):
        tune.report(ray.get(progress))


def _pack_task(shared: RunInputs, task: int, pack: int) -> Iterator[dict[str, float]]:
    from clnp_search.search.trial import run_pack

    inputs = shared.of_task(task)
    plan = inputs.plan
    for training in run_pack(inputs, [plan.points[index] for index in plan.packs[pack]]):
        yield {"epochs_done": training.epoch, "best_val_accuracy": training.best_val_accuracy}
    # A trial without a result counts as failed; points that had been finished before give none.
    yield {"done": True}
