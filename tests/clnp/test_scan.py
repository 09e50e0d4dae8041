"""The threshold scan against a slow twin that commits every pruned model and evaluates its subnetwork."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
import torch
from builders import GRAPHS, HEADS, commit_at, fill_group, make_info, make_network, make_state, make_trained
from torch import Tensor

from clnp_search.clnp import scan as scans
from clnp_search.clnp.scan import Candidate, Grown, scan
from clnp_search.clnp.state import Architecture, FreeParameters, State, commit
from clnp_search.clnp.subnetwork import Subnetwork
from clnp_search.records import CurveStep, ScanRecord

NETWORKS = {str(hidden): make_network(hidden) for hidden in [(7,), (6, 5), (5, 4, 5)]}
NETWORKS |= {name: Architecture(graph) for name, graph in GRAPHS.items() if name != "mlp"}
MARGINS = [-5, 0, 3, 15, 60]


class Slow:
    """Every pruned model of a candidate, committed for real."""

    def __init__(self, state: State, trained: FreeParameters, inputs: Tensor, labels: Tensor) -> None:
        self.state, self.trained, self.inputs, self.labels = state, trained, inputs, labels
        self.num_classes = len(trained.tensors[state.graph.head]["weight.own"])
        self.groups = tuple(state.graph.groups)
        self.depth = len(self.groups)
        self.known: dict[tuple[float, ...], tuple[int, tuple[int, ...]]] = {}

    def at(self, theta: Sequence[float]) -> tuple[int, tuple[int, ...]]:
        """Right samples, and active units of each group."""
        if tuple(theta) not in self.known:
            info = make_info(num_classes=self.num_classes, shape=self.state.graph.input_shape)
            after = commit(self.state, info, self.trained, dict(zip(self.groups, theta, strict=True)))
            correct = (Subnetwork(after, self.state.num_tasks)(self.inputs).argmax(1) == self.labels).sum().item()
            active = tuple(len(after.active()[group]) for group in self.groups)
            self.known[tuple(theta)] = int(correct), active
        return self.known[tuple(theta)]

    def activities(self, group: int) -> list[float]:
        """Activities of a group's free units."""
        return self.trained.activities[self.groups[group]].tolist()

    @property
    def thetas(self) -> list[float]:
        """Every distinct activity and zero, from the highest down."""
        return sorted({0.0, *(value for group in range(self.depth) for value in self.activities(group))}, reverse=True)

    def highest(self, min_correct: int) -> tuple[float, ...] | None:
        """The highest global theta that passes."""
        passing = (value for value in self.thetas if self.at([value] * self.depth)[0] >= min_correct)
        value = next(passing, None)
        return None if value is None else (value,) * self.depth

    def raise_groups(self, theta: tuple[float, ...], min_correct: int, order: Iterable[int]) -> tuple[float, ...]:
        """Each group's highest theta that passes, one after another."""
        for group in order:
            tried = {theta[group], *self.activities(group)}
            options = [(*theta[:group], value, *theta[group + 1 :]) for value in tried if value >= theta[group]]
            theta = max(option for option in options if self.at(option)[0] >= min_correct)
        return theta

    def fewest_raised(self, min_correct: int) -> int:
        """The fewest units that raising single thetas, from every global one that passes, leaves."""
        starts = [(value,) * self.depth for value in self.thetas if self.at([value] * self.depth)[0] >= min_correct]
        orders = (range(self.depth)[::-1], range(self.depth))
        ends = [self.raise_groups(start, min_correct, order) for start in starts for order in orders]
        return min(sum(self.at(end)[1]) for end in ends)

    def fewest(self, min_correct: int) -> int:
        """The fewest units of all choices of thetas that pass."""
        choices = itertools.product(*({0.0, *self.activities(group)} for group in range(self.depth)))
        return min(sum(units) for correct, units in map(self.at, choices) if correct >= min_correct)

    def assert_curve(self, curve: Sequence[CurveStep]) -> None:
        """Each step of a curve is the truth, and theta falls from step to step."""
        for step in curve:
            correct, active = self.at(step.theta)
            assert step.val_accuracy == correct / len(self.labels)
            assert step.active == active
        thetas = [step.theta for step in curve]
        assert thetas == sorted(set(thetas), reverse=True)


