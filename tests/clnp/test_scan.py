"""The threshold scan against a slow twin that commits every pruned model and evaluates its subnetwork."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from builders import HEADS, make_info, make_state, make_trained
from torch import Tensor

from clnp_search.clnp.scan import Candidate, scan
from clnp_search.clnp.state import Architecture, FreeParameters, State, commit
from clnp_search.clnp.subnetwork import Subnetwork
from clnp_search.records import CurveStep, ScanRecord

HIDDEN = [(7,), (6, 5), (5, 4, 5)]
MARGINS = [-5, 0, 3, 15, 60]


class Slow:
    """Every pruned model of a candidate, committed for real."""

    def __init__(self, state: State, trained: FreeParameters, inputs: Tensor, labels: Tensor) -> None:
        self.state, self.trained, self.inputs, self.labels = state, trained, inputs, labels
        self.info = make_info(num_classes=len(trained.head_weight), in_features=state.architecture.in_features)
        self.depth = len(state.layers)
        self.known: dict[tuple[float, ...], tuple[int, tuple[int, ...]]] = {}

    def at(self, theta: Sequence[float]) -> tuple[int, tuple[int, ...]]:
        """Right samples, and active units of each layer."""
        if tuple(theta) not in self.known:
            after = commit(self.state, self.info, self.trained, tuple(theta))
            correct = (Subnetwork(after, self.state.num_tasks)(self.inputs).argmax(1) == self.labels).sum().item()
            active = tuple(len(layer.active(self.state.num_tasks)) for layer in after.layers)
            self.known[tuple(theta)] = int(correct), active
        return self.known[tuple(theta)]

    @property
    def thetas(self) -> list[float]:
        """Every distinct activity and zero, from the highest down."""
        return sorted({0.0, *torch.cat(self.trained.activities).tolist()}, reverse=True)

    def highest(self, min_correct: int) -> tuple[float, ...] | None:
        """The highest global theta that passes."""
        passing = (value for value in self.thetas if self.at([value] * self.depth)[0] >= min_correct)
        value = next(passing, None)
        return None if value is None else (value,) * self.depth

    def raise_layers(self, theta: tuple[float, ...], min_correct: int) -> tuple[float, ...]:
        """Each layer's highest theta that passes, from the last hidden layer to the first."""
        for layer in reversed(range(self.depth)):
            tried = {theta[layer], *self.trained.activities[layer].tolist()}
            options = [(*theta[:layer], value, *theta[layer + 1 :]) for value in tried if value >= theta[layer]]
            theta = max(option for option in options if self.at(option)[0] >= min_correct)
        return theta

    def assert_curve(self, curve: Sequence[CurveStep]) -> None:
        """Each step of a curve is the truth, and theta falls from step to step."""
        for step in curve:
            correct, active = self.at(step.theta)
            assert step.val_accuracy == correct / len(self.labels)
            assert step.active == active
        thetas = [step.theta for step in curve]
        assert thetas == sorted(set(thetas), reverse=True)


def make_candidate(
    architecture: Architecture, num_tasks: int, seed: int, exact: bool, num_samples: int = 300
) -> tuple[Slow, Candidate]:
    """A random candidate on a state of `num_tasks`; its labels are mostly what the unpruned model says."""
    state = make_state(architecture, num_tasks, exact=exact)
    trained = make_trained(state, 3 if architecture.head == "multi" else 2, seed + 100, exact)
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_samples, architecture.in_features, generator=generator)
    if exact:
        inputs = (4 * inputs).round() / 4
    whole = commit(state, make_info(num_classes=len(trained.head_weight)), trained, (-1.0,) * len(architecture.hidden))
    labels = Subnetwork(whole, num_tasks)(inputs).argmax(1)
    noise = torch.rand(num_samples, generator=generator) < 0.2
    labels[noise] = torch.randint(len(trained.head_weight), (int(noise.sum()),), generator=generator)
    return Slow(state, trained, inputs, labels), Candidate(state, trained, inputs, labels)


