"""What a commit freezes, cuts and refuses, and what a state file keeps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from builders import HEADS, make_info, make_state, make_trained
from torch import Tensor

from clnp_search.clnp.state import FREE, Architecture, FreeParameters, Head, Layer, State, commit

DEEP = Architecture(3, (5, 6, 5))


def ones(state: State, activities: list[list[float]], head_bias: Tensor | None = None) -> FreeParameters:
    """A trained point of two classes in which every parameter is one."""
    trained = make_trained(state)
    return FreeParameters(
        tuple(torch.ones_like(weight) for weight in trained.weights),
        tuple(torch.ones_like(bias) for bias in trained.biases),
        torch.ones_like(trained.head_weight),
        head_bias,
        tuple(torch.tensor(values, dtype=torch.float64) for values in activities),
    )


def two_tasks(head: str = "multi", head_bias: str = "frozen") -> State:
    """Layers of four units: task 0 owns units 0 and 2, then unit 1; task 1 owns unit 1, then units 0 and 3."""
    state = State.empty(Architecture(2, (4, 4), head=head, head_bias=head_bias))
    bias = None if head_bias == "none" else torch.tensor([1.0, 2.0])
    first = ones(state, [[0.5, 0.1, 0.9, 0.0], [0.2, 0.3, 0.0, 0.0]], bias)
    state = commit(state, make_info(in_features=2), first, (0.1, 0.2))
    bias = None if head_bias == "none" else torch.tensor([3.0, 4.0])
    second = ones(state, [[0.7, 0.1], [0.2, 0.1, 0.2]], bias)
    return commit(state, make_info(in_features=2), second, (0.1, 0.1))


def with_weight(state: State, layer: int, row: int, column: int, value: float) -> State:
    weight = state.layers[layer].weight.clone()
    weight[row, column] = value
    layers = list(state.layers)
    layers[layer] = replace(layers[layer], weight=weight)
    return replace(state, layers=tuple(layers))


def next_float(value: float) -> float:
    """The float32 whose last bit differs."""
    bits = torch.tensor([value]).view(torch.int32) ^ 1
    return bits.view(torch.float32).item()


def weight_owners(state: State) -> Iterator[tuple[int, int, int, str]]:
    """Each hidden weight as (layer, row, column, kind), by the design's definition."""
    for index, layer in enumerate(state.layers):
        below = [0] * layer.weight.shape[1] if index == 0 else state.layers[index - 1].born.tolist()
        for row, born in enumerate(layer.born.tolist()):
            for column, owner in enumerate(below):
                if born == FREE:
                    kind = "free"
                elif owner == FREE or owner > born:
                    kind = "interference"
                else:
                    kind = "active"
                yield index, row, column, kind


# The partition


def test_theta_at_a_units_own_activity_prunes_it() -> None:
    state = State.empty(Architecture(2, (4,)))
    activity = 0.1 + 0.2  # not representable in float32
    trained = ones(state, [[activity, activity + 1e-12, 0.0, 1.0]], torch.zeros(2))
    after = commit(state, make_info(in_features=2), trained, (activity,))
    assert after.layers[0].active(0).tolist() == [1, 3]


def test_a_unit_that_is_never_active_is_pruned_at_theta_zero() -> None:
    state = State.empty(Architecture(2, (2,)))
    after = commit(state, make_info(in_features=2), ones(state, [[0.0, 1e-300]], torch.zeros(2)), (0.0,))
    assert after.layers[0].born.tolist() == [FREE, 0]


def test_each_layer_has_its_own_theta() -> None:
    state = State.empty(Architecture(2, (2, 2)))
    trained = ones(state, [[0.2, 0.4], [0.2, 0.4]], torch.zeros(2))
    after = commit(state, make_info(in_features=2), trained, (0.3, 0.1))
    assert [layer.active(0).tolist() for layer in after.layers] == [[1], [0, 1]]


def test_units_remember_the_task_that_froze_them() -> None:
    state = two_tasks()
    assert [layer.born.tolist() for layer in state.layers] == [[0, 1, 0, FREE], [1, 0, FREE, 1]]


def test_active_and_free_units_are_all_units_once() -> None:
    for layer in make_state(DEEP, 3).layers:
        units = torch.cat([layer.active(2), layer.free])
        assert sorted(units.tolist()) == list(range(len(layer.born)))


def test_active_units_of_an_earlier_task_exclude_later_ones() -> None:
    assert [two_tasks().layers[0].active(task).tolist() for task in (0, 1)] == [[0, 2], [0, 1, 2]]


