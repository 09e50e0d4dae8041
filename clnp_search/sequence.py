"""Task after task: plan, train, select, scan, choose, commit, report. Resume is the same loop, going on."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from clnp_search import selection
from clnp_search.clnp.state import Architecture, State, commit
from clnp_search.clnp.subnetwork import Subnetwork, subnetworks
from clnp_search.config import Sweep
from clnp_search.errors import InputError, MachineFault
from clnp_search.listener import Listener
from clnp_search.records import (
    Environment,
    PackProgress,
    Point,
    PointRecord,
    RunStatus,
    ScanRecord,
    Selected,
    Selection,
    Summary,
    TaskPlan,
    TaskResult,
    Units,
    summarise,
)
from clnp_search.search.points import (
    MemoryEstimate,
    auto_points_per_trial,
    estimate_memory,
    grid,
    pack_points,
    point_key,
)
from clnp_search.search.trial import RunInputs
from clnp_search.storage import RunFolder
from clnp_search.tasks import SCENARIOS, Split, Task, TaskData

if TYPE_CHECKING:
    from ray import ObjectRef

    from clnp_search.search.cluster import Cluster
    from clnp_search.search.tuning import Program

logger = logging.getLogger(__name__)


class TaskSequence:
    """A sweep's tasks and their data, and the state that they start from."""

    def __init__(self, sweep: Sweep) -> None:
        """Loads the sweep's data set.

        Raises:
            InputError: It cannot be loaded, or the sweep asks for more samples than it has.
        """
        self.sweep = sweep
        self._scenario = SCENARIOS[sweep.scenario.name]
        self.raw = self._scenario.load(Path(sweep.scenario.root))

    def __len__(self) -> int:
        return self.sweep.scenario.tasks

    def task(self, index: int) -> Task:
        """The task at `index`."""
        return self._scenario.task(index, len(self))

    def data(self, index: int) -> TaskData:
        """The samples of the task at `index`."""
        scenario = self.sweep.scenario
        return self.task(index).data(self.raw, scenario.validation, scenario.scaling, self.sweep.seed)

    def check(self) -> None:
        """Nothing, if the data set has what every task takes from it.

        Raises:
            InputError: It has not.
        """
        for index in range(len(self)):
            self.data(index)

    def key(self, state: State, index: int, point: Point) -> str:
        """The hash of all that a point's result depends on, besides the machine."""
        return point_key(state.digest, self.task(index), self._digest, self.sweep, point)

    @property
    def architecture(self) -> Architecture:
        """The network of all tasks."""
        return self.sweep.architecture(self.raw.train_inputs[0].size)

    def empty_state(self) -> State:
        """The state before the first task."""
        return State.empty(self.architecture)

    def memory(self, active: Sequence[int], index: int) -> MemoryEstimate:
        """What a trial of the task at `index` needs.

        Args:
            active: Units of each hidden layer that are frozen already.
        """
        data = self.data(index)
        classes, settings = data.info.num_classes, self.sweep.training.settings
        return estimate_memory(self.architecture, active, classes, len(data.train), len(data.validation), settings)

    @cached_property
    def _digest(self) -> str:
        return self.raw.digest


def plan_packs(
    sweep: Sweep, points: Sequence[Point], memory: MemoryEstimate, num_slots: int, slot_bytes: int
) -> tuple[tuple[int, ...], ...]:
    """Which points each trial of a task trains."""
    asked = sweep.search.points_per_trial
    size = auto_points_per_trial(len(points), num_slots, memory, slot_bytes) if asked == "auto" else asked
    return pack_points(points, size)


def reused_point(sweep: Sweep, folder: RunFolder, index: int) -> Point | None:
    """What the first task chose, if the task at `index` shall reuse it and it is known."""
    if index == 0 or sweep.search.tasks == "every":
        return None
    first, choice = folder.read_plan(0), folder.read_selection(0)
    return first.points[choice.chosen] if first and choice else None