def make_candidate(
    architecture: Architecture,
    num_tasks: int,
    seed: int,
    exact: bool,
    num_samples: int = 300,
    compensated: bool = False,
) -> tuple[Slow, Candidate]:
    """A random candidate on a state of `num_tasks`; its labels are mostly what the unpruned model says."""
    state = make_state(architecture, num_tasks, exact=exact)
    num_classes = 3 if architecture.head == "multi" else 2
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_samples, *state.graph.input_shape, generator=generator)
    trained = make_trained(state, num_classes, seed + 100, exact, inputs if compensated else None)
    if exact:
        inputs = (4 * inputs).round() / 4
    whole = commit_at(state, trained, -1.0, num_classes=num_classes)
    labels = Subnetwork(whole, num_tasks)(inputs).argmax(1)
    noise = torch.rand(num_samples, generator=generator) < 0.2
    labels[noise] = torch.randint(num_classes, (int(noise.sum()),), generator=generator)
    return Slow(state, trained, inputs, labels), Candidate(state, trained, inputs, labels)


def by_hand(activities: list[float], votes: list[float], num_samples: int = 100) -> Candidate:
    """One hidden layer whose units always say one; class 0 wins, and is right, where the kept votes sum above zero."""
    units = len(activities)
    state = State.empty(make_network((units,), in_features=1))
    trained = make_trained(state)
    hidden, head = trained.tensors["hidden0"], trained.tensors["head"]
    hidden["weight.shared"].zero_()
    hidden["bias"].fill_(1.0)
    head["weight.own"][:] = torch.tensor([votes, [0.0] * units])[:, :, None]
    head["bias"][:] = torch.tensor([-0.5, 0.0])
    trained.activities["hidden0"][:] = torch.tensor(activities, dtype=torch.float64)
    return Candidate(state, trained, torch.ones(num_samples, 1), torch.zeros(num_samples, dtype=torch.int64))


def accuracies(record: ScanRecord) -> dict[float, float]:
    return {step.theta[0]: step.val_accuracy for step in record.curve}


# Against the twin


