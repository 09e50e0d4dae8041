"""What a commit freezes, cuts and refuses, and what a state file keeps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from builders import (
    GRAPHS,
    HEADS,
    commit_at,
    fill_group,
    make_info,
    make_network,
    make_samples,
    make_state,
    make_trained,
)
from torch import Tensor

from clnp_search.clnp.state import FREE, Architecture, FreeParameters, State, commit
from clnp_search.clnp.subnetwork import Subnetwork

DEEP = make_network((5, 6, 5))
NETWORKS = {name: Architecture(graph) for name, graph in GRAPHS.items()}


def ones(state: State, activities: list[list[float]], head_bias: Tensor | None = None) -> FreeParameters:
    """A trained point of two classes in which every parameter is one."""
    trained = make_trained(state)
    tensors = {
        node: {name: torch.ones_like(tensor) for name, tensor in own.items()} for node, own in trained.tensors.items()
    }
    if head_bias is not None:
        tensors["head"]["bias"] = head_bias
    values = (torch.tensor(each, dtype=torch.float64) for each in activities)
    return FreeParameters(trained.units, tensors, dict(zip(state.graph.groups, values, strict=True)))


def two_tasks(head: str = "multi", head_bias: str = "frozen") -> State:
    """Layers of four units: task 0 owns units 0 and 2, then unit 1; task 1 owns unit 1, then units 0 and 3."""
    state = State.empty(make_network((4, 4), in_features=2, head=head, head_bias=head_bias))
    bias = None if head_bias == "none" else torch.tensor([1.0, 2.0])
    first = ones(state, [[0.5, 0.1, 0.9, 0.0], [0.2, 0.3, 0.0, 0.0]], bias)
    state = commit(state, make_info(shape=2), first, {"hidden0": 0.1, "hidden1": 0.2})
    bias = None if head_bias == "none" else torch.tensor([3.0, 4.0])
    second = ones(state, [[0.7, 0.1], [0.2, 0.1, 0.2]], bias)
    return commit_at(state, second, 0.1)


def matrix(state: State, node: str, name: str = "weight") -> list[list[float]]:
    """A dense layer's weights, or a node's other values."""
    tensor = state.tensors[node][name]
    result: list[list[float]] = (tensor[:, :, 0] if name == "weight" else tensor).tolist()
    return result


def with_value(state: State, node: str, name: str, place: tuple[int, ...], value: float) -> State:
    tensor = state.tensors[node][name].clone()
    tensor[place] = value
    return replace(state, tensors={**state.tensors, node: {**state.tensors[node], name: tensor}})


def next_float(value: float) -> float:
    """The float32 whose last bit differs."""
    bits = torch.tensor([value]).view(torch.int32) ^ 1
    return bits.view(torch.float32).item()


def owners(state: State) -> Iterator[tuple[str, str, tuple[int, ...], str]]:
    """Each value of a hidden node as (node, name, place, kind), by the design's definition."""
    born = {group: values.tolist() for group, values in state.born.items()}
    born["input"] = [-1] * state.graph.input_shape[0]
    for name, own in state.tensors.items():
        node = state.graph.by_name[name]
        rows, columns = (
            [owner for group in each.groups for owner in born[group]] for each in (node, state.graph.source(node))
        )
        for parameter, tensor in own.items():
            for place in itertools.product(*map(range, tensor.shape)):
                row, reads = rows[place[0]], parameter == "weight" and tensor.ndim == 3
                if row == FREE:
                    kind = "free"
                elif reads and columns[place[1]] > row:
                    kind = "interference"
                else:
                    kind = "active"
                yield name, parameter, place, kind


# The partition


def test_theta_at_a_units_own_activity_prunes_it() -> None:
    state = State.empty(make_network((4,), in_features=2))
    activity = 0.1 + 0.2  # not representable in float32
    after = commit_at(state, ones(state, [[activity, activity + 1e-12, 0.0, 1.0]]), activity)
    assert after.active(0)["hidden0"].tolist() == [1, 3]


def test_a_unit_that_is_never_active_is_pruned_at_theta_zero() -> None:
    state = State.empty(make_network((2,), in_features=2))
    after = commit_at(state, ones(state, [[0.0, 1e-300]]), 0.0)
    assert after.born["hidden0"].tolist() == [FREE, 0]


def test_each_group_has_its_own_theta() -> None:
    state = State.empty(make_network((2, 2), in_features=2))
    trained = ones(state, [[0.2, 0.4], [0.2, 0.4]])
    after = commit(state, make_info(shape=2), trained, {"hidden0": 0.3, "hidden1": 0.1})
    assert [after.active(0)[group].tolist() for group in after.born] == [[1], [0, 1]]


