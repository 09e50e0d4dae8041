"""Zero forgetting: a task's function is its subnetwork, and no later task changes a bit of it."""

from __future__ import annotations

import io
import warnings
from dataclasses import replace

import pytest
import torch
from builders import (
    GRAPHS,
    HEADS,
    OPS_USED,
    commit_at,
    make_info,
    make_network,
    make_samples,
    make_state,
    make_trained,
    make_training,
    run_all,
    using,
)
from torch import Tensor

from clnp_search.clnp.graph import INPUT, Graph, run
from clnp_search.clnp.ops import (
    Op,
)
from clnp_search.clnp.state import Architecture, State, commit, read_safetensors
from clnp_search.clnp.subnetwork import Subnetwork, cuts
from clnp_search.clnp.training import TrainingSettings

DEEP = make_network((6, 5, 6))
NETWORKS = {name: Architecture(graph) for name, graph in GRAPHS.items()} | {"mlp": DEEP}
SETTINGS = [
    TrainingSettings(3, 8, "adam"),
    TrainingSettings(3, 8, "adamw", weight_decay=0.5),
    TrainingSettings(3, 8, "sgd", weight_decay=0.1, momentum=0.9),
]


def learn(state: State, settings: TrainingSettings) -> State:
    """The state after one more task, trained on random samples, that takes half of each group's free units."""
    alpha = tuple(0.01 * (1 + layer % 3) for layer in range(len(state.graph.layers)))
    pack, training = make_training(state, [alpha], [0.02], settings)
    run_all(training)
    inputs, labels = make_samples(30, state.graph.input_shape, seed=state.num_tasks)
    point = pack.point(0, pack.activities(pack.features(inputs, labels))[0])
    theta = {group: values.median().item() if len(values) else 0.0 for group, values in point.activities.items()}
    return commit(state, make_info(f"task-{state.num_tasks}", shape=state.graph.input_shape), point, theta)


def after_tasks(architecture: Architecture, settings: TrainingSettings, num_tasks: int) -> list[State]:
    states = [State.empty(architecture)]
    for _ in range(num_tasks):
        states.append(learn(states[-1], settings))
    return states[1:]


# Zero forgetting


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.optimizer)
@pytest.mark.parametrize(("head", "bias"), HEADS)
@pytest.mark.parametrize("network", NETWORKS)
def test_old_tasks_digests_and_logits_are_bit_identical_after_new_tasks(
    network: str, head: str, bias: str, settings: TrainingSettings
) -> None:
    states = after_tasks(replace(NETWORKS[network], head=head, head_bias=bias), settings, 3)
    raw, _ = make_samples(40, states[0].graph.input_shape, seed=9)
    for task in range(3):
        networks = [Subnetwork(state, task) for state in states[task:]]
        assert len({each.digest for each in networks}) == 1
        assert all(torch.equal(networks[0](raw), each(raw)) for each in networks)
    # Tasks grew units and their functions differ: nothing above is true for lack of change.
    assert all((born == task).any() for born in states[2].born.values() for task in range(2))
    assert len({Subnetwork(states[2], task).digest for task in range(3)}) == 3
    assert not torch.equal(Subnetwork(states[2], 0)(raw), Subnetwork(states[2], 2)(raw))


def full_logits(state: State, task: int, inputs: Tensor, spoil: float) -> Tensor:
    """A task's logits computed on the full network, with `spoil` in every parameter of free units."""
    graph, tensors = state.graph, {}
    for name, own in state.tensors.items():
        rows = graph.index(graph.by_name[name].groups, state.free)
        tensors[name] = {each: tensor.index_fill(0, rows, spoil) for each, tensor in own.items()}
    seen = graph.index(graph.source(graph.by_name[graph.head]).groups, state.visible(task))
    head = dict(state.heads[task])
    weight = torch.zeros_like(head["weight"])
    weight[:, seen] = head["weight"][:, seen]
    return run(graph, {INPUT: inputs}, tensors | {graph.head: head | {"weight": weight}})[graph.head]


