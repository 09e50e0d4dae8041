"""A pack against a plain network of full-size tensors, trained by autograd in float64, one point at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import (
    GRAPHS,
    HEADS,
    commit_at,
    each_point,
    fill_group,
    make_network,
    make_pack,
    make_samples,
    make_state,
    make_trained,
    make_training,
    run_all,
)
from torch import Tensor, nn
from torch.nn import functional

from clnp_search.clnp import pack as packs
from clnp_search.clnp.graph import CLASSES, INPUT, Builder, Graph, Node, conv, mlp
from clnp_search.clnp.initial import draw
from clnp_search.clnp.ops import Activation, Add, BatchNorm, Concat, Conv, Dropout, Flatten, Linear, MaxPool, Op
from clnp_search.clnp.pack import L1, Pack, cross_entropy, evaluation_batch
from clnp_search.clnp.seeds import generator
from clnp_search.clnp.state import Architecture, FreeParameters, Parameters, State
from clnp_search.clnp.trace import Traced, trace
from clnp_search.clnp.training import Training, TrainingSettings

SMALL = make_network()
NETWORKS = GRAPHS | {f"mlp_{name}": mlp(3, (5, 6), name) for name in ("sigmoid", "tanh", "gelu")}
DROPOUT = conv((2, 6, 6), [16, "pool"], [5], dropout=0.5)
ALPHAS: list[tuple[float, ...]] = [(0.0, 0.0, 0.0), (0.01, 0.02, 0.03), (0.1, 0.0, 0.2)]
RATES = [0.01, 0.02, 0.05]
ALL = torch.arange(9)


def alphas_of(graph: Graph) -> list[tuple[float, ...]]:
    """Three points: without a penalty, with one of each layer's own, and with one on every other layer."""
    layers = range(len(graph.layers))
    return [
        tuple(0.0 for _ in layers),
        tuple(0.01 * (1 + layer) for layer in layers),
        tuple(0.1 * (layer % 2) for layer in layers),
    ]


class Plain:
    """One point as an ordinary network of full-size float64 tensors, of which the free entries are leaves.

    A free row reads every frozen unit and every free one. Frozen rows are the state's.
    """

    def __init__(self, state: State, start: FreeParameters) -> None:
        self.state, self.graph, self.start = state, state.graph, start
        self.leaves, self.free = self.spread(start.tensors)
        for node, own in self.leaves.items():
            for name, tensor in own.items():
                tensor.requires_grad_(self._is_trained(node, name))

    def spread(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> tuple[Parameters, Parameters]:
        """A point's tensors at their places in full-size ones, and where these places are."""
        full: Parameters = {}
        places: Parameters = {}
        for name, own in tensors.items():
            node = self.graph.by_name[name]
            shapes = self.graph.shapes(node, len(self.start.tensors[self.graph.head]["weight.own"]))
            full[name] = {each: torch.zeros(shape, dtype=torch.float64) for each, shape in shapes.items()}
            places[name] = {each: torch.zeros(shape, dtype=torch.bool) for each, shape in shapes.items()}
            rows = self._rows(node)
            for part, tensor in own.items():
                each, _, which = part.partition(".")
                index: tuple[Tensor, ...] = (rows,)
                if which:
                    index = rows[:, None], self._columns(node, which)[None]
                full[name][each][index] = tensor.detach().cpu().double()
                places[name][each][index] = True
        return full, places

    def values(self, inputs: Tensor, training: bool = False) -> dict[str, Tensor]:
        """All nodes' values; free units' statistics move while training."""
        values = {INPUT: inputs.double()}
        for node in self.graph.nodes:
            tensors = self._tensors(node)
            read = [values[name] for name in node.inputs]
            value = node.op.plain(read, tensors)
            if training and isinstance(node.op, BatchNorm):
                moved = {name: tensor.clone() for name, tensor in tensors.items()}
                free = torch.zeros(value.shape[1], dtype=torch.bool)
                free[self._rows(node)] = True
                value = torch.where(free.view(-1, *[1] * (value.ndim - 2)), node.op.plain(read, moved, True), value)
                for name in node.op.STATISTICS:
                    self.leaves[node.name][name] = moved[name]
            values[node.name] = value
        return values

    def logits(self, inputs: Tensor) -> Tensor:
        """[N, C], in evaluation."""
        return self.values(inputs)[self.graph.head].detach()

    def loss(self, inputs: Tensor, labels: Tensor, alpha: tuple[float, ...], scales: float = 1.0) -> Tensor:
        """Mean cross-entropy and the L1 penalty of free weights and scales; biases are left out."""
        penalty = torch.zeros((), dtype=torch.float64)
        by_layer = dict(zip(self.graph.layers, alpha, strict=True))
        for node, own in self.leaves.items():
            for name, factor in (("weight", 1.0), ("scale", scales)):
                if name in own:
                    layer = self.graph.normalised_layer(self.graph.by_name[node])
                    penalty = penalty + factor * by_layer[layer] * own[name][self.free[node][name]].abs().sum()
        return functional.cross_entropy(self.values(inputs, training=True)[self.graph.head], labels) + penalty

    @property
    def trainable(self) -> list[Tensor]:
        return [tensor for own in self.leaves.values() for tensor in own.values() if tensor.requires_grad]

    def assert_gradients(self, pack: Pack, position: int, tolerance: float = 1e-5) -> None:
        """The pack's gradients of a point are those of the leaves."""
        gradients = {
            node: {name: tensor.grad[0] for name, tensor in own.items() if tensor.grad is not None}
            for node, own in point_tensors(pack, position).items()
        }
        actual, _ = self.spread(gradients)
        for node, own in self.leaves.items():
            for name, leaf in own.items():
                if leaf.requires_grad:
                    assert leaf.grad is not None
                    assert_close(actual[node][name], leaf.grad.where(self.free[node][name], 0.0), tolerance)

    def assert_ends_at(self, point: FreeParameters, tolerance: float) -> None:
        """The point's parameters and statistics are those of the leaves."""
        actual, places = self.spread(point.tensors)
        for node, own in self.leaves.items():
            for name, leaf in own.items():
                where = places[node][name]
                assert_close(actual[node][name][where], leaf.detach()[where], tolerance)

    def _tensors(self, node: Node) -> dict[str, Tensor]:
        frozen = self.state.tensors.get(node.name, {})
        return {
            name: torch.where(self.free[node.name][name], leaf, frozen[name].double() if frozen else 0.0)
            for name, leaf in self.leaves.get(node.name, {}).items()
        }

    def _rows(self, node: Node) -> Tensor:
        if node.groups == (CLASSES,):
            return torch.arange(len(self.start.tensors[node.name]["weight.own"]))
        return self.graph.index(node.groups, self.start.units)

    def _columns(self, node: Node, which: str) -> Tensor:
        nothing = dict.fromkeys([INPUT, *self.graph.groups], torch.arange(0))
        if which == "own":
            units = nothing | self.start.units
        else:
            reads_frozen = node.name != self.graph.head or self.state.architecture.head == "multi"
            units = self.state.active() if reads_frozen else nothing
        return self.graph.index(self.graph.source(node).groups, units)

    def _is_trained(self, node: str, name: str) -> bool:
        if name in self.graph.by_name[node].op.STATISTICS:
            return False
        is_head_bias = (node, name) == (self.graph.head, "bias")
        rule = self.state.architecture.bias_rule
        return not is_head_bias or rule == "per_task" or (rule == "frozen" and not self.state.heads)


def point_tensors(pack: Pack, position: int) -> dict[str, dict[str, Tensor]]:
    """A point's tensors [1, ...] with their gradients."""
    offset = position
    for block in pack.blocks:
        if offset < block.points:
            break
        offset -= block.points
    found: dict[str, dict[str, Tensor]] = {}
    for node, own in block.tensors.items():
        found[node] = {}
        for name, tensor in own.items():
            part = tensor.detach()[offset : offset + 1]
            part.grad = None if tensor.grad is None else tensor.grad[offset : offset + 1]
            found[node][name] = part
    return found


def plain(state: State, pack: Pack, position: int) -> Plain:
    """The plain network of a pack's point, as it is now."""
    return Plain(state, pack.point(position, {}))


def point_bytes(pack: Pack) -> list[bytes]:
    """Each point's parameters."""
    nothing = dict.fromkeys(pack.graph.groups, torch.zeros(0, dtype=torch.float64))
    return [pack.point(position, nothing).to_bytes() for position in range(pack.num_points)]


def tensors_of(pack: Pack) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in pack.tensors.items()}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual.double().cpu(), expected.double().cpu(), rtol=tolerance, atol=tolerance)