def test_units_remember_the_task_that_froze_them() -> None:
    assert [born.tolist() for born in two_tasks().born.values()] == [[0, 1, 0, FREE], [1, 0, FREE, 1]]


@pytest.mark.parametrize("network", NETWORKS)
def test_active_and_free_units_are_all_units_once(network: str) -> None:
    state = make_state(NETWORKS[network], 3)
    for group, units in state.graph.groups.items():
        both = torch.cat([state.active()[group], state.free[group]])
        assert sorted(both.tolist()) == list(range(units))


def test_active_units_of_an_earlier_task_exclude_later_ones() -> None:
    assert [two_tasks().active(task)["hidden0"].tolist() for task in (0, 1)] == [[0, 2], [0, 1, 2]]


@pytest.mark.parametrize("head", ["multi", "single"])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_three_masks_partition_every_value_and_only_active_ones_are_kept(network: str, head: str) -> None:
    state = make_state(replace(NETWORKS[network], head=head), 2)
    seen = {"active": 0, "free": 0, "interference": 0}
    for node, name, place, kind in owners(state):
        seen[kind] += 1
        # Random normal parameters: a kept value is never zero.
        assert (state.tensors[node][name][place].item() != 0) == (kind == "active")
    assert all(seen.values())
    assert sum(seen.values()) == sum(tensor.numel() for own in state.tensors.values() for tensor in own.values())


def test_rows_of_new_units_keep_only_columns_of_units_active_at_that_commit() -> None:
    assert matrix(two_tasks(), "hidden1") == [[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]]


def test_the_first_layer_keeps_all_inputs_of_active_units_and_none_of_free_ones() -> None:
    assert matrix(two_tasks(), "hidden0") == [[1, 1], [1, 1], [1, 1], [0, 0]]


def test_biases_of_free_units_are_zero() -> None:
    assert [matrix(two_tasks(), f"hidden{layer}", "bias") for layer in (0, 1)] == [[1, 1, 1, 0], [1, 1, 0, 1]]


def test_columns_of_trained_rows_are_frozen_units_then_free_ones() -> None:
    state = two_tasks()
    trained = ones(state, [[1.0], [1.0]])
    # The free unit of layer 1 reads units 0, 1, 2 (frozen) and 3 (free) of layer 0.
    trained.tensors["hidden1"]["weight.shared"][0, :, 0] = torch.tensor([5.0, 6.0, 7.0])
    trained.tensors["hidden1"]["weight.own"][0, 0, 0] = 8.0
    assert matrix(commit_at(state, trained, 0.0), "hidden1")[2] == [5, 6, 7, 8]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_later_commit_leaves_frozen_values_bit_identical(network: str) -> None:
    states = [make_state(NETWORKS[network], num_tasks) for num_tasks in (1, 2, 3)]
    for before, after in itertools.pairwise(states):
        for name, own in before.tensors.items():
            node = before.graph.by_name[name]
            rows = before.graph.index(node.groups, before.active())
            for each, tensor in own.items():
                assert torch.equal(tensor[rows], after.tensors[name][each][rows])
        for group, born in before.born.items():
            rows = before.active()[group]
            assert torch.equal(born[rows], after.born[group][rows])


@pytest.mark.parametrize("network", NETWORKS)
def test_a_commit_does_not_touch_the_state_before_it(network: str) -> None:
    before = make_state(NETWORKS[network], 1)
    digest = before._header(), before.to_bytes()
    commit_at(before, make_trained(before), 0.0)
    assert (before._header(), before.to_bytes()) == digest


# The head


def head_columns(state: State) -> list[list[list[float]]]:
    return [head["weight"][:, :, 0].tolist() for head in state.heads]


def test_multi_head_reads_all_units_active_at_its_commit() -> None:
    assert head_columns(two_tasks("multi")) == [[[0, 1, 0, 0]] * 2, [[1, 1, 0, 1]] * 2]


def test_single_head_is_one_matrix_with_columns_of_committed_units_only() -> None:
    assert head_columns(two_tasks("single")) == [[[1, 1, 0, 1]] * 2] * 2


def test_single_head_task_sees_only_the_units_that_it_grew() -> None:
    state = two_tasks("single")
    assert [state.visible(task)["hidden1"].tolist() for task in (0, 1)] == [[1], [0, 3]]


def test_multi_head_task_sees_the_units_of_earlier_tasks_too() -> None:
    state = two_tasks("multi")
    assert [state.visible(task)["hidden1"].tolist() for task in (0, 1)] == [[1], [0, 1, 3]]


