"""Packs as Ray Tune trials. A trial's process imports this module, so it imports nothing heavy besides Tune."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray import tune

from clnp_search.records import PackProgress

if TYPE_CHECKING:
    from clnp_search.search.trial import TaskInputs


def run_trials(
    shared: ray.ObjectRef,
    packs: Sequence[int],
    bundle: dict[str, float],
    ray_folder: tuple[str, Any],
    name: str,
    max_failures: int,
    listen: Callable[[PackProgress], None],
) -> dict[int, str]:
    """Runs one trial for each pack, and tells how they go on.

    Args:
        shared: The task's inputs.
        bundle: What each trial is given.
        name: Of the Tune experiment; new for every call, because Tune mixes trials of equal names.

    Returns:
        For each pack that failed for good, the reason.
    """
    path, filesystem = ray_folder
    # A reference inside a list stays one: the trial hands it on without reading the inputs itself.
    trainable = tune.with_parameters(_train_trial, shared=[shared], bundle=bundle)
    tuner = tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([{}, bundle])),
        param_space={"pack": tune.grid_search(list(packs))},
        tune_config=tune.TuneConfig(reuse_actors=True),
        run_config=tune.RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=max_failures),
            callbacks=[_Watcher(listen)],
            verbose=0,
        ),
    )
    results = tuner.fit()
    return {result.config["pack"]: str(result.error).strip().splitlines()[-1] for result in results if result.error}


class _Watcher(tune.Callback):
    """Hands Tune's results on; runs in the driver."""

    def __init__(self, listen: Callable[[PackProgress], None]) -> None:
        self._listen = listen
        self._epochs: dict[int, int] = {}
        self._best = 0.0

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "epochs_done" in result:
            self._epochs[trial.config["pack"]] = result["epochs_done"]
            self._best = max(self._best, result["best_val_accuracy"])
            self._listen(PackProgress(dict(self._epochs), self._best))

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks with its experiment; the listener is of this process only


def _train_trial(config: dict[str, Any], shared: list[ray.ObjectRef], bundle: dict[str, float]) -> None:
    """A Tune trial: runs its pack inside the trial's resources and reports what comes of it."""
    task = _pack_task.options(num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0))
    for progress in task.remote(shared[0], config["pack"]):
        tune.report(ray.get(progress))


@ray.remote(max_retries=0)
def _pack_task(inputs: TaskInputs, pack: int) -> Iterator[dict[str, float]]:
    from clnp_search.search.trial import run_pack

    plan = inputs.plan
    for training in run_pack(inputs, [plan.points[index] for index in plan.packs[pack]]):
        yield {"epochs_done": training.epoch, "best_val_accuracy": training.best_val_accuracy}
    # A trial without a result counts as failed; points that had been finished before give none.
    yield {"done": True}