def by_hand(activities: list[float], votes: list[float], num_samples: int = 100) -> Candidate:
    """One hidden layer whose units always say one; class 0 wins, and is right, where the kept votes sum above zero."""
    units = len(activities)
    state = State.empty(Architecture(1, (units,)))
    trained = FreeParameters(
        weights=(torch.zeros(units, 1),),
        biases=(torch.ones(units),),
        head_weight=torch.tensor([votes, [0.0] * units]),
        head_bias=torch.tensor([-0.5, 0.0]),
        activities=(torch.tensor(activities, dtype=torch.float64),),
    )
    return Candidate(state, trained, torch.ones(num_samples, 1), torch.zeros(num_samples, dtype=torch.int64))


def accuracies(record: ScanRecord) -> dict[float, float]:
    return {step.theta[0]: step.val_accuracy for step in record.curve}


# Against the twin


@pytest.mark.parametrize("exact", [True, False], ids=["ties", "distinct"])
@pytest.mark.parametrize("num_tasks", [0, 1])
@pytest.mark.parametrize("head", ["multi", "single"])
@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
def test_a_scan_gives_what_committing_every_model_gives(
    hidden: tuple[int, ...], head: str, num_tasks: int, exact: bool
) -> None:
    for seed in range(4):
        slow, candidate = make_candidate(Architecture(3, hidden, head=head), num_tasks, seed, exact)
        best = slow.at([0.0] * len(hidden))[0]
        for allowed in MARGINS:
            record = scan(candidate, seed, best - allowed)
            assert record.theta == slow.highest(best - allowed)
            assert (record.val_correct, record.active) == slow.at(record.theta or [0.0] * len(hidden))
            assert record.point == seed
            slow.assert_curve(record.curve)


@pytest.mark.parametrize("num_tasks", [0, 1])
@pytest.mark.parametrize("head", ["multi", "single"])
@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
def test_a_scan_of_each_layer_gives_what_raising_each_by_hand_gives(
    hidden: tuple[int, ...], head: str, num_tasks: int
) -> None:
    for seed in range(len(MARGINS)):
        slow, candidate = make_candidate(Architecture(3, hidden, head=head), num_tasks, seed, exact=True)
        min_correct = slow.at([0.0] * len(hidden))[0] - MARGINS[seed]
        together = slow.highest(min_correct)
        record = scan(candidate, 0, min_correct, "per_layer")
        if together is None:
            assert record.theta is None
            continue
        assert record.theta is not None
        assert record.theta == slow.raise_layers(together, min_correct)
        assert all(own >= shared for own, shared in zip(record.theta, together, strict=True))
        assert (record.val_correct, record.active) == slow.at(record.theta)
        slow.assert_curve(record.curve)
        for curve in record.layer_curves:
            slow.assert_curve(curve)


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
@pytest.mark.parametrize(("head", "bias"), HEADS)
def test_a_scan_holds_for_every_activation_and_head(activation: str, head: str, bias: str) -> None:
    architecture = Architecture(3, (6, 5), activation, head, bias)
    slow, candidate = make_candidate(architecture, 2, seed=5, exact=False)
    min_correct = slow.at([0.0, 0.0])[0] - 10
    record = scan(candidate, 0, min_correct)
    assert record.theta == slow.highest(min_correct)
    slow.assert_curve(record.curve)


