"""What a run would do: points, packs, memory and time of every task, from shapes and records alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from clnp_search.clnp.rates import matrix_rate
from clnp_search.errors import InputError
from clnp_search.records import Point, TaskPlan, TaskResult
from clnp_search.search.capacity import Capacity
from clnp_search.search.points import MemoryEstimate, cache_share, training_flop
from clnp_search.search.proposals import first_points
from clnp_search.search.trial import TaskInputs, measure_step
from clnp_search.sequence import TaskSequence, reused_point
from clnp_search.storage import RunFolder

# Of the rate of a large matrix product, what training reaches (tests/benchmarks/README.md), and what each step and each
# task take besides.
MATRIX_SHARE = 0.75
STEP_S = 1e-3
TASK_S = 1.0
MEASURED_STEPS = 10


@dataclass(frozen=True)
class Pace:
    """How fast a trial trains.

    Args:
        source: Where that is known from, in words.
    """

    flop_per_s: float
    step_s: float
    task_s: float
    source: str


@dataclass(frozen=True)
class PlannedTask:
    """A task that is not committed yet.

    Args:
        points: Those that are known; Optuna proposes others on their results.
        num_points: In all.
        seconds: About how long it will take; None if there is nothing to tell it from.
    """

    index: int
    points: tuple[Point, ...]
    num_points: int
    packs: tuple[tuple[int, ...], ...]
    memory: MemoryEstimate
    seconds: float | None

    @property
    def trial_bytes(self) -> int:
        """Memory of its largest trial."""
        return self.memory.total(max(len(pack) for pack in self.packs))


@dataclass(frozen=True)
class RunPlan:
    """What is left of a run.

    Args:
        pace: What the times are estimated from, in words; empty if they are not.
    """

    done: tuple[TaskResult, ...]
    tasks: tuple[PlannedTask, ...]
    pace: str


def plan_run(sequence: TaskSequence, folder: RunFolder, capacity: Capacity, measure: bool = False) -> RunPlan:
    """The tasks that a run has still to do, each with the units that are free now: later ones need less than said.

    Args:
        folder: The run's folder, whose settings agree with the sequence's.
        measure: Whether to train some steps for the estimate of time.

    Raises:
        InputError: There is no memory to measure in.
    """
    sequence.warn_of_slow_scan()
    done = folder.read_results()
    units = done[-1].units if done else {}
    is_clnp = sequence.sweep.method == "clnp"  # in a baseline no unit is ever frozen
    active = {group: each.active for group, each in units.items() if is_clnp}
    widths = {group: each.total for group, each in units.items()}
    wider = widths | sequence.wider(units)
    left = [_Workload(sequence, folder, index, wider, active, capacity) for index in range(len(done), len(sequence))]
    stops = sequence.sweep.capacity.on_depletion == "stop" and any(not each.free for each in units.values())
    if not left or stops:
        return RunPlan(done, (), "")
    if measure:
        pace: Pace | None = _measured(left[0])
    elif done:
        before = {group: each.active - each.new for group, each in units.items() if is_clnp}
        pace = _recorded(done[-1], _Workload(sequence, folder, len(done) - 1, widths, before, capacity))
    else:
        pace = _assumed(sequence)
    tasks = [
        PlannedTask(
            each.index, each.points, each.num_points, each.packs, each.memory, each.seconds(pace) if pace else None
        )
        for each in left
    ]
    return RunPlan(done, tuple(tasks), pace.source if pace else "")


class _Workload:
    """A task's grid on a network of which some units are frozen.

    Args:
        widths: Units of each group; of the groups that are left out, as many as the first task has.
        active: Of these, the frozen ones.
    """

    def __init__(
        self,
        sequence: TaskSequence,
        folder: RunFolder,
        index: int,
        widths: Mapping[str, int],
        active: Mapping[str, int],
        capacity: Capacity,
    ) -> None:
        self.index, self._sequence, self._folder, self._capacity = index, sequence, folder, capacity
        sweep, data = sequence.sweep, sequence.data(index)
        architecture = replace(sequence.architecture, graph=sequence.architecture.graph.widened(widths))
        self.memory = sequence.memory(architecture, active, index, capacity.slot_bytes)
        plan = folder.read_plan(index)
        if plan is not None:
            self.points, self.packs = plan.points, plan.packs
        else:
            chosen = reused_point(folder, sweep) if index and folder.read_results() else None
            self.points = first_points(sweep, index, chosen, architecture.graph.layers)
            if index and sweep.search.tasks == "first" and chosen is None:
                self.points = self.points[:1]  # which one will be chosen is not known; any costs the same
            slots = capacity.num_slots, capacity.slot_bytes
            self.packs = sequence.packs(self.points, architecture, active, index, *slots)
        searched = index == 0 or sweep.search.tasks == "every"
        self.num_points = max(len(self.points), sweep.num_points if searched else 0)
        sample_flop = training_flop(architecture, active, data.info.num_classes)
        steps = math.ceil(sequence.sizes(index)[0] / sweep.training.batch_size)
        # Trials of one wave train side by side, so a task takes as long as its largest pack, wave after wave.
        self.waves = math.ceil(len(self.packs) / capacity.num_slots) * math.ceil(self.num_points / len(self.points))
        self.pack_size = max(len(pack) for pack in self.packs)
        self.step_flop = self.pack_size * sample_flop * sweep.training.batch_size
        # Validation is a third of training's arithmetic. Scans are counted as if every point were a candidate, each as
        # one epoch at least.
        share = (len(data.train) + len(data.validation) / 3) / len(data.train)
        is_clnp, scan = sweep.method == "clnp", 1.0
        if is_clnp and sample_flop:
            scan = max(scan, sequence.scan_flop(architecture, active, index) / (len(data.train) * sample_flop))
        rounds = sweep.forgetting.finetune_rounds if is_clnp else 0
        epochs = sweep.training.epochs + rounds * sweep.forgetting.finetune_epochs
        self.steps = self.waves * steps * (epochs * share + (1 + rounds) * scan)

    def seconds(self, pace: Pace) -> float:
        """How long the task takes at this pace."""
        return self.steps * (self.step_flop / pace.flop_per_s + pace.step_s) + pace.task_s

    @property
    def trial_seconds(self) -> float:
        """How long its recorded trials and scans took, as many at a time as there are slots."""
        training_s = sum(record.seconds for record in self._folder.read_points(self.index))
        scans_s = sum(scan.seconds for scan in self._folder.read_scans(self.index))
        return (training_s + scans_s) / self._capacity.num_slots

    def measured_step(self) -> float:
        """Seconds of a step of the largest pack, by training some; nothing is written."""
        needed, present = self.memory.total(self.pack_size), self._capacity.slot_bytes
        if self._sequence.sweep.resources.gpu and not torch.cuda.is_available():
            raise InputError("--measure: trains here, where there is no GPU that can be used, and resources.gpu asks")
        if needed > present:
            raise InputError(f"--measure: a trial needs {needed >> 20} MiB, and {present >> 20} MiB are present")
        sequence, index = self._sequence, self.index
        state = sequence.empty_state() if index == 0 else sequence.start_of(index, self._folder.read_state(index - 1))
        name, keys, cache = sequence.task(index).name, ("",) * len(self.points), cache_share(present)
        plan = TaskPlan(
            index, name, state.digest, self.points, keys, self.packs, sequence.environment, cache_bytes=cache
        )
        inputs = TaskInputs(sequence.run_inputs(self._folder), plan, state, sequence.drawn(index))
        largest = max(self.packs, key=len)
        return measure_step(inputs, [self.points[each] for each in largest], MEASURED_STEPS)


def _measured(workload: _Workload) -> Pace:
    step_s = workload.measured_step()
    return _pace(workload, step_s, TASK_S, f"measured: {1000 * step_s:.3g} ms a step of the largest pack")


def _recorded(result: TaskResult, workload: _Workload) -> Pace:
    # A task that was cut short, or that a fork took over, took longer than its last session: as long as its trials.
    seconds = max(result.seconds, workload.trial_seconds)
    source = f"at the pace of task {result.index}, which took {seconds:.0f} s"
    return _pace(workload, seconds / workload.steps, 0.0, source)


def _pace(workload: _Workload, step_s: float, task_s: float, source: str) -> Pace:
    """That of a task whose steps took so long; where no unit was left to train, all steps take as long."""
    if not workload.step_flop:
        return Pace(math.inf, step_s, task_s, source)
    return Pace(workload.step_flop / step_s, 0.0, task_s, source)


def _assumed(sequence: TaskSequence) -> Pace | None:
    """From this machine's matrix products, on the threads that a trial is given."""
    resources, settings = sequence.sweep.resources, sequence.sweep.training.settings
    if resources.gpu and not torch.cuda.is_available():
        return None
    rate = matrix_rate(resources.device, settings.dtype, resources.cpu)
    source = f"assumed: {MATRIX_SHARE:.0%} of this machine's {rate / 1e9:,.0f} GFLOP/s in matrix products"
    return Pace(MATRIX_SHARE * rate, STEP_S, TASK_S, f"{source}; --measure trains a few steps instead")
