"""Keys, packs and the memory estimate."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from builders import GRAPHS, make_network, make_point, make_scan, make_state, make_sweep

from clnp_search.clnp.graph import INPUT, Builder, conv, mlp
from clnp_search.clnp.initial import draw
from clnp_search.clnp.ops import Add, Conv, Flatten, Linear
from clnp_search.clnp.pack import CACHE_BYTES, Pack
from clnp_search.clnp.state import Architecture
from clnp_search.clnp.training import TrainingSettings
from clnp_search.records import Environment, Point, TaskPlan
from clnp_search.search.points import (
    NUMERICS,
    TRIAL_FLOP,
    MemoryEstimate,
    auto_points_per_trial,
    cache_share,
    estimate_memory,
    pack_name,
    pack_points,
    point_key,
    round_plan,
    scan_flop,
    training_flop,
)
from clnp_search.sequence import active_units
from clnp_search.tasks import Task

TASK = Task(1, "permutation-1", None, True)
POINT = Point(3, (1e-6, 1e-5, 1e-6), 0.001)
ARCHITECTURE = make_network((30, 40), in_features=20)
SETTINGS = TrainingSettings()


def key(parent: str = "parent", task: Task = TASK, data: str = "data", point: Point = POINT, **sections: Any) -> str:
    return point_key(parent, task, data, "", make_sweep(**sections), point)


def scenario(**changes: Any) -> dict[str, Any]:
    return {"scenario": {"name": "permuted_digits", "tasks": 2} | changes}


# Keys


def test_equal_ingredients_give_equal_keys() -> None:
    assert key() == key()
    assert len(key()) == 64


CHANGES: dict[str, dict[str, Any]] = {
    "state": {"parent": "other"},
    "data": {"data": "other"},
    "task index": {"task": replace(TASK, index=2)},
    "classes": {"task": replace(TASK, classes=(0, 1))},
    "permutation": {"task": replace(TASK, permuted=False)},
    "alpha": {"point": replace(POINT, alpha=(1e-6, 1e-5, 1e-5))},
    "alpha order": {"point": replace(POINT, alpha=(1e-5, 1e-6, 1e-6))},
    "learning rate": {"point": replace(POINT, learning_rate=0.002)},
    "seed": {"seed": 1},
    "validation": scenario(validation=100),
    "scaling": scenario(scaling="unit"),
    "epochs": {"training": {"epochs": 3}},
    "batch size": {"training": {"batch_size": 3}},
    "optimizer": {"training": {"optimizer": "sgd"}},
    "schedule": {"training": {"schedule": "constant"}},
    "weight decay": {"training": {"weight_decay": 0.1}},
    "momentum": {"training": {"momentum": 0.8}},
    "precision": {"training": {"precision": "bf16"}},
    "l1": {"training": {"l1": "proximal"}},
    "l1 of scales": {"training": {"l1_scales": 2.0}},
    "compensation": {"training": {"compensate": True}},
}


@pytest.mark.parametrize("ingredient", CHANGES)
def test_a_key_changes_with(ingredient: str) -> None:
    assert key(**CHANGES[ingredient]) != key()


def test_a_key_changes_with_the_weights_that_a_module_draws() -> None:
    def drawn(digest: str) -> str:
        return point_key("parent", TASK, "data", digest, make_sweep(), POINT)

    assert drawn("") == key()
    assert len({drawn(""), drawn("one"), drawn("other")}) == 3


def test_a_key_changes_with_the_codes_numerics() -> None:
    assert point_key("parent", TASK, "data", "", make_sweep(), POINT, NUMERICS) == key()
    assert point_key("parent", TASK, "data", "", make_sweep(), POINT, NUMERICS + 1) != key()


def test_no_two_changes_give_the_same_key() -> None:
    assert len({key(**each) for each in CHANGES.values()}) == len(CHANGES)


def test_every_training_setting_is_an_ingredient() -> None:
    changed = {key for change in CHANGES.values() for key in change.get("training", {})}
    assert changed == set(make_sweep().training.model_dump())


@pytest.mark.parametrize(
    "sections",
    [
        {"name": "other"},
        {"storage": "elsewhere"},
        {"tracking": {"uri": "none"}},
        {"resources": {"cpu": 2}},
        {"forgetting": {"margin": "1%", "theta": "per_layer", "sparsity": "weights"}},
        {"capacity": {"on_depletion": "stop"}},
        {"search": {"alpha": 5, "learning_rate": 7, "tasks": "first", "points_per_trial": 1, "max_failures": 0}},
        scenario(tasks=3),
        scenario(root="elsewhere"),
    ],
)
def test_a_key_does_not_change_with_what_acts_elsewhere(sections: dict[str, Any]) -> None:
    assert key(**sections) == key()


def test_a_key_does_not_change_with_the_points_place_in_the_grid() -> None:
    assert key(point=replace(POINT, index=9)) == key()


def test_a_pack_is_named_by_its_points() -> None:
    names = {pack_name(keys) for keys in (["a", "b"], ["a"], ["b"], ["b", "a"])}
    assert len(names) == 4
    assert pack_name(["a", "b"]) in names


# Packs


def test_a_fine_tune_round_keeps_the_packs_of_the_points_that_have_passed() -> None:
    points, environment = tuple(map(make_point, range(5))), Environment("cpu", 1, "float32", "2.15", "0.1")
    plan = TaskPlan(0, "task", "parent", points, tuple("abcde"), ((0, 2), (1, 3), (4,)), environment)
    scans = [make_scan(index, 9000, theta=(0.5, 0.5) if index in (0, 1, 3) else None) for index in range(5)]
    first = round_plan(plan, scans, make_sweep().forgetting)
    assert first.packs == ((0,), (1, 3))
    assert [point.index for point in first.trained] == [0, 1, 3]
    assert round_plan(first, scans[1:2], make_sweep().forgetting).packs == ((1,),)


@pytest.mark.parametrize("num_points", range(1, 25))
def test_packs_cover_each_point_once_evenly_and_within_the_limit(num_points: int) -> None:
    points = [make_point(index, learning_rate=rate) for index, rate in enumerate([0.1, 0.3, 0.2] * 8)][:num_points]
    for points_per_trial in range(1, 26):
        packs = pack_points(points, points_per_trial)
        sizes = [len(pack) for pack in packs]
        assert sorted(itertools.chain(*packs)) == list(range(num_points))
        assert 0 < max(sizes) <= points_per_trial
        assert max(sizes) - min(sizes) <= 1


def test_points_of_equal_learning_rate_stand_together() -> None:
    points = [make_point(index, learning_rate=rate) for index, rate in enumerate([0.2, 0.1, 0.2, 0.1])]
    assert pack_points(points, 2) == ((1, 3), (0, 2))
    assert pack_points(points, 4) == ((1, 3, 0, 2),)


@pytest.mark.parametrize(
    ("num_points", "num_slots", "available", "trials_worth", "expected"),
    [
        (12, 1, 10_000, 100.0, 12),  # one device trains all together
        (12, 4, 10_000, 100.0, 3),  # every device has work
        (13, 4, 10_000, 100.0, 4),
        (3, 8, 10_000, 100.0, 1),
        (12, 4, 10_000, 2.5, 4),  # enough for three
        (12, 4, 10_000, 0.1, 12),  # another process would take longer to start than to train
        (12, 4, 10_000, 0.0, 12),  # no unit is left to train
        (12, 1, 160, 100.0, 6),  # what fits the memory
        (12, 4, 160, 0.1, 6),
        (12, 1, 50, 100.0, 1),  # one point at least, if even that does not fit
        (12, 1, 119, 100.0, 1),
    ],
)
def test_auto_keeps_slots_busy_that_have_enough_to_do_within_their_memory(
    num_points: int, num_slots: int, available: int, trials_worth: float, expected: int
) -> None:
    memory = MemoryEstimate(fixed=100, per_point=10)
    flop = trials_worth * TRIAL_FLOP / num_points
    assert auto_points_per_trial(num_points, num_slots, memory, available, flop) == expected


# Memory


def estimate(
    architecture: Architecture = ARCHITECTURE,
    num_classes: int = 10,
    num_train: int = 1000,
    num_validation: int = 100,
    settings: TrainingSettings = SETTINGS,
    num_tasks: int = 0,
) -> MemoryEstimate:
    active = active_units(make_state(architecture, num_tasks))
    return estimate_memory(architecture, active, num_classes, num_train, num_validation, settings)


def test_more_points_need_more_memory() -> None:
    totals = [estimate().total(num_points) for num_points in (1, 2, 8)]
    assert totals == sorted(set(totals))


@pytest.mark.parametrize(
    "more",
    [
        {"num_classes": 11},
        {"num_train": 1100},
        {"num_validation": 200},
        {"settings": replace(SETTINGS, batch_size=512)},
        {"architecture": make_network((30, 40), in_features=30)},
        {"architecture": make_network((31, 40), in_features=20)},
        {"architecture": make_network((30, 41), in_features=20)},
        {"architecture": make_network((30, 40, 40), in_features=20)},
    ],
)
def test_more_of_anything_needs_more_memory(more: dict[str, Any]) -> None:
    assert estimate(**more).total(4) > estimate().total(4)


def test_frozen_units_move_memory_from_the_points_to_the_shared_part() -> None:
    before, after = estimate(), estimate(num_tasks=1)
    assert after.per_point < before.per_point
    assert after.fixed > before.fixed


def test_a_single_heads_last_layer_needs_no_cache_of_frozen_units() -> None:
    multi, single = (estimate(replace(ARCHITECTURE, head=head), num_tasks=1) for head in ("multi", "single"))
    assert single.fixed < multi.fixed


def test_frozen_units_outputs_need_memory_where_a_trial_may_keep_them_and_only_there() -> None:
    state = make_state(ARCHITECTURE, 1)
    active = active_units(state)

    def fixed(cache_bytes: int) -> int:
        return estimate_memory(ARCHITECTURE, active, 10, 1000, 100, SETTINGS, cache_bytes=cache_bytes).fixed

    sample = 4 * sum(active.values())
    assert fixed(1000 * sample) - fixed(0) == 1100 * sample
    assert fixed(1000 * sample - 1) - fixed(0) == 100 * sample  # of the validation split alone


def test_a_trial_keeps_frozen_outputs_in_half_of_its_memory_at_most() -> None:
    assert cache_share(2 << 30) == 1 << 30
    assert cache_share(1 << 50) == CACHE_BYTES


@pytest.mark.parametrize("head", ["multi", "single"])
def test_a_full_network_can_be_planned(head: str) -> None:
    full = make_state(replace(ARCHITECTURE, head=head), 1, theta=-1.0)
    memory = estimate_memory(full.architecture, active_units(full), 2, 1000, 100, SETTINGS)
    assert auto_points_per_trial(12, 1, memory, memory.total(100), 0.0) == 12


@pytest.mark.parametrize("head", ["multi", "single"])
@pytest.mark.parametrize("num_tasks", [0, 2])
@pytest.mark.parametrize("network", GRAPHS)
def test_the_arithmetic_of_shapes_is_that_of_a_pack(network: str, head: str, num_tasks: int) -> None:
    state = make_state(Architecture(GRAPHS[network], head), num_tasks)
    pack = Pack(state, 2, [(0.0,) * len(state.graph.layers)] * 2, draw(state, 2, 0, state.num_tasks))
    assert 2 * training_flop(state.architecture, active_units(state), 2) == pack.training_flop


def test_a_scan_computes_again_what_depends_on_a_new_unit_but_the_layers_that_read_it() -> None:
    dense = Architecture(mlp(3, (5, 6, 7)))
    assert scan_flop(dense, {}, 2) == 2 * (5 * (6 * 7 + 7 * 2) + 6 * (7 * 2))
    assert scan_flop(dense, {"hidden0": 4, "hidden1": 6}, 2) == 2 * (7 * 2)
    assert scan_flop(dense, {}, 2, steps=1) == 2 * (5 * 6 + 6 * 7 + 7 * 2)
    maps = Architecture(conv((2, 6, 6), [4, "pool", 5], [6]))
    dense0, head = 2 * 6 * 5 * 9, 2 * 2 * 6
    assert scan_flop(maps, {}, 2) == 4 * (dense0 + head) + 5 * head
    build = Builder((2, 6, 6))
    first = build.layer("first", Conv(padding=(1, 1)), INPUT, 4)
    total = build.add("sum", Add(), first, build.layer("second", Conv(padding=(1, 1)), first, 4))
    third = build.add("flat", Flatten(), build.layer("third", Conv(), total, 3))  # of the sum, all has changed
    build.layer("head", Linear(), third, 0, head=True)
    assert scan_flop(Architecture(build.build()), {}, 2) == 4 * (2 * 3 * 4 * 9 * 16 + 2 * 2 * 3 * 16)
