"""How many trials fit on which machines. Knows nothing of Ray."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clnp_search.errors import InputError

if TYPE_CHECKING:
    from clnp_search.config import ResourcesConfig

CGROUP = Path("/sys/fs/cgroup")
# Of a slot's memory, what a trial may plan with.
MEMORY_SHARE = 0.8
# Of a machine's memory, what Ray offers to trials; the rest is its object store and the system.
LOCAL_SHARE = 0.6


@dataclass(frozen=True)
class Capacity:
    """What trials can be given.

    Args:
        num_slots: Trials that run at the same time.
        slot_bytes: Memory that one of them may plan with.
    """

    cpus: float
    gpus: float
    num_slots: int
    slot_bytes: int


@dataclass(frozen=True)
class Node:
    """What one machine has."""

    cpus: float
    gpus: float
    memory: int


def capacity_of(resources: ResourcesConfig, nodes: Sequence[Node]) -> Capacity:
    """What trials of these resources can be given on some machines.

    Raises:
        InputError: None of them can hold one trial.
    """
    for label, asked, present in (
        ("cpu", resources.cpu, max((node.cpus for node in nodes), default=0)),
        ("gpu", resources.gpu, max((node.gpus for node in nodes), default=0)),
    ):
        if asked > present:
            raise InputError(
                f"resources.{label}: {asked:g} for each trial is more than any node has; allowed: up to {present:g}"
            )
    num_slots, slot_bytes = 0, 0
    for node in nodes:
        slots = int(node.cpus // resources.cpu)
        if resources.gpu:
            shared = int(node.gpus // resources.gpu) if resources.gpu >= 1 else int(node.gpus) * int(1 / resources.gpu)
            slots = min(slots, shared)
        if slots:
            num_slots += slots
            room = int(node.memory / slots * MEMORY_SHARE)
            slot_bytes = min(slot_bytes, room) if slot_bytes else room
    if not num_slots:
        raise InputError(f"resources: no node has {resources.cpu} CPUs and {resources.gpu:g} GPUs together")
    return Capacity(sum(node.cpus for node in nodes), sum(node.gpus for node in nodes), num_slots, slot_bytes)


def local_capacity(resources: ResourcesConfig) -> Capacity:
    """What this machine has, as a local cluster would offer it; GPUs are counted without touching them.

    Raises:
        InputError: It cannot hold one trial.
    """
    gpus, visible = len(list(Path("/dev").glob("nvidia[0-9]*"))), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = sum(each.strip() not in ("", "-1") for each in visible.split(","))
        gpus = min(gpus, named) if gpus else named  # of some machines no device files say which there are
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    total = min(whole, _limit("memory.max", "memory/memory.limit_in_bytes"))
    return capacity_of(resources, [Node(local_cpus(), gpus, int(total * LOCAL_SHARE))])


def gpu_slot_bytes(resources: ResourcesConfig, whole: int) -> int:
    """Memory that a trial may plan with on a GPU of which it is given its share."""
    return int(whole * min(1.0, resources.gpu) * MEMORY_SHARE)


def local_cpus() -> int:
    """The CPUs of this machine that this process may use: by its affinity, and by the quota of its container."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none
    return max(1, int(min(here, _limit("cpu.max", "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))))


def _limit(newer: str, *older: str) -> float:
    """What a container is held to, by the file of its control group or, in the older version, by one or two of them:
    a number, or the ratio of two; infinite if it is not limited.
    """
    for names in ((newer,), older):
        with suppress(OSError, ValueError):
            words = [word for name in names for word in (CGROUP / name).read_text().split()]
            limit, period = (float(word) for word in [*words, "1"][:2])
            return limit / period if limit > 0 else math.inf
    return math.inf