@pytest.mark.parametrize("num_samples", [1, 30, 2100])
def test_a_scan_holds_for_few_samples_and_for_several_batches(num_samples: int) -> None:
    slow, candidate = make_candidate(Architecture(3, (6, 5)), 1, 3, exact=True, num_samples=num_samples)
    for allowed in (0, num_samples // 20):
        min_correct = slow.at([0.0, 0.0])[0] - allowed
        assert scan(candidate, 0, min_correct).theta == slow.highest(min_correct)


def test_a_scan_on_a_device_gives_what_committing_every_model_gives(device: torch.device) -> None:
    slow, _ = make_candidate(Architecture(3, (6, 5), head="single"), 1, 7, exact=True)
    candidate = Candidate(slow.state, slow.trained, slow.inputs.to(device), slow.labels.to(device))
    min_correct = slow.at([0.0, 0.0])[0] - 5
    record = scan(candidate, 0, min_correct, "per_layer")
    together = slow.highest(min_correct)
    assert together is not None
    assert record.theta == slow.raise_layers(together, min_correct)


@pytest.mark.parametrize("head", ["multi", "single"])
def test_a_candidates_logits_are_its_subnetworks(head: str) -> None:
    slow, candidate = make_candidate(Architecture(3, (6, 5), head=head), 1, 11, exact=False)
    for theta in (0.0, 0.3, 0.6, 2.0):
        after = commit(slow.state, slow.info, slow.trained, (theta, theta))
        logits = candidate.logits(candidate.counts((theta, theta)))
        torch.testing.assert_close(logits, Subnetwork(after, 1)(slow.inputs), rtol=1e-4, atol=1e-5)


def test_a_candidates_logits_on_some_samples_are_those_of_the_whole_split() -> None:
    _, candidate = make_candidate(Architecture(3, (6, 5)), 1, 11, exact=True)
    samples = torch.tensor([5, 0, 17])
    assert torch.equal(candidate.logits((2, 3), samples), candidate.logits((2, 3))[samples])


# By hand


def test_the_highest_passing_theta_is_found_where_accuracy_is_not_monotone() -> None:
    # Kept units from the top: right, wrong, right, wrong, right.
    candidate = by_hand([5.0, 4.0, 3.0, 2.0, 1.0], [1.0, -1.0, 1.0, -1.0, 1.0])
    record = scan(candidate, 0, 100)
    assert record.theta == (4.0,)
    assert accuracies(record) == {5.0: 0.0, 4.0: 1.0, 3.0: 0.0, 2.0: 1.0, 1.0: 0.0, 0.0: 1.0}


def test_a_theta_below_a_failing_one_is_found() -> None:
    candidate = by_hand([4.0, 3.0, 2.0, 1.0], [-1.0, -1.0, 3.0, -1.0])
    assert scan(candidate, 0, 100).theta == (1.0,)


def test_a_candidate_that_fails_at_theta_zero_has_no_theta() -> None:
    record = scan(by_hand([2.0, 1.0], [0.25, 0.125]), 0, 1)
    assert record.theta is None
    assert record.val_correct == 0
    assert record.active == (2,)
    assert accuracies(record) == {2.0: 0.0, 1.0: 0.0, 0.0: 0.0}


def test_a_unit_that_is_never_active_is_pruned_though_only_it_is_right() -> None:
    record = scan(by_hand([1.0, 0.0], [-1.0, 5.0]), 0, 1)
    assert record.theta is None
    assert record.active == (1,)


def test_a_model_without_new_units_is_the_answer_if_it_passes() -> None:
    record = scan(by_hand([2.0, 1.0], [1.0, 1.0]), 0, 0)
    assert record.theta == (2.0,)
    assert record.active == (0,)


def test_units_of_equal_activity_are_kept_or_pruned_together() -> None:
    # Only the first two of the equal ones would be right.
    candidate = by_hand([2.0, 1.0, 1.0, 1.0], [-1.0, 1.0, 1.0, -3.0])
    assert scan(candidate, 0, 1).theta is None
    assert {step.active for step in scan(candidate, 0, 1).curve} == {(0,), (1,), (4,)}


def test_the_answer_gets_exactly_the_samples_that_are_asked_for() -> None:
    slow, candidate = make_candidate(Architecture(3, (7,)), 0, 1, exact=True)
    for theta in slow.thetas:
        correct = slow.at([theta])[0]
        record = scan(candidate, 0, correct)
        assert record.val_correct >= correct
        assert record.theta is not None
        assert record.theta[0] >= theta


# The record


@pytest.mark.parametrize("curve_steps", [2, 5, 16])
def test_the_curve_holds_the_chosen_theta_and_the_next_value_above_it(curve_steps: int) -> None:
    activities = [float(value) for value in range(40, 0, -1)]
    candidate = by_hand(activities, [0.0] * 20 + [1.0] * 20)
    record = scan(candidate, 0, 100, curve_steps=curve_steps)
    assert record.theta == (19.0,)
    curve = accuracies(record)
    assert curve[19.0] == 1.0
    assert curve[20.0] == 0.0
    assert {40.0, 0.0} <= curve.keys()


def test_each_layers_curve_holds_its_chosen_theta_and_the_next_activity_above_it() -> None:
    slow, candidate = make_candidate(Architecture(3, (6, 5)), 0, 2, exact=False)
    min_correct = slow.at([0.0, 0.0])[0] - 10
    record = scan(candidate, 0, min_correct, "per_layer")
    assert record.theta is not None
    assert len(record.layer_curves) == 2
    for layer, curve in enumerate(record.layer_curves):
        thetas = [step.theta[layer] for step in curve]
        above = [value for value in slow.trained.activities[layer].tolist() if value > record.theta[layer]]
        assert record.theta[layer] in thetas
        assert not above or min(above) in thetas


def test_a_global_scan_has_empty_layer_curves() -> None:
    record = scan(by_hand([2.0, 1.0], [1.0, 1.0]), 0, 1)
    assert not any(record.layer_curves)


def test_sparsity_counts_units_and_weights_of_earlier_tasks_as_used() -> None:
    architecture = Architecture(3, (5, 4))
    slow, candidate = make_candidate(architecture, 1, 0, exact=True)
    record = scan(candidate, 0, 0)
    active = [len(layer.active(0)) for layer in slow.state.layers]
    assert record.active == tuple(active)
    assert record.totals == (5, 4)
    assert record.unit_sparsity == pytest.approx(1 - sum(active) / 9)
    assert record.weight_sparsity == pytest.approx(1 - (3 * active[0] + active[0] * active[1]) / (3 * 5 + 5 * 4))


@pytest.mark.parametrize("head", ["multi", "single"])
@pytest.mark.parametrize("rule", ["global", "per_layer"])
def test_a_scan_on_a_full_network_is_its_one_model(rule: str, head: str) -> None:
    architecture = Architecture(3, (4, 4), head=head)
    full = make_state(architecture, 1, theta=-1.0)
    trained = make_trained(full)
    inputs, labels = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(20, dtype=torch.int64)
    record = scan(Candidate(full, trained, inputs, labels), 0, 0, rule)
    assert record.theta == (0.0, 0.0)
    assert record.active == (4, 4)


@pytest.mark.parametrize("rule", ["global", "per_layer"])
def test_a_scan_with_one_full_layer_agrees_with_the_twin(rule: str) -> None:
    state = make_state(Architecture(3, (4, 5)), 1, exact=True)
    layer = state.layers[0]
    state = replace(state, layers=(replace(layer, born=torch.zeros_like(layer.born)), state.layers[1]))
    trained = make_trained(state, exact=True)
    inputs = torch.randint(-4, 5, (50, 3), generator=torch.Generator().manual_seed(0)) / 4
    labels = torch.zeros(50, dtype=torch.int64)
    slow = Slow(state, trained, inputs, labels)
    min_correct = slow.at([0.0, 0.0])[0]
    expected = slow.highest(min_correct)
    assert expected is not None
    if rule == "per_layer":
        expected = slow.raise_layers(expected, min_correct)
    assert scan(Candidate(state, trained, inputs, labels), 0, min_correct, rule).theta == expected


def test_a_scan_leaves_the_trained_point_as_it_was() -> None:
    slow, candidate = make_candidate(Architecture(3, (6, 5)), 1, 0, exact=False)
    before = slow.trained.to_bytes()
    scan(candidate, 0, 0, "per_layer")
    assert slow.trained.to_bytes() == before
