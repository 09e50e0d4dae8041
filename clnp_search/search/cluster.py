"""Ray: where packs are trained (as Tune trials) and candidates are scanned (as tasks).

A Tune trial holds its resources and watches over its pack, which is trained by a Ray task inside them. Processes that
train or scan have imported torch, and Ray keeps them for the next task's packs and scans; a trial's own process is
new for every experiment, so this module imports nothing heavy.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

# Before ray is imported: no usage data, no second `uv run` around every worker, no progress printing of its own, one
# working folder for all trials, and an interrupt that reaches the driver instead of only pausing Tune.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
# Workers compete with the driver, which draws and logs meanwhile; Ray would put them far behind it.
os.environ.setdefault("RAY_worker_niceness", "0")
# Idle workers, which have imported torch, stay for the next task's scans instead of ending after a second.
os.environ.setdefault("RAY_num_workers_soft_limit", str(2 * (os.cpu_count() or 1)))

import ray
from ray import tune

from clnp_search.errors import InputError
from clnp_search.records import PackProgress
from clnp_search.search.capacity import MEMORY_SHARE, Node, capacity_of

if TYPE_CHECKING:
    from clnp_search.config import ResourcesConfig
    from clnp_search.records import Point, ScanRecord, TaskPlan
    from clnp_search.search.trial import TaskInputs

logger = logging.getLogger(__name__)


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


class Cluster:
    """A connection to Ray, with the resources that every trial is given."""

    def __init__(self, resources: ResourcesConfig) -> None:
        self.resources = resources
        offers = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        nodes = [Node(offer.get("CPU", 0), offer.get("GPU", 0), int(offer.get("memory", 0))) for offer in offers]
        self.capacity = capacity_of(resources, nodes)

    @property
    def device(self) -> str:
        """Where trials compute."""
        return "cuda" if self.resources.gpu else "cpu"

    def slot_bytes(self) -> int:
        """Memory that one trial may plan with, on the device where it computes."""
        if not self.resources.gpu:
            return self.capacity.slot_bytes
        whole = ray.get(_gpu_bytes.options(num_gpus=self.resources.gpu).remote())
        return int(whole * min(1.0, self.resources.gpu) * MEMORY_SHARE)

    def share(self, inputs: TaskInputs) -> ray.ObjectRef:
        """Puts a task's inputs into the object store, from where its trials and scans read them."""
        return ray.put(inputs)

    def train(
        self,
        shared: ray.ObjectRef,
        plan: TaskPlan,
        packs: Sequence[int],
        ray_folder: tuple[str, Any],
        max_failures: int,
        listen: Callable[[PackProgress], None],
    ) -> dict[int, str]:
        """Trains packs of a task as Tune trials, each of which writes its points to the run folder.

        Args:
            shared: The task's inputs.
            ray_folder: Where Tune keeps its experiments: a path, and its pyarrow filesystem.

        Returns:
            For each pack that failed for good, the reason.
        """
        path, filesystem = ray_folder
        bundle = {"CPU": float(self.resources.cpu)} | ({"GPU": self.resources.gpu} if self.resources.gpu else {})
        # A reference inside a list stays one: the trial hands it on without reading the inputs itself.
        trainable = tune.with_parameters(_train_trial, shared=[shared], bundle=bundle)
        tuner = tune.Tuner(
            tune.with_resources(trainable, tune.PlacementGroupFactory([{}, bundle])),
            param_space={"pack": tune.grid_search(list(packs))},
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(
                # Tune mixes trials of equal experiment names, so each attempt has its own.
                name=f"task-{plan.task:03d}-{time.time_ns():x}",
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=tune.FailureConfig(max_failures=max_failures),
                callbacks=[_Watcher(listen)],
                verbose=0,
            ),
        )
        results = tuner.fit()
        return {result.config["pack"]: str(result.error).strip().splitlines()[-1] for result in results if result.error}

    def scan(self, shared: ray.ObjectRef, points: Sequence[Point], min_correct: int, rule: str) -> Iterator[ScanRecord]:
        """Scans candidates in parallel; gives each record as it is done."""
        remote = _scan_task.options(num_cpus=self.resources.cpu, num_gpus=self.resources.gpu)
        waiting = [remote.remote(shared, point, min_correct, rule) for point in points]
        while waiting:
            done, waiting = ray.wait(waiting)
            yield ray.get(done[0])


@contextmanager
def connect(address: str, resources: ResourcesConfig) -> Iterator[Cluster]:
    """A Ray cluster for the length of a run.

    Args:
        address: `local` starts one in this machine; `auto` finds one; `HOST:PORT` or `ray://...` names one.

    Raises:
        InputError: There is none, or no node of it can hold a trial.
    """
    if address == "local" and resources.cpu > (os.cpu_count() or 1):
        raise InputError(f"resources.cpu: {resources.cpu} is more than this machine has; at most {os.cpu_count()}")
    try:
        ray.init(
            address=address,
            include_dashboard=False if address == "local" else None,
            logging_level=logging.ERROR,
            log_to_driver=False,
            configure_logging=True,
        )
    except ConnectionError as error:
        raise InputError(f"--address {address}: no Ray cluster can be reached: {error}") from error
    try:
        cluster = Cluster(resources)
        # The first packs find processes that have imported torch while the driver was loading its data.
        for _ in range(cluster.capacity.num_slots):
            _warm_up.options(num_cpus=resources.cpu).remote()
        yield cluster
    finally:
        ray.shutdown()


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


@ray.remote(max_retries=2)
def _scan_task(inputs: TaskInputs, point: Point, min_correct: int, rule: str) -> ScanRecord:
    from clnp_search.search.trial import scan_point

    return scan_point(inputs, point, min_correct, rule)


@ray.remote
def _warm_up() -> None:
    import clnp_search.search.trial  # noqa: F401


@ray.remote
def _gpu_bytes() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory
