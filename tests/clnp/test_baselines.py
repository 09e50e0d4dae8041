"""Baselines against closed forms and slow twins, on tiny networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import GRAPHS, make_info, make_samples, run_all, using
from torch import Tensor, nn
from torch.nn import functional

from clnp_search.clnp.baselines import BASELINES, DAMPING, fisher
from clnp_search.clnp.graph import INPUT, Graph, mlp, run
from clnp_search.clnp.initial import draw
from clnp_search.clnp.ops import GroupedConv
from clnp_search.clnp.pack import Pack
from clnp_search.clnp.state import FREE, Architecture, Parameters, State, flat, nested
from clnp_search.clnp.subnetwork import Subnetwork
from clnp_search.clnp.training import Training, TrainingSettings

GRAPH = mlp(3, (5, 6))
SETTINGS = TrainingSettings(epochs=3, batch_size=8, schedule="constant")
HEADS = ["multi", "shared"]


def empty(head: str = "shared", graph: Graph = GRAPH) -> State:
    return State.empty(Architecture(graph, head))


def samples(task: int) -> tuple[Tensor, Tensor]:
    """Of a task: its inputs are its samples; every task has others, of two classes."""
    return make_samples(24, seed=task) if task else make_samples(24)


def train(
    method: str,
    state: State,
    strengths: Sequence[float] = (0.0,),
    settings: TrainingSettings = SETTINGS,
    rates: Sequence[float] | None = None,
) -> tuple[Pack, list[State]]:
    """A pack that one more task was trained on, and the state after each of its points."""
    baseline, task = BASELINES[method], state.num_tasks
    joint = range(task + 1) if baseline.JOINT else [task]
    classes = [2] * len(joint)
    multi = state.architecture.head == "multi"
    start = draw(state, 2 * len(joint) if multi else 2, 0, state.num_tasks)
    pack = baseline.pack(state, start, strengths, classes)
    inputs, labels = zip(*(samples(each) for each in joint), strict=True)
    offset = [own + (2 * index if pack.class_tasks is not None else 0) for index, own in enumerate(labels)]
    features = pack.features(torch.cat(inputs), torch.cat(offset))
    rates = list(rates or [0.05] * len(strengths))
    training = Training(pack, rates, features, features, settings, 0, task)
    while not training.finished:
        training.run_epoch()
    info, activities = make_info(f"task-{task}"), pack.activities(features)
    points = [pack.point(position, each) for position, each in enumerate(activities)]
    raw = samples(task)[0]
    points = [baseline.finished(pack, position, each, info, raw) for position, each in enumerate(points)]
    return pack, [baseline.after(state, info, each) for each in points]


def sequence(method: str, head: str, tasks: int, strength: float = 0.5) -> list[State]:
    """The states after each of some tasks."""
    states = [empty(head)]
    for _ in range(tasks):
        states.append(train(method, states[-1], [strength])[1][0])
    return states[1:]


def parameters(graph: Graph, classes: int = 3, seed: int = 0) -> Parameters:
    generator = torch.Generator().manual_seed(seed)
    return {
        node.name: {
            name: torch.rand(shape, generator=generator) + (0.5 if name == "variance" else -0.5)
            for name, shape in graph.shapes(node, classes).items()
        }
        for node in graph.nodes
        if graph.shapes(node, classes)
    }


@pytest.mark.parametrize("name", GRAPHS)
def test_fisher_is_the_mean_squared_gradient_over_samples_and_predicted_classes(name: str) -> None:
    graph = GRAPHS[name]
    tensors, (inputs, _) = parameters(graph), make_samples(5, graph.input_shape)
    trained = {
        path: tensor.requires_grad_()
        for path, tensor in flat(tensors).items()
        if path.rpartition("/")[2] not in graph.by_name[path.rpartition("/")[0]].op.STATISTICS
    }
    expected = {path: torch.zeros_like(tensor) for path, tensor in trained.items()}
    for sample in inputs:
        logits = run(graph, {INPUT: sample[None]}, nested({**flat(tensors), **trained}))[graph.nodes[-1].name]
        for logarithm in logits.log_softmax(1)[0]:
            gradients = torch.autograd.grad(logarithm, list(trained.values()), retain_graph=True)
            for path, gradient in zip(trained, gradients, strict=True):
                expected[path] += logarithm.exp().detach() * gradient.square() / len(inputs)
    found = flat(
        fisher(graph, {node: {k: v.detach() for k, v in own.items()} for node, own in tensors.items()}, inputs)
    )
    for path, value in expected.items():
        torch.testing.assert_close(found[path], value, rtol=1e-4, atol=1e-6)
    assert sum(value.sum() for value in expected.values()) > 0


def test_fisher_of_logistic_regression_is_its_closed_form() -> None:
    graph = mlp(1, (1,))
    tensors = {
        "hidden0": {"weight": torch.ones(1, 1, 1), "bias": torch.zeros(1)},
        "head": {"weight": torch.tensor([[[0.0]], [[0.5]]]), "bias": torch.zeros(2)},
    }
    p = torch.sigmoid(torch.tensor(0.5 * 2.0))  # the second class of the one sample, whose value is 2
    found = fisher(graph, tensors, torch.tensor([[2.0]]))
    torch.testing.assert_close(found["head"]["bias"], (p * (1 - p)).expand(2))
    torch.testing.assert_close(found["head"]["weight"].flatten(), (4 * p * (1 - p)).expand(2))


@pytest.mark.parametrize("head", HEADS)
def test_ewc_penalises_by_each_earlier_task_apart(head: str) -> None:
    states = sequence("ewc", head, 2)
    fishers = [states[0].memory["importance"]]
    fishers.append({name: each - fishers[0][name] for name, each in states[1].memory["importance"].items()})
    pack = BASELINES["ewc"].pack(states[1], draw(states[1], 2, 0, states[1].num_tasks), [3.0, 7.0], [2])
    with torch.no_grad():
        for *_, tensor in pack.trainable():
            tensor += 0.1
    pack._begin_gradients()
    found = {name: tensor for name, _, tensor in pack.trainable()}
    values = [flat({**state.tensors, "head": state.heads[-1]}) for state in states]
    checked = 0
    for name in fishers[0]:
        now = values[1][name] + 0.1
        expected = sum(own[name] * (now - then[name]) for own, then in zip(fishers, values, strict=True))
        part = name if name in found else f"{name}.{'shared' if name.startswith('hidden0') else 'own'}"
        for position, strength in enumerate((3.0, 7.0)):
            gradient = found[part].grad
            assert gradient is not None
            torch.testing.assert_close(gradient[position], strength * expected, rtol=1e-3, atol=1e-6)
            checked += 1
    assert checked == 2 * (6 if head == "shared" else 4)
    if head == "multi":
        assert not any(bool(tensor.grad.any()) for name, tensor in found.items() if name.startswith("head"))


class Plain(nn.Module):
    """The same network in plain torch."""

    def __init__(self, start: Parameters) -> None:
        super().__init__()
        self.values = nn.ParameterDict({path.replace(".", "_"): each.clone() for path, each in flat(start).items()})

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in ("hidden0", "hidden1", "head"):
            inputs = functional.linear(inputs, self.values[f"{layer}/weight"].flatten(1), self.values[f"{layer}/bias"])
            inputs = inputs if layer == "head" else inputs.relu()
        return inputs


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_si_is_an_explicit_loop_with_autograd(optimizer: str) -> None:
    settings = replace(SETTINGS, optimizer=optimizer, momentum=0.5, batch_size=24)  # one batch: the order is the same
    strength, rate, state = 2.0, 0.02, empty()
    start = draw(state, 2, 0, state.num_tasks)
    importance: dict[str, Tensor] = {}
    anchor: dict[str, Tensor] = {}
    for task in range(2):
        plain = Plain(start)
        kinds: dict[str, Any] = {"sgd": (torch.optim.SGD, {"momentum": 0.5}), "adam": (torch.optim.Adam, {})}
        kind, options = kinds[optimizer]
        steps, path = kind(plain.parameters(), lr=rate, **options), dict[str, Tensor]()
        inputs, labels = samples(task)
        for _ in range(settings.epochs):
            steps.zero_grad()
            functional.cross_entropy(plain(inputs), labels).backward()
            data = {name: each.grad.clone() for name, each in plain.values.items()}
            before = {name: each.detach().clone() for name, each in plain.values.items()}
            if importance:
                penalty = sum(
                    (own * (plain.values[name] - anchor[name]).square()).sum() for name, own in importance.items()
                )
                (strength * penalty).backward()
            steps.step()
            for name, each in plain.values.items():
                path[name] = path.get(name, 0.0) - data[name] * (each.detach() - before[name])
        for name, each in plain.values.items():
            moved = (each.detach() - flat(start)[name]).square() + DAMPING
            importance[name] = (importance.get(name, 0.0) + path[name] / moved).clamp(min=0)
            anchor[name] = each.detach().clone()
        state = train("si", state, [strength], settings, [rate])[1][0]
        start = nested(anchor)
        for name, own in importance.items():
            torch.testing.assert_close(state.memory["importance"][name], own, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(state.memory["anchor"][name], anchor[name], rtol=1e-4, atol=1e-6)
    assert max(own.max() for own in importance.values()) > 1e-3


@pytest.mark.parametrize("method", ["ewc", "si", "packnet", "finetune"])
def test_a_points_bits_do_not_depend_on_its_pack_mates(method: str) -> None:
    first = sequence(method, "shared", 1)[0]
    strengths = (0.25, 0.5, 0.75, 0.5)
    together = train(method, first, strengths)[1]
    for strength, state in zip(strengths, together, strict=True):
        # Dense products of one point alone may round differently, so packs of four are compared.
        assert train(method, first, [strength] * 4)[1][0].digest == state.digest
    assert (together[0].digest == together[1].digest) == (method == "finetune")


@pytest.mark.parametrize("method", ["si", "packnet"])
def test_a_checkpoint_goes_on_to_the_same_bits(method: str) -> None:
    state = sequence(method, "shared", 1)[0]

    def begin() -> tuple[Pack, Training]:
        pack = BASELINES[method].pack(state, draw(state, 2, 0, state.num_tasks), [0.25, 0.75], [2])
        features = pack.features(*samples(1))
        return pack, Training(pack, [0.05, 0.02], features, features, replace(SETTINGS, epochs=6), 0, 1)

    whole, training = begin()
    for _ in range(4):
        training.run_epoch()
    saved = training.to_bytes()
    while not training.finished:
        training.run_epoch()
    again, resumed = begin()
    resumed.restore(saved)
    while not resumed.finished:
        resumed.run_epoch()
    assert whole.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(each, again.tensors[name]) for name, each in whole.tensors.items())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_packnets_old_logits_are_bit_identical_after_later_tasks(head: str, optimizer: str) -> None:
    settings = replace(SETTINGS, epochs=6, optimizer=optimizer, weight_decay=0.1)
    states, raw = [empty(head)], samples(9)[0]
    for _ in range(3):
        states.append(train("packnet", states[-1], [0.5], settings)[1][0])
    for task in range(3):
        right_after = Subnetwork(states[task + 1], task)
        for later in states[task + 1 :]:
            assert torch.equal(Subnetwork(later, task)(raw), right_after(raw))
            assert Subnetwork(later, task).digest == right_after.digest
    assert not torch.equal(states[1].tensors["hidden1"]["weight"], states[3].tensors["hidden1"]["weight"])


def test_packnet_gives_a_share_of_each_layers_free_weights_back() -> None:
    first, second = sequence("packnet", "shared", 2, strength=0.25)
    for layer, weights in {"hidden0": 15, "hidden1": 30, "head": 12}.items():
        owner = second.memory["owner"][f"{layer}/weight"]
        free = round(0.25 * weights)
        assert int((owner == 0).sum()) == weights - free
        assert int((owner == FREE).sum()) == round(0.25 * free)
        values = second.tensors[layer]["weight"] if layer != "head" else second.heads[-1]["weight"]
        assert bool((values[owner == FREE] == 0).all())
        assert first.memory["owner"][f"{layer}/weight"].max() == FREE


def test_packnet_counts_no_weights_that_a_layer_lacks() -> None:
    state = State.empty(Architecture(using(GroupedConv(padding=(1, 1), blocks=2, rows=2, columns=2)), "shared"))
    lacks = state.graph.lacking["op"].expand(-1, -1, 9)
    inputs, labels = make_samples(24, state.graph.input_shape)
    pack = BASELINES["packnet"].pack(state, draw(state, 2, 0, state.num_tasks), [0.25], [2])
    features = pack.features(inputs, labels)
    run_all(Training(pack, [0.01], features, features, replace(SETTINGS, epochs=3), 0, 0))
    weight = pack.point(0, {}).tensors["op"]["weight.own"]
    assert not weight[lacks].any()
    assert int((weight[~lacks] == 0).sum()) == round(0.25 * int((~lacks).sum()))


def test_packnet_prunes_the_smallest() -> None:
    settings = replace(SETTINGS, epochs=1)  # so that nothing is trained after pruning
    pruned = train("packnet", empty(), [0.5], settings)[1][0].tensors["hidden1"]["weight"].flatten()
    dense = train("packnet", empty(), [0.0], settings)[1][0].tensors["hidden1"]["weight"].flatten()
    order = dense.abs().argsort()
    assert bool((pruned[order[:15]] == 0).all())
    assert torch.equal(pruned[order[15:]], dense[order[15:]])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("method", BASELINES)
def test_a_state_is_read_back_as_it_was_written(method: str, head: str) -> None:
    state = sequence(method, head, 2)[-1]
    read = State.from_bytes(state.to_bytes())
    assert read.digest == state.digest
    assert [Subnetwork(read, task).digest for task in range(2)] == [Subnetwork(state, task).digest for task in range(2)]
    assert all(bool((born == 0).all()) for born in state.born.values())


def test_what_is_remembered_decides_the_digest() -> None:
    state = sequence("ewc", "shared", 1)[0]
    importance = {name: 2 * tensor for name, tensor in state.memory["importance"].items()}
    assert replace(state, memory={**state.memory, "importance": importance}).digest != state.digest
    assert replace(state, memory={}).digest != state.digest


def test_a_memory_that_is_not_finite_is_not_committed() -> None:
    pack, _ = train("ewc", empty())
    point = pack.point(0, pack.activities(pack.features(*samples(0)))[0])
    learned = BASELINES["ewc"].finished(pack, 0, point, make_info(), samples(0)[0]).learned
    bad = replace(point, learned={name: each / 0 for name, each in learned.items()})
    with pytest.raises(ValueError, match="importance/hidden0/weight: a value is not finite"):
        BASELINES["ewc"].after(empty(), make_info(), bad)


def test_a_shared_head_reads_all_units_for_every_task() -> None:
    state = sequence("finetune", "shared", 3)[-1]
    assert all(torch.equal(head["weight"], state.heads[0]["weight"]) for head in state.heads)
    raw = samples(5)[0]
    expected = Plain({**state.tensors, "head": state.heads[0]})(raw)
    for task in range(3):
        torch.testing.assert_close(Subnetwork(state, task)(raw), expected)


def test_a_single_task_starts_anew_and_finetuning_does_not() -> None:
    for method, same in (("single_task", True), ("joint", True), ("finetune", False)):
        state = sequence(method, "multi", 1)[0]
        start = draw(state, 2, 0, state.num_tasks)
        pack = BASELINES[method].pack(state, start, [0.0], [2])
        assert torch.equal(pack.tensors["0/hidden1/weight.own"][0], start["hidden1"]["weight"]) == same
        assert torch.equal(pack.tensors["0/hidden1/weight.own"][0], state.tensors["hidden1"]["weight"]) != same


def test_joint_heads_are_trained_each_among_its_own_classes() -> None:
    state = sequence("joint", "multi", 1)[0]
    pack = BASELINES["joint"].pack(state, draw(state, 4, 0, state.num_tasks), [0.0], [2, 2])
    inputs, labels = samples(1)
    pack.train_batch(pack.features(inputs, labels + 2), torch.arange(24))
    start = {node: {name: each[0] for name, each in own.items()} for node, own in pack.blocks[0].tensors.items()}
    plain = Plain(
        {
            "hidden0": {
                "weight": start["hidden0"]["weight.shared"].detach(),
                "bias": start["hidden0"]["bias"].detach(),
            },
            "hidden1": {"weight": start["hidden1"]["weight.own"].detach(), "bias": start["hidden1"]["bias"].detach()},
            "head": {"weight": start["head"]["weight.own"].detach(), "bias": start["head"]["bias"].detach()},
        }
    )
    functional.cross_entropy(plain(inputs)[:, 2:], labels).backward()  # among the second task's two classes
    gradients = {name: tensor.grad[0] for name, _, tensor in pack.trainable() if tensor.grad is not None}
    torch.testing.assert_close(gradients["head/weight.own"], plain.values["head/weight"].grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        gradients["hidden1/weight.own"], plain.values["hidden1/weight"].grad, rtol=1e-4, atol=1e-6
    )
    assert not gradients["head/weight.own"][:2].any()
    after = train("joint", state)[1][0]
    assert [head["weight"].shape for head in after.heads] == [(2, 6, 1)] * 2
