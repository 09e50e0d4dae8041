"""A pack against a plain network with full weight matrices, trained by autograd in float64, one point at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import HEADS, make_samples, make_state, make_training, run_all
from torch import Tensor, nn
from torch.nn import functional

from clnp_search.clnp.pack import EVALUATION_BATCH, Features, Pack
from clnp_search.clnp.seeds import generator
from clnp_search.clnp.state import Architecture, FreeParameters, State
from clnp_search.clnp.training import TrainingSettings, cross_entropy

SMALL = Architecture(3, (5, 6))
ALPHAS: list[tuple[float, ...]] = [(0.0, 0.0, 0.0), (0.01, 0.02, 0.03), (0.1, 0.0, 0.2)]
ACTIVATIONS = {"relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}


class Plain(nn.Module):
    """One point as an ordinary network: full matrices in float64, of which the free entries are parameters.

    A row of a free unit reads every unit of the layer below. Frozen rows come from the state as they are.
    """

    def __init__(self, state: State, start: FreeParameters) -> None:
        super().__init__()
        self.state = state
        architecture = state.architecture
        self.activation = ACTIVATIONS[architecture.activation]
        self.free = [layer.free for layer in state.layers]
        frozen = [layer.active(state.num_tasks) for layer in state.layers]
        columns = [
            torch.arange(architecture.in_features),
            *(torch.cat(pair) for pair in zip(frozen, self.free, strict=True)),
        ]
        single = architecture.head == "single"
        self.columns = [*columns[:-1], self.free[-1] if single else columns[-1]]
        self.weights = nn.ParameterList(weight.double() for weight in (*start.weights, start.head_weight))
        self.biases = nn.ParameterList(bias.double() for bias in start.biases)
        num_classes = len(start.head_weight)
        bias = torch.zeros(num_classes) if start.head_bias is None else start.head_bias
        rule = architecture.head_bias if single else "per_task"
        trainable = rule == "per_task" or (rule == "frozen" and state.num_tasks == 0)
        self.head_bias = nn.Parameter(bias.double(), requires_grad=trainable)

    def forward(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits [N, C], and each layer's outputs [N, U]."""
        values, outputs = inputs.double(), []
        for layer, free, columns, weight, bias in zip(
            self.state.layers, self.free, self.columns, self.weights, self.biases, strict=False
        ):
            rows = torch.zeros(len(free), layer.weight.shape[1], dtype=torch.float64).index_copy(1, columns, weight)
            full = layer.weight.double().index_copy(0, free, rows)
            values = self.activation(values @ full.T + layer.bias.double().index_copy(0, free, bias))
            outputs.append(values)
        return values[:, self.columns[-1]] @ self.weights[-1].T + self.head_bias, outputs

    def loss(self, inputs: Tensor, labels: Tensor, alpha: tuple[float, ...]) -> Tensor:
        """Mean cross-entropy and the L1 penalty of the free weights, biases left out."""
        penalty = sum(each * weight.abs().sum() for each, weight in zip(alpha, self.weights, strict=True))
        return functional.cross_entropy(self(inputs)[0], labels) + penalty

    @property
    def trainable(self) -> list[nn.Parameter]:
        """Weights, then biases."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def plain(state: State, pack: Pack, position: int) -> Plain:
    """The plain network of a pack's point, as it is now."""
    return Plain(state, pack.point(position, [torch.zeros(pack.num_points, len(layer.free)) for layer in state.layers]))


def joined_gradients(pack: Pack, position: int) -> tuple[list[Tensor], list[Tensor]]:
    """A point's gradients of weights, frozen columns first, and of biases."""
    layers = [*pack.layers, pack.head]
    weights, biases = [], []
    for layer in layers:
        assert layer.shared.grad is not None
        assert layer.own.grad is not None
        weights.append(torch.cat([layer.shared.grad[position], layer.own.grad[position]], 1).cpu())
        if layer.bias.grad is not None:
            biases.append(layer.bias.grad[position].cpu())
    return weights, biases


def parameters(pack: Pack) -> list[Tensor]:
    return [parameter.cpu().clone() for parameter in pack.parameters]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual.double().cpu(), expected.double(), rtol=tolerance, atol=tolerance)