@pytest.mark.parametrize("head", ["multi", "single"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_subnetwork_computes_what_the_full_network_does_whatever_free_units_hold(network: str, head: str) -> None:
    state = make_state(replace(NETWORKS[network], head=head), 3)
    raw, _ = make_samples(40, state.graph.input_shape)
    for task in range(3):
        inputs = state.tasks[task].transform(raw)
        for spoil in (0.0, 1e2):
            expected = full_logits(state, task, inputs, spoil)
            torch.testing.assert_close(Subnetwork(state, task)(raw), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("head", "bias"), HEADS)
@pytest.mark.parametrize("network", NETWORKS)
def test_logits_are_those_of_the_pruned_pack(network: str, head: str, bias: str) -> None:
    state = make_state(replace(NETWORKS[network], head=head, head_bias=bias), 1)
    pack, training = make_training(state, [(0.01,) * len(state.graph.layers)], [0.02], TrainingSettings(2, 8))
    run_all(training)
    inputs, labels = make_samples(30, state.graph.input_shape)
    features = pack.features(inputs, labels)
    point = pack.point(0, pack.activities(features)[0])
    after = commit_at(state, point, -1.0)  # below zero nothing is pruned
    block, (levels, _) = pack.blocks[0], features.batch(slice(0, 30))
    logits = block.logits(block.forward(levels))[0].T.detach()
    torch.testing.assert_close(Subnetwork(after, 1)(inputs), logits, rtol=1e-4, atol=1e-4)


# Contents


@pytest.mark.parametrize("network", ["mlp", "conv"])
@pytest.mark.parametrize("head", ["multi", "single"])
def test_biases_make_up_for_units_that_always_give_the_same(network: str, head: str) -> None:
    state = make_state(Architecture(GRAPHS[network], head, "per_task"), 1)
    sample, _ = make_samples(1, state.graph.input_shape)
    trained = make_trained(state, seed=4, samples=sample)
    # Over one sample every value is its own mean; before the last convolution, only those of one position would be.
    theta = dict.fromkeys(state.graph.groups, 0.6)
    theta |= {"conv0": -1.0} if network == "conv" else {}
    info = make_info(shape=state.graph.input_shape)
    pruned, whole = (
        Subnetwork(commit(state, info, trained, at), 1) for at in (theta, dict.fromkeys(state.graph.groups, -1.0))
    )
    torch.testing.assert_close(pruned(sample), whole(sample), rtol=1e-5, atol=1e-5)
    without = Subnetwork(commit(state, info, replace(trained, means={}), theta), 1)
    assert (without(sample) - whole(sample)).abs().max() > 0.01


def test_the_mean_that_a_normalisation_subtracts_makes_up_where_there_is_no_bias() -> None:
    graph = GRAPHS["conv_norm"]
    assert graph.shift_of("conv1") == ("conv1.norm", "mean", -1)
    assert graph.shift_of("dense0") == ("dense0", "bias", 1)
    assert GRAPHS["residual"].shift_of("one") == ("one.norm", "mean", -1)


def test_the_digest_changes_with_one_bit_of_any_parameter() -> None:
    network = Subnetwork(make_state(DEEP, 2), 1)
    digests = {network.digest}
    values = [values for values in network.state_dict().values() if values.is_floating_point()]
    for parameter in values:
        bits = parameter.view(torch.int32).view(-1)
        for position in range(len(bits)):
            bits[position] ^= 1
            digests.add(network.digest)
            bits[position] ^= 1
    assert len(digests) == 1 + sum(parameter.numel() for parameter in values)


def test_the_digest_covers_the_input_transform_and_the_units() -> None:
    state = make_state(DEEP, 2)
    info = state.tasks[1]
    permutation = info.transform.permutation
    assert permutation is not None
    digests = {Subnetwork(state, 1).digest}
    for transform in (
        replace(info.transform, mean=(0.5,)),
        replace(info.transform, std=(2.0,)),
        replace(info.transform, permutation=permutation.roll(1)),
        replace(info.transform, permutation=None),
    ):
        tasks = (state.tasks[0], replace(info, transform=transform))
        digests.add(Subnetwork(replace(state, tasks=tasks), 1).digest)
    assert len(digests) == 5


def test_subnetworks_of_the_same_weights_on_other_units_have_other_digests() -> None:
    digests = set()
    for active in (0, 1):
        state = State.empty(make_network((2,)))
        trained = make_trained(state)
        for own in trained.tensors.values():
            for tensor in own.values():
                tensor.fill_(1.0)
        trained.activities["hidden0"][:] = torch.eye(2, dtype=torch.float64)[active]
        digests.add(Subnetwork(commit_at(state, trained, 0.0), 0).digest)
    assert len(digests) == 2


@pytest.mark.parametrize("network", NETWORKS)
def test_a_subnetwork_holds_active_units_only(network: str) -> None:
    state = make_state(NETWORKS[network], 2)
    found, active = Subnetwork(state, 0), state.active(0)
    assert {group: units.tolist() for group, units in found.units.items()} == {
        group: units.tolist() for group, units in active.items()
    }
    counts = {group: len(units) for group, units in active.items()}
    for name in state.graph.layers[:-1]:
        node = state.graph.by_name[name]
        weight = found.network.get_submodule(name).get_buffer("weight")
        assert len(weight) == sum(counts[group] for group in node.groups)
    assert not list(found.parameters())


@pytest.mark.parametrize("task", [-1, 2])
def test_a_task_that_is_not_committed_raises_index_error(task: int) -> None:
    with pytest.raises(IndexError, match=f"task {task} is not committed: tasks are 0 to 1"):
        Subnetwork(make_state(DEEP, 2), task)


def test_a_task_without_units_still_has_its_heads_bias() -> None:
    state = State.empty(DEEP)
    state = commit_at(state, make_trained(state), 2.0)
    assert torch.equal(Subnetwork(state, 0)(make_samples(5)[0]), state.heads[0]["bias"].expand(5, -1))


# Evaluation


def test_raw_samples_are_flattened_permuted_and_scaled_as_in_training() -> None:
    raw = torch.randint(256, (20, 3, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    state = make_state(DEEP, 2)
    transform = replace(state.tasks[1].transform, mean=(12.5,), std=(255.0,))
    tasks = (state.tasks[0], replace(state.tasks[1], input_shape=(3, 1), transform=transform))
    network = Subnetwork(replace(state, tasks=tasks), 1)
    identity = (
        state.tasks[0],
        replace(state.tasks[1], transform=replace(transform, mean=(0.0,), std=(1.0,), permutation=None)),
    )
    plain = Subnetwork(replace(state, tasks=identity), 1)
    assert torch.equal(network(raw), plain(transform(raw)))


def test_an_input_transform_leaves_the_raw_samples_as_they_are() -> None:
    raw, _ = make_samples(4)
    before = raw.clone()
    replace(make_info().transform, mean=(1.0,), std=(2.0,))(raw)
    assert torch.equal(raw, before)


def test_accuracy_is_the_fraction_of_right_predictions() -> None:
    network = Subnetwork(make_state(DEEP, 1), 0)
    raw, labels = make_samples(1013)
    expected = network(raw).argmax(1)
    assert torch.equal(network.predictions(raw), expected)
    assert network.accuracy(raw, labels) == (expected == labels).sum().item() / 1013


@pytest.mark.parametrize(("head", "bias"), HEADS)
@pytest.mark.parametrize("network", NETWORKS)
def test_cuts_compute_what_the_subnetworks_of_all_tasks_compute(network: str, head: str, bias: str) -> None:
    state = make_state(replace(NETWORKS[network], head=head, head_bias=bias), 3)
    raw, labels = make_samples(40, state.graph.input_shape)
    found = list(cuts(state))
    assert [cut.info.name for cut in found] == ["task-0", "task-1", "task-2"]
    for task, cut in enumerate(found):
        module = Subnetwork(state, task)
        assert torch.equal(cut(raw), module(raw))
        assert cut.num_correct(raw, labels) == module.num_correct(raw, labels)


# Exports


@pytest.mark.parametrize("op", OPS_USED, ids=str)
def test_exports_agree_with_the_subnetwork_on_raw_images(op: Op) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    state = make_state(Architecture(using(op)), 2)
    transform = replace(state.tasks[1].transform, mean=(100.0, 120.0), std=(60.0, 70.0), permutation=None)
    state = replace(state, tasks=(state.tasks[0], replace(state.tasks[1], transform=transform)))
    network = Subnetwork(state, 1)
    raw = torch.randint(256, (7, 2, 6, 6), generator=torch.Generator().manual_seed(0)).float()
    expected = network(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own
        onnx, program = network.to_bytes(".onnx"), network.to_bytes(".pt2")
    (logits,) = onnxruntime.InferenceSession(onnx).run(None, {"raw": raw.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)
    loaded = torch.export.load(io.BytesIO(program)).module()
    torch.testing.assert_close(loaded(raw), expected, rtol=1e-5, atol=1e-5)
    assert loaded(raw[:0]).shape == (0, expected.shape[1])


@pytest.mark.parametrize("network", NETWORKS)
def test_a_safetensors_export_holds_the_graph_and_every_tensor(network: str) -> None:
    found = Subnetwork(make_state(NETWORKS[network], 2), 1)
    data = found.to_bytes(".safetensors")
    header, tensors = read_safetensors(data, "subnetwork")
    own = found.state_dict()
    assert Graph.from_json(header["graph"]) == found.graph
    assert tensors.keys() == own.keys()
    assert all(torch.equal(tensors[name], own[name]) for name in own)