@pytest.mark.parametrize("head", ["multi", "single"])
def test_the_three_masks_partition_every_weight_and_only_active_weights_are_kept(head: str) -> None:
    state = make_state(replace(DEEP, head=head), 3)
    seen = {"active": 0, "free": 0, "interference": 0}
    for layer, row, column, kind in weight_owners(state):
        seen[kind] += 1
        # Random normal parameters: a kept weight is never zero.
        assert (state.layers[layer].weight[row, column].item() != 0) == (kind == "active")
    assert all(seen.values())
    assert sum(seen.values()) == sum(layer.weight.numel() for layer in state.layers)


def test_rows_of_new_units_keep_only_columns_of_units_active_at_that_commit() -> None:
    expected = [[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]]
    assert two_tasks().layers[1].weight.tolist() == expected


def test_the_first_layer_keeps_all_inputs_of_active_units_and_none_of_free_ones() -> None:
    assert two_tasks().layers[0].weight.tolist() == [[1, 1], [1, 1], [1, 1], [0, 0]]


def test_biases_of_free_units_are_zero() -> None:
    assert [layer.bias.tolist() for layer in two_tasks().layers] == [[1, 1, 1, 0], [1, 1, 0, 1]]


def test_columns_of_trained_rows_are_frozen_units_then_free_ones() -> None:
    state = two_tasks()
    trained = ones(state, [[1.0], [1.0]], torch.zeros(2))
    # The free unit of layer 1 reads units 0, 1, 2 (frozen) and 3 (free) of layer 0.
    trained = replace(trained, weights=(trained.weights[0], torch.tensor([[5.0, 6.0, 7.0, 8.0]])))
    after = commit(state, make_info(in_features=2), trained, (0.0, 0.0))
    assert after.layers[1].weight[2].tolist() == [5, 6, 7, 8]


def test_a_later_commit_leaves_frozen_rows_bit_identical() -> None:
    states = [make_state(DEEP, num_tasks) for num_tasks in (1, 2, 3)]
    for before, after in itertools.pairwise(states):
        for old, new in zip(before.layers, after.layers, strict=True):
            rows = old.active(before.num_tasks)
            assert torch.equal(old.weight[rows], new.weight[rows])
            assert torch.equal(old.bias[rows], new.bias[rows])
            assert torch.equal(old.born[rows], new.born[rows])


def test_a_commit_does_not_touch_the_state_before_it() -> None:
    before = make_state(DEEP, 1)
    digest = before.digest
    commit(before, make_info(), make_trained(before), (0.0, 0.0, 0.0))
    assert before.digest == digest


# The head


def test_multi_head_reads_all_units_active_at_its_commit() -> None:
    state = two_tasks("multi")
    assert [head.weight.tolist() for head in state.heads] == [[[0, 1, 0, 0]] * 2, [[1, 1, 0, 1]] * 2]


def test_single_head_is_one_matrix_with_columns_of_committed_units_only() -> None:
    state = two_tasks("single")
    assert [head.weight.tolist() for head in state.heads] == [[[1, 1, 0, 1]] * 2] * 2


def test_single_head_task_sees_only_the_units_that_it_grew() -> None:
    state = two_tasks("single")
    assert [state.visible(task).tolist() for task in (0, 1)] == [[1], [0, 3]]


def test_multi_head_task_sees_the_units_of_earlier_tasks_too() -> None:
    state = two_tasks("multi")
    assert [state.visible(task).tolist() for task in (0, 1)] == [[1], [0, 1, 3]]


def test_single_head_columns_of_earlier_tasks_stay_bit_identical() -> None:
    architecture = replace(DEEP, head="single")
    before, after = make_state(architecture, 2), make_state(architecture, 3)
    columns = before.layers[-1].active(1)
    assert torch.equal(before.heads[0].weight[:, columns], after.heads[0].weight[:, columns])


@pytest.mark.parametrize(
    ("rule", "biases"),
    [("frozen", [[1, 2], [1, 2]]), ("per_task", [[1, 2], [3, 4]]), ("none", [None, None])],
)
def test_single_head_bias_rule(rule: str, biases: list[list[float] | None]) -> None:
    state = two_tasks("single", rule)
    assert [None if head.bias is None else head.bias.tolist() for head in state.heads] == biases