def assert_points_close(one: Pack, other: Pack, tolerance: float = 1e-4) -> None:
    for position in range(one.num_points):
        pairs = zip(point_tensors(one, position).values(), point_tensors(other, position).values(), strict=True)
        for mine, theirs in pairs:
            for name in mine:
                assert_close(mine[name], theirs[name], tolerance)


# Gradients


@pytest.mark.parametrize("num_tasks", [0, 1, 2])
@pytest.mark.parametrize(("head", "bias"), HEADS)
@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_equal_autograd_of_a_plain_network(
    network: str, num_tasks: int, head: str, bias: str, device: torch.device
) -> None:
    graph = NETWORKS[network]
    state, alphas = make_state(Architecture(graph, head, bias), num_tasks), alphas_of(graph)
    # A pack mid-way, where the points differ.
    settings = TrainingSettings(epochs=2, batch_size=15, schedule="constant")
    pack, training = make_training(state, alphas, RATES, settings, device)
    training.run_epoch()
    inputs, labels = make_samples(9, graph.input_shape, seed=77)
    twins = [plain(state, pack, position) for position in range(3)]
    losses = pack.train_batch(pack.features(inputs, labels), ALL.to(device))
    for position, (twin, alpha) in enumerate(zip(twins, alphas, strict=True)):
        loss = twin.loss(inputs, labels, alpha)
        loss.backward()
        twin.assert_gradients(pack, position)
        twin.assert_ends_at(pack.point(position, {}), 1e-5)  # the statistics have moved
        if not any(alpha):
            assert_close(losses[position] / 9, loss.detach())


@pytest.mark.parametrize("scales", [0.0, 1.0, 2.5])
def test_the_penalty_acts_on_the_scales_of_normalisations_as_much_as_is_set(scales: float) -> None:
    state = make_state(Architecture(GRAPHS["residual"]), 1)
    alpha = alphas_of(state.graph)[1]
    pack = make_pack(state, [alpha], l1=L1(scales=scales))
    inputs, labels = make_samples(9, state.graph.input_shape)
    twin = plain(state, pack, 0)
    pack.train_batch(pack.features(inputs, labels), ALL)
    twin.loss(inputs, labels, alpha, scales).backward()
    twin.assert_gradients(pack, 0)


