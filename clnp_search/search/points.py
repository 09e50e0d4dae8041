"""A task's grid: its points, their keys, and how they are packed into trials. Pure functions."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from clnp_search.clnp.graph import CLASSES, INPUT, Node
from clnp_search.clnp.ops import Reader
from clnp_search.clnp.pack import CACHE_BYTES, LARGEST_BATCH, evaluation_batch, is_one_block, microbatch
from clnp_search.clnp.state import Architecture
from clnp_search.config import ForgettingConfig, Sweep
from clnp_search.records import Point, PointRecord, ScanRecord, TaskPlan
from clnp_search.tasks import Task

if TYPE_CHECKING:
    from clnp_search.clnp.training import TrainingSettings

# Resident memory of a trial's process before any data: Python, torch, ray and pyarrow (measured; see
# tests/benchmarks/README.md).
PROCESS_BYTES = 680 << 20
# What one core computes while Ray starts the processes of another trial: it takes about two seconds of a core.
TRIAL_FLOP = 30e9
# Raised with every change of the code after which the same settings give other bits: points of before and after
# have other keys, and are never mixed.
NUMERICS = 7


def point_key(
    parent_digest: str,
    task: Task,
    data_digest: str,
    drawn_digest: str,
    sweep: Sweep,
    point: Point,
    numerics: int = NUMERICS,
) -> str:
    """The hash of all that a point's result depends on, besides the machine.

    Args:
        data_digest: Of the task's own samples, splits and input transform.
        drawn_digest: Of the initial weights of a user's module, whose constructor draws them; else empty.
    """
    parts = {
        "numerics": numerics,
        "state": parent_digest,
        "task": asdict(task),
        "data": data_digest,
        "validation": sweep.scenario.validation,
        "scaling": sweep.scenario.scaling,
        "augment": sweep.scenario.augment.model_dump(),
        "training": sweep.training.model_dump(),
        "seed": sweep.seed,
        "alpha": point.alpha,
        "learning_rate": point.learning_rate,
    }
    if sweep.method != "clnp":
        parts["method"] = sweep.method
    if drawn_digest:
        parts["drawn"] = drawn_digest
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def round_plan(plan: TaskPlan, scans: Sequence[ScanRecord], rules: ForgettingConfig) -> TaskPlan:
    """The next fine-tune round of a task: the points whose scans have passed, pruned at their thresholds.

    They stay in the packs that they were in, so that no other machine that goes on with the task packs them anew.

    Args:
        plan: Of the round before.
        scans: After that round.
    """
    cuts = {scan.point: scan.theta for scan in scans if scan.theta is not None}
    keys = list(plan.keys)
    for point, theta in cuts.items():
        parts = (plan.keys[point], plan.round + 1, theta, rules.finetune_epochs, rules.finetune_l1)
        keys[point] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    kept = (tuple(point for point in pack if point in cuts) for pack in plan.packs)
    return replace(plan, round=plan.round + 1, cuts=cuts, keys=tuple(keys), packs=tuple(filter(None, kept)))


def retrained(scans: Sequence[ScanRecord], records: Sequence[PointRecord]) -> list[ScanRecord]:
    """What points have come to after their last fine-tune round.

    Args:
        scans: By which they were pruned before that round.
        records: Of the round's end.
    """
    before = {scan.point: scan for scan in scans}
    after = []
    for record in records:
        scan = before[record.point.index]
        inside = record.status == "done" and record.val_correct >= scan.min_correct
        after.append(
            replace(
                scan,
                theta=scan.theta if inside else None,
                val_correct=record.val_correct,
                round=record.round,
                key=record.key,
                parameters_sha256=record.parameters_sha256,
            )
        )
    return after


def pack_name(keys: Sequence[str]) -> str:
    """The name of the pack of these points, the same for the same points."""
    return hashlib.sha256("".join(keys).encode()).hexdigest()[:16]


def cache_share(slot_bytes: int) -> int:
    """What a trial may take of its memory to keep frozen units' outputs."""
    return min(CACHE_BYTES, slot_bytes // 2)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a trial's process or device holds at its peak."""

    fixed: int
    per_point: int

    def total(self, num_points: int) -> int:
        """Bytes of a pack of `num_points`."""
        return self.fixed + num_points * self.per_point


def estimate_memory(
    architecture: Architecture,
    active: Mapping[str, int],
    num_classes: int,
    num_train: int,
    num_validation: int,
    settings: TrainingSettings,
    device: str = "cpu",
    cache_bytes: int = CACHE_BYTES,
) -> MemoryEstimate:
    """What a pack needs, from shapes alone.

    Each free parameter is held four times (value, gradient, two moments), and three times more while a checkpoint is
    written; bf16 adds half-width copies of weights and gradients. Maps are held from the forward to the backward pass,
    but for those that the next node overwrites, and two gradients beside them.

    Args:
        active: Units of each group that are frozen already.
        device: Its kind.
        cache_bytes: What frozen units' outputs on a split may take to be kept.
    """
    graph = architecture.graph
    free, frozen = _free_units(architecture, active), {**active, INPUT: graph.input_shape[0]}
    parameters = sum(
        math.prod(shape)
        for layer in _trained(architecture, active, num_classes)
        for shape in layer.node.op.shapes(layer.rows, layer.shared + layer.own, layer.taps).values()
    )
    width = 2 if settings.precision == "bf16" else 4
    samples, features = num_train + num_validation, math.prod(graph.input_shape)
    levels = 0
    for name in {graph.source(graph.by_name[layer]).name for layer in graph.layers} - {INPUT}:
        if name != graph.source(graph.by_name[graph.head]).name or architecture.head_reads_frozen:
            levels += graph.value_size(name, frozen)
    outputs = [num * width * levels for num in (num_train, num_validation)]
    # Inputs are held in float32; what they are made from takes as much. Frozen outputs are cached beside them.
    fixed = PROCESS_BYTES + samples * 2 * 4 * features + sum(each for each in outputs if each <= cache_bytes)
    if width == 2:
        fixed += samples * width * features
    values = sum(graph.value_size(node.name, free) for node in graph.nodes)
    trained = graph.pooled_first
    kept = sum(trained.value_size(node.name, free) for node in trained.nodes if node.name not in trained.in_place)
    together = microbatch(graph, settings.batch_size, device, width) * (kept + 2 * graph.largest_value)
    if graph.is_dense:
        together = (2 * settings.batch_size + LARGEST_BATCH) * values // 2
    elif is_one_block(graph, device):
        together += evaluation_batch(graph, device) * values  # a recorded step keeps its memory
    else:
        fixed += width * max(together, evaluation_batch(graph, device) * 2 * graph.largest_value)
        together = 0
    per_point = 1 + parameters * (16 + 12 + (6 if width == 2 else 0)) + width * together
    return MemoryEstimate(fixed, per_point)


def training_flop(architecture: Architecture, active: Mapping[str, int], num_classes: int) -> int:
    """Floating-point operations of one sample's forward and backward pass through one point's free layers.

    What reads frozen units or the input hands no gradient on: 4 operations a weight instead of 6.

    Args:
        active: Units of each group that are frozen already.
    """
    flop = 0
    for layer in _trained(architecture, active, num_classes):
        op, positions = layer.node.op, math.prod(layer.node.positions)
        flop += 3 * op.flop(layer.rows, layer.own, layer.taps, positions)
        if isinstance(op, Reader):
            flop += 2 * op.flop(layer.rows, layer.shared, layer.taps, positions)
    return flop


def scan_flop(architecture: Architecture, active: Mapping[str, int], num_classes: int, steps: int | None = None) -> int:
    """Floating-point operations of one sample in all models that a scan of one threshold for all groups tries.

    Each has a unit more than the one before, and what depends on that unit is computed again; but layers that read it,
    and nothing that it has changed, add what it gives.

    Args:
        active: Units of each group that are frozen already.
        steps: Tries that many thresholds instead of all.
    """
    graph = architecture.graph
    flop = {
        layer.node.name: layer.node.op.flop(layer.rows, layer.own, layer.taps, math.prod(layer.node.positions))
        for layer in _trained(architecture, active, num_classes)
    }
    total = 0
    for group, units in _free_units(architecture, active).items():
        again: set[str] = set()
        for node in graph.nodes:
            read = graph.source(node).groups if isinstance(node.op, Reader) else ()
            changed = not again.isdisjoint(node.inputs)
            if group in read or changed:
                again.add(node.name)
                total += units * flop[node.name] if changed or len(read) > 1 else 0
    return total if steps is None else min(total, steps * sum(flop.values()))


def _free_units(architecture: Architecture, active: Mapping[str, int]) -> dict[str, int]:
    """For each group, the units that no task owns."""
    return {group: units - active.get(group, 0) for group, units in architecture.graph.groups.items()}


@dataclass(frozen=True)
class _Layer:
    """A node as a point of a task trains it.

    Args:
        rows: Its own units.
        shared: Frozen units, or inputs, that it reads.
        own: Own units that it reads.
        taps: Values of each unit that it reads.
    """

    node: Node
    rows: int
    shared: int
    own: int
    taps: int


def _trained(architecture: Architecture, active: Mapping[str, int], num_classes: int) -> Iterator[_Layer]:
    """What a point of a task trains, from shapes alone."""
    graph = architecture.graph
    free = {**_free_units(architecture, active), INPUT: 0, CLASSES: num_classes}
    frozen = {**active, INPUT: graph.input_shape[0]}
    for node in graph.nodes:
        source = graph.source(node)
        rows, own = (sum(free[group] for group in each.groups) for each in (node, source))
        reads_frozen = node.name != graph.head or architecture.head_reads_frozen
        shared = sum(frozen.get(group, 0) for group in source.groups) if reads_frozen else 0
        yield _Layer(node, rows, shared, own, source.taps)


def pack_points(points: Sequence[Point], points_per_trial: int) -> tuple[tuple[int, ...], ...]:
    """Packs of at most `points_per_trial` points, as even as possible.

    Points of equal learning rate stand together, because an optimizer call serves one rate.
    """
    order = [point.index for point in sorted(points, key=lambda point: (point.learning_rate, point.index))]
    num_packs = math.ceil(len(order) / points_per_trial)
    cuts = [round(pack * len(order) / num_packs) for pack in range(num_packs + 1)]
    return tuple(tuple(order[start:stop]) for start, stop in itertools.pairwise(cuts))


def auto_points_per_trial(
    num_points: int, num_slots: int, memory: MemoryEstimate, available_bytes: int, point_flop: float
) -> int:
    """As many points in a trial as keep all slots busy, if they have enough to do, and fit the memory of one slot.

    Args:
        num_slots: Trials that run at the same time.
        available_bytes: Memory of one slot.
        point_flop: Of a point's training.
    """
    fitting = max(1, (available_bytes - memory.fixed) // memory.per_point)
    busy = max(1, min(num_slots, math.ceil(num_points * point_flop / TRIAL_FLOP)))
    return int(min(math.ceil(num_points / busy), fitting))