def test_multi_head_has_a_bias_of_its_own_for_each_task() -> None:
    state = two_tasks("multi")
    assert [head.bias.tolist() for head in state.heads if head.bias is not None] == [[1, 2], [3, 4]]


def test_multi_heads_may_differ_in_classes() -> None:
    state = State.empty(Architecture(3, (4,)))
    for num_classes in (2, 5):
        state = commit(state, make_info(num_classes=num_classes), make_trained(state, num_classes), (0.5,))
    assert [len(head.weight) for head in state.heads] == [2, 5]


# Capacity


@pytest.mark.parametrize(("head", "bias"), HEADS)
def test_a_full_network_still_commits_a_task(head: str, bias: str) -> None:
    architecture = Architecture(3, (4, 4), head=head, head_bias=bias)
    full = make_state(architecture, 1, theta=-1.0)
    after = commit(full, make_info(), make_trained(full), (0.0, 0.0))
    assert after.num_tasks == 2
    assert after.faults() == []
    assert [layer.born.tolist() for layer in after.layers] == [[0] * 4] * 2


def test_a_task_that_keeps_no_unit_is_committed() -> None:
    state = State.empty(DEEP)
    after = commit(state, make_info(), make_trained(state), (2.0, 2.0, 2.0))
    assert after.faults() == []
    assert all((layer.born == FREE).all() for layer in after.layers)


# Faults


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["weight", "bias", "head_weight", "head_bias"])
def test_a_parameter_that_is_not_finite_is_never_committed(part: str, value: float) -> None:
    state = State.empty(Architecture(3, (4, 4)))
    trained = make_trained(state)
    parts = {
        "weight": trained.weights[1],
        "bias": trained.biases[0],
        "head_weight": trained.head_weight,
        "head_bias": trained.head_bias,
    }
    tensor = parts[part]
    assert tensor is not None
    tensor.view(-1)[0] = value
    with pytest.raises(ValueError, match=r"task 0 cannot be committed.*not finite"):
        commit(state, make_info(), trained, (-1.0, -1.0))


def test_a_free_unit_that_is_not_finite_reaches_no_committed_task() -> None:
    state = State.empty(Architecture(3, (4, 4)))
    trained = make_trained(state)
    trained.weights[0][1] = float("inf")
    trained.weights[1][:, 1] = float("nan")
    trained.activities[0][1] = 0.0
    after = commit(state, make_info(), trained, (0.0, 0.0))
    assert all(layer.weight.isfinite().all() for layer in after.layers)


@pytest.mark.parametrize(("head", "bias"), HEADS)
def test_a_committed_state_has_no_faults(head: str, bias: str) -> None:
    assert make_state(replace(DEEP, head=head, head_bias=bias), 3).faults() == []


def test_faults_find_any_single_weight_that_was_cut() -> None:
    state = make_state(DEEP, 3)
    for layer, row, column, kind in weight_owners(state):
        changed = with_weight(state, layer, row, column, 1e-30)
        named = [fault for fault in changed.faults() if fault.startswith(f"hidden{layer}: a weight that was cut")]
        assert len(named) == (kind != "active")


def test_faults_find_the_bias_of_a_free_unit() -> None:
    state = two_tasks()
    state.layers[1].bias[2] = 1.0
    assert len(state.faults()) == 1


@pytest.mark.parametrize("head", ["multi", "single"])
def test_faults_find_any_head_column_of_a_unit_that_is_not_read(head: str) -> None:
    state = two_tasks(head)
    readers = [{1}, {0, 1, 3}] if head == "multi" else [{0, 1, 3}] * 2
    for task, read in enumerate(readers):
        for column in range(4):
            weight = state.heads[task].weight.clone()
            weight[1, column] = 2.0
            heads = list(state.heads)
            heads[task] = Head(weight, heads[task].bias)
            assert len(replace(state, heads=tuple(heads)).faults()) == (column not in read)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_faults_find_a_parameter_that_is_not_finite(part: str) -> None:
    state = two_tasks()
    getattr(state.layers[0], part)[0] = float("nan")
    assert state.faults() == ["hidden0: a parameter is not finite"]


# Digests


def test_the_digest_changes_with_one_bit_of_any_frozen_weight() -> None:
    state = make_state(DEEP, 2)
    digests = {state.digest}
    active = [place[:3] for place in weight_owners(state) if place[3] == "active"]
    for layer, row, column in active:
        value = state.layers[layer].weight[row, column].item()
        digests.add(with_weight(state, layer, row, column, next_float(value)).digest)
    assert len(digests) == len(active) + 1