@pytest.mark.parametrize("network", NETWORKS)
def test_single_head_columns_of_earlier_tasks_stay_bit_identical(network: str) -> None:
    architecture = replace(NETWORKS[network], head="single")
    before, after = make_state(architecture, 2), make_state(architecture, 3)
    graph = before.graph
    columns = graph.index(graph.source(graph.by_name[graph.head]).groups, before.active())
    assert torch.equal(before.heads[0]["weight"][:, columns], after.heads[0]["weight"][:, columns])


@pytest.mark.parametrize(
    ("rule", "biases"),
    [("frozen", [[1, 2], [1, 2]]), ("per_task", [[1, 2], [3, 4]]), ("none", [None, None])],
)
def test_single_head_bias_rule(rule: str, biases: list[list[float] | None]) -> None:
    state = two_tasks("single", rule)
    assert [head["bias"].tolist() if "bias" in head else None for head in state.heads] == biases


def test_multi_head_has_a_bias_of_its_own_for_each_task() -> None:
    assert [head["bias"].tolist() for head in two_tasks("multi").heads] == [[1, 2], [3, 4]]


def test_a_graph_whose_head_has_no_bias_has_none_whatever_the_rule() -> None:
    graph = GRAPHS["mlp"]
    nodes = (*graph.nodes[:-1], replace(graph.nodes[-1], op=replace(graph.nodes[-1].op, bias=False)))
    for head, bias in HEADS:
        state = make_state(Architecture(replace(graph, nodes=nodes), head, bias), 2)
        assert ["bias" in each for each in state.heads] == [False, False]


def test_multi_heads_may_differ_in_classes() -> None:
    state = State.empty(make_network((4,)))
    for num_classes in (2, 5):
        state = commit_at(state, make_trained(state, num_classes), 0.5, num_classes=num_classes)
    assert [len(head["weight"]) for head in state.heads] == [2, 5]


# Capacity


