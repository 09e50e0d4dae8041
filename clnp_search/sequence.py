"""Task after task: plan, train, select, scan, choose, commit, report. Resume is the same loop, going on."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property, partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from clnp_search import selection
from clnp_search.agreement import (
    Chosen,
    check_commit,
    check_plan,
    check_selection,
    check_sweep,
    chosen_from,
    recorded_best,
    recorded_choice,
    step_after,
)
from clnp_search.clnp.rates import matrix_rate
from clnp_search.clnp.seeds import generator
from clnp_search.clnp.state import FREE, Architecture, Parameters, State, commit, tensors_digest
from clnp_search.clnp.subnetwork import Cut, Subnetwork, cuts
from clnp_search.config import Sweep, sweep_at
from clnp_search.errors import Damaged, InputError, MachineFault, NoModel
from clnp_search.forecast import Budget
from clnp_search.listener import Listener
from clnp_search.pareto import pareto_front
from clnp_search.records import (
    Environment,
    Outcome,
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
    NUMERICS,
    MemoryEstimate,
    auto_points_per_trial,
    cache_share,
    estimate_memory,
    pack_points,
    point_key,
    round_plan,
    scan_flop,
    training_flop,
)
from clnp_search.search.proposals import agree, as_points, first_points
from clnp_search.search.trial import RunInputs
from clnp_search.selection import Step
from clnp_search.storage import RunFolder
from clnp_search.tasks import Split, Task, TaskData

if TYPE_CHECKING:
    from ray import ObjectRef

    from clnp_search.search.cluster import Cluster
    from clnp_search.search.tuning import Program

logger = logging.getLogger(__name__)
FEW_STEPS = 64  # thresholds for networks whose scans are too long


class TaskSequence:
    """A sweep's tasks and their data, and the state that they start from."""

    def __init__(self, sweep: Sweep) -> None:
        """Loads the sweep's data set.

        Raises:
            InputError: It cannot be loaded, or the sweep asks for more samples than it has.
        """
        self.sweep = sweep
        self.scenario = sweep.load_scenario()
        self._digests: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.scenario)

    def task(self, index: int) -> Task:
        """The task at `index`."""
        return self.scenario.tasks[index]

    def data(self, index: int) -> TaskData:
        """The samples of the task at `index`."""
        return self.scenario.data(index)

    def check(self) -> None:
        """Nothing, if the data set has what every task takes from it.

        Raises:
            InputError: It has not.
        """
        for index in range(len(self)):
            self.data(index)

    def key(self, plan: TaskPlan, point: Point) -> str:
        """The hash of all that the result of a task's point depends on, besides the machine."""
        of_task = plan.parent_digest, self.task(plan.task), plan.data_digest, plan.drawn_digest
        return point_key(*of_task, self.sweep, point)

    def sizes(self, index: int) -> tuple[int, int]:
        """How many samples a task is trained on, and validated on: its own, or those of all tasks so far."""
        first = 0 if self.sweep.method == "joint" else index
        train, validation = zip(*self._own_sizes[first : index + 1], strict=True)
        return sum(train), sum(validation)

    @cached_property
    def _own_sizes(self) -> list[tuple[int, int]]:
        return [self.scenario.sizes(index) for index in range(len(self))]

    def data_digest(self, index: int) -> str:
        """SHA-256 of the samples and splits of the task at `index`, and of how its network sees them; of all tasks so
        far, where it is trained on their data.
        """
        if index not in self._digests:
            self._digests[index] = self.data(index).digest
        if index and self.sweep.method == "joint":
            return hashlib.sha256((self.data_digest(index - 1) + self._digests[index]).encode()).hexdigest()
        return self._digests[index]

    def read_plan(self, folder: RunFolder, index: int, parent_digest: str) -> TaskPlan | None:
        """A task's recorded plan, or None before there is one.

        Args:
            parent_digest: Of the state before the task.

        Raises:
            InputError: The sweep, the data or that state are not those that the task was planned with.
        """
        plan = folder.read_plan(index) if index < len(self) else None
        if plan is not None:
            check_plan(folder, plan, self.sweep, parent_digest, self.data_digest(index), self.task(index))
        return plan

    @cached_property
    def architecture(self) -> Architecture:
        """The network that the first task begins with."""
        return self.sweep.architecture(self.scenario.input_shape)

    def drawn(self, index: int) -> Parameters | None:
        """What a module's own constructor draws for the task at `index`; None for networks of ours."""
        seed = generator(self.sweep.seed, "init", index).initial_seed()
        return self.sweep.draw(self.scenario.input_shape, seed)

    @cached_property
    def drawn_digest(self) -> str:
        """SHA-256 of what a module's own constructor draws for the first task, which speaks for all of them; empty for
        networks of ours.
        """
        drawn = self.drawn(0)
        tensors = {f"{node}.{name}": tensor for node, own in (drawn or {}).items() for name, tensor in own.items()}
        return tensors_digest("drawn", tensors) if tensors else ""

    def start_of(self, index: int, state: State) -> State:
        """The state that the task at `index` starts from: the one after the task before, wider where it was full."""
        wider = self.wider(count_units(state)) if index else {}
        return state.widened(wider) if wider else state

    def wider(self, units: Mapping[str, Units]) -> dict[str, int]:
        """How many units the groups that are full after a task have when the next one starts; empty if none grows."""
        capacity = self.sweep.capacity
        if not capacity.widens:
            return {}
        full = {group: each.total for group, each in units.items() if not each.free}
        return {group: total + math.ceil(total * capacity.expand_by) for group, total in full.items()}

    @property
    def environment(self) -> Environment:
        """What bits depend on besides the settings, as trials are to have it."""
        resources, precision = self.sweep.resources, self.sweep.training.precision
        return Environment(resources.device, resources.cpu, precision, torch.__version__, version("clnp-search"))

    def run_inputs(self, folder: RunFolder) -> RunInputs:
        """What the trials and scans of all tasks read."""
        sweep = self.sweep
        return RunInputs(
            folder=folder.uri,
            scenario=self.scenario,
            settings=sweep.training.settings,
            finetune_epochs=sweep.forgetting.finetune_epochs,
            finetune_l1=sweep.forgetting.finetune_l1,
            seed=sweep.seed,
            graph=self.architecture.graph,
            augment=sweep.scenario.augment.settings,
            method=sweep.method,
            gpu=sweep.resources.gpu,
        )

    def empty_state(self) -> State:
        """The state before the first task."""
        return State.empty(self.architecture)

    def memory(
        self, architecture: Architecture, active: Mapping[str, int], index: int, slot_bytes: int
    ) -> MemoryEstimate:
        """What a trial of the task at `index` needs.

        Args:
            architecture: As the task begins with it.
            active: Units of each group that are frozen already.
            slot_bytes: What there is for it.
        """
        classes, sizes = self.data(index).info.num_classes, self.sizes(index)
        settings, device = self.sweep.training.settings, self.sweep.resources.device
        if self.sweep.method == "clnp":
            cache = cache_share(slot_bytes)
            return estimate_memory(architecture, active, classes, *sizes, settings, device, cache)
        estimate = estimate_memory(architecture, {}, classes, *sizes, settings, device)
        # What a regulariser keeps: at most an importance, an anchor and four buffers for each parameter.
        return MemoryEstimate(estimate.fixed + estimate.per_point, 2 * estimate.per_point)

    def point_flop(self, architecture: Architecture, active: Mapping[str, int], index: int) -> int:
        """Floating-point operations of training one point of the task's search; arguments as `memory` has."""
        samples = self.sizes(index)[0] * self.sweep.training.epochs
        trained = active if self.sweep.method == "clnp" else {}  # a baseline freezes no unit
        return samples * training_flop(architecture, trained, self.data(index).info.num_classes)

    def scan_flop(self, architecture: Architecture, active: Mapping[str, int], index: int) -> int:
        """Floating-point operations of one candidate's scan, about; arguments as `memory` has."""
        data, rules = self.data(index), self.sweep.forgetting
        one = scan_flop(architecture, active, data.info.num_classes, rules.theta_steps)
        # About half of the samples say enough of a model. Single groups are raised in two orders after all together.
        paths = 3 if rules.theta == "per_layer" and not architecture.graph.is_dense else 1
        return paths * one * len(data.validation) // 2

    def warn_of_slow_scan(self) -> None:
        """Says so where a candidate's scan is more work than its training."""
        if self.sweep.method != "clnp" or (self.sweep.forgetting.theta_steps or math.inf) <= FEW_STEPS:
            return
        work = [flop(self.architecture, {}, 0) for flop in (self.scan_flop, self.point_flop)]
        if work[0] > work[1]:
            logger.warning(
                "the scan of a candidate, through %d thresholds, is %.1f times as much work as its training; "
                "forgetting.theta_steps: %d tries %d of them",
                self.sweep.forgetting.theta_steps or sum(self.architecture.graph.groups.values()),
                work[0] / work[1],
                FEW_STEPS,
                FEW_STEPS,
            )

    def packs(
        self,
        points: Sequence[Point],
        architecture: Architecture,
        active: Mapping[str, int],
        index: int,
        num_slots: int,
        slot_bytes: int,
    ) -> tuple[tuple[int, ...], ...]:
        """Which points each trial of a task trains.

        Args:
            architecture, active, index, slot_bytes: As `memory` has them.
            num_slots: Trials that run at the same time.
        """
        asked, of_task = self.sweep.search.points_per_trial, (architecture, active, index)
        if asked != "auto":
            return pack_points(points, asked)
        memory, flop = self.memory(*of_task, slot_bytes), self.point_flop(*of_task)
        return pack_points(points, auto_points_per_trial(len(points), num_slots, memory, slot_bytes, flop))


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
        if self._sweep.training.precision == "bf16" and self._cluster.device == "cpu":
            _warn_of_slow_bf16(self._sweep.resources.cpu)
        self._sequence.warn_of_slow_scan()
        architecture = self._sequence.architecture
        self._packs(first_points(self._sweep, 0, None, architecture.graph.layers), 0, architecture, {})

    def run(self) -> Summary:
        """Commits every task that is not committed yet. Whatever is raised, what is finished stays, and can be resumed.

        Raises:
            InputError: The run folder is of other settings or data; nothing was written.
            MachineFault: What the run needs failed, time after time.
            NoModel: A task has no usable point.
        """
        retries = self._sweep.search.max_failures
        try:
            return self._cluster.train(self._tasks(), self._shared, self._folder.ray_folder, retries, self._training)
        finally:
            vars(self).pop("_shared", None)  # what is Ray's goes before Ray does

    def forget_failed(self) -> int:
        """Has the failed points of the task that is not committed yet trained again; gives their number."""
        task = len(self._folder.read_results())
        records = self._folder.read_points(task)
        failed = [record for record in records if record.status == "failed"]
        if failed:  # what was retrained and chosen since follows from all points, and may become something else
            self._folder.delete_selection(task)
            for record in reversed(records):  # a kill then leaves no round without those before it
                if record in failed or record.round > failed[0].round:
                    self._folder.delete_point(task, record)
        return len(failed)

    def _tasks(self) -> Program[Summary]:
        """Task after task; asks for packs to be trained, after which each of their points has its record."""
        results = self._folder.read_results()
        self._check_plans(results)
        samples = [self._sequence.sizes(index)[0] for index in range(len(self._sequence))]
        for listener in self._listeners:
            listener.loaded(samples)
        state = self._folder.read_state(len(results) - 1) if results else self._sequence.empty_state()
        summary = self._write_summary(results, state)
        try:
            while summary.status == "running":
                started, start = time.perf_counter(), self._sequence.start_of(len(results), state)
                result, state = yield from self._run_task(results, start)
                results = (*results, result)
                summary = self._write_summary(results, state)
                for listener in self._listeners:
                    listener.committed(summary, time.perf_counter() - started)
        except Exception as error:
            reason = (
                str(error)
                if isinstance(error, Damaged | MachineFault | InputError | NoModel)
                else f"{type(error).__name__}: {error}"
            )
            with suppress(OSError):  # the storage may be what failed
                self._folder.write_summary(replace(self._summary("failed", results, state), reason=reason))
            raise
        return summary

    def _check_plans(self, results: tuple[TaskResult, ...]) -> None:
        """Holds the plans so far, also of committed tasks, against the sweep, the data and one another."""
        folder = self._folder
        check_sweep(folder, self._sweep)
        if len(results) > len(self._sequence):
            raise InputError(
                f"{folder.uri}: scenario.name: {self._sweep.scenario.name} gives {len(self._sequence)} task(s), "
                f"but {len(results)} are committed"
            )
        plans = []
        for index in range(len(results) + 1):
            parent = results[index - 1].state_digest if index else self._sequence.empty_state().digest
            if index and self._sweep.capacity.widens:
                parent = self._sequence.start_of(index, folder.read_state(index - 1)).digest
            plans.append(self._sequence.read_plan(folder, index, parent))
        *committed, begun = plans
        if None in committed:
            raise Damaged(f"{folder.uri}: task {committed.index(None)}: plan.json is missing")
        if begun is not None and begun.numerics != NUMERICS:
            raise InputError(
                f"{folder.uri}: task {begun.task} was begun by clnp-search {begun.environment.clnp_search}, whose "
                "results differ from this version's in their bits; go on with that version, or start a new run"
            )

    @cached_property
    def _shared(self) -> ObjectRef:
        return self._cluster.share(self._sequence.run_inputs(self._folder))

    def _share(self, plan: TaskPlan, state: State, drawn: Parameters | None = None) -> ObjectRef:
        """What the trials and scans of one task read."""
        return self._cluster.share((plan, state.as_one_task, drawn))

    def _run_task(self, before: tuple[TaskResult, ...], state: State) -> Program[tuple[TaskResult, State]]:
        """The task after these.

        Args:
            state: That it starts from.
        """
        started, index = time.perf_counter(), len(before)
        sweep, folder = self._sweep, self._folder
        plan = self._plan(index, state)
        inputs = self._share(plan, state, self._sequence.drawn(index))
        plan, inputs, records = yield from self._search(plan, inputs, state)
        rules, groups = sweep.forgetting, tuple(state.graph.groups)
        budget = Budget(groups, before, plan.num_tasks)
        spent = selection.spend(records, rules.margins, rules.sparsity, budget, partial(self._scan, plan, inputs))
        steps = [Step(records, spent.scans)]
        while steps[-1].passing and plan.round < rules.finetune_rounds:
            scans = steps[-1].scans
            plan = self._round(plan, scans)
            inputs = self._share(plan, state)
            records = yield from self._train(plan, inputs)
            scan = partial(self._scan, plan, inputs, limit=spent.limit)
            steps.append(step_after(plan, records, scans, rules, scan))
        chosen = chosen_from(steps, spent, rules)
        choice, kept = chosen.choice, chosen.kept
        check_selection(folder, index, choice)
        data = self._sequence.data(index)
        after = commit(state, data.info, folder.read_trained(index, kept), chosen.theta(groups))
        subnetwork = Subnetwork(after, index)
        check_commit(count_units(after), num_correct(subnetwork, data.validation), chosen.scan)
        folder.write_selection(index, choice)
        self._write_tables(index, chosen, steps, groups)
        chosen_point = selected(kept.point, chosen.scan)
        result = self._commit(plan, choice, chosen_point, cuts(after), subnetwork.digest, after, started)
        return result, after

    def _commit(
        self,
        plan: TaskPlan,
        choice: Selection,
        chosen: Selected,
        networks: Iterable[Cut],
        digest: str,
        after: State,
        started: float,
        **more: Any,
    ) -> TaskResult:
        """Writes down the state after a task, and then its result.

        Args:
            networks: Of all tasks so far.
            digest: Of the last of them.
            after: The state after the task.
            started: When it began, by `time.perf_counter`.
            more: Further fields of the result.
        """
        state_sha256 = self._folder.write_state(plan.task, after)
        accuracies = tuple(test_accuracies(self._sequence, networks))
        result = TaskResult(
            index=plan.task,
            name=plan.name,
            best_val_accuracy=choice.best_val_accuracy,
            margin=choice.margin,
            selected=chosen,
            test_accuracy=accuracies[-1],
            test_accuracies=accuracies,
            units=count_units(after),
            points=len(plan.points),
            digest=digest,
            state_digest=after.digest,
            state_sha256=state_sha256,
            seconds=time.perf_counter() - started,
            ended=time.time(),
            **more,
        )
        self._folder.write_result(result)
        return result

    @cached_property
    def _reused(self) -> Point | None:
        return reused_point(self._folder, self._sweep)

    def _plan(self, index: int, state: State) -> TaskPlan:
        """The task's recorded plan, or a new one."""
        sweep, layers, reused = self._sweep, state.graph.layers, self._reused if index else None
        existing = self._sequence.read_plan(self._folder, index, state.digest)
        if existing is not None:
            if not agree(sweep, index, reused, layers, existing.points):
                raise RuntimeError(f"{self._folder.uri}: task {index} was planned with other points than the sweep's")
            return self._adopt(existing)
        plan = TaskPlan(
            task=index,
            name=self._sequence.task(index).name,
            parent_digest=state.digest,
            points=(),
            keys=(),
            packs=(),
            environment=self._sequence.environment,
            settings=self._sweep.settings,
            data_digest=self._sequence.data_digest(index),
            numerics=NUMERICS,
            drawn_digest=self._sequence.drawn_digest,
            num_tasks=len(self._sequence),
            started=time.time(),
            cache_bytes=cache_share(self._cluster.slot_bytes),
        )
        return self._extended(plan, first_points(sweep, index, reused, layers), state)

    def _extended(self, plan: TaskPlan, points: tuple[Point, ...], state: State) -> TaskPlan:
        """A task's plan with more points; written down before any of them is trained."""
        keys = tuple(self._sequence.key(plan, point) for point in points)
        packs = self._packs(points, plan.task, state.architecture, active_units(state))
        plan = replace(plan, points=plan.points + points, keys=plan.keys + keys, packs=plan.packs + packs)
        self._take_over(plan)
        self._folder.write_plan(plan)
        return plan

    def _take_over(self, plan: TaskPlan) -> None:
        """Of a fork, what its origin has of these points, and the origin of that one, and so on."""
        fork, seen = self._folder.read_fork(), {self._folder.uri}
        while fork is not None and fork.origin not in seen:
            uri = fork.origin
            seen.add(uri)
            try:
                origin = RunFolder(uri)
                fork = origin.read_fork()
                take_over(self._folder, origin, plan)
            except (InputError, OSError, RuntimeError) as error:
                logger.warning("task %d: no further point of %s is taken over: %s", plan.task, uri, error)

    def _search(
        self, plan: TaskPlan, inputs: ObjectRef, state: State
    ) -> Program[tuple[TaskPlan, ObjectRef, list[PointRecord]]]:
        """Trains all points of a task, batch after batch where Optuna proposes them."""
        sweep, search, layers = self._sweep, self._sweep.search, state.graph.layers
        records = yield from self._train(plan, inputs)
        if search.algorithm != "optuna" or (plan.task and search.tasks == "first"):
            return plan, inputs, records
        from clnp_search.search.study import Study  # not above: few runs need Optuna, whose import is slow

        while True:
            study = Study(search, sweep.seed, plan.task, layers)
            for end in range(search.batch_size, len(records) + search.batch_size, search.batch_size):
                batch = records[end - search.batch_size : end]
                study.tell([record.point for record in batch], self._outcomes(plan, inputs, records[:end], batch))
            left = min(search.batch_size, search.num_points - len(plan.points))
            proposed = study.propose(left)
            self._folder.write_study(plan.task, study.to_bytes())
            if not left:
                return plan, inputs, records
            plan = self._extended(plan, as_points(sweep, layers, proposed, len(plan.points)), state)
            inputs = self._share(plan, state, self._sequence.drawn(plan.task))
            records = yield from self._train(plan, inputs)

    def _outcomes(
        self, plan: TaskPlan, inputs: ObjectRef, records: Sequence[PointRecord], batch: Sequence[PointRecord]
    ) -> list[Outcome]:
        """What Optuna is told of a batch: how it compares with the best point so far, after the scans that says.

        Args:
            records: Of all points so far, the batch's last.
        """
        rules = self._sweep.forgetting
        scans: dict[int, ScanRecord] = {}
        limit = 0
        if "sparsity" in self._sweep.search.objectives and any(record.status == "done" for record in records):
            limit, inside = selection.candidates(records, rules.margins[-1])
            own = [record for record in inside if record in batch]
            scans = {scan.point: scan for scan in self._scan(plan, inputs, own, limit)}
        outcomes = []
        for record in batch:
            if record.status != "done":
                outcomes.append(Outcome(None))
                continue
            scan = scans.get(record.point.index)
            sparsity = selection.SPARSITY[rules.sparsity](scan) if scan and scan.theta is not None else 0.0
            correct = scan.val_correct if scan else record.val_correct
            outcomes.append(Outcome(record.val_accuracy, sparsity, (limit - correct) / record.val_total))
        return outcomes

    def _round(self, plan: TaskPlan, scans: Sequence[ScanRecord]) -> TaskPlan:
        """The next fine-tune round: what it trains follows from what is recorded, and so does it on a resume."""
        plan = round_plan(plan, scans, self._sweep.forgetting)
        self._take_over(plan)
        return plan

    def _packs(
        self, points: Sequence[Point], index: int, architecture: Architecture, active: Mapping[str, int]
    ) -> tuple[tuple[int, ...], ...]:
        slots = self._cluster.capacity.num_slots, self._cluster.slot_bytes
        return self._sequence.packs(points, architecture, active, index, *slots)

    def _adopt(self, plan: TaskPlan) -> TaskPlan:
        """A plan of an earlier session; where this machine cannot keep it to the bit, the log says so."""
        here, then = self._sequence.environment, plan.environment
        if (then.device, here.device) == ("cuda", "cpu"):
            raise MachineFault(
                f"task {plan.task} was planned for a GPU, of which resources.gpu: 0 gives its trials none"
            )
        if (kept := replace(here, device=then.device, threads=then.threads)) != here:
            logger.warning(
                "task %d goes on as it was planned, on %s with %d thread(s) a trial; later tasks go by resources",
                plan.task,
                then.device,
                then.threads,
            )
        if plan.drawn_digest and plan.drawn_digest != self._sequence.drawn_digest:
            logger.warning(
                "task %d: the module's constructor draws other weights than when the task was begun, because it has "
                "changed or by the rounding of another machine",
                plan.task,
            )
        if then != kept:
            logger.warning("task %d was begun as %s and goes on as %s", plan.task, then, kept)
        return plan

    def _train(self, plan: TaskPlan, inputs: ObjectRef) -> Program[list[PointRecord]]:
        """Trains what is missing; every point of the plan has a record afterwards."""
        from clnp_search.search.tuning import Packs  # not above: most commands do without Tune, whose import is slow

        folder = self._folder
        finished = [record for point in plan.trained if (record := self._recorded(plan, point)) is not None]
        recorded = {record.point.index for record in finished}
        for listener in self._listeners:
            listener.task_planned(plan, finished)
        missing = tuple(index for index, pack in enumerate(plan.packs) if not recorded.issuperset(pack))
        if missing:
            yield Packs(plan.task, missing, inputs)
        names = [point.name_in(plan.round) for point in plan.trained]
        records = [record for name in names if (record := folder.read_point(plan.task, name)) is not None]
        if len(records) < len(names):
            raise RuntimeError(f"task {plan.task}: a trial ended without a record of every point")
        for listener in self._listeners:
            listener.points_finished(records)
        return records

    def _recorded(self, plan: TaskPlan, point: Point) -> PointRecord | None:
        name = point.name_in(plan.round)
        record = self._folder.read_point(plan.task, name)
        if record is not None and record.key != plan.keys[point.index]:
            raise InputError(f"{self._folder.uri}: task {plan.task}, {name}: the record is of another point")
        return record

    def _training(self, progress: PackProgress) -> None:
        for listener in self._listeners:
            listener.training(progress)

    def _scan(self, plan: TaskPlan, inputs: ObjectRef, inside: Sequence[PointRecord], limit: int) -> list[ScanRecord]:
        """A threshold scan of every candidate; some may be recorded already."""
        rule, task = self._sweep.forgetting.rule, plan.task
        scans, missing = [], []
        for record in inside:
            scan = self._folder.read_scan(task, record.point.index, rule, limit, plan.round)
            if scan is not None and scan.is_of(record, rule, limit):
                scans.append(scan)
                continue
            if scan is not None:
                logger.warning(
                    "task %d: %s is scanned again: its scan was of other parameters", task, record.point.name
                )
            missing.append(record.point)
        retries = self._sweep.search.max_failures

        def listen(models: int) -> None:
            for listener in self._listeners:
                listener.scanning(len(scans), len(inside), models)

        for scan in self._cluster.scan(self._shared, inputs, missing, limit, rule, retries, listen):
            self._folder.write_scan(task, scan)
            scans.append(scan)
            for listener in self._listeners:
                listener.scanned(len(scans), len(inside))
        return sorted(scans, key=lambda scan: scan.point)

    def _write_tables(self, task: int, chosen: Chosen, steps: Sequence[Step], layers: Sequence[str]) -> None:
        """Writes what the choice can be redone from; `steps` are before the fine-tune rounds, and after each."""
        records, choice = chosen.records, chosen.choice
        passing = {scan.point: scan for scan in chosen.scans if scan.theta is not None}
        rounds = {
            record.point.index: [
                {"theta": scan.theta, "val_accuracy": scan.val_accuracy}
                for step in steps
                for scan in step.scans
                if scan.point == record.point.index
            ]
            for record in records
        }
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
                    **({"rounds": json.dumps(rounds[record.point.index])} if len(steps) > 1 else {}),
                }
            )
        self._folder.write_table(task, "points", rows)
        front = [asdict(model) | {"theta": json.dumps(model.theta)} for model in pareto_front(steps[0].scans)]
        if front:  # of a baseline there is none
            self._folder.write_table(task, "pareto", front)
        for scan in steps[0].scans:
            name = next(record.point.name for record in records if record.point.index == scan.point)
            self._folder.write_curve(task, name, scan.curve, layers)
            for layer, curve in enumerate(scan.layer_curves):
                self._folder.write_curve(task, f"{name}.{layers[layer]}", curve, layers, layer)

    def _write_summary(self, results: tuple[TaskResult, ...], state: State) -> Summary:
        status: RunStatus = "running"
        if len(results) == len(self._sequence):
            status = "complete"
        elif self._sweep.capacity.on_depletion == "stop" and any(len(state.free[group]) == 0 for group in state.born):
            status = "depleted"
        summary = self._summary(status, results, state)
        self._folder.write_summary(summary)
        return summary

    def _summary(self, status: RunStatus, results: tuple[TaskResult, ...], state: State) -> Summary:
        return summarise(self._folder.name, status, self._sweep.seed, state.digest, results)