@pytest.mark.parametrize("exact", [True, False], ids=["ties", "distinct"])
@pytest.mark.parametrize("num_tasks", [0, 1])
@pytest.mark.parametrize("head", ["multi", "single"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_scan_gives_what_committing_every_model_gives(network: str, head: str, num_tasks: int, exact: bool) -> None:
    for seed in range(2):
        slow, candidate = make_candidate(replace(NETWORKS[network], head=head), num_tasks, seed, exact)
        best = slow.at([0.0] * slow.depth)[0]
        for allowed in MARGINS:
            record = scan(candidate, seed, best - allowed)
            assert record.theta == slow.highest(best - allowed)
            assert (record.val_correct, record.active) == slow.at(record.theta or [0.0] * slow.depth)
            assert record.point == seed
            slow.assert_curve(record.curve)


@pytest.mark.parametrize("rule", ["global", "per_layer"])
@pytest.mark.parametrize("head", ["multi", "single"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_scan_holds_where_biases_make_up_for_what_is_pruned(network: str, head: str, rule: str) -> None:
    architecture = replace(NETWORKS[network], head=head)
    slow, candidate = make_candidate(architecture, 1, 3, exact=False, compensated=True)
    assert candidate.num_correct((0,) * slow.depth) == slow.at([1.0] * slow.depth)[0]
    best = slow.at([0.0] * slow.depth)[0]
    for allowed in MARGINS[1:4]:
        record = scan(candidate, 0, best - allowed, rule)
        if rule == "global":
            assert record.theta == slow.highest(best - allowed)
        assert (record.val_correct, record.active) == slow.at(record.theta or [0.0] * slow.depth)
        slow.assert_curve(record.curve)


@pytest.mark.parametrize("num_tasks", [0, 1])
@pytest.mark.parametrize("head", ["multi", "single"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_scan_of_each_group_leaves_as_few_units_as_raising_each_by_hand(
    network: str, head: str, num_tasks: int
) -> None:
    for seed, margin in enumerate(MARGINS[:4] if num_tasks else MARGINS[1:3]):
        slow, candidate = make_candidate(replace(NETWORKS[network], head=head), num_tasks, seed, exact=True)
        min_correct = slow.at([0.0] * slow.depth)[0] - margin
        together = slow.highest(min_correct)
        record = scan(candidate, 0, min_correct, "per_layer")
        if together is None:
            assert record.theta is None
            continue
        assert record.theta is not None
        assert (record.val_correct, record.active) == slow.at(record.theta)
        assert record.val_correct >= min_correct
        assert sum(record.active) <= sum(slow.at(together)[1])  # never more than with one theta
        assert sum(record.active) == slow.fewest_raised(min_correct)
        slow.assert_curve(record.curve)
        for curve in record.layer_curves:
            slow.assert_curve(curve)


def test_a_scan_of_each_group_finds_the_fewest_units_that_any_thetas_leave() -> None:
    for seed in range(9):
        slow, candidate = make_candidate(make_network((6, 5)), 0, seed, exact=False)
        for allowed in (3, 15):
            min_correct = slow.at([0.0, 0.0])[0] - allowed
            assert sum(scan(candidate, 0, min_correct, "per_layer").active) == slow.fewest(min_correct)


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
@pytest.mark.parametrize(("head", "bias"), HEADS)
def test_a_scan_holds_for_every_activation_and_head(activation: str, head: str, bias: str) -> None:
    architecture = make_network((6, 5), activation, head=head, head_bias=bias)
    slow, candidate = make_candidate(architecture, 2, seed=5, exact=False)
    min_correct = slow.at([0.0, 0.0])[0] - 10
    record = scan(candidate, 0, min_correct)
    assert record.theta == slow.highest(min_correct)
    slow.assert_curve(record.curve)


@pytest.mark.parametrize("num_samples", [1, 30, 2100])
def test_a_scan_holds_for_few_samples_and_for_several_batches(num_samples: int) -> None:
    slow, candidate = make_candidate(make_network((6, 5)), 1, 3, exact=True, num_samples=num_samples)
    for allowed in (0, num_samples // 20):
        min_correct = slow.at([0.0, 0.0])[0] - allowed
        assert scan(candidate, 0, min_correct).theta == slow.highest(min_correct)


@pytest.mark.parametrize("held_bytes", [0, 20_000, 1 << 30])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_scan_in_parts_holds_as_many_values_as_fit(network: str, held_bytes: int) -> None:
    slow, candidate = make_candidate(NETWORKS[network], 1, 4, exact=False)
    candidate.features.batch_size = 17
    candidate.held_limit = held_bytes
    for allowed in MARGINS:
        limit = slow.at([0.0] * slow.depth)[0] - allowed
        assert scan(candidate, 0, limit).theta == slow.highest(limit)


def test_a_scan_holds_no_more_than_its_slot_has_room_for() -> None:
    slow, whole = make_candidate(NETWORKS["residual"], 1, 4, exact=False)
    small = Candidate(slow.state, slow.trained, slow.inputs, slow.labels, cache_bytes=1000)
    assert (whole.held_limit, small.held_limit) == (scans.HELD_BYTES, 1000)
    limit = slow.at([0.0] * slow.depth)[0] - 1
    assert scan(small, 0, limit).theta == slow.highest(limit)


@pytest.mark.parametrize("num_tasks", [0, 1])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_scan_holds_where_samples_are_seen_one_at_a_time(network: str, num_tasks: int) -> None:
    slow, candidate = make_candidate(NETWORKS[network], num_tasks, 5, exact=False, num_samples=40)
    candidate.features.batch_size = 1
    limit = slow.at([0.0] * slow.depth)[0] - 2
    assert scan(candidate, 0, limit).theta == slow.highest(limit)


def test_a_scan_on_a_device_gives_what_committing_every_model_gives(device: torch.device) -> None:
    slow, _ = make_candidate(make_network((6, 5), head="single"), 1, 7, exact=True)
    candidate = Candidate(slow.state, slow.trained, slow.inputs.to(device), slow.labels.to(device))
    min_correct = slow.at([0.0, 0.0])[0] - 5
    record = scan(candidate, 0, min_correct, "per_layer")
    assert sum(record.active) == slow.fewest_raised(min_correct)


@pytest.mark.parametrize("head", ["multi", "single"])
def test_a_candidates_logits_are_its_subnetworks(head: str) -> None:
    slow, candidate = make_candidate(make_network((6, 5), head=head), 1, 11, exact=False)
    for theta in (0.0, 0.3, 0.6, 2.0):
        after = commit_at(slow.state, slow.trained, theta, num_classes=slow.num_classes)
        logits = candidate.logits(*candidate.path([[theta], [theta]]))
        torch.testing.assert_close(logits, Subnetwork(after, 1)(slow.inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("together", [1, 3, 1000])
@pytest.mark.parametrize("num_tasks", [0, 1])
@pytest.mark.parametrize("network", NETWORKS)
def test_growing_models_logits_on_some_samples_are_those_of_the_whole_split(
    network: str, num_tasks: int, together: int
) -> None:
    slow, candidate = make_candidate(NETWORKS[network], num_tasks, 11, exact=False)
    samples = torch.tensor([5, 0, 17])
    same = [slow.thetas[len(slow.thetas) // 2]] * len(slow.thetas)
    growing = [range(slow.depth), *([group] for group in range(slow.depth))]  # all groups, and each alone
    for groups in growing:
        path = candidate.path([slow.thetas if group in groups else same for group in range(slow.depth)])
        grown = Grown(candidate, samples)
        for start in range(0, len(path), together):
            models = path[start : start + together]
            expected = torch.stack([candidate.logits(counts)[samples] for counts in models])
            torch.testing.assert_close(grown.advance(models), expected, rtol=1e-4, atol=1e-4)


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
    slow, candidate = make_candidate(make_network((7,)), 0, 1, exact=True)
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


def test_a_scan_of_few_thetas_finds_the_highest_of_them_that_passes() -> None:
    activities = [float(value) for value in range(40, 0, -1)]
    candidate = by_hand(activities, [0.0] * 20 + [1.0] * 20)
    assert scan(candidate, 0, 100, "global-of-5").theta == (10.0,)  # of 40, 30, 20, 10 and 0


@pytest.mark.parametrize("rule", ["global-of-4", "per_layer-of-4"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_scan_of_few_thetas_stays_inside_the_margin(network: str, rule: str) -> None:
    slow, candidate = make_candidate(NETWORKS[network], 1, 3, exact=True)
    min_correct = slow.at([0.0] * slow.depth)[0] - 15
    record, whole = (scan(candidate, 0, min_correct, each) for each in (rule, rule.partition("-")[0]))
    assert record.theta is not None
    assert (record.val_correct, record.active) == slow.at(record.theta)
    assert record.val_correct >= min_correct
    assert sum(record.active) >= sum(whole.active)


def test_each_layers_curve_holds_its_chosen_theta_and_the_next_activity_above_it() -> None:
    slow, candidate = make_candidate(make_network((6, 5)), 0, 2, exact=False)
    min_correct = slow.at([0.0, 0.0])[0] - 10
    record = scan(candidate, 0, min_correct, "per_layer")
    assert record.theta is not None
    assert len(record.layer_curves) == 2
    for layer, curve in enumerate(record.layer_curves):
        thetas = [step.theta[layer] for step in curve]
        above = [value for value in slow.activities(layer) if value > record.theta[layer]]
        assert record.theta[layer] in thetas
        assert not above or min(above) in thetas


def test_a_global_scan_has_empty_layer_curves() -> None:
    record = scan(by_hand([2.0, 1.0], [1.0, 1.0]), 0, 1)
    assert not any(record.layer_curves)


def test_sparsity_counts_units_and_weights_of_earlier_tasks_as_used() -> None:
    architecture = make_network((5, 4))
    slow, candidate = make_candidate(architecture, 1, 0, exact=True)
    record = scan(candidate, 0, 0)
    active = [len(slow.state.active()[group]) for group in slow.groups]
    assert record.active == tuple(active)
    assert record.totals == (5, 4)
    assert record.unit_sparsity == pytest.approx(1 - sum(active) / 9)
    assert record.weight_sparsity == pytest.approx(1 - (3 * active[0] + active[0] * active[1]) / (3 * 5 + 5 * 4))


@pytest.mark.parametrize("head", ["multi", "single"])
@pytest.mark.parametrize("rule", ["global", "per_layer"])
def test_a_scan_on_a_full_network_is_its_one_model(rule: str, head: str) -> None:
    architecture = make_network((4, 4), head=head)
    full = make_state(architecture, 1, theta=-1.0)
    trained = make_trained(full)
    inputs, labels = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(20, dtype=torch.int64)
    record = scan(Candidate(full, trained, inputs, labels), 0, 0, rule)
    assert record.theta == (0.0, 0.0)
    assert record.active == (4, 4)


@pytest.mark.parametrize("rule", ["global", "per_layer"])
def test_a_scan_with_one_full_layer_agrees_with_the_twin(rule: str) -> None:
    state = make_state(make_network((4, 5)), 1, exact=True)
    state = fill_group(state, "hidden0")
    trained = make_trained(state, exact=True)
    inputs = torch.randint(-4, 5, (50, 3), generator=torch.Generator().manual_seed(0)) / 4
    labels = torch.zeros(50, dtype=torch.int64)
    slow = Slow(state, trained, inputs, labels)
    min_correct = slow.at([0.0, 0.0])[0]
    record = scan(Candidate(state, trained, inputs, labels), 0, min_correct, rule)
    if rule == "global":
        assert record.theta == slow.highest(min_correct)
    else:
        assert sum(record.active) == slow.fewest_raised(min_correct)


def test_a_scan_leaves_the_trained_point_as_it_was() -> None:
    slow, candidate = make_candidate(make_network((6, 5)), 1, 0, exact=False)
    before = slow.trained.to_bytes()
    scan(candidate, 0, 0, "per_layer")
    assert slow.trained.to_bytes() == before