@pytest.mark.parametrize(("head", "bias"), HEADS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_full_network_still_commits_a_task(network: str, head: str, bias: str) -> None:
    full = make_state(replace(NETWORKS[network], head=head, head_bias=bias), 1, theta=-1.0)
    after = commit_at(full, make_trained(full), 0.0)
    assert after.num_tasks == 2
    assert after.faults() == []
    assert not any(born.any() for born in after.born.values())


@pytest.mark.parametrize("network", NETWORKS)
def test_a_task_that_keeps_no_unit_is_committed(network: str) -> None:
    state = State.empty(NETWORKS[network])
    after = commit_at(state, make_trained(state), 2.0)
    assert after.faults() == []
    assert all((born == FREE).all() for born in after.born.values())


def test_a_state_of_views_reads_back() -> None:
    def views(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.stack([tensor, tensor], -1)[..., 0] for name, tensor in tensors.items()}

    state = make_state(DEEP, 2)
    viewed = replace(state, born=views(state.born), heads=tuple(map(views, state.heads)))
    assert State.from_bytes(viewed.to_bytes()).digest == viewed.digest == state.digest


@pytest.mark.parametrize("head", ["multi", "single"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_wider_network_keeps_every_tasks_digest_and_logits(network: str, head: str) -> None:
    state = make_state(replace(NETWORKS[network], head=head), 2)
    group = next(iter(state.graph.groups))
    for names in ([group], list(state.graph.groups)):
        wide = state.widened({name: state.graph.groups[name] + 3 for name in names})
        assert wide.faults() == []
        assert [len(wide.free[name]) - len(state.free[name]) for name in names] == [3] * len(names)
        raw, _ = make_samples(10, state.graph.input_shape)
        for task in range(2):
            old, new = Subnetwork(state, task), Subnetwork(wide, task)
            assert new.digest == old.digest
            assert torch.equal(new(raw), old(raw))
        later = commit_at(wide, make_trained(wide, seed=7), 0.5)
        assert later.faults() == []
        for task in range(2):
            assert Subnetwork(later, task).digest == Subnetwork(state, task).digest
        assert State.from_bytes(wide.to_bytes()).digest == wide.digest


def test_a_state_that_is_not_widened_is_the_same() -> None:
    state = make_state(NETWORKS["residual"], 2)
    assert state.widened({}).digest == state.digest


# Faults


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "part",
    ["stem/weight.shared", "one/weight.own", "deep.norm/scale", "two.norm/variance", "head/weight.own", "head/bias"],
)
def test_a_parameter_that_is_not_finite_is_never_committed(part: str, value: float) -> None:
    state = State.empty(NETWORKS["residual"])
    trained = make_trained(state)
    node, name = part.split("/")
    trained.tensors[node][name].view(-1)[0] = value
    with pytest.raises(ValueError, match=r"task 0 cannot be committed.*not finite"):
        commit_at(state, trained, -1.0)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_free_unit_that_is_not_finite_reaches_no_committed_task(network: str) -> None:
    state = make_state(NETWORKS[network], 1)
    group = next(iter(state.graph.groups))
    trained = make_trained(state)
    trained.activities[group][1] = 0.0
    for name, own in trained.tensors.items():
        node = state.graph.by_name[name]
        for tensor in own.values() if node.groups == (group,) else ():
            tensor[1] = float("inf")
        if state.graph.source(node).groups[:1] == (group,) and "weight.own" in own:
            own["weight.own"][:, 1] = float("nan")
    after = commit_at(state, trained, 0.0)
    assert all(tensor.isfinite().all() for own in after.tensors.values() for tensor in own.values())


@pytest.mark.parametrize(("head", "bias"), HEADS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_committed_state_has_no_faults(network: str, head: str, bias: str) -> None:
    assert make_state(replace(NETWORKS[network], head=head, head_bias=bias), 3).faults() == []


@pytest.mark.parametrize("network", NETWORKS)
def test_faults_find_any_single_value_that_was_cut(network: str) -> None:
    state = make_state(NETWORKS[network], 2)
    # One value of each node, parameter and kind in the larger networks; all in the small one.
    places = list(owners(state))
    if network != "mlp":
        places = list({(node, name, kind): (node, name, place, kind) for node, name, place, kind in places}.values())
    for node, name, place, kind in places:
        changed = with_value(state, node, name, place, 1e-30)
        named = [fault for fault in changed.faults() if fault.startswith(f"{node}.{name}: what was cut")]
        assert len(named) == (kind != "active")


@pytest.mark.parametrize("head", ["multi", "single"])
def test_faults_find_any_head_column_of_a_unit_that_is_not_read(head: str) -> None:
    state = two_tasks(head)
    readers = [{1}, {0, 1, 3}] if head == "multi" else [{0, 1, 3}] * 2
    for task, read in enumerate(readers):
        for column in range(4):
            weight = state.heads[task]["weight"].clone()
            weight[1, column] = 2.0
            heads = list(state.heads)
            heads[task] = {**heads[task], "weight": weight}
            assert len(replace(state, heads=tuple(heads)).faults()) == (column not in read)


@pytest.mark.parametrize("part", ["hidden0.weight", "hidden0.bias"])
def test_faults_find_a_parameter_that_is_not_finite(part: str) -> None:
    state = two_tasks()
    node, name = part.split(".")
    state.tensors[node][name][0] = float("nan")
    assert state.faults() == [f"{part}: a value is not finite"]


# Digests


def test_the_digest_changes_with_one_bit_of_any_frozen_value() -> None:
    state = make_state(NETWORKS["conv_norm"], 2)
    digests = {state.digest}
    active = [place[:3] for place in owners(state) if place[3] == "active"][::7]
    for node, name, place in active:
        value = state.tensors[node][name][place].item()
        digests.add(with_value(state, node, name, place, next_float(value)).digest)
    assert len(digests) == len(active) + 1


def test_the_digest_changes_with_a_mask_a_head_or_an_input_transform() -> None:
    state = make_state(DEEP, 2)
    head, info = state.heads[0], state.tasks[1]
    permutation = info.transform.permutation
    assert permutation is not None
    transforms = [replace(info.transform, std=(2.0,)), replace(info.transform, permutation=permutation.roll(1))]
    changed = [
        fill_group(state, "hidden0"),
        replace(state, heads=({**head, "weight": head["weight"] * 2}, *state.heads[1:])),
        *(replace(state, tasks=(state.tasks[0], replace(info, transform=each))) for each in transforms),
    ]
    assert len({state.digest, *(each.digest for each in changed)}) == 5


def test_the_digest_covers_all_states_before() -> None:
    state = make_state(DEEP, 2)
    assert state.parent == make_state(DEEP, 1).digest
    assert replace(state, parent="").digest != state.digest


def test_empty_states_of_different_architectures_have_different_digests() -> None:
    variants = [
        *NETWORKS.values(),
        DEEP,
        make_network((5, 6, 5), "tanh"),
        replace(DEEP, head="single"),
        make_network((5, 6, 5), in_features=4),
    ]
    assert len({State.empty(architecture).digest for architecture in variants}) == len(variants)


# Files


def test_a_state_file_keeps_the_order_of_groups_in_which_thetas_and_counts_are_written() -> None:
    state = make_state(NETWORKS["residual"], 1)
    read = State.from_bytes(state.to_bytes())
    assert list(read.born) == list(read.graph.groups) == list(state.graph.groups) != sorted(state.graph.groups)


@pytest.mark.parametrize("num_tasks", [0, 1, 3])
@pytest.mark.parametrize(("head", "bias"), HEADS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_state_reads_back_as_it_was_written(network: str, head: str, bias: str, num_tasks: int) -> None:
    state = make_state(replace(NETWORKS[network], head=head, head_bias=bias), num_tasks)
    data = state.to_bytes()
    again = State.from_bytes(data)
    assert again.digest == state.digest
    assert again.architecture == state.architecture
    assert again.to_bytes() == data


@pytest.mark.parametrize("theta", [0.6, -1.0])
@pytest.mark.parametrize(("head", "bias"), HEADS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_trained_point_reads_back_as_it_was_written(network: str, head: str, bias: str, theta: float) -> None:
    state = make_state(replace(NETWORKS[network], head=head, head_bias=bias), 1, theta)
    trained = make_trained(state, samples=make_samples(3, state.graph.input_shape)[0])
    again = FreeParameters.from_bytes(trained.to_bytes())
    assert again.units.keys() == trained.units.keys()
    assert again.tensors.keys() == trained.tensors.keys()
    assert again.means.keys() == trained.means.keys()
    pairs = [
        *((trained.units[group], again.units[group]) for group in trained.units),
        *((trained.activities[group], again.activities[group]) for group in trained.units),
        *((mean, again.means[name]) for name, mean in trained.means.items()),
        *((tensor, again.tensors[node][name]) for node, own in trained.tensors.items() for name, tensor in own.items()),
    ]
    assert all(left.dtype == right.dtype and torch.equal(left, right) for left, right in pairs)


def test_a_trained_point_of_a_full_network_has_no_rows() -> None:
    full = make_state(make_network((4,), head="single", head_bias="none"), 1, theta=-1.0)
    again = FreeParameters.from_bytes(make_trained(full).to_bytes())
    assert again.tensors["hidden0"]["weight.shared"].shape == (0, 3, 1)
    assert "bias" not in again.tensors["head"]


def damaged(data: bytes) -> Iterator[bytes]:
    """The file cut short, with bytes of its header changed, and with bits flipped anywhere."""
    yield from (data[:length] for length in (0, 1, 7, 8, 9, len(data) // 2, len(data) - 1))
    yield b"not a tensor file" * 10
    header = 8 + int.from_bytes(data[:8], "little")
    step = max(1, header // 300)
    positions = [*range(0, header, step), *range(header, len(data), max(1, (len(data) - header) // 200))]
    for position in positions:
        for mask in (1, 16):
            yield data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_damaged_state_raises_value_error_or_reads_as_another_state(network: str) -> None:
    state = make_state(NETWORKS[network], 2)
    refused = 0
    for data in damaged(state.to_bytes()):
        try:
            assert State.from_bytes(data).digest != state.digest
        except ValueError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("network", NETWORKS)
def test_a_damaged_point_raises_nothing_but_value_error(network: str) -> None:
    for data in damaged(make_trained(State.empty(NETWORKS[network])).to_bytes()):
        with suppress(ValueError):
            FreeParameters.from_bytes(data)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_state_file_that_was_cut_short_raises_value_error(length: int) -> None:
    with pytest.raises(ValueError, match="not a state file"):
        State.from_bytes(make_state(DEEP, 1).to_bytes()[:length])


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_point_file_that_was_cut_short_raises_value_error(length: int) -> None:
    with pytest.raises(ValueError, match="not a trained point"):
        FreeParameters.from_bytes(make_trained(State.empty(DEEP)).to_bytes()[:length])


def test_a_state_file_of_another_format_names_both_formats() -> None:
    data = make_state(DEEP, 1).to_bytes().replace(b"clnp-state-2", b"clnp-state-9")
    with pytest.raises(ValueError, match=r"clnp-state-9.*clnp-state-2"):
        State.from_bytes(data)


def test_a_trained_point_is_no_state() -> None:
    with pytest.raises(ValueError, match="not a state file"):
        State.from_bytes(make_trained(State.empty(DEEP)).to_bytes())


@pytest.mark.parametrize("head", ["multi", "single"])
def test_a_state_is_no_trained_point(head: str) -> None:
    with pytest.raises(ValueError, match="not a trained point"):
        FreeParameters.from_bytes(make_state(replace(DEEP, head=head), 1).to_bytes())