@pytest.mark.parametrize("network", GRAPHS)
def test_the_penaltys_gradient_is_alpha_times_the_sign_and_none_at_zero(network: str) -> None:
    state = make_state(Architecture(GRAPHS[network]), 1)
    alpha = alphas_of(state.graph)[1]
    with_penalty, without = make_pack(state, [alpha]), make_pack(state, 1)
    features = with_penalty.features(*make_samples(9, state.graph.input_shape))
    for pack in (with_penalty, without):
        for own in pack.blocks[0].tensors.values():
            for name, tensor in own.items():
                if name.startswith("weight"):
                    tensor.data.view(-1)[::3] = 0.0
        pack.train_batch(features, ALL)
    by_layer = dict(zip(state.graph.layers, alpha, strict=True))
    for (node, own), others in zip(
        point_tensors(with_penalty, 0).items(), point_tensors(without, 0).values(), strict=True
    ):
        layer = by_layer[state.graph.normalised_layer(state.graph.by_name[node])]
        for name, tensor in own.items():
            if tensor.grad is not None:
                penalised = name.startswith("weight") or name == "scale"
                expected = others[name].grad + (layer * tensor.sign() if penalised else 0.0)  # type: ignore[operator]
                assert_close(tensor.grad, expected, 1e-6)


def test_microbatches_give_the_gradients_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_state(Architecture(GRAPHS["conv"]), 1)
    inputs, labels = make_samples(9, state.graph.input_shape)
    twin, losses = plain(state, make_pack(state, 2), 1), []
    for cached_bytes in (1, 4 * 4 * state.graph.largest_value, 8 << 20):
        monkeypatch.setitem(packs.TRAINED_BYTES, "cpu", cached_bytes)
        pack = make_pack(state, 2)
        losses.append(pack.train_batch(pack.features(inputs, labels), ALL))
        for leaf in twin.trainable:
            leaf.grad = None
        twin.loss(inputs, labels, (0.0,) * 4).backward()
        twin.assert_gradients(pack, 1)
    assert_close(losses[0], losses[2])
    assert_close(losses[1], losses[2])


def test_a_batch_is_trained_whole_where_its_statistics_count() -> None:
    assert packs.microbatch(conv((3, 64, 64), [64], batch_norm=True), 256, "cpu") == 256
    assert packs.microbatch(conv((3, 64, 64), [64]), 256, "cpu") < 256


@pytest.mark.parametrize("network", ["conv", "conv_norm"])
def test_pooling_before_a_rising_activation_gives_the_same_bits(network: str) -> None:
    state = make_state(Architecture(GRAPHS[network]), 1)
    assert state.graph.pooled_first != state.graph
    inputs, labels = make_samples(9, state.graph.input_shape)
    pack = make_pack(state, 1)
    levels, target = pack.features(inputs, labels).batch(slice(0, 9))
    seen = []
    for graph in (state.graph, state.graph.pooled_first):
        pack = make_pack(state, 1)
        block = pack.blocks[0]
        logits = block.logits(block.forward(levels, True, graph=graph))
        logits.backward(cross_entropy(logits.detach(), target, 9)[1])
        seen.append([logits.detach(), *(each.grad for each in each_point(pack)[0])])
    assert all(map(torch.equal, *seen))


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("network", ["mlp_tanh", "conv_norm"])
def test_training_ends_where_a_plain_training_loop_ends(
    network: str, kind: str, schedule: str, device: torch.device
) -> None:
    graph = NETWORKS[network]
    state = make_state(Architecture(graph), 1)
    settings = TrainingSettings(2, 8, kind, schedule, weight_decay=0.01)
    depth, rates = len(graph.layers), [0.01, 0.01, 0.02]
    alphas = [tuple(first * (1 + layer) for layer in range(depth)) for first in (0.001, 0.004, 0.002)]
    pack, training = make_training(state, alphas, rates, settings, device)
    twins = [plain(state, pack, position) for position in range(3)]
    run_all(training)
    inputs, labels = make_samples(50, graph.input_shape, seed=1)
    for position, (twin, alpha, rate) in enumerate(zip(twins, alphas, rates, strict=True)):
        optimizers: dict[str, torch.optim.Optimizer] = {
            "adam": torch.optim.Adam(twin.trainable, rate, weight_decay=0.01),
            "adamw": torch.optim.AdamW(twin.trainable, rate, weight_decay=0.01),
            "sgd": torch.optim.SGD(twin.trainable, rate, momentum=0.9, weight_decay=0.01),
        }
        optimizer, steps = optimizers[kind], 2 * 4
        annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for epoch in range(2):
            for index in torch.randperm(30, generator=generator(0, "order", 1, epoch)).split(8):
                optimizer.zero_grad()
                twin.loss(inputs[index], labels[index], alpha).backward()
                optimizer.step()
                if schedule == "cosine":
                    annealing.step()
        twin.assert_ends_at(pack.point(position, {}), 1e-4)