# Gradients


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
@pytest.mark.parametrize("num_tasks", [0, 1, 2])
@pytest.mark.parametrize(("head", "bias"), HEADS)
def test_gradients_equal_autograd_of_a_plain_network(
    activation: str, num_tasks: int, head: str, bias: str, device: torch.device
) -> None:
    architecture = replace(SMALL, activation=activation, head=head, head_bias=bias)
    state = make_state(architecture, num_tasks)
    # A pack mid-way, where the points differ.
    settings = TrainingSettings(epochs=2, batch_size=7, schedule="constant")
    pack, training = make_training(state, ALPHAS, [0.01, 0.02, 0.05], settings, device)
    training.run_epoch()
    inputs, labels = make_samples(9, seed=77)
    levels, target = pack.features(inputs, labels).batch(slice(0, 9))
    pack.backward(levels, cross_entropy(pack.forward(levels), target)[1])
    for position, alpha in enumerate(ALPHAS):
        twin = plain(state, pack, position)
        twin.loss(inputs, labels, alpha).backward()
        weights, biases = joined_gradients(pack, position)
        expected_biases = [bias.grad for bias in (*twin.biases, twin.head_bias) if bias.requires_grad]
        for actual, parameter in zip(weights, twin.weights, strict=True):
            assert parameter.grad is not None
            assert_close(actual, parameter.grad)
        for actual, expected in zip(biases, expected_biases, strict=True):
            assert expected is not None
            assert_close(actual, expected)


def test_the_penalty_alone_has_gradient_alpha_times_sign() -> None:
    pack = Pack(State.empty(SMALL), 2, [(0.25, 0.5, 2.0)], 0)
    levels, _ = pack.features(torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)).batch(slice(0, 4))
    logits = pack.forward(levels)
    pack.backward(levels, torch.zeros_like(logits))
    for layer, alpha in zip([*pack.layers, pack.head], (0.25, 0.5, 2.0), strict=True):
        for weight in (layer.shared, layer.own):
            assert weight.grad is not None
            assert torch.equal(weight.grad, alpha * weight.sign())
        assert layer.bias.grad is not None
        assert not layer.bias.grad.any()


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_training_ends_where_a_plain_training_loop_ends(kind: str, schedule: str, device: torch.device) -> None:
    state = make_state(replace(SMALL, activation="tanh"), 1)
    settings = TrainingSettings(3, 8, kind, schedule, weight_decay=0.01)
    rates = [0.01, 0.01, 0.02]
    alphas: list[tuple[float, ...]] = [(0.01, 0.02, 0.03), (0.1, 0.05, 0.2), (0.02, 0.02, 0.02)]
    pack, training = make_training(state, alphas, rates, settings, device)
    twins = [plain(state, pack, position) for position in range(3)]
    run_all(training)
    inputs, labels = make_samples(50, seed=1)
    for position, (twin, alpha, rate) in enumerate(zip(twins, alphas, rates, strict=True)):
        optimizers: dict[str, torch.optim.Optimizer] = {
            "adam": torch.optim.Adam(twin.trainable, rate, weight_decay=0.01),
            "adamw": torch.optim.AdamW(twin.trainable, rate, weight_decay=0.01),
            "sgd": torch.optim.SGD(twin.trainable, rate, momentum=0.9, weight_decay=0.01),
        }
        optimizer, steps = optimizers[kind], 3 * 4
        annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for epoch in range(3):
            for index in torch.randperm(30, generator=generator(0, "order", 1, epoch)).split(8):
                optimizer.zero_grad()
                twin.loss(inputs[index], labels[index], alpha).backward()
                optimizer.step()
                if schedule == "cosine":
                    annealing.step()
        now = plain(state, pack, position)
        for actual, expected in zip(now.parameters(), twin.parameters(), strict=True):
            assert_close(actual.detach(), expected.detach(), 1e-4)


# Points and packs


def test_a_points_result_does_not_depend_on_who_shares_its_pack(device: torch.device) -> None:
    state, settings = make_state(SMALL, 1), TrainingSettings(epochs=3, batch_size=8)
    rates = [0.01, 0.02, 0.05]
    together, training = make_training(state, ALPHAS, rates, settings, device)
    run_all(training)
    for position in range(3):
        alone, training = make_training(state, ALPHAS[position : position + 1], [rates[position]], settings, device)
        run_all(training)
        for ours, shared in zip(parameters(alone), parameters(together), strict=True):
            assert_close(ours[0], shared[position], 1e-4)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_the_same_pack_gives_the_same_bits(kind: str, device: torch.device) -> None:
    state, settings = make_state(SMALL, 1), TrainingSettings(epochs=2, batch_size=8, optimizer=kind)
    packs = []
    for _ in range(2):
        pack, training = make_training(state, ALPHAS, [0.01, 0.02, 0.05], settings, device)
        run_all(training)
        packs.append(parameters(pack))
    assert all(torch.equal(first, second) for first, second in zip(*packs, strict=True))