def _warn_of_slow_bf16(threads: int) -> None:
    """Says so where this machine, and so others too, multiplies more slowly in bfloat16 than in float32."""
    narrow, full = (matrix_rate("cpu", dtype, threads, 512, 0.05) for dtype in (torch.bfloat16, torch.float32))
    if narrow < full:
        logger.warning(
            "training.precision: bf16 is slower here than float32: matrix products at %.0f and %.0f GFLOP/s",
            narrow / 1e9,
            full / 1e9,
        )


def take_over(folder: RunFolder, origin: RunFolder, plan: TaskPlan) -> None:
    """Copies what another run has trained and scanned of a task's points, or of a fine-tune round's, where their keys
    are the same.
    """
    theirs = {record.key: record for record in origin.read_points(plan.task) if record.status == "done"}
    scans = [scan for scan in origin.read_scans(plan.task) if scan.round == plan.round] if theirs else []
    for point in plan.trained:
        record = theirs.get(plan.keys[point.index])
        if record is None or folder.read_point(plan.task, point.name_in(plan.round)) is not None:
            continue
        try:
            trained = origin.read_trained(plan.task, record)
        except (InputError, OSError, RuntimeError) as error:
            logger.warning("task %d: %s is not taken over: %s", plan.task, point.name, error)
            continue
        for scan in scans:
            if scan.point == record.point.index:
                folder.write_scan(plan.task, replace(scan, point=point.index))
        folder.write_point(plan.task, replace(record, point=point, origin=origin.uri), trained)


