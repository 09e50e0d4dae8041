"""Graphs: their groups, where activity is seen, what reads back, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import GRAPHS, make_samples, make_state

from clnp_search.clnp.graph import INPUT, Builder, Graph, conv, mlp, run, zenke
from clnp_search.clnp.ops import (
    Activation,
    Add,
    Affine,
    Concat,
    Conv,
    Depthwise,
    Flatten,
    Linear,
    MaxPool,
    MeanPositions,
    Multiply,
)
from clnp_search.clnp.state import Architecture


def test_what_meets_in_a_sum_or_a_product_is_one_group() -> None:
    graph = GRAPHS["residual"]
    assert graph.groups == {"stem": 4, "one": 3, "two": 5, "squeeze": 3, "last": 4}
    groups = {name: graph.by_name[name].groups for name in ("back", "deep", "gate", "down", "joined", "last")}
    assert groups == {
        "back": ("stem",),
        "deep": ("two",),
        "gate": ("two",),
        "down": ("two",),
        "joined": ("two", "stem"),
        "last": ("last",),
    }


def test_a_group_that_meets_two_others_in_one_sum_ties_all_three() -> None:
    build = Builder((3, 4, 4))
    one, two, twice = (build.layer(name, Conv(), INPUT, 4) for name in ("one", "two", "twice"))
    both = build.add("both", Concat(), build.add("cat", Concat(), one, two))
    build.add("sum", Add(), both, build.add("doubled", Concat(), twice, twice))
    build.layer("head", Linear(), build.add("mean", MeanPositions(), "sum"), 0, head=True)
    graph = build.build()
    assert graph.groups == {"one": 4}
    assert graph.by_name["sum"].groups == graph.by_name["cat"].groups == ("one", "one")


def test_activity_is_seen_after_activations_and_a_factor_only_in_its_product() -> None:
    assert GRAPHS["residual"].observed == {
        "stem": ("stem.relu", "first.relu"),
        "one": ("one.relu",),
        "two": ("two.relu", "gated", "second.relu"),
        "squeeze": ("squeeze.relu",),
        "last": ("last.relu",),
    }


def test_a_factor_that_is_read_beside_its_product_is_seen_too() -> None:
    build = Builder((3, 4, 4))
    seen = build.add("seen", Activation(), build.layer("one", Conv(), INPUT, 4))
    gate = build.add("gate", Activation("sigmoid"), build.add("scale", Affine(2.0), seen))
    gated = build.add("gated", Multiply(), seen, gate)
    flat = build.add("mean", MeanPositions(), build.add("sum", Add(), seen, gated))
    build.layer("head", Linear(), flat, 0, head=True)
    assert build.build().observed == {"one": ("seen", "gated")}


def test_a_group_without_an_activation_is_seen_as_it_is_read() -> None:
    build = Builder((3,))
    build.layer("head", Linear(), build.layer("first", Linear(), INPUT, 4), 0, head=True)
    assert build.build().observed == {"first": ("first",)}


@pytest.mark.parametrize("graph", [*GRAPHS.values(), zenke((3, 32, 32))], ids=[*GRAPHS, "zenke"])
def test_a_graph_reads_back_as_it_was_written(graph: Graph) -> None:
    assert Graph.from_json(graph.to_json()) == graph


def test_the_head_is_the_last_layer() -> None:
    assert [graph.layers[-1] for graph in GRAPHS.values()] == ["head"] * len(GRAPHS)


def test_after_a_flatten_a_unit_owns_its_whole_map() -> None:
    graph = conv((2, 6, 6), [4, "pool"], [5])
    assert (graph.by_name["flatten"].taps, graph.by_name["flatten"].positions) == (9, ())
    assert graph.shapes(graph.by_name["dense0"]) == {"weight": (5, 4, 9), "bias": (5,)}


def test_zenkes_network_has_its_published_layers() -> None:
    graph = zenke((3, 32, 32))
    assert graph.groups == {"conv0": 32, "conv1": 32, "conv2": 64, "conv3": 64, "dense0": 512}
    assert graph.by_name["flatten"].taps == 36
    assert zenke((3, 32, 32), width=0.5).groups["dense0"] == 256


def test_operations_are_two_for_each_weight_and_position() -> None:
    graph = conv((2, 6, 6), [4, "pool"], [5])
    assert graph.flop(classes=3) == {"conv0": 2 * 4 * 2 * 9 * 36, "dense0": 2 * 5 * 4 * 9, "head": 2 * 3 * 5}


def test_trained_parameters_are_counted_by_layer_with_those_of_its_normalisation() -> None:
    counts = conv((2, 6, 6), [4, "pool"], batch_norm=True).parameters(3)
    assert counts == {"conv0": 4 * 2 * 9 + 2 * 4, "head": 3 * 4 * 9 + 3}


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_pooling_first_gives_the_same_values(activation: str) -> None:
    graph = conv((2, 6, 6), [4, "pool", 5, "pool"], activation=activation)
    assert (graph.pooled_first == graph) == (activation == "gelu")  # which falls
    state = make_state(Architecture(graph), 1, theta=-1.0)
    inputs, _ = make_samples(5, graph.input_shape)
    tensors = {**state.tensors, "head": state.heads[0]}
    plain, swapped = (run(each, {INPUT: inputs}, tensors)["head"] for each in (graph, graph.pooled_first))
    assert torch.equal(plain, swapped)


def test_a_pool_of_what_others_read_too_stays_where_it_is() -> None:
    build = Builder((2, 4, 4))
    active = build.add("relu", Activation(), build.layer("one", Conv(padding=(1, 1)), INPUT, 3))
    pooled = build.add("flat", Flatten(), build.add("pool", MaxPool(), active))
    both = build.add("both", Concat(), pooled, build.add("pooled", Flatten(), build.add("again", MaxPool(), active)))
    build.layer("head", Linear(), both, 0, head=True)
    assert build.build().pooled_first == build.build()


def test_shapes_are_worked_out_without_memory_for_their_values() -> None:
    build = Builder((3, 10**6, 10**6))
    pooled = build.add("pool", MaxPool(), build.layer("one", Conv(padding=(1, 1)), INPUT, 10**9))
    build.layer("head", Linear(), build.add("mean", MeanPositions(), pooled), 0, head=True)
    assert build.build().by_name["pool"].positions == (500_000, 500_000)


# What does not fit


def misfit(call: Callable[[Builder, str, str], Any]) -> str:
    """Why a call on a builder with a map `one` of 3 channels and a map `two` of 4 is refused."""
    build = Builder((2, 4, 4))
    one, two = build.layer("one", Conv(), INPUT, 3), build.layer("two", Conv(), INPUT, 4)
    with pytest.raises(ValueError, match=r".") as caught:
        call(build, one, two)
    return str(caught.value)


def test_a_sum_of_other_units_names_both() -> None:
    assert misfit(lambda build, one, two: build.add("sum", Add(), one, two)) == (
        "joins one and two, whose units do not stand one to one"
    )


def test_a_sum_with_the_samples_is_refused() -> None:
    def call(build: Builder, one: str, two: str) -> None:
        build.add("sum", Add(), build.layer("same", Conv(padding=(1, 1)), INPUT, 2), INPUT)

    assert misfit(call) == "ties units to the input"


def test_a_product_with_the_classes_is_refused() -> None:
    def call(build: Builder, one: str, two: str) -> None:
        flat = build.add("flat", Flatten(), one)
        head = build.layer("head", Linear(), flat, 0, head=True)
        build.add("product", Multiply(), build.layer("gate", Linear(), flat, 1), head)

    assert misfit(call) == "ties units to the classes"


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda build, one, two: build.layer("one", Conv(), INPUT, 3), "two nodes named 'one'"),
        (lambda build, one, two: build.add("deep", Depthwise(), INPUT), "the samples' own channels"),
        (lambda build, one, two: build.add("deep", Depthwise(), build.add("flat", Flatten(), one)), "flat values"),
        (lambda build, one, two: build.layer("none", Conv(), one, 0), "no units"),
        (lambda build, one, two: build.layer("big", Conv(kernel=(9, 9)), one, 3), "Kernel size"),
        (lambda build, one, two: build.layer("still", Conv(kernel=(1, 1), stride=(0, 0)), one, 3), "zero"),
        (lambda build, one, two: build.add("both", Concat(), one, build.add("f", Flatten(), two)), "different shapes"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(call: Callable[..., Any], reason: str) -> None:
    assert reason in misfit(call)


def without(graph: Graph, name: str) -> dict[str, Any]:
    data = graph.to_json()
    return {**data, "nodes": [node for node in data["nodes"] if node["name"] != name]}


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"input_shape": [3], "groups": {}, "nodes": []},
        without(GRAPHS["mlp"], "hidden0"),
        without(GRAPHS["mlp"], "head"),
        mlp(3, (5, 6)).to_json() | {"groups": {"hidden0": 5, "hidden1": 7, "more": 1}},
        mlp(3, (5, 6)).to_json() | {"input_shape": [3, 2]},
        {"input_shape": [3], "groups": {}, "nodes": [{"name": "a", "op": {}}]},
    ],
)
def test_what_is_no_network_raises_value_error(data: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        Graph.from_json(data)


def test_an_activation_that_is_not_known_is_refused_by_name() -> None:
    graph = GRAPHS["mlp"]
    nodes = tuple(
        replace(node, op=Activation("softmax")) if isinstance(node.op, Activation) else node for node in graph.nodes
    )
    with pytest.raises(ValueError, match="'softmax' is no activation"):
        Graph.from_json(replace(graph, nodes=nodes).to_json())