def test_a_diverging_point_leaves_its_pack_mates_bits_untouched(device: torch.device) -> None:
    state, settings = make_state(SMALL, 1), TrainingSettings(epochs=2, batch_size=8, optimizer="sgd")
    calm, training = make_training(state, ALPHAS, [0.01, 0.02, 0.05], settings, device)
    run_all(training)
    wild, training = make_training(state, ALPHAS, [0.01, 1e30, 0.05], settings, device)
    run_all(training)
    assert calm.finite() == [True, True, True]
    assert wild.finite() == [True, False, True]
    for expected, actual in zip(parameters(calm), parameters(wild), strict=True):
        assert torch.equal(expected[[0, 2]], actual[[0, 2]])


def test_a_point_keeps_its_parameters_when_the_pack_trains_on() -> None:
    state = make_state(SMALL, 1)
    pack, training = make_training(state, ALPHAS, [0.01, 0.02, 0.05], TrainingSettings(epochs=2, batch_size=8))
    activities = [torch.zeros(3, len(layer.free), dtype=torch.float64) for layer in state.layers]
    point = pack.point(1, activities)
    before = point.to_bytes()
    run_all(training)
    for activity in activities:
        activity.fill_(9.0)
    assert point.to_bytes() == before


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize(("head", "bias"), HEADS)
def test_only_free_parameters_move(optimizer: str, head: str, bias: str, device: torch.device) -> None:
    state = make_state(replace(SMALL, head=head, head_bias=bias), 2)
    digest = state.digest
    settings = TrainingSettings(2, 8, optimizer, weight_decay=0.1)
    pack, training = make_training(state, ALPHAS, [0.01, 0.02, 0.05], settings, device)
    inputs = make_samples(5)[0].to(device)
    trunk_before, bias_before = pack.trunk.levels(inputs), pack.head.bias.clone()
    run_all(training)
    assert state.digest == digest
    assert all(map(torch.equal, trunk_before, pack.trunk.levels(inputs)))
    moves = head == "multi" or bias == "per_task"
    assert torch.equal(bias_before, pack.head.bias) == (not moves)


def test_a_pack_holds_no_parameter_of_a_frozen_unit() -> None:
    state = make_state(SMALL, 1)
    free = [len(layer.free) for layer in state.layers]
    pack = Pack(state, 2, ALPHAS, 0)
    assert [layer.bias.shape for layer in pack.layers] == [(3, free[0]), (3, free[1])]
    assert all(0 < units < total for units, total in zip(free, SMALL.hidden, strict=True))


def test_a_single_head_never_computes_frozen_units_of_the_last_layer() -> None:
    widths = [Pack(make_state(replace(SMALL, head=head), 1), 2, ALPHAS, 0).trunk.widths for head in ("multi", "single")]
    assert [len(each) for each in widths] == [3, 2]


def test_finite_names_the_points_with_a_value_that_is_not() -> None:
    pack = Pack(State.empty(SMALL), 2, ALPHAS, 0)
    pack.layers[1].own[2, 0, 0] = float("nan")
    pack.head.bias[0, 1] = float("inf")
    assert pack.finite() == [False, True, False]


# Initial parameters


def test_all_points_start_from_the_same_parameters() -> None:
    for parameter in Pack(make_state(SMALL, 1), 2, ALPHAS, 0).parameters:
        assert torch.equal(parameter, parameter[:1].expand_as(parameter))


def test_initial_parameters_do_not_depend_on_the_size_of_the_pack() -> None:
    state = make_state(SMALL, 1)
    few, many = (Pack(state, 2, ALPHAS[:num], 0).parameters for num in (1, 3))
    assert all(torch.equal(one[0], other[0]) for one, other in zip(few, many, strict=True))


def test_initial_weights_differ_between_seeds_and_between_tasks() -> None:
    empty = State.empty(SMALL)
    # The second task starts on a state without active units, so its shapes are the same.
    later = make_state(SMALL, 1, theta=2.0)
    first, seeded, second = (Pack(*each).layers[0].shared for each in _arguments(empty, later))
    assert not torch.equal(first, seeded)
    assert not torch.equal(first, second)


def _arguments(empty: State, later: State) -> list[tuple[State, int, list[tuple[float, ...]], int]]:
    return [(empty, 2, ALPHAS, 0), (empty, 2, ALPHAS, 1), (later, 2, ALPHAS, 0)]


