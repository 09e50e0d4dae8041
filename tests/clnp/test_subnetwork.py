"""Zero forgetting: a task's function is its subnetwork, and no later task changes a bit of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from builders import HEADS, make_info, make_samples, make_state, make_trained, make_training, run_all
from torch import Tensor

from clnp_search.clnp.state import Architecture, State, commit
from clnp_search.clnp.subnetwork import Subnetwork, subnetworks
from clnp_search.clnp.training import TrainingSettings

DEEP = Architecture(3, (6, 5, 6))
ALPHA = (0.01, 0.02, 0.01, 0.03)
SETTINGS = [
    TrainingSettings(3, 8, "adam"),
    TrainingSettings(3, 8, "adamw", weight_decay=0.5),
    TrainingSettings(3, 8, "sgd", weight_decay=0.1, momentum=0.9),
]


def learn(state: State, settings: TrainingSettings) -> State:
    """The state after one more task, trained on random samples, that takes half of each layer's free units."""
    pack, training = make_training(state, [ALPHA], [0.02], settings)
    run_all(training)
    inputs, labels = make_samples(30, seed=state.num_tasks)
    point = pack.point(0, pack.activities(pack.features(inputs, labels)))
    theta = tuple(activity.median().item() for activity in point.activities)
    return commit(state, make_info(f"task-{state.num_tasks}"), point, theta)


def after_tasks(architecture: Architecture, settings: TrainingSettings, num_tasks: int) -> list[State]:
    states = [State.empty(architecture)]
    for _ in range(num_tasks):
        states.append(learn(states[-1], settings))
    return states[1:]


# Zero forgetting


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.optimizer)
@pytest.mark.parametrize(("head", "bias"), HEADS)
def test_old_task_logits_are_bit_identical_after_new_tasks(head: str, bias: str, settings: TrainingSettings) -> None:
    states = after_tasks(replace(DEEP, head=head, head_bias=bias), settings, 3)
    raw, _ = make_samples(40, seed=9)
    for task in range(3):
        logits = [Subnetwork(state, task)(raw) for state in states[task:]]
        assert all(torch.equal(logits[0], later) for later in logits)
    # Each task grew units and its function differs: nothing above is true for lack of change.
    assert all((layer.born == task).any() for layer in states[2].layers for task in range(3))
    assert not torch.equal(Subnetwork(states[2], 0)(raw), Subnetwork(states[2], 2)(raw))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.optimizer)
@pytest.mark.parametrize(("head", "bias"), HEADS)
def test_old_task_digests_are_equal_after_new_tasks(head: str, bias: str, settings: TrainingSettings) -> None:
    states = after_tasks(replace(DEEP, head=head, head_bias=bias), settings, 3)
    for task in range(3):
        assert len({Subnetwork(state, task).digest for state in states[task:]}) == 1
    assert len({network.digest for network in subnetworks(states[2])}) == 3


def full_logits(state: State, task: int, inputs: Tensor, spoil: float) -> Tensor:
    """A task's logits computed on the full network, with `spoil` in every parameter of free units."""
    activate: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "tanh": torch.tanh}
    values = inputs
    for layer in state.layers:
        weight, bias = layer.weight.clone(), layer.bias.clone()
        weight[layer.free] = spoil
        bias[layer.free] = spoil
        values = activate[state.architecture.activation](values @ weight.T + bias)
    head = state.heads[task]
    seen = torch.zeros(values.shape[1], dtype=torch.bool)
    seen[state.visible(task)] = True
    logits = torch.where(seen, values, 0.0) @ head.weight.T
    return logits if head.bias is None else logits + head.bias


@pytest.mark.parametrize("head", ["multi", "single"])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_a_subnetwork_computes_what_the_full_network_does_whatever_free_units_hold(activation: str, head: str) -> None:
    state = make_state(replace(DEEP, activation=activation, head=head), 3)
    raw, _ = make_samples(40)
    for task in range(3):
        inputs = state.tasks[task].transform(raw)
        for spoil in (0.0, 1e3):
            expected = full_logits(state, task, inputs, spoil)
            torch.testing.assert_close(Subnetwork(state, task)(raw), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("head", "bias"), HEADS)
def test_logits_are_those_of_the_pruned_pack(head: str, bias: str) -> None:
    state = make_state(replace(DEEP, head=head, head_bias=bias), 1)
    pack, training = make_training(state, [ALPHA], [0.02], TrainingSettings(2, 8))
    run_all(training)
    inputs, labels = make_samples(30)
    features = pack.features(inputs, labels)
    point = pack.point(0, pack.activities(features))
    # Below zero nothing is pruned.
    after = commit(state, make_info(), point, (-1.0, -1.0, -1.0))
    levels, _ = features.batch(slice(0, 30))
    torch.testing.assert_close(Subnetwork(after, 1)(inputs), pack.forward(levels)[0].T, rtol=1e-5, atol=1e-6)


# Contents


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
        state = State.empty(Architecture(3, (2,)))
        trained = make_trained(state)
        trained.weights[0].fill_(1.0)
        trained.biases[0].fill_(1.0)
        trained.head_weight.fill_(1.0)
        activity = torch.zeros(2, dtype=torch.float64)
        activity[active] = 1.0
        after = commit(state, make_info(), replace(trained, activities=(activity,)), (0.0,))
        digests.add(Subnetwork(after, 0).digest)
    assert len(digests) == 2


def test_a_subnetwork_holds_active_units_only() -> None:
    state = make_state(DEEP, 2)
    network = Subnetwork(state, 0)
    widths = [len(layer.active(0)) for layer in state.layers]
    assert [units.tolist() for units in network.units] == [layer.active(0).tolist() for layer in state.layers]
    assert [linear.weight.shape for linear in network.hidden] == [
        (widths[0], 3),
        *zip(widths[1:], widths, strict=False),
    ]
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("task", [-1, 2])
def test_a_task_that_is_not_committed_raises_index_error(task: int) -> None:
    with pytest.raises(IndexError, match=f"task {task} is not committed: tasks are 0 to 1"):
        Subnetwork(make_state(DEEP, 2), task)


def test_a_task_without_units_still_has_its_heads_bias() -> None:
    state = State.empty(DEEP)
    state = commit(state, make_info(), make_trained(state), (2.0, 2.0, 2.0))
    bias = state.heads[0].bias
    assert bias is not None
    assert torch.equal(Subnetwork(state, 0)(make_samples(5)[0]), bias.expand(5, -1))


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


def test_subnetworks_gives_one_for_each_task_in_order() -> None:
    assert [network.info.name for network in subnetworks(make_state(DEEP, 3))] == ["task-0", "task-1", "task-2"]