def test_the_digest_changes_with_a_mask_a_head_or_an_input_transform() -> None:
    state = make_state(DEEP, 2)
    layer, head, info = state.layers[0], state.heads[0], state.tasks[1]
    born = torch.where(layer.born == 0, 1, layer.born)
    permutation = info.transform.permutation
    assert permutation is not None
    transforms = [replace(info.transform, std=(2.0,)), replace(info.transform, permutation=permutation.roll(1))]
    changed = [
        replace(state, layers=(Layer(layer.weight, layer.bias, born), *state.layers[1:])),
        replace(state, heads=(Head(head.weight * 2, head.bias), *state.heads[1:])),
        *(replace(state, tasks=(state.tasks[0], replace(info, transform=each))) for each in transforms),
    ]
    assert len({state.digest, *(each.digest for each in changed)}) == 5


def test_the_digest_covers_all_states_before() -> None:
    state = make_state(DEEP, 2)
    assert state.parent == make_state(DEEP, 1).digest
    assert replace(state, parent="").digest != state.digest


def test_empty_states_of_different_architectures_have_different_digests() -> None:
    variants = [DEEP, replace(DEEP, activation="tanh"), replace(DEEP, head="single"), replace(DEEP, in_features=4)]
    assert len({State.empty(architecture).digest for architecture in variants}) == 4


# Files


@pytest.mark.parametrize("num_tasks", [0, 1, 3])
@pytest.mark.parametrize(("head", "bias"), HEADS)
def test_a_state_reads_back_as_it_was_written(head: str, bias: str, num_tasks: int) -> None:
    state = make_state(replace(DEEP, head=head, head_bias=bias), num_tasks)
    data = state.to_bytes()
    again = State.from_bytes(data)
    assert again.digest == state.digest
    assert again.architecture == state.architecture
    assert again.to_bytes() == data


def test_a_trained_point_reads_back_as_it_was_written() -> None:
    trained = make_trained(make_state(DEEP, 1))
    again = FreeParameters.from_bytes(trained.to_bytes())
    assert trained.head_bias is not None
    assert again.head_bias is not None
    pairs = [
        *zip(trained.weights, again.weights, strict=True),
        *zip(trained.biases, again.biases, strict=True),
        *zip(trained.activities, again.activities, strict=True),
        (trained.head_weight, again.head_weight),
        (trained.head_bias, again.head_bias),
    ]
    assert all(left.dtype == right.dtype and torch.equal(left, right) for left, right in pairs)


def test_a_trained_point_of_a_full_network_reads_back() -> None:
    full = make_state(Architecture(3, (4,), head="single", head_bias="none"), 1, theta=-1.0)
    again = FreeParameters.from_bytes(make_trained(full).to_bytes())
    assert again.weights[0].shape == (0, 3)
    assert again.head_bias is None


def damaged(data: bytes) -> Iterator[bytes]:
    """The file cut short, and with each byte of its header changed."""
    yield from (data[:length] for length in (0, 1, 7, 8, 9, len(data) // 2, len(data) - 1))
    yield b"not a tensor file" * 10
    for position in range(8 + int.from_bytes(data[:8], "little")):
        for mask in (1, 16):
            yield data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :]


def test_a_damaged_state_header_raises_value_error_or_reads_as_another_state() -> None:
    state = make_state(Architecture(2, (2, 2)), 2)
    for data in damaged(state.to_bytes()):
        try:
            assert State.from_bytes(data).digest != state.digest
        except ValueError:
            continue


def test_a_damaged_point_header_raises_nothing_but_value_error() -> None:
    for data in damaged(make_trained(State.empty(Architecture(2, (2, 2)))).to_bytes()):
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
    data = make_state(DEEP, 1).to_bytes().replace(b"clnp-state-1", b"clnp-state-9")
    with pytest.raises(ValueError, match=r"clnp-state-9.*clnp-state-1"):
        State.from_bytes(data)


def test_a_trained_point_is_no_state() -> None:
    with pytest.raises(ValueError, match="not a state file"):
        State.from_bytes(make_trained(State.empty(DEEP)).to_bytes())


@pytest.mark.parametrize("head", ["multi", "single"])
def test_a_state_is_no_trained_point(head: str) -> None:
    with pytest.raises(ValueError, match="not a trained point"):
        FreeParameters.from_bytes(make_state(replace(DEEP, head=head), 1).to_bytes())
