"""How many trials fit on which nodes."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from clnp_search.config import ResourcesConfig
from clnp_search.errors import InputError
from clnp_search.search import capacity
from clnp_search.search.capacity import MEMORY_SHARE, Node, capacity_of

NODE = Node(cpus=16, gpus=2, memory=1000)


@pytest.mark.parametrize(
    ("cpu", "gpu", "slots"),
    [
        (1, 0, 16),
        (5, 0, 3),
        (1, 1, 2),
        (1, 2, 1),
        (1, 0.5, 4),
        (1, 0.3, 6),  # a trial's share is of one GPU: three on each, and a tenth left over
        (8, 0.25, 2),
    ],
)
def test_slots_are_what_the_scarcer_of_cpus_and_gpus_allows(cpu: int, gpu: float, slots: int) -> None:
    assert capacity_of(ResourcesConfig(cpu=cpu, gpu=gpu), [NODE]).num_slots == slots


def test_nodes_add_up_and_the_fullest_gives_the_memory_of_a_slot() -> None:
    found = capacity_of(ResourcesConfig(cpu=4), [NODE, Node(4, 0, 500), Node(2, 0, 100)])
    assert (found.cpus, found.gpus, found.num_slots) == (22, 2, 5)
    assert found.slot_bytes == int(1000 / 4 * MEMORY_SHARE)


@pytest.mark.parametrize(
    ("cpu", "gpu", "nodes", "message"),
    [
        (17, 0, [NODE, NODE], "resources.cpu: 17 for each trial .* allowed: up to 16"),
        (1, 3, [NODE], "resources.gpu: 3 for each trial .* allowed: up to 2"),
        (1, 0.5, [Node(4, 0, 100)], "resources.gpu: 0.5 for each trial .* allowed: up to 0"),
        (8, 1, [Node(16, 0, 100), Node(4, 1, 100)], "no node has 8 CPUs and 1 GPUs together"),
    ],
)
def test_what_no_node_can_hold_is_refused(cpu: int, gpu: float, nodes: list[Node], message: str) -> None:
    with pytest.raises(InputError, match=message):
        capacity_of(ResourcesConfig(cpu=cpu, gpu=gpu), nodes)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ({}, math.inf),
    ],
)
def test_a_container_has_the_cpus_of_its_quota(
    files: dict[str, str], expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "CGROUP", tmp_path)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    here = len(os.sched_getaffinity(0))
    assert capacity.local_cpus() == max(1, int(min(here, expected)))


def test_a_container_has_the_memory_of_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{1 << 30}\n")
    slots = capacity.local_cpus()
    room = int((1 << 30) * capacity.LOCAL_SHARE)
    assert capacity.local_capacity(ResourcesConfig()).slot_bytes == int(room / slots * MEMORY_SHARE)


@pytest.mark.parametrize("visible", ["", "-1", "0,1"])
def test_gpus_are_those_that_are_named_of_those_that_are_there(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    there = len(list(Path("/dev").glob("nvidia[0-9]*")))
    named = 2 if visible == "0,1" else 0
    assert capacity.local_capacity(ResourcesConfig()).gpus == (min(there, named) if there else named)