def reused_point(folder: RunFolder, sweep: Sweep) -> Point | None:
    """What the first task chose, if later ones shall reuse it; found anew from that task's records."""
    if sweep.search.tasks == "every":
        return None
    first = folder.read_plan(0)
    assert first is not None, "task 0 is committed"
    if sweep.method != "clnp":
        return recorded_best(folder, first).kept.point
    rules = sweep_at(folder, sweep, first).forgetting
    return first.points[recorded_choice(folder, first, rules).choice.chosen]


def selected(point: Point, scan: ScanRecord) -> Selected:
    """A chosen point and what its scan found, as a task's result shows them."""
    assert scan.theta is not None, "chosen points have a theta"
    return Selected(point.name, point.alpha, point.learning_rate, scan.theta, scan.val_accuracy, scan.unit_sparsity)


def count_units(state: State) -> dict[str, Units]:
    """Units of each group: all, active, grown by the last task, still free."""
    counts = {}
    for group, born in state.born.items():
        total, free = len(born), int((born == FREE).sum())
        counts[group] = Units(total, total - free, int((born == state.num_tasks - 1).sum()), free)
    return counts


def active_units(state: State) -> dict[str, int]:
    """For each group, the units that are frozen."""
    return {group: units.active for group, units in count_units(state).items()}


def test_accuracies(sequence: TaskSequence, networks: Iterable[Cut]) -> Iterator[float]:
    """Test accuracy of each task's network."""
    for task, network in enumerate(networks):
        # Without a split of the training set: this part of a task grows with its index.
        test = sequence.scenario.test(task)
        yield num_correct(network, test) / len(test)


def num_correct(network: Cut | Subnetwork, split: Split) -> int:
    """How many of a split's samples a subnetwork gets right."""
    return network.num_correct(split.inputs, split.labels)
