"""How many trials fit on which nodes."""

from __future__ import annotations

import pytest

from clnp_search.config import ResourcesConfig
from clnp_search.errors import InputError
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
    capacity = capacity_of(ResourcesConfig(cpu=4), [NODE, Node(4, 0, 500), Node(2, 0, 100)])
    assert (capacity.cpus, capacity.gpus, capacity.num_slots) == (22, 2, 5)
    assert capacity.slot_bytes == int(1000 / 4 * MEMORY_SHARE)


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