@pytest.mark.parametrize("head", ["multi", "single"])
def test_initial_weights_fill_plus_minus_one_over_the_root_of_the_fan_in(head: str) -> None:
    state = make_state(Architecture(40, (30, 60), head=head), 1, num_classes=10)
    pack = Pack(state, 10, [(0.0, 0.0, 0.0)], 0)
    free = len(state.layers[-1].free)
    for layer, fan_in in zip([*pack.layers, pack.head], (40, 30, free if head == "single" else 60), strict=True):
        largest = torch.cat([layer.shared.flatten(), layer.own.flatten()]).abs().max().item()
        assert 0.99 * fan_in**-0.5 < largest <= fan_in**-0.5
        assert not layer.bias.any() or layer is pack.head


def test_initial_biases_are_zero() -> None:
    pack = Pack(make_state(SMALL, 1), 2, ALPHAS, 0)
    assert not any(layer.bias.any() for layer in [*pack.layers, pack.head])


def test_a_frozen_single_head_bias_is_the_first_tasks() -> None:
    state = make_state(replace(SMALL, head="single"), 1)
    expected = state.heads[0].bias
    assert expected is not None
    assert torch.equal(Pack(state, 2, ALPHAS, 0).head.bias[1], expected)


# Features


@pytest.mark.parametrize("num_tasks", [0, 2])
@pytest.mark.parametrize("head", ["multi", "single"])
def test_features_give_the_same_training_cached_or_not(head: str, num_tasks: int, device: torch.device) -> None:
    state, settings = make_state(replace(SMALL, head=head), num_tasks), TrainingSettings(epochs=3, batch_size=8)
    ends = []
    for cache_bytes in (1 << 20, 0):
        pack, training = make_training(state, ALPHAS, [0.01, 0.02, 0.05], settings, device, cache_bytes)
        run_all(training)
        ends.append(parameters(pack))
    for cached, computed in zip(*ends, strict=True):
        assert_close(cached, computed, 1e-4)


def test_features_give_samples_and_labels_in_the_order_asked_for(device: torch.device) -> None:
    pack = Pack(make_state(SMALL, 1), 2, ALPHAS, 0, device)
    inputs, labels = make_samples(20)
    for cache_bytes in (1 << 20, 0):
        features: Features = pack.features(inputs, labels, cache_bytes)
        levels, own = features.batch(torch.tensor([7, 3, 3], device=device))
        assert torch.equal(levels[0].cpu(), inputs[[7, 3, 3]])
        assert torch.equal(own.cpu(), labels[[7, 3, 3]])
        assert len(features) == 20


def test_batches_cover_a_split_once_in_order() -> None:
    pack = Pack(State.empty(SMALL), 2, ALPHAS, 0)
    inputs, labels = make_samples(2 * EVALUATION_BATCH + 3)
    batches = list(pack.features(inputs, labels).batches())
    assert [len(own) for _, own in batches] == [EVALUATION_BATCH, EVALUATION_BATCH, 3]
    assert torch.equal(torch.cat([levels[0] for levels, _ in batches]), inputs)
    assert torch.equal(torch.cat([own for _, own in batches]), labels)


# Measurements


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
def test_activities_equal_a_float64_mean_over_the_whole_split(activation: str, device: torch.device) -> None:
    state = make_state(replace(SMALL, activation=activation), 1)
    pack = Pack(state, 2, ALPHAS, 0, device)
    pack.layers[1].own[1].mul_(-1)
    inputs, labels = make_samples(EVALUATION_BATCH + 37)
    activities = pack.activities(pack.features(inputs, labels))
    assert all(activity.dtype == torch.float64 for activity in activities)
    for position in range(3):
        outputs = plain(state, pack, position)(inputs)[1]
        for layer, activity, output in zip(state.layers, activities, outputs, strict=True):
            assert_close(activity[position], output.abs().mean(0)[layer.free].detach(), 1e-6)


def test_activity_of_a_unit_that_is_below_zero_is_its_mean_absolute_value() -> None:
    pack = Pack(State.empty(Architecture(1, (1,), activation="tanh")), 2, [(0.0, 0.0)], 0)
    pack.layers[0].shared.fill_(1.0)
    inputs = torch.tensor([[-2.0], [1.0]])
    activity = pack.activities(pack.features(inputs, torch.tensor([0, 1])))[0]
    assert_close(activity, inputs.double().tanh().abs().mean()[None, None], 1e-6)


def test_activities_are_summed_in_float64() -> None:
    pack = Pack(State.empty(Architecture(1, (1,))), 2, [(0.0, 0.0)], 0)
    pack.layers[0].shared.fill_(1.0)
    inputs, labels = make_samples(EVALUATION_BATCH, in_features=1)
    activity = pack.activities(pack.features(inputs, labels))[0].item()
    assert activity == pytest.approx(inputs.double().relu().mean().item(), rel=1e-14)