class Runner:
    """Takes a run from where it stands to its end."""

    def __init__(
        self, sequence: TaskSequence, folder: RunFolder, cluster: Cluster, listeners: Sequence[Listener] = ()
    ) -> None:
        self._sequence, self._folder, self._cluster, self._listeners = sequence, folder, cluster, listeners
        self._sweep = sequence.sweep

    def check(self) -> None:
        """Nothing, if the data set and the cluster have what the run needs, as far as that shows beforehand.

        Raises:
            InputError: The data set has not.
            MachineFault: The cluster has not.
        """
        self._sequence.check()
        self._packs(grid(self._sweep, None), 0, [0] * len(self._sequence.architecture.hidden))

    def run(self) -> Summary:
        """Commits every task that is not committed yet. Whatever is raised, what is finished stays, and can be resumed.

        Raises:
            MachineFault: What the run needs failed, time after time.
            RuntimeError: A task has no usable point.
        """
        retries = self._sweep.search.max_failures
        try:
            return self._cluster.train(self._tasks(), self._shared, self._folder.ray_folder, retries, self._training)
        finally:
            vars(self).pop("_shared", None)  # what is Ray's goes before Ray does

    def forget_failed(self) -> int:
        """Has the failed points of the task that is not committed yet trained again; gives their number."""
        task = len(self._folder.read_results())
        failed = [record.point.name for at, record in self._folder.read_failed() if at == task]
        for name in failed:
            self._folder.delete_point(task, name)
        return len(failed)

    def _tasks(self) -> Program[Summary]:
        """Task after task; asks for packs to be trained, after which each of their points has its record."""
        results = self._folder.read_results()
        state = self._folder.read_state(len(results) - 1) if results else self._sequence.empty_state()
        summary = self._write_summary(results, state)
        try:
            while summary.status == "running":
                started = time.perf_counter()
                result, state = yield from self._run_task(len(results), state)
                results = (*results, result)
                summary = self._write_summary(results, state)
                for listener in self._listeners:
                    listener.committed(summary, time.perf_counter() - started)
        except Exception as error:
            reason = str(error) if isinstance(error, MachineFault | InputError) else f"{type(error).__name__}: {error}"
            with suppress(OSError):  # the storage may be what failed
                self._folder.write_summary(replace(self._summary("failed", results, state), reason=reason))
            raise
        return summary

    @cached_property
    def _shared(self) -> ObjectRef:
        sweep, sequence = self._sweep, self._sequence
        return self._cluster.share(
            RunInputs(
                folder=self._folder.uri,
                raw=sequence.raw,
                tasks=tuple(sequence.task(index) for index in range(len(sequence))),
                validation=sweep.scenario.validation,
                scaling=sweep.scenario.scaling,
                settings=sweep.training.settings,
                seed=sweep.seed,
            )
        )

    def _run_task(self, index: int, state: State) -> Program[tuple[TaskResult, State]]:
        started = time.perf_counter()
        sweep, folder = self._sweep, self._folder
        plan = self._plan(index, state)
        inputs = self._cluster.share((plan, state))
        records = yield from self._train(plan, inputs)
        scans = self._scan(index, inputs, records)
        choice = selection.choose(records, scans, sweep.forgetting.margin, sweep.forgetting.sparsity)
        scan = next(scan for scan in scans if scan.point == choice.chosen)
        assert scan.theta is not None
        point = plan.points[choice.chosen]
        folder.write_selection(index, choice)
        self._write_tables(index, records, scans, choice, state.architecture.layer_names)
        info = self._sequence.data(index).info
        after = commit(state, info, folder.read_trained(index, point.name), scan.theta)
        folder.write_state(index, after)
        accuracies = tuple(test_accuracies(self._sequence, after))
        result = TaskResult(
            index=index,
            name=plan.name,
            best_val_accuracy=choice.best_val_accuracy,
            margin=choice.margin,
            selected=Selected(
                point.name, point.alpha, point.learning_rate, scan.theta, scan.val_accuracy, scan.unit_sparsity
            ),
            test_accuracy=accuracies[-1],
            test_accuracies=accuracies,
            units=count_units(after),
            points=len(records),
            digest=Subnetwork(after, index).digest,
            state_digest=after.digest,
            seconds=time.perf_counter() - started,
        )
        folder.write_result(result)
        return result, after

    def _plan(self, index: int, state: State) -> TaskPlan:
        """The task's recorded plan, or a new one."""
        existing = self._folder.read_plan(index)
        if existing is not None:
            if existing.parent_digest != state.digest:
                raise InputError(
                    f"{self._folder.uri}: task {index} was planned on another state than the one before it; "
                    "a file of this run was changed"
                )
            return self._adopt(existing)
        points = grid(self._sweep, reused_point(self._sweep, self._folder, index))
        plan = TaskPlan(
            task=index,
            name=self._sequence.task(index).name,
            parent_digest=state.digest,
            points=points,
            keys=tuple(self._sequence.key(state, index, point) for point in points),
            packs=self._packs(points, index, [units.active for units in count_units(state).values()]),
            environment=self._environment(),
        )
        self._folder.write_plan(plan)
        return plan

    def _packs(self, points: Sequence[Point], index: int, active: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        memory = self._sequence.memory(active, index)
        return plan_packs(self._sweep, points, memory, self._cluster.capacity.num_slots, self._cluster.slot_bytes)

    def _adopt(self, plan: TaskPlan) -> TaskPlan:
        """A plan of an earlier session; where this machine cannot keep it to the bit, the log says so."""
        here = self._environment()
        if (plan.environment.device, here.device) == ("cuda", "cpu"):
            raise MachineFault(
                f"task {plan.task} was planned for a GPU, of which resources.gpu: 0 gives its trials none"
            )
        if plan.environment != here:
            logger.warning("task %d was begun as %s and goes on as %s", plan.task, plan.environment, here)
        return plan

    def _train(self, plan: TaskPlan, inputs: ObjectRef) -> Program[list[PointRecord]]:
        """Trains what is missing; every point of the plan has a record afterwards."""
        from clnp_search.search.tuning import Packs  # not above: most commands do without Tune, whose import is slow

        folder = self._folder
        recorded = {point.index for point in plan.points if self._is_recorded(plan, point)}
        for listener in self._listeners:
            listener.task_planned(plan, len(recorded))
        missing = tuple(index for index, pack in enumerate(plan.packs) if not recorded.issuperset(pack))
        if missing:
            yield Packs(plan.task, missing, inputs)
        records = [record for point in plan.points if (record := folder.read_point(plan.task, point.name)) is not None]
        if len(records) < len(plan.points):
            raise RuntimeError(f"task {plan.task}: a trial ended without a record of every point")
        for listener in self._listeners:
            listener.points_finished(records)
        return records

    def _is_recorded(self, plan: TaskPlan, point: Point) -> bool:
        record = self._folder.read_point(plan.task, point.name)
        if record is not None and record.key != plan.keys[point.index]:
            raise InputError(f"{self._folder.uri}: task {plan.task}, {point.name}: the record is of another point")
        return record is not None

    def _training(self, progress: PackProgress) -> None:
        for listener in self._listeners:
            listener.training(progress)

    def _scan(self, task: int, inputs: ObjectRef, records: Sequence[PointRecord]) -> list[ScanRecord]:
        """A threshold scan of every candidate; some may be recorded already."""
        rule = self._sweep.forgetting.theta
        limit, inside = selection.candidates(records, self._sweep.forgetting.margin)
        fingerprint = f"{rule}-{limit}"
        scans, missing = [], []
        for record in inside:
            scan = self._folder.read_scan(task, record.point.index, fingerprint)
            if scan is None:
                missing.append(record.point)
            else:
                scans.append(scan)
        retries = self._sweep.search.max_failures
        for scan in self._cluster.scan(self._shared, inputs, missing, limit, rule, retries):
            self._folder.write_scan(task, scan, fingerprint)
            scans.append(scan)
            for listener in self._listeners:
                listener.scanned(len(scans), len(inside))
        return sorted(scans, key=lambda scan: scan.point)

    def _write_tables(
        self,
        task: int,
        records: Sequence[PointRecord],
        scans: Sequence[ScanRecord],
        choice: Selection,
        layers: Sequence[str],
    ) -> None:
        passing = {scan.point: scan for scan in scans if scan.theta is not None}
        rows = []
        for record in records:
            scan = passing.get(record.point.index)
            rows.append(
                {
                    "point": record.point.name,
                    "alpha": json.dumps(record.point.alpha),
                    "learning_rate": record.point.learning_rate,
                    "val_accuracy": record.val_accuracy if record.status == "done" else "",
                    "in_margin": record.point.index in choice.candidates,
                    "theta": json.dumps(scan.theta) if scan else "",
                    "pruned_val_accuracy": scan.val_accuracy if scan else "",
                    "unit_sparsity": scan.unit_sparsity if scan else "",
                    "selected": record.point.index == choice.chosen,
                    "status": record.status,
                }
            )
        self._folder.write_points_table(task, rows)
        for scan in scans:
            name = next(record.point.name for record in records if record.point.index == scan.point)
            self._folder.write_curve(task, name, scan.curve, layers)
            for layer, curve in enumerate(scan.layer_curves):
                self._folder.write_curve(task, f"{name}.{layers[layer]}", curve, layers, layer)

    def _write_summary(self, results: tuple[TaskResult, ...], state: State) -> Summary:
        status: RunStatus = "running"
        if len(results) == len(self._sequence):
            status = "complete"
        elif self._sweep.capacity.on_depletion == "stop" and any(len(layer.free) == 0 for layer in state.layers):
            status = "depleted"
        summary = self._summary(status, results, state)
        self._folder.write_summary(summary)
        return summary

    def _summary(self, status: RunStatus, results: tuple[TaskResult, ...], state: State) -> Summary:
        return summarise(self._folder.name, status, self._sweep.seed, state.digest, results)

    def _environment(self) -> Environment:
        return Environment(
            device=self._cluster.device,
            threads=self._sweep.resources.cpu,
            precision=self._sweep.training.precision,
            torch=torch.__version__,
            clnp_search=version("clnp-search"),
        )


def count_units(state: State) -> dict[str, Units]:
    """Units of each hidden layer: all, active, grown by the last task, still free."""
    counts = {}
    for name, layer in zip(state.architecture.layer_names, state.layers, strict=True):
        total, free = len(layer.born), len(layer.free)
        counts[name] = Units(total, total - free, int((layer.born == state.num_tasks - 1).sum()), free)
    return counts


def test_accuracies(sequence: TaskSequence, state: State) -> list[float]:
    """Test accuracy of every committed task, evaluated on its subnetwork."""
    splits = [sequence.data(task).test for task in range(state.num_tasks)]
    return [_accuracy(network, split) for network, split in zip(subnetworks(state), splits, strict=True)]


def _accuracy(network: Subnetwork, split: Split) -> float:
    return network.accuracy(split.inputs, split.labels)
