"""Each op: plain as torch's own module, packed as several plain ones side by side, random where it is to be."""

from __future__ import annotations

import pytest
import torch
from builders import OPS_USED, each_point, make_pack, make_samples, make_state, using
from torch import Tensor, nn
from torch.nn import functional

from clnp_search.clnp.graph import INPUT, Builder, Graph, mlp
from clnp_search.clnp.ops import (
    OPS,
    Activation,
    AdaptivePool,
    Add,
    AvgPool,
    BatchNorm,
    Conv,
    Depthwise,
    Dropout,
    InstanceNorm,
    Linear,
    MaxPool,
    MeanPositions,
    Op,
    PRelu,
    Subtract,
    largest_of_windows,
)
from clnp_search.clnp.pack import Pack
from clnp_search.clnp.state import Architecture, State

MAP = torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def test_every_op_is_among_those_that_are_tested() -> None:
    assert {type(op) for op in OPS_USED} == set(OPS.values())


@pytest.mark.parametrize(
    ("op", "module"),
    [
        (Linear(), nn.Linear(4, 3)),
        (Linear(bias=False), nn.Linear(4, 3, bias=False)),
        (Conv(padding=(1, 1)), nn.Conv2d(4, 3, 3, padding=1)),
        (Conv(True, (3, 2), (2, 1), (1, 0), (2, 1)), nn.Conv2d(4, 3, (3, 2), (2, 1), (1, 0), (2, 1))),
        (Depthwise(stride=(2, 2)), nn.Conv2d(4, 4, 3, 2, groups=4)),
        (BatchNorm(), nn.BatchNorm2d(4)),
        (BatchNorm(affine=False, momentum=0.3, epsilon=0.1), nn.BatchNorm2d(4, 0.1, 0.3, affine=False)),
        (InstanceNorm(), nn.InstanceNorm2d(4, affine=True)),
        (InstanceNorm(affine=False, epsilon=0.1), nn.GroupNorm(4, 4, 0.1, affine=False)),
        (PRelu(), nn.PReLU(4)),
        (MaxPool((3, 3), (2, 2), (1, 1)), nn.MaxPool2d(3, 2, 1)),
        (AvgPool((3, 3), (2, 2), (1, 1), count_padding=False), nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
        (AdaptivePool((2, 3)), nn.AdaptiveAvgPool2d((2, 3))),
        (AdaptivePool((2, 3), maximum=True), nn.AdaptiveMaxPool2d((2, 3))),
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [False, True])
def test_the_plain_form_is_torchs_module(op: Op, module: nn.Module, training: bool) -> None:
    names = {"weight": "weight", "bias": "bias", "running_mean": "mean", "running_var": "variance"}
    if isinstance(op, BatchNorm | InstanceNorm):
        names |= {"weight": "scale", "bias": "shift"}
    elif isinstance(op, PRelu):
        names = {"weight": "slope"}
    inputs = MAP[..., 0, 0] if isinstance(op, Linear) else MAP
    shapes = op.shapes(3 if isinstance(op, Linear | Conv) else 4, 4, 1)
    own = {names[name]: tensor for name, tensor in module.state_dict().items() if name in names}
    tensors = {name: own[name].detach().clone().reshape(shape) for name, shape in shapes.items()}
    expected = module.train(training)(inputs)
    torch.testing.assert_close(op.plain([inputs], tensors, training), expected)
    for name, tensor in module.state_dict().items():
        if name in names and names[name] in op.STATISTICS:
            torch.testing.assert_close(tensors[names[name]], tensor)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 5), (7, 9)])
def test_the_largest_of_windows_that_overlap_or_not_is_torchs_and_so_is_its_gradient(size: tuple[int, int]) -> None:
    ends = []
    for pool in (largest_of_windows, functional.adaptive_max_pool2d):
        value = MAP.clone().requires_grad_()
        out = pool(value, size)
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()
        ends.append((out, value.grad))
    torch.testing.assert_close(*ends)


# Points that are computed together draw zeros of their own.
@pytest.mark.parametrize("op", [op for op in OPS_USED if not isinstance(op, Dropout)], ids=str)
def test_points_side_by_side_compute_what_each_computes_alone(op: Op) -> None:
    graph = using(op)
    state = make_state(Architecture(graph), 1)
    inputs, labels = make_samples(12, graph.input_shape)
    alphas = [(0.01 * point,) * len(graph.layers) for point in range(3)]
    packs = [make_pack(state, alphas, seed=1, together=together) for together in (3, 1)]
    for pack in packs:
        _move_apart(pack)
        pack.train_batch(pack.features(inputs, labels), torch.arange(12))
    assert [len(pack.blocks) for pack in packs] == [1, 3]
    for side_by_side, alone in zip(*map(each_point, packs), strict=True):
        for one, other in zip(side_by_side, alone, strict=True):
            torch.testing.assert_close(one, other)
            assert one.grad is not None
            assert other.grad is not None
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
    logits = [_logits(pack, inputs) for pack in packs]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    assert not torch.equal(logits[0][0], logits[0][1])


def _move_apart(pack: Pack) -> None:
    """Gives each point other parameters, the same whoever it is computed with."""
    for position, tensors in enumerate(each_point(pack)):
        generator = torch.Generator().manual_seed(position)
        for tensor in tensors:
            tensor.data.add_(0.3 * torch.randn(tensor.shape, generator=generator))


def _logits(pack: Pack, inputs: Tensor) -> Tensor:
    """[P, C, N]."""
    levels, _ = pack.features(inputs, torch.zeros(len(inputs), dtype=torch.int64)).batch(slice(None))
    with torch.no_grad():
        return torch.cat([block.logits(block.forward(levels)) for block in pack.blocks])