def test_a_point_carries_its_own_activities_in_float64() -> None:
    pack = Pack(State.empty(SMALL), 2, ALPHAS, 0)
    activities = [torch.rand(3, 5, dtype=torch.float64), torch.rand(3, 6, dtype=torch.float64)]
    point = pack.point(2, activities)
    assert all(torch.equal(own, all_[2]) for own, all_ in zip(point.activities, activities, strict=True))


def test_num_correct_counts_the_samples_that_each_point_gets_right(device: torch.device) -> None:
    state = make_state(SMALL, 1)
    pack, training = make_training(state, ALPHAS, [0.01, 0.5, 0.05], TrainingSettings(epochs=1, batch_size=8), device)
    run_all(training)
    inputs, labels = make_samples(EVALUATION_BATCH + 100)
    expected = [
        int((plain(state, pack, position)(inputs)[0].argmax(1) == labels).sum()) for position in range(pack.num_points)
    ]
    assert pack.num_correct(pack.features(inputs, labels)) == expected


def test_training_flop_counts_two_products_on_frozen_inputs_and_three_on_free_ones() -> None:
    pack = Pack(State.empty(Architecture(3, (5, 6))), 2, [(0.0, 0.0, 0.0)] * 7, 0)
    assert pack.training_flop == 7 * (2 * 2 * 3 * 5 + 3 * 2 * 5 * 6 + 3 * 2 * 6 * 2)


# Precision


def test_bf16_trains_and_stays_close_to_float32(device: torch.device) -> None:
    state = make_state(SMALL, 1)
    losses, packs = [], []
    for precision in ("float32", "bf16"):
        settings = TrainingSettings(epochs=6, batch_size=8, precision=precision)
        pack, training = make_training(state, ALPHAS, [0.02, 0.02, 0.05], settings, device)
        run_all(training)
        losses.append([[seen.train_loss for seen in training.history[epoch]] for epoch in (0, -1)])
        packs.append(pack)
    (_, exact), (first, last) = losses
    assert all(after < before for before, after in zip(first, last, strict=True))
    assert last == pytest.approx(exact, abs=0.05)
    assert all(parameter.dtype == torch.float32 for parameter in packs[1].parameters)
    assert packs[1].finite() == [True, True, True]


def test_bf16_gradients_are_close_to_float32s(device: torch.device) -> None:
    state = make_state(SMALL, 1)
    inputs, labels = make_samples(16)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        pack = Pack(state, 2, ALPHAS, 0, device, dtype)
        levels, target = pack.features(inputs, labels).batch(slice(0, 16))
        pack.backward(levels, cross_entropy(pack.forward(levels), target)[1])
        gradients.append(joined_gradients(pack, 1))
    for exact, rounded in zip(*(weights + biases for weights, biases in gradients), strict=True):
        assert_close(rounded, exact, 0.03)


# Capacity


@pytest.mark.parametrize(("head", "bias"), HEADS)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_pack_on_a_full_network_trains(optimizer: str, head: str, bias: str, device: torch.device) -> None:
    state = make_state(replace(SMALL, head=head, head_bias=bias), 1, theta=-1.0)
    settings = TrainingSettings(2, 8, optimizer)
    pack, training = make_training(state, ALPHAS, [0.01, 0.02, 0.05], settings, device)
    run_all(training)
    assert pack.finite() == [True, True, True]
    assert [activity.shape for activity in pack.activities(pack.features(*make_samples(5)))] == [(3, 0), (3, 0)]


@pytest.mark.parametrize("full", [0, 1])
@pytest.mark.parametrize("head", ["multi", "single"])
def test_gradients_with_one_full_layer_equal_autograd(full: int, head: str, device: torch.device) -> None:
    state = make_state(replace(SMALL, head=head), 1)
    layer = state.layers[full]
    layers = list(state.layers)
    layers[full] = replace(layer, born=torch.zeros_like(layer.born))
    state = replace(state, layers=tuple(layers))
    pack = Pack(state, 2, ALPHAS, 0, device)
    inputs, labels = make_samples(9)
    levels, target = pack.features(inputs, labels).batch(slice(0, 9))
    pack.backward(levels, cross_entropy(pack.forward(levels), target)[1])
    twin = plain(state, pack, 1)
    twin.loss(inputs, labels, ALPHAS[1]).backward()
    for actual, parameter in zip(joined_gradients(pack, 1)[0], twin.weights, strict=True):
        if parameter.numel():
            assert parameter.grad is not None
            assert_close(actual, parameter.grad)