def _grouped() -> tuple[nn.Module, Traced]:
    """A module with a convolution in two blocks, and its graph."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU()
    module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 2))
    return module, trace(module, (2, 6, 6))


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_convolution_in_blocks_is_trained_as_torchs_own(kind: str, device: torch.device) -> None:
    module, traced = _grouped()
    state, alpha, rate = State.empty(Architecture(traced.graph)), 0.003, 0.01
    inputs, labels = make_samples(30, (2, 6, 6))
    pack = Pack(state, 2, [(alpha,) * 3], traced.tensors(module), device)
    features, settings = pack.features(inputs, labels), TrainingSettings(2, 8, kind, "constant", weight_decay=0.01)
    run_all(Training(pack, [rate], features, features, settings, 0, 0))
    optimizer: torch.optim.Optimizer = torch.optim.SGD(module.parameters(), rate, momentum=0.9, weight_decay=0.01)
    if kind == "adam":
        optimizer = torch.optim.Adam(module.parameters(), rate, weight_decay=0.01)
    for epoch in range(2):
        for index in torch.randperm(30, generator=generator(0, "order", 0, epoch)).split(8):
            optimizer.zero_grad()
            penalty = sum(tensor.abs().sum() for name, tensor in module.named_parameters() if "weight" in name)
            (functional.cross_entropy(module(inputs[index]), labels[index]) + alpha * penalty).backward()
            optimizer.step()
    own, expected = pack.point(0, {}).tensors, traced.tensors(module)
    for name in ("0", "2", "5"):
        weight = torch.cat([own[name]["weight.shared"], own[name]["weight.own"]], 1)  # of the samples, and of units
        torch.testing.assert_close(weight, expected[name]["weight"], rtol=1e-4, atol=1e-5)
    assert not own["2"]["weight.own"][traced.graph.lacking["2"].expand(-1, -1, 9)].any()


def test_block_by_block_is_the_same_as_all_at_once() -> None:
    _, traced = _grouped()
    inputs, labels = make_samples(9, (2, 6, 6))
    seen = []
    for graph in (traced.graph, traced.graph.in_blocks):
        pack = make_pack(State.empty(Architecture(traced.graph)), 3, together=3)
        for position, tensors in enumerate(each_point(pack)):
            for tensor in tensors:
                tensor.data.mul_(1 + position)
        levels, target = pack.features(inputs, labels).batch(slice(0, 9))
        logits = pack.blocks[0].logits(pack.blocks[0].forward(levels, True, graph=graph))
        logits.backward(cross_entropy(logits.detach(), target, 9)[1])
        seen.append([logits.detach(), *(each.grad for point in each_point(pack) for each in point)])
    assert traced.graph.in_blocks != traced.graph
    torch.testing.assert_close(*seen)
    wide = traced.graph.widened({"2": 12})
    assert wide.in_blocks == wide


def test_no_task_gives_a_convolution_in_blocks_a_weight_between_them(device: torch.device) -> None:
    _, traced = _grouped()
    state = State.empty(Architecture(traced.graph)).widened({"0": 7, "2": 9})
    inputs, labels = make_samples(30, (2, 6, 6))
    for _ in range(3):
        pack = make_pack(state, [(0.001,) * 3] * 2, device)
        features, settings = pack.features(inputs, labels), TrainingSettings(1, 8, "adamw", weight_decay=0.1)
        run_all(Training(pack, [0.01, 0.02], features, features, settings, 0, 0))
        state = commit_at(state, pack.point(1, make_trained(state).activities))
    weight, lacks = state.tensors["2"]["weight"], state.graph.lacking["2"][:, :, 0]
    assert not weight[lacks].any()
    assert lacks[7].tolist() == [False, False, True, True, False, False, True]
    assert weight[~lacks].any(1).float().mean() > 0.5


@pytest.mark.parametrize("network", ["mlp", "conv_norm"])
def test_a_proximal_step_is_a_plain_step_and_then_a_soft_threshold(network: str) -> None:
    state = make_state(Architecture(GRAPHS[network]), 1)
    alphas = [tuple(100 * each for each in alpha) for alpha in alphas_of(state.graph)]
    settings = TrainingSettings(1, 30, "sgd", momentum=0.0, l1_scales=2.0)
    free, training = make_training(state, [(0.0,) * len(alphas[0])] * 3, RATES, settings)
    training.run_epoch()
    pack, training = make_training(state, alphas, RATES, replace(settings, l1="proximal"))
    training.run_epoch()
    zeros = 0
    for position, (alpha, rate) in enumerate(zip(alphas, RATES, strict=True)):
        by_layer = dict(zip(state.graph.layers, alpha, strict=True))
        unpenalised = point_tensors(free, position)
        for node, own in point_tensors(pack, position).items():
            layer = by_layer[state.graph.normalised_layer(state.graph.by_name[node])]
            for name, tensor in own.items():
                factor = 1.0 if name.startswith("weight") else 2.0 if name == "scale" else 0.0
                bound = factor * layer * rate
                assert_close(tensor, functional.softshrink(unpenalised[node][name], bound), 1e-7)
                zeros += int((tensor == 0).sum()) if bound else 0
    assert zeros > 0  # exact ones


# Points and packs


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("network", ["wide", "conv", "conv_norm", "residual", "dropout"])
def test_a_points_bits_do_not_depend_on_who_shares_its_pack_on_a_cpu(network: str, kind: str, size: int) -> None:
    # Products of dense layers round by the number of rows and by where operands lie in memory: alike for all points
    # only at widths like these. Maps are computed one point at a time.
    graph = {"wide": mlp(16, (64, 48)), "dropout": DROPOUT, **GRAPHS}[network]
    state = make_state(Architecture(graph), 0 if network == "wide" else 1)
    settings = TrainingSettings(1, 16, kind)
    alphas, rates = [*alphas_of(graph), (0.05,) * len(graph.layers)], [*RATES, 0.03]
    together, training = make_training(state, alphas, rates, settings)
    run_all(training)
    points, accuracies = [], []
    for first in range(0, 4, size):
        chosen = slice(first, first + size)
        pack, training_of = make_training(state, alphas[chosen], rates[chosen], settings)
        run_all(training_of)
        points += point_bytes(pack)
        accuracies += training_of.history[-1]
    assert points == point_bytes(together)
    assert accuracies == training.history[-1]


@pytest.mark.parametrize("network", GRAPHS)
def test_points_computed_together_or_apart_are_the_same_but_for_rounding(network: str, device: torch.device) -> None:
    graph = GRAPHS[network]
    state, settings = make_state(Architecture(graph), 1), TrainingSettings(1, 8, "sgd", momentum=0.0)
    ends = []
    for together in (1, 2, 3):
        pack, training = make_training(state, alphas_of(graph), RATES, settings, device, together=together)
        run_all(training)
        assert [block.points for block in pack.blocks] == {1: [1, 1, 1], 2: [2, 1], 3: [3]}[together]
        ends.append(pack)
    assert_points_close(ends[0], ends[1])
    assert_points_close(ends[0], ends[2])


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("network", GRAPHS)
def test_the_same_pack_gives_the_same_bits(network: str, kind: str, device: torch.device) -> None:
    state = make_state(Architecture(GRAPHS[network]), 1)
    ends = []
    for _ in range(2):
        pack, training = make_training(state, alphas_of(state.graph), RATES, TrainingSettings(1, 8, kind), device)
        run_all(training)
        ends.append(point_bytes(pack))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("network", GRAPHS)
def test_a_diverging_point_leaves_its_pack_mates_bits_untouched(network: str, device: torch.device) -> None:
    state, settings = make_state(Architecture(GRAPHS[network]), 1), TrainingSettings(2, 8, "sgd")
    ends, finite = [], []
    for rate in (0.02, 1e30):
        pack, training = make_training(state, alphas_of(state.graph), [0.001, rate, 0.002], settings, device)
        run_all(training)
        ends.append(point_bytes(pack))
        finite.append(pack.finite())
    assert finite == [[True, True, True], [True, False, True]]
    assert [ends[0][0], ends[0][2]] == [ends[1][0], ends[1][2]]


def test_a_point_keeps_its_parameters_when_the_pack_trains_on() -> None:
    state = make_state(SMALL, 1)
    pack, training = make_training(state, ALPHAS, RATES, TrainingSettings(epochs=2, batch_size=8))
    point = pack.point(1, {group: torch.zeros(1, dtype=torch.float64) for group in state.graph.groups})
    before = point.to_bytes()
    run_all(training)
    assert point.to_bytes() == before


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize(("head", "bias"), HEADS)
@pytest.mark.parametrize("network", GRAPHS)
def test_only_free_parameters_move(network: str, optimizer: str, head: str, bias: str, device: torch.device) -> None:
    graph = GRAPHS[network]
    state = make_state(Architecture(graph, head, bias), 2)
    digest, alphas = state.digest, alphas_of(graph)[1:2]
    pack, training = make_training(state, alphas, [0.02], TrainingSettings(2, 8, optimizer, weight_decay=0.1), device)
    inputs = make_samples(5, graph.input_shape)[0].to(device)
    before, tensors_before = pack.trunk.levels(inputs), tensors_of(pack)
    run_all(training)
    after = pack.trunk.levels(inputs)
    assert state.digest == digest
    assert all(torch.equal(before[name], after[name]) for name in before)
    name = f"0/{graph.head}/bias"
    if name in tensors_before:
        moves = head == "multi" or bias == "per_task"
        assert torch.equal(tensors_before[name], tensors_of(pack)[name]) == (not moves)


@pytest.mark.parametrize("network", GRAPHS)
def test_a_pack_holds_no_parameter_of_a_frozen_unit(network: str) -> None:
    state = make_state(Architecture(GRAPHS[network]), 1)
    free = {group: len(units) for group, units in state.free.items()}
    assert all(0 < free[group] < units for group, units in state.graph.groups.items())
    block = make_pack(state, 3, together=3).blocks[0]
    for node, own in block.tensors.items():
        groups = state.graph.by_name[node].groups
        rows = 2 if groups == (CLASSES,) else sum(free[group] for group in groups)
        assert all(tensor.shape[:2] == (3, rows) for tensor in own.values())


def test_a_single_head_never_computes_frozen_units_of_the_last_layer() -> None:
    read = [make_pack(make_state(replace(SMALL, head=head), 1), 1).trunk.levels_read for head in ("multi", "single")]
    assert read == [(INPUT, "hidden0.relu", "hidden1.relu"), (INPUT, "hidden0.relu")]


def test_finite_names_the_points_with_a_value_that_is_not() -> None:
    pack = make_pack(State.empty(SMALL), ALPHAS)
    with torch.no_grad():
        pack.blocks[0].tensors["hidden1"]["weight.own"][2, 0, 0] = float("nan")
        pack.blocks[0].tensors["head"]["bias"][0, 1] = float("inf")
    assert pack.finite() == [False, True, False]


def test_finite_reads_statistics_and_activities_too() -> None:
    pack = make_pack(State.empty(Architecture(GRAPHS["conv_norm"])), 3)
    pack.blocks[1].tensors["conv0.norm"]["variance"][0, 0] = float("inf")
    activities = [{"conv0": torch.tensor([value])} for value in (0.0, 0.0, float("nan"))]
    assert pack.finite(activities) == [True, False, False]


# Initial parameters


@pytest.mark.parametrize("network", GRAPHS)
def test_all_points_start_from_the_same_parameters(network: str) -> None:
    for num_points in (1, 3):
        points = point_bytes(make_pack(make_state(Architecture(GRAPHS[network]), 1), num_points))
        assert len(set(points)) == 1


def test_a_pack_goes_on_from_what_each_point_starts_with() -> None:
    state = make_state(Architecture(GRAPHS["residual"]), 1)
    starts = [make_trained(state, seed=seed).pruned(state.graph, dict.fromkeys(state.born, 0.5)) for seed in (1, 2)]
    pack = Pack(state, 2, [(0.0,) * len(state.graph.layers)] * 2, starts)
    for position, start in enumerate(starts):
        assert pack.point(position, start.activities).to_bytes() == start.to_bytes()
    inputs, labels = make_samples(9, state.graph.input_shape)
    twins = [Plain(state, start) for start in starts]
    pack.train_batch(pack.features(inputs, labels), ALL)
    for position, twin in enumerate(twins):
        # What was pruned has no part in the network: its leaves are zero, and so is its scale.
        twin.loss(inputs, labels, (0.0,) * len(state.graph.layers)).backward()
        twin.assert_gradients(pack, position)


def test_a_point_drops_the_same_beside_points_of_other_units() -> None:
    state, alpha = make_state(Architecture(DROPOUT), 1), (0.0,) * len(DROPOUT.layers)
    thetas = [{"conv0": theta, "dense0": 0.0} for theta in (0.0, 0.8, 0.0)]
    starts = [make_trained(state, seed=seed).pruned(DROPOUT, theta) for seed, theta in enumerate(thetas)]
    assert len({len(start.units["conv0"]) for start in starts}) > 1
    samples = make_samples(9, DROPOUT.input_shape)

    def trained(starts: list[FreeParameters]) -> list[bytes]:
        pack = Pack(state, 2, [alpha] * len(starts), starts)
        features, rates = pack.features(*samples), [0.01] * len(starts)
        run_all(Training(pack, rates, features, features, TrainingSettings(1, 9), 0, 0))
        return point_bytes(pack)

    assert trained(starts) == [trained([start])[0] for start in starts]


def test_initial_weights_differ_between_seeds_and_between_tasks() -> None:
    # The second task starts on a state without active units, so its shapes are the same.
    empty, later = State.empty(SMALL), make_state(SMALL, 1, theta=2.0)
    drawn = [draw(*each)["hidden0"]["weight"] for each in ((empty, 2, 0, 0), (empty, 2, 1, 0), (later, 2, 0, 1))]
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("head", ["multi", "single"])
def test_initial_weights_fill_plus_minus_one_over_the_root_of_the_fan_in(head: str) -> None:
    state = make_state(make_network((30, 60), in_features=40, head=head), 1, num_classes=10)
    drawn = draw(state, 10, 0, 1)
    free = len(state.free["hidden1"])
    for (name, own), fan_in in zip(drawn.items(), (40, 30, free if head == "single" else 60), strict=True):
        assert 0.99 * fan_in**-0.5 < own["weight"].abs().max().item() <= fan_in**-0.5, name


def test_the_fan_in_of_a_convolution_counts_its_window_and_of_a_flattened_map_its_positions() -> None:
    drawn = draw(State.empty(Architecture(conv((3, 8, 8), [30, "pool"], [200]))), 10, 0, 0)
    for name, fan_in in (("conv0", 3 * 9), ("dense0", 30 * 16), ("head", 200)):
        assert 0.99 * fan_in**-0.5 < drawn[name]["weight"].abs().max().item() <= fan_in**-0.5


def test_biases_start_at_zero_and_normalisations_do_nothing() -> None:
    drawn = draw(State.empty(Architecture(GRAPHS["residual"])), 2, 0, 0)
    values = {"bias": 0.0, "shift": 0.0, "mean": 0.0, "scale": 1.0, "variance": 1.0}
    for own in drawn.values():
        for name, tensor in own.items():
            assert name == "weight" or bool((tensor == values[name]).all())


def test_a_frozen_single_head_bias_is_the_first_tasks() -> None:
    state = make_state(replace(SMALL, head="single"), 1)
    assert torch.equal(make_pack(state, 3).blocks[0].tensors["head"]["bias"][1], state.heads[0]["bias"])


@pytest.mark.parametrize("unit", ["value", "channel"])
@pytest.mark.parametrize("after", [[], [Activation()], [MaxPool()]])
def test_dropout_acts_on_what_is_read_of_frozen_units_whatever_stands_between(
    unit: str, after: list[Op], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Builder((2, 6, 6))
    last = build.add("drop", Dropout(0.5, unit), build.layer("first", Conv(padding=(1, 1)), INPUT, 8))
    for position, op in enumerate(after):
        last = build.add(f"after{position}", op, last)
    build.layer("head", Linear(), build.add("flat", Flatten(), last), 0, head=True)
    pack = make_pack(make_state(Architecture(build.build()), 1), 1)
    inputs, labels = make_samples(64, pack.graph.input_shape)
    features, seen, read = pack.features(inputs, labels), [], Linear.read

    def watched(op: Linear, shared: Tensor | None, *others: Any) -> Tensor:
        assert shared is not None
        seen.append(shared)
        return read(op, shared, *others)

    monkeypatch.setattr(Linear, "read", watched)
    (levels, _), block = features.batch(torch.arange(64)), pack.blocks[0]
    for training in (False, True):
        block.forward(levels, training, graph=pack.graph.pooled_first)
    evaluated, dropped = (values.unflatten(1, (-1, pack.graph.by_name["flat"].taps)) for values in seen)
    zero = (dropped == 0) & (evaluated != 0)
    share = zero.sum() / (evaluated != 0).sum()
    if unit == "value" and any(isinstance(op, MaxPool) for op in after):
        assert share == 0  # a maximum of what is left is no masked maximum
        return
    assert 0.35 < share < 0.65
    assert_close(dropped[~zero], 2 * evaluated[~zero])
    if unit == "channel":
        assert ((zero | (evaluated == 0)).all(2) == zero.any(2)).all()


def test_all_that_reads_a_dropout_of_frozen_values_sees_the_same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    build = Builder((16,))
    dropped = build.add("drop", Dropout(0.5), INPUT)
    last = build.add("sum", Add(), *(build.layer(name, Linear(), dropped, 4) for name in ("one", "two")))
    build.layer("head", Linear(), last, 0, head=True)
    pack, seen, read = make_pack(State.empty(Architecture(build.build())), 1), [], Linear.read

    def watched(op: Linear, shared: Tensor | None, *others: Any) -> Tensor:
        seen.append(shared)
        return read(op, shared, *others)

    monkeypatch.setattr(Linear, "read", watched)
    features = pack.features(*make_samples(64, pack.graph.input_shape))
    (levels, _), block = features.batch(torch.arange(64)), pack.blocks[0]
    block.forward(levels, training=True, graph=pack.graph.pooled_first)
    one, two, _ = seen
    assert one is not None
    assert two is not None
    assert 0.3 < (one == 0).float().mean() < 0.7
    assert torch.equal(one, two)


def test_a_head_that_all_tasks_share_is_trained_on_the_samples_that_it_reads() -> None:
    build = Builder((4,))
    both = build.add("both", Concat(), INPUT, build.layer("hidden", Linear(), INPUT, 5))
    build.layer("head", Linear(), both, 0, head=True)
    state = State.empty(Architecture(build.build(), "shared"))
    pack, training = make_training(state, [(0.0, 0.0)], [0.01], TrainingSettings(epochs=1, batch_size=10))
    head = pack.blocks[0].tensors["head"]["weight.shared"]
    before = head.detach().clone()
    run_all(training)
    assert ((head.detach() - before).abs() > 1e-4).all()


def test_a_head_whose_bias_is_not_used_has_no_means_of_what_it_reads() -> None:
    pack = make_pack(State.empty(Architecture(mlp(4, [5]), "single", "none")), 1)
    features = pack.features(*make_samples(64, (4,)))
    assert [*pack.means(features)[0]] == []


# Features


@pytest.mark.parametrize("num_tasks", [0, 2])
@pytest.mark.parametrize("head", ["multi", "single"])
@pytest.mark.parametrize("network", GRAPHS)
def test_features_give_the_same_training_cached_or_not(
    network: str, head: str, num_tasks: int, device: torch.device
) -> None:
    state = make_state(Architecture(GRAPHS[network], head), num_tasks)
    alphas, settings = alphas_of(state.graph)[1:], TrainingSettings(1, 8, "sgd", momentum=0.0)
    ends = []
    for cache_bytes in (1 << 20, 0):
        pack, training = make_training(state, alphas, [0.001, 0.002], settings, device, cache_bytes)
        run_all(training)
        ends.append(pack)
    assert_points_close(*ends)


@pytest.mark.parametrize("network", GRAPHS)
def test_features_give_samples_and_labels_in_the_order_asked_for(network: str, device: torch.device) -> None:
    state = make_state(Architecture(GRAPHS[network]), 1)
    pack = make_pack(state, 1, device)
    inputs, labels = make_samples(20, state.graph.input_shape)
    index = torch.tensor([7, 3, 3])
    expected = pack.trunk.levels(inputs[index].to(device))
    for cache_bytes in (1 << 20, 0):
        features = pack.features(inputs, labels, cache_bytes)
        levels, own = features.batch(index.to(device))
        assert torch.equal(levels[INPUT].cpu(), inputs[index])
        assert torch.equal(own.cpu(), labels[index])
        assert len(features) == 20
        for name in pack.trunk.levels_read:
            assert_close(levels[name], expected[name])


def test_batches_cover_a_split_once_in_order() -> None:
    pack = make_pack(State.empty(SMALL), 1)
    size = evaluation_batch(pack.graph, "cpu")
    inputs, labels = make_samples(2 * size + 3)
    batches = list(pack.features(inputs, labels).batches())
    assert [len(own) for _, own in batches] == [size, size, 3]
    assert torch.equal(torch.cat([levels[INPUT] for levels, _ in batches]), inputs)
    assert torch.equal(torch.cat([own for _, own in batches]), labels)


# Measurements


@pytest.mark.parametrize("num_tasks", [0, 1])
@pytest.mark.parametrize("network", NETWORKS)
def test_activities_equal_a_float64_mean_over_the_whole_split(
    network: str, num_tasks: int, device: torch.device
) -> None:
    graph = NETWORKS[network]
    state = make_state(Architecture(graph), num_tasks)
    pack, training = make_training(state, alphas_of(graph), RATES, TrainingSettings(1, 15), device)
    run_all(training)
    inputs, labels = make_samples(37, graph.input_shape)
    activities = pack.activities(pack.features(inputs, labels))
    for position, found in enumerate(activities):
        values = plain(state, pack, position).values(inputs)
        for group, units in graph.groups.items():
            largest = torch.zeros(units, dtype=torch.float64)
            for name in graph.observed[group]:
                start = graph.by_name[name].groups.index(group)
                before = sum(graph.groups[each] for each in graph.by_name[name].groups[:start])
                size = values[name].abs().flatten(1).unflatten(1, (-1, values[name][0][0].numel())).mean((0, 2))
                largest = torch.maximum(largest, size[before : before + units].detach())
            assert found[group].dtype == torch.float64
            assert_close(found[group], largest[state.free[group]], 1e-5)


def test_activities_are_those_of_several_batches_together() -> None:
    pack = make_pack(State.empty(SMALL), 1)
    inputs, labels = make_samples(evaluation_batch(pack.graph, "cpu") + 37)
    activity = pack.activities(pack.features(inputs, labels))[0]["hidden0"]
    expected = plain(pack.state, pack, 0).values(inputs)["hidden0.relu"].mean(0).detach()
    assert_close(activity, expected, 1e-6)


def test_activity_of_a_unit_that_is_below_zero_is_its_mean_absolute_value() -> None:
    pack = make_pack(State.empty(make_network((1,), "tanh", in_features=1)), 1)
    pack.blocks[0].tensors["hidden0"]["weight.shared"].data.fill_(1.0)
    inputs = torch.tensor([[-2.0], [1.0]])
    activity = pack.activities(pack.features(inputs, torch.tensor([0, 1])))[0]["hidden0"]
    assert_close(activity, inputs.double().tanh().abs().mean()[None], 1e-6)


def test_activities_are_summed_in_float64() -> None:
    pack = make_pack(State.empty(make_network((1,), in_features=1)), 1)
    pack.blocks[0].tensors["hidden0"]["weight.shared"].data.fill_(1.0)
    inputs, labels = make_samples(1000, shape=1)
    activity = pack.activities(pack.features(inputs, labels))[0]["hidden0"].item()
    assert activity == pytest.approx(inputs.double().relu().mean().item(), rel=1e-14)


def test_a_point_carries_its_own_activities_in_float64() -> None:
    activities = {"hidden0": torch.rand(5, dtype=torch.float64), "hidden1": torch.rand(6, dtype=torch.float64)}
    point = make_pack(State.empty(SMALL), 3).point(2, activities)
    assert all(torch.equal(point.activities[group], activities[group]) for group in activities)


@pytest.mark.parametrize("network", GRAPHS)
def test_num_correct_counts_the_samples_that_each_point_gets_right(network: str, device: torch.device) -> None:
    graph = GRAPHS[network]
    state = make_state(Architecture(graph), 1)
    pack, training = make_training(state, alphas_of(graph), [0.01, 0.5, 0.05], TrainingSettings(1, 8), device)
    run_all(training)
    inputs, labels = make_samples(200, graph.input_shape)
    expected = [int((plain(state, pack, point).logits(inputs).argmax(1) == labels).sum()) for point in range(3)]
    assert pack.num_correct(pack.features(inputs, labels)) == expected


def test_training_flop_counts_two_products_on_frozen_inputs_and_three_on_free_ones() -> None:
    pack = make_pack(State.empty(SMALL), 7)
    assert pack.training_flop == 7 * (2 * 2 * 3 * 5 + 3 * 2 * 5 * 6 + 3 * 2 * 6 * 2)


def test_training_flop_of_a_convolution_counts_every_position() -> None:
    pack = make_pack(State.empty(Architecture(conv((2, 6, 6), [4, "pool"]))), 2)
    assert pack.training_flop == 2 * (2 * 2 * (4 * 2 * 9) * 36 + 3 * 2 * (2 * 4 * 9))


# Precision


@pytest.mark.parametrize("network", ["mlp", "conv", "residual"])
def test_bf16_trains_and_stays_close_to_float32(network: str, device: torch.device) -> None:
    graph = GRAPHS[network]
    state = State.empty(Architecture(graph))
    alphas, losses, packed = [alphas_of(graph)[0]] * 2, [], []
    for precision in ("float32", "bf16"):
        settings = TrainingSettings(epochs=6, batch_size=8, precision=precision)
        pack, training = make_training(state, alphas, [0.02, 0.05], settings, device)
        run_all(training)
        losses.append([[seen.train_loss for seen in training.history[epoch]] for epoch in (0, -1)])
        packed.append(pack)
    (_, exact), (first, last) = losses
    assert all(after < before for before, after in zip(first, last, strict=True))
    assert last == pytest.approx(exact, abs=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in packed[1].tensors.values())
    assert packed[1].finite() == [True, True]


@pytest.mark.parametrize("network", GRAPHS)
def test_bf16_gradients_are_close_to_float32s(network: str, device: torch.device) -> None:
    state = State.empty(Architecture(GRAPHS[network]))
    inputs, labels = make_samples(16, state.graph.input_shape)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        pack = make_pack(state, 1, device, dtype=dtype)
        pack.train_batch(pack.features(inputs, labels), torch.arange(16, device=device))
        gradients.append([each.grad for each in each_point(pack)[0]])
    for exact, rounded in zip(*gradients, strict=True):
        assert exact is not None
        assert rounded is not None
        assert_close(rounded, exact, 0.03)


# Capacity


@pytest.mark.parametrize(("head", "bias"), HEADS)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("network", GRAPHS)
def test_a_pack_on_a_full_network_trains(
    network: str, optimizer: str, head: str, bias: str, device: torch.device
) -> None:
    state = make_state(Architecture(GRAPHS[network], head, bias), 1, theta=-1.0)
    pack, training = make_training(state, alphas_of(state.graph), RATES, TrainingSettings(2, 8, optimizer), device)
    run_all(training)
    assert pack.finite() == [True, True, True]
    activities = pack.activities(pack.features(*make_samples(5, state.graph.input_shape)))
    assert all(values.shape == (0,) for own in activities for values in own.values())


@pytest.mark.parametrize("head", ["multi", "single"])
@pytest.mark.parametrize(
    ("network", "full"), [(network, group) for network, graph in GRAPHS.items() for group in graph.groups]
)
def test_gradients_with_one_full_group_equal_autograd(network: str, full: str, head: str, device: torch.device) -> None:
    state = fill_group(make_state(Architecture(GRAPHS[network], head), 1), full)
    inputs, labels = make_samples(9, state.graph.input_shape)
    alpha = alphas_of(state.graph)[1]
    pack = make_pack(state, [alpha], device)
    twin = plain(state, pack, 0)
    pack.train_batch(pack.features(inputs, labels), ALL.to(device))
    twin.loss(inputs, labels, alpha).backward()
    twin.assert_gradients(pack, 0)