# What is overwritten


def _joined(*inputs_of_sum: str) -> Graph:
    """Two convolutions, their rectified first one, and a sum of what is named."""
    build = Builder((2, 6, 6))
    first = build.layer("first", Conv(padding=(1, 1)), INPUT, 4)
    build.add("relu", Activation(), first)
    build.layer("second", Conv(padding=(1, 1)), "relu", 4)
    build.add("norm", BatchNorm(), "second")
    build.add("sum", Add(), *inputs_of_sum)
    build.layer("head", Linear(), build.add("mean", MeanPositions(), "sum"), 0, head=True)
    return build.build()


@pytest.mark.parametrize(
    ("inputs", "overwritten"),
    [
        (("norm", "relu"), {"relu": 0, "sum": 0}),
        (("relu", "norm"), {"relu": 0, "sum": 1}),
        (("norm", "norm"), {"relu": 0}),
    ],
)
def test_a_sum_overwrites_what_nothing_else_reads(inputs: tuple[str, ...], overwritten: dict[str, int]) -> None:
    assert _joined(*inputs).in_place == overwritten


@pytest.mark.parametrize("op", [Add(), Subtract()], ids=str)
@pytest.mark.parametrize("index", [0, 1])
def test_what_is_overwritten_is_the_same_and_the_other_value_stays(op: Op, index: int) -> None:
    values = [MAP, MAP.flip(0)]
    given = [value.clone() for value in values]
    assert torch.equal(op.overwriting(given, index), op.plain(values, {}))
    assert torch.equal(given[index], op.plain(values, {}))
    assert torch.equal(given[1 - index], values[1 - index])


def test_a_value_that_two_nodes_read_is_not_overwritten() -> None:
    assert _joined("first", "norm").in_place == {"sum": 1}


def test_a_batch_of_one_sample_leaves_the_parameters_as_they_are() -> None:
    graph = mlp(64, (6, 5))
    pack = make_pack(State.empty(Architecture(graph)), 3)
    _move_apart(pack)
    inputs, _ = make_samples(9, graph.input_shape)
    whole, before = _logits(pack, inputs), [tensor.clone() for point in each_point(pack) for tensor in point]
    alone = [_logits(pack, inputs[sample : sample + 1]) for sample in range(9)]
    torch.testing.assert_close(torch.cat(alone, dim=2), whole)
    assert all(map(torch.equal, before, [tensor for point in each_point(pack) for tensor in point]))


def test_a_layer_that_reads_no_unit_trains_its_bias() -> None:
    build = Builder((3,))
    first = build.add("one.relu", Activation(), build.layer("one", Linear(), INPUT, 2))
    second = build.add("two.relu", Activation(), build.layer("two", Linear(), first, 4))
    build.layer("head", Linear(), second, 0, head=True)
    state = State.empty(Architecture(build.build()))
    activities = {"one": torch.zeros(2, dtype=torch.float64), "two": torch.ones(4, dtype=torch.float64)}
    start = make_pack(state, 1).point(0, activities).pruned(state.graph, {"one": 0.0, "two": 0.0})
    pack = Pack(state, 2, [(0.0,) * 3], [start])
    bias = pack.blocks[0].tensors["two"]["bias"]
    bias.data.fill_(1.0)
    pack.train_batch(pack.features(*make_samples(9)), torch.arange(9))
    assert bias.grad is not None
    assert bool(bias.grad.any())


# What is random


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_zeroes_its_share_and_keeps_the_mean(share: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    value = torch.ones(50, 20, 10, 10, dtype=dtype).contiguous(memory_format=torch.channels_last)
    dropped = Dropout(share).plain([value], {"mask": Dropout(share).mask(value)}, training=True)
    assert dropped.stride() == value.stride()
    assert (dropped == 0).float().mean().item() == pytest.approx(share, abs=0.005)
    if share < 1:
        torch.testing.assert_close(dropped[dropped != 0], torch.full_like(dropped[dropped != 0], 1 / (1 - share)))


@pytest.mark.parametrize(("unit", "kept_together"), [("channel", (2, 3)), ("sample", (1, 2, 3))])
def test_dropout_of_a_unit_takes_all_of_its_values(unit: str, kept_together: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    zero = Dropout(0.5, unit).mask(torch.ones(100, 8, 3, 3)).expand(100, 8, 3, 3) == 0
    assert torch.equal(zero.any(kept_together), zero.all(kept_together))
    assert 0.3 < zero.float().mean().item() < 0.7


def test_dropout_without_a_mask_does_nothing() -> None:
    assert Dropout().plain([MAP], {}) is Dropout().packed([MAP], {}, 2, training=False) is MAP


@pytest.mark.parametrize("shape", [(100, 8, 3, 3), (100, 8)])
@pytest.mark.parametrize("unit", ["value", "channel", "sample"])
def test_points_that_are_computed_together_drop_the_same(unit: str, shape: tuple[int, ...]) -> None:
    value = torch.ones(shape)
    op, tensors = Dropout(0.5, unit), {"mask": Dropout(0.5, unit).mask(value)}
    alone = op.plain([value], tensors)
    side_by_side = torch.cat([value, value], 1)
    packed = op.packed([side_by_side if value.ndim == 4 else side_by_side.T], tensors, 2, training=True)
    assert torch.equal(packed if value.ndim == 4 else packed.T, torch.cat([alone, alone], 1))
    dropped = alone == 0
    assert 0.3 < dropped.float().mean().item() < 0.7
    assert unit != "sample" or torch.equal(dropped.flatten(1).any(1), dropped.flatten(1).all(1))
