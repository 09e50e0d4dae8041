"""A task's grid: its points, their keys, and how they are packed into trials. Pure functions."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from clnp_search.clnp.state import Architecture
from clnp_search.clnp.training import TrainingSettings
from clnp_search.config import Sweep
from clnp_search.records import Point
from clnp_search.tasks import Task

# Resident memory of a trial's process before any data: Python, torch, ray and pyarrow (measured; see
# tests/benchmarks/README.md).
PROCESS_BYTES = 680 << 20


def grid(sweep: Sweep, chosen: Point | None) -> tuple[Point, ...]:
    """The points of a task, in order: alpha by alpha, rate by rate.

    Args:
        chosen: What the first task chose, if this task shall reuse it.
    """
    if chosen is not None:
        return (Point(0, chosen.alpha, chosen.learning_rate),)
    product = itertools.product(sweep.search.alpha, sweep.search.learning_rate)
    return tuple(Point(index, sweep.layer_alphas(alpha), rate) for index, (alpha, rate) in enumerate(product))


def point_key(parent_digest: str, task: Task, data_digest: str, sweep: Sweep, point: Point) -> str:
    """The hash of all that a point's result depends on, besides the machine."""
    parts = {
        "state": parent_digest,
        "task": asdict(task),
        "data": data_digest,
        "validation": sweep.scenario.validation,
        "scaling": sweep.scenario.scaling,
        "training": sweep.training.model_dump(),
        "seed": sweep.seed,
        "alpha": point.alpha,
        "learning_rate": point.learning_rate,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def pack_name(keys: Sequence[str]) -> str:
    """The name of the pack of these points, the same for the same points."""
    return hashlib.sha256("".join(keys).encode()).hexdigest()[:16]


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
    active: Sequence[int],
    num_classes: int,
    num_train: int,
    num_validation: int,
    settings: TrainingSettings,
) -> MemoryEstimate:
    """What a pack needs, from shapes alone.

    Each free parameter is held four times (value, gradient, two moments), and three times more while a checkpoint is
    written; bf16 adds half-width copies of weights and gradients.

    Args:
        active: Units of each hidden layer that are frozen already.
    """
    frozen = [*active]
    free = [total - units for total, units in zip(architecture.hidden, active, strict=True)]
    if architecture.head == "single":
        frozen[-1] = 0
    inputs = [architecture.in_features, *(a + f for a, f in zip(frozen, free, strict=True))]
    parameters = sum(units * width for units, width in zip((*free, num_classes), inputs, strict=True))
    width = 2 if settings.precision == "bf16" else 4
    samples = num_train + num_validation
    # Inputs are held in float32; what they are made from takes as much. Frozen outputs are cached beside them.
    fixed = PROCESS_BYTES + samples * (2 * 4 * architecture.in_features + width * sum(frozen))
    if width == 2:
        fixed += samples * width * architecture.in_features
    rows = 2 * settings.batch_size + 1000
    per_point = 1 + parameters * (16 + 12 + (6 if width == 2 else 0)) + rows * width * sum(free)
    return MemoryEstimate(fixed, per_point)


def training_flop(architecture: Architecture, active: Sequence[int], num_classes: int) -> int:
    """Floating-point operations of one sample's forward and backward pass through one point's free layers.

    What reads frozen units or the input hands no gradient on: 4 operations a weight instead of 6.

    Args:
        active: Units of each hidden layer that are frozen already.
    """
    free = [total - units for total, units in zip(architecture.hidden, active, strict=True)]
    shared, own = [architecture.in_features, *active], [0, *free]
    if architecture.head == "single":
        shared[-1] = 0
    return sum(
        units * (4 * frozen_inputs + 6 * free_inputs)
        for units, frozen_inputs, free_inputs in zip((*free, num_classes), shared, own, strict=True)
    )


def pack_points(points: Sequence[Point], points_per_trial: int) -> tuple[tuple[int, ...], ...]:
    """Packs of at most `points_per_trial` points, as even as possible.

    Points of equal learning rate stand together, because an optimizer call serves one rate.
    """
    order = [point.index for point in sorted(points, key=lambda point: (point.learning_rate, point.index))]
    num_packs = math.ceil(len(order) / points_per_trial)
    cuts = [round(pack * len(order) / num_packs) for pack in range(num_packs + 1)]
    return tuple(tuple(order[start:stop]) for start, stop in itertools.pairwise(cuts))


def auto_points_per_trial(num_points: int, num_slots: int, memory: MemoryEstimate, available_bytes: int) -> int:
    """As many points in a trial as keep all slots busy and fit the memory of one slot.

    Args:
        num_slots: Trials that run at the same time.
        available_bytes: Memory of one slot.
    """
    fitting = max(1, (available_bytes - memory.fixed) // memory.per_point)
    return int(min(math.ceil(num_points / max(1, num_slots)), fitting))
