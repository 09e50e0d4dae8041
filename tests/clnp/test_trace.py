"""Modules as graphs: each op by a small module, what is refused and why, and torchvision's networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_pruning
import torchvision
from builders import commit_at, make_state
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from clnp_search.clnp.graph import INPUT, Graph, run
from clnp_search.clnp.ops import ACTIVATIONS, Activation
from clnp_search.clnp.pack import Pack
from clnp_search.clnp.state import Architecture, State
from clnp_search.clnp.subnetwork import Subnetwork
from clnp_search.clnp.trace import NetworkRefused, Refused, Traced, trace

MAPS = (3, 8, 8)


class Forward(nn.Module):
    """Layers by name, and a forward of them."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.call = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


def around(middle: Callable[[Any, Tensor], Tensor], channels: int = 4, **layers: nn.Module | nn.Parameter) -> Forward:
    """A network with something between its first convolution (of 4 channels) and its head."""

    def forward(net: Any, x: Tensor) -> Tensor:
        return net.head(torch.flatten(net.pool(middle(net, net.first(x))), 1))

    head = nn.Linear(channels * 4, 5)
    return Forward(forward, first=nn.Conv2d(3, 4, 3), pool=nn.AdaptiveAvgPool2d(2), head=head, **layers)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """A module with random parameters and statistics, none of which is like another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return module


def assert_same(module: nn.Module, input_shape: tuple[int, ...] = MAPS, traced: Traced | None = None) -> Graph:
    """The graph of a module, which computes what the module does, and is the same when it is read back."""
    traced = traced or trace(randomised(module), input_shape)
    example = torch.randn(3, *input_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = run(traced.graph, {INPUT: example}, traced.tensors(module))[traced.graph.nodes[-1].name]
        torch.testing.assert_close(ours, module.eval()(example.clone()), rtol=1e-5, atol=1e-5)
    assert Graph.from_json(traced.graph.to_json()) == traced.graph
    return traced.graph


def reasons(module: nn.Module, input_shape: tuple[int, ...] = MAPS) -> list[Refused]:
    """Why a module is refused."""
    with pytest.raises(NetworkRefused) as caught:
        trace(module, input_shape)
    return list(caught.value.refused)


def reason(module: nn.Module, input_shape: tuple[int, ...] = MAPS) -> tuple[str, str]:
    """The one reason why a module is refused, with its place."""
    (found,) = reasons(module, input_shape)
    return found.module, found.reason


# Ops


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, stride=2, padding=1, dilation=2),
        nn.Conv2d(4, 4, (1, 3), padding="same", bias=False),
        nn.Conv2d(4, 4, 2, padding="valid"),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 4, 3, padding=(1, 0), groups=4, bias=False),
        nn.Conv2d(4, 4, 3, 2, groups=2, bias=False),
        nn.BatchNorm2d(4, eps=1e-3),
        nn.BatchNorm2d(4, affine=False),
        nn.InstanceNorm2d(4, eps=1e-3),
        nn.InstanceNorm2d(4, affine=True),
        nn.GroupNorm(4, 4),
        nn.PReLU(4),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.MaxPool2d(2, 1, dilation=2),
        nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.AvgPool2d((2, 1)),
        nn.AdaptiveAvgPool2d((None, 2)),
        nn.AdaptiveMaxPool2d(3),
        nn.ZeroPad2d((1, 0, 2, 1)),
        nn.ConstantPad2d(1, 0.0),
        nn.Dropout(0.3),
        nn.Dropout2d(0.3),
        nn.Identity(),
        nn.Sequential(),
        torchvision.ops.SqueezeExcitation(4, 2),
        torchvision.ops.StochasticDepth(0.5, "row"),
        torchvision.ops.Conv2dNormActivation(4, 4),
    ],
    ids=repr,
)
def test_a_layer_computes_what_it_did(layer: nn.Module) -> None:
    assert_same(around(lambda net, x: net.layer(x), layer=layer))


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_an_activation_computes_what_it_did_as_a_layer_and_as_a_function(name: str) -> None:
    kind = next(getattr(nn, each) for each in dir(nn) if each.lower() == name.replace("_", ""))
    arguments = (0.1, 0.5) if name == "threshold" else ()
    assert_same(around(lambda net, x: net.layer(x), layer=kind(*arguments)))
    graph = assert_same(around(lambda net, x: getattr(F, name)(x, *arguments)))
    assert Activation(name, graph.nodes[1].op.arguments) == graph.nodes[1].op  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "layer",
    [nn.LeakyReLU(0.3), nn.ELU(0.5), nn.GELU("tanh"), nn.Hardtanh(-0.2, 0.4), nn.Softplus(2, 3), nn.Hardshrink(0.1)],
    ids=repr,
)
def test_an_activation_keeps_its_settings(layer: nn.Module) -> None:
    assert_same(around(lambda net, x: net.layer(x), layer=layer))


FORWARDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "functions": lambda net, x: F.max_pool2d(F.relu(torch.sigmoid(x)), 2),
    "methods": lambda net, x: x.relu().tanh().clamp(-0.5, 0.2),
    "functional settings": lambda net, x: F.avg_pool2d(F.leaky_relu(x, 0.3, True), kernel_size=2, stride=1),
    "pool to a size": lambda net, x: F.avg_pool2d(x, x.size()[2:]),
    "residual": lambda net, x: x + net.layer(x),
    "residual in place": lambda net, x: net.layer(x).add_(x),
    "sum": lambda net, x: sum([x, net.layer(x)]),
    "dense": lambda net, x: net.wide(torch.cat([x, net.layer(x)], 1)),
    "by itself": lambda net, x: x * x + x,
    "numbers": lambda net, x: -(1 - 2 * x) / 3 + 0.5,
    "hand-written swish": lambda net, x: x * F.relu6(x + 3) / 6,
    "gate of flat values": lambda net, x: x * torch.sigmoid(net.linear(x.mean((2, 3))))[:, :, None, None],
    "gate by view and expand": lambda net, x: (
        x * torch.sigmoid(net.linear(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1))).view(-1, 4, 1, 1).expand_as(x)
    ),
    "gate of a mean that keeps dimensions": lambda net, x: x * torch.sigmoid(x.mean([2, 3], keepdim=True)),
    "mean over a view": lambda net, x: x * x.flatten(2).mean(-1).unsqueeze(-1).unsqueeze(-1),
    "changes in place": lambda net, x: x.add_(1) * 0 + F.relu(x, inplace=True) + x,
    "padding": lambda net, x: F.pad(F.pad(x, [1, 1]), (0, 0, 1, -1), mode="constant", value=0),
    "difference": lambda net, x: net.layer(x) - x,
    "difference in place": lambda net, x: net.layer(x).sub_(x),
    "mean of rows, then of columns": lambda net, x: x * x.mean(3).mean(2)[:, :, None, None],
    "mean of columns, then of rows": lambda net, x: (
        x * x.mean(2, keepdim=True).mean(3, keepdim=True) + x.mean(2).mean(2)[..., None, None]
    ),
    "gate of the largest": lambda net, x: x * torch.sigmoid(net.linear(x.amax((2, 3))))[:, :, None, None],
    "largest of a view": lambda net, x: x * x.flatten(2).amax(-1)[:, :, None, None],
    "clamp on one side": lambda net, x: x.clamp(max=0.3).clamp_min(-0.2),
    "precision": lambda net, x: x.float().to(torch.float32).to(x.device),
    "hand-written mish": lambda net, x: x * torch.tanh(F.softplus(x, 1)),
    "looks at sizes": lambda net, x: looks_at_sizes(x),
    "sizes in numpy": lambda net, x: x.view(len(x), -1, int(np.prod(x.shape[2:]))).view(x.shape),
    "another name before a change in place": lambda net, x: (lambda same: F.relu_(x) + same)(net.same(x)),
    "edges cut off": lambda net, x: net.layer(x)[:, :, 1:-1, 2:] + x[..., 1:-1, :-2],
    "rows cut off": lambda net, x: x[:, :, 1:],
    "layers made on the way": lambda net, x: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))(x),
    "there and back": lambda net, x: x.flatten(2).reshape(x.shape).contiguous().clone(),
}


def looks_at_sizes(x: Tensor) -> Tensor:
    assert x.ndim == x.dim() == x.ndimension() == 4
    assert x.nelement() == x.numel() > len(x)
    batch, channels, *rest = x.shape
    positions = 1
    for size in x.size()[2:]:
        positions *= size
    return x.view(batch, channels, positions).view(-1, channels, *rest) if x.size(-1) > 2 else -x


@pytest.mark.parametrize("name", FORWARDS)
def test_a_forward_computes_what_it_did(name: str) -> None:
    layers = {"layer": nn.Conv2d(4, 4, 1), "wide": nn.Conv2d(8, 4, 1), "linear": nn.Linear(4, 4), "same": nn.Identity()}
    assert_same(around(FORWARDS[name], **layers))


def test_a_layer_with_a_forward_of_its_own_is_that_layer() -> None:
    class Padded(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (0, 1, 0, 1)))

    graph = assert_same(around(lambda net, x: net.conv(x), conv=Padded(4, 4, 2, bias=False)))
    assert graph.groups == {"first": 4, "conv": 4}
    place, why = reason(around(lambda net, x: net.conv(net.conv(x)), conv=Padded(4, 4, 2)))
    assert (place, "is called twice" in why) == ("conv", True)


def test_a_clamp_on_one_side_is_computed_in_every_precision() -> None:
    _, high, low, *_ = trace(around(lambda net, x: x.clamp(max=0.5).clamp_min(-0.5)), MAPS).graph.nodes
    value = torch.tensor([-1e30, 0.25, 1e30], dtype=torch.bfloat16)
    assert low.op.plain([high.op.plain([value], {})], {}).tolist() == [-0.5, 0.25, 0.5]


def test_flat_values_are_traced_too() -> None:
    layers = [nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6), nn.PReLU(6), nn.Dropout(), nn.Linear(6, 4, bias=False)]
    assert_same(nn.Sequential(*layers), (12,))
    graph = assert_same(nn.Sequential(*layers), (1, 3, 4))
    assert graph.shapes(graph.by_name["1"]) == {"weight": (6, 1, 12), "bias": (6,)}


@pytest.mark.parametrize(
    "end",
    [
        lambda net, x: F.log_softmax(x, dim=1),
        lambda net, x: x.log_softmax(-1),
        lambda net, x: net.log_softmax(x),
    ],
)
def test_a_log_softmax_at_the_end_is_left_out(end: Callable[[Any, Tensor], Tensor]) -> None:
    layers = {"body": nn.Linear(6, 5), "head": nn.Linear(5, 3), "log_softmax": nn.LogSoftmax(1)}
    module = randomised(Forward(lambda net, x: end(net, net.head(F.relu(net.body(x)))), **layers))
    traced, example = trace(module, (6,)), torch.randn(4, 6)
    assert traced.graph.nodes[-1].name == "head"
    logits = run(traced.graph, {INPUT: example}, traced.tensors(module))["head"]
    torch.testing.assert_close(logits.log_softmax(1), module(example))


def test_a_layer_behind_a_flatten_reads_each_units_positions() -> None:
    graph = assert_same(around(lambda net, x: x))
    assert graph.shapes(graph.by_name["head"], classes=5)["weight"] == (5, 4, 4)


def test_a_convolution_can_be_the_head() -> None:
    graph = assert_same(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.AvgPool2d(6), nn.Flatten()))
    assert graph.head == "1"
    assert graph.groups == {"0": 4}


def test_what_the_logits_do_not_depend_on_is_left_out() -> None:
    def middle(net: Any, x: Tensor) -> Tensor:
        F.softmax(net.layer(x), 1)
        return x

    graph = assert_same(around(middle, layer=nn.Conv2d(4, 4, 1)))
    assert "layer" not in graph.by_name


def test_what_meets_in_a_sum_is_one_group_named_by_its_first_writer() -> None:
    graph = assert_same(around(lambda net, x: x + net.layer(x), layer=nn.Conv2d(4, 4, 1)))
    assert graph.groups == {"first": 4}


def test_nodes_have_the_modules_names_and_each_call_its_own() -> None:
    block = Forward(lambda net, x: net.relu(net.relu(x) + x), relu=nn.ReLU())
    graph = assert_same(around(lambda net, x: net.layer1(x) + x, layer1=nn.Sequential(block)))
    names = ["first", "layer1.0.relu", "layer1.0.add", "layer1.0.relu_1", "add", "pool", "flatten", "head"]
    assert [node.name for node in graph.nodes] == names


@pytest.mark.parametrize("name", ["input", "classes", "born", "heads", "memory"])
@pytest.mark.parametrize("head", ["single", "multi"])
def test_a_module_named_like_what_a_state_holds_keeps_its_tensors(name: str, head: str) -> None:
    layers = {name: nn.Linear(6, 4), "head": nn.Linear(4, 5)}
    graph = assert_same(Forward(lambda net, x: net.head(F.relu(getattr(net, name)(x))), **layers), (6,))
    state = make_state(Architecture(graph, head), 2)
    read, digest = State.from_bytes(state.to_bytes()), Subnetwork(state, 0).digest
    assert (read.digest, Subnetwork(read, 0).digest) == (state.digest, digest)


def test_arguments_with_defaults_keep_them() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, features: bool = False, mask: Tensor | None = None) -> Tensor:
            return x if features or mask is not None else self.head(self.layer(x))

    assert_same(Optional(), (6,))


def test_a_module_comes_back_as_it_was() -> None:
    module = around(lambda net, x: net.norm(net.drop(x)), norm=nn.BatchNorm2d(4), drop=nn.Dropout())
    module.drop.eval()  # type: ignore[operator]
    before, state = {name: each.training for name, each in module.named_modules()}, torch.get_rng_state()
    tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trace(module, MAPS)
    assert {name: each.training for name, each in module.named_modules()} == before
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_tensors_are_those_of_the_module_that_is_given() -> None:
    module, other = (randomised(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), seed) for seed in (0, 1))
    tensors = trace(module, (3,)).tensors(other)["1"]
    assert torch.equal(tensors["weight"][:, :, 0], other[1].weight)  # type: ignore[index]
    tensors["weight"].zero_()
    assert other[1].weight.any()  # type: ignore[index]


def test_a_forward_may_change_what_it_is_given() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        return net.head(net.layer(x.sub_(0.5).div_(0.25)))

    assert_same(Forward(forward, layer=nn.Linear(6, 4), head=nn.Linear(4, 3)), (6,))


def test_numpys_names_of_arguments_are_known() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        x = net.first(x)
        gated = x * x.mean((2, 3), keepdims=True)
        return net.head(torch.cat([gated, x], axis=1).mean(axis=(2, 3)))

    assert_same(Forward(forward, first=nn.Conv2d(3, 4, 3), head=nn.Linear(8, 5)))


# Refused


def test_a_change_in_place_behind_a_dropout_that_evaluation_leaves_out_is_refused() -> None:
    dropped = around(lambda net, x: (lambda other: F.relu(other, inplace=True) + x)(net.drop(x)), drop=nn.Dropout())
    assert "computes something else" in reason(dropped)[1]


@pytest.mark.parametrize("hidden", ["", "other", "head"])
def test_a_value_that_is_changed_in_place_after_it_was_kept_is_refused_also_where_zeros_hide_it(hidden: str) -> None:
    def forward(net: Any, x: Tensor) -> Any:
        x = net.layer(x)
        kept = x
        x += net.other(x)
        return net.head(x.relu() + kept)

    network = randomised(Forward(forward, layer=nn.Linear(6, 4), other=nn.Linear(4, 4), head=nn.Linear(4, 3)))
    for parameter in network.get_submodule(hidden).parameters() if hidden else ():
        nn.init.zeros_(parameter)
    before = copy.deepcopy(network.state_dict())
    assert "computes something else" in reason(network, (6,))[1]
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("middle", [lambda net, x: x / len(x), lambda net, x: x if x.size(0) == 2 else -x])
def test_a_forward_that_goes_by_the_number_of_samples_is_refused(middle: Callable[[Any, Tensor], Tensor]) -> None:
    assert "computes something else" in reason(around(middle))[1]


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.Dropout()], ids=repr)
def test_layers_that_the_module_keeps_in_evaluation_are_refused(layer: nn.Module) -> None:
    class Held(Forward):
        def train(self, mode: bool = True) -> Held:
            super().train(mode)
            self.layer.eval()
            return self

    layers = {"first": nn.Conv2d(3, 4, 3), "layer": layer, "head": nn.Linear(4, 5)}
    module = Held(lambda net, x: net.head(net.layer(net.first(x)).mean((2, 3))), **layers)
    assert reason(module) == ("layer", "stays in evaluation when its network trains")


def test_layers_that_the_module_holds_fixed_are_refused() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        return net.head(net.layer(net.body(x)))

    body = nn.Linear(6, 4).requires_grad_(False)
    found = reasons(Forward(forward, body=body, layer=nn.Linear(4, 4), head=nn.Linear(4, 3)), (6,))
    assert [each.module for each in found] == ["body.weight", "body.bias"]
    assert all("is not trained by the module" in each.reason for each in found)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_what_the_module_computes_without_gradients_is_refused(context: Any) -> None:
    def layer(net: Any, x: Tensor) -> Any:
        with context():
            x = net.body(x)
        return net.head(net.layer(x))

    def branch(net: Any, x: Tensor) -> Any:
        x = net.body(x)
        with context():
            gate = torch.sigmoid(x)
        return net.head(net.layer(x * gate))

    layers = {"body": nn.Linear(6, 4), "layer": nn.Linear(4, 4), "head": nn.Linear(4, 3)}
    for forward, place, label in ((layer, "body", "Linear"), (branch, "Forward", "sigmoid")):
        why = f"{label} is computed without gradients (no_grad), but would be trained here"
        assert reason(Forward(forward, **layers), (6,)) == (place, why)


def test_what_depends_on_no_parameter_needs_no_gradients() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        with torch.no_grad():
            x = F.avg_pool2d(x, 2)
        return net.head(net.first(x).mean((2, 3)))

    module = Forward(forward, first=nn.Conv2d(3, 4, 3), head=nn.Linear(4, 5))
    assert [node.name for node in trace(module, (3, 8, 8)).graph.nodes][1:2] == ["first"]


def test_a_head_with_a_logit_for_each_position_is_refused() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        return net.head(net.first(x)).flatten(1)

    place, why = reason(Forward(forward, first=nn.Conv2d(3, 4, 3), head=nn.Conv2d(4, 2, 3)))
    assert (place, "logits of each class" in why) == ("Forward", True)


def test_logits_of_several_heads_are_refused() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        x = F.relu(net.layer(x))
        return torch.cat([net.one(x), net.two(x)], 1)

    place, why = reason(Forward(forward, layer=nn.Linear(6, 4), one=nn.Linear(4, 2), two=nn.Linear(4, 2)), (6,))
    assert (place, "the head is one layer" in why) == ("Forward", True)


def test_a_network_that_is_spread_over_devices_is_refused() -> None:
    assert "give the network" in reason(nn.DataParallel(around(lambda net, x: x)))[1]


def test_groups_of_a_head_or_over_a_concatenation_are_refused() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.head(net.first(x)).mean((2, 3))

    place, why = reason(Forward(forward, first=nn.Conv2d(3, 4, 3), head=nn.Conv2d(4, 2, 3, groups=2)))
    assert (place, "has groups" in why) == ("head", True)
    joined = around(lambda net, x: net.both(torch.cat([x, x.relu()], 1)), both=nn.Conv2d(8, 4, 1, groups=2))
    place, why = reason(joined)
    assert (place, "has groups" in why) == ("both", True)


def test_a_network_without_a_unit_to_prune_is_refused() -> None:
    assert "no unit that could be pruned" in reason(nn.Linear(6, 3), (6,))[1]


@pytest.mark.parametrize(
    ("layer", "part"),
    [
        (nn.LayerNorm(6), "LayerNorm normalises each sample by itself"),
        (nn.GroupNorm(2, 4), "GroupNorm normalises each sample by itself"),
        (nn.LocalResponseNorm(2), "LocalResponseNorm normalises each sample by itself"),
        (nn.Softmax(1), "Softmax makes a unit's value from other units"),
        (nn.ChannelShuffle(2), "ChannelShuffle moves values between channels"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding_mode 'reflect'; allowed: zeros"),
        (nn.ConstantPad2d(1, 2.0), "ConstantPad2d with 2.0; allowed: zeros"),
        (nn.ReflectionPad2d(1), "ReflectionPad2d is none of the operations that are known"),
        (nn.InstanceNorm2d(4, track_running_stats=True), "with running statistics"),
        (nn.BatchNorm2d(4, track_running_stats=False), "without running statistics"),
        (nn.PReLU(), "use PReLU(4)"),
        (nn.Upsample(scale_factor=2), "Upsample is none of the operations that are known"),
        (parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), "computes its parameters from others"),
    ],
    ids=repr,
)
def test_a_layer_is_refused_by_its_name(layer: nn.Module, part: str) -> None:
    channels = getattr(layer, "out_channels", 4)
    place, text = reason(around(lambda net, x: net.block(x), channels, block=layer))
    assert place == "block"
    assert part in text


@pytest.mark.parametrize(
    ("forward", "part"),
    [
        (lambda net, x: F.softmax(x, 1), "softmax makes a unit's value from other units"),
        (lambda net, x: x.view(x.size(0), 2, 2, 6, 6).transpose(1, 2).reshape(x.shape), "view from [batch, 4, 6, 6]"),
        (lambda net, x: x.permute(0, 1, 3, 2), "permute moves values"),
        (lambda net, x: torch.cat(x.chunk(2, 1)[::-1], 1), "chunk takes channels apart"),
        (lambda net, x: torch.cat([*x.chunk(2, 1)], 1), "chunk takes channels apart"),
        (lambda net, x: x.double().float(), "double is none of the operations"),
        (lambda net, x: x.to(torch.float64).float(), "training.precision says"),
        (lambda net, x: x[:, [1, 0, 2, 3]], "getitem from"),
        (lambda net, x: x[:, :, ::2], "getitem from"),
        (lambda net, x: x * x.mean(1, keepdim=True), "mean of [batch, 4, 6, 6] over dimensions [1]"),
        (lambda net, x: x * x[:, :1].expand_as(x), "getitem from"),
        (lambda net, x: x * net.scale, "mul reads the tensor 'scale'"),
        (lambda net, x: F.conv2d(x, net.scale), "conv2d reads the tensor 'scale'"),
        (lambda net, x: x * x.max().item(), "item makes a number of the data"),
        (lambda net, x: x if x.sum() > 0 else -x, "control flow"),
        (lambda net, x: torch.stack([*x]), "cannot be followed"),
        (lambda net, x: F.pad(x, (1, 1, 1, 1), "reflect"), "pad with reflect; allowed: zeros"),
        (lambda net, x: F.pad(x, (0, 0, 0, 0, 1, -1)), "pad of channels"),
        (lambda net, x: F.dropout(x), "acts in evaluation too"),
        (lambda net, x: x / x, "of two tensors"),
        (lambda net, x: x**2, "pow is none of the operations"),
        (lambda net, x: torch.cat([x, x], 2), "allowed: 1, over channels"),
    ],
)
def test_a_forward_is_refused_by_what_it_does(forward: Callable[[Any, Tensor], Tensor], part: str) -> None:
    block = Forward(forward, scale=nn.Parameter(torch.ones(4, 4, 1, 1)))
    network = around(lambda net, x: net.block(x), block=block)
    if "scale" in part and "mul" in part:
        block.scale = nn.Parameter(torch.ones(4, 1, 1))
    place, text = reason(network)
    assert place == "block"
    assert part in text


def test_every_reason_is_given_at_once_and_what_follows_from_one_is_none() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.shuffle(net.first(x))
        x = net.norm(net.upsampled(net.second(x)))
        if x.sum() > 0:
            x = -x
        return net.head(torch.flatten(x, 1))

    layers = {
        "first": nn.Conv2d(3, 4, 1),
        "shuffle": nn.ChannelShuffle(2),
        "second": nn.Conv2d(4, 4, 1),
        "upsampled": nn.Upsample(scale_factor=2),
        "norm": nn.LayerNorm(16),
        "head": nn.Linear(1024, 2),
    }
    assert [each.module for each in reasons(Forward(forward, **layers))] == ["shuffle", "upsampled", "norm", "Forward"]


def test_control_flow_is_named_with_its_line() -> None:
    _, text = reason(around(lambda net, x: x if x.sum() > 0 else -x))
    assert "test_trace.py, line" in text


def test_layers_that_the_network_does_not_hold_are_refused() -> None:
    listed = [nn.Conv2d(4, 4, 1)]
    why = "calls a Conv2d that is no submodule, and so is not trained; keep layers in an nn.ModuleList"
    assert reason(around(lambda net, x: listed[0](x))) == ("Forward", why)


@pytest.mark.parametrize(
    ("middle", "part"),
    [
        (lambda net, x: x * x.flatten(2).max(2)[0][..., None, None], "x.amax((2, 3)) gives"),
        (lambda net, x: x[:, :, ::2], "units cannot be followed"),
        (lambda net, x: x[:, 1:], "units cannot be followed"),
    ],
)
def test_a_step_that_loses_track_of_units_is_refused_with_its_reason(middle: Any, part: str) -> None:
    assert any(part in each.reason for each in reasons(around(middle)))


def test_a_pyramid_of_flattened_maps_is_refused_with_their_sizes() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        x = net.first(x)
        return net.head(torch.cat([F.adaptive_avg_pool2d(x, 2).flatten(1), x.mean((2, 3))], 1))

    _, why = reason(Forward(forward, first=nn.Conv2d(3, 4, 3), head=nn.Linear(20, 2)))
    assert "joins flattened maps of 4, 1 values a channel" in why


def test_statistics_that_are_used_twice_are_refused() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        x = net.normal(net.first(x))
        return net.head(net.normal(net.second(x.relu())).relu().mean((2, 3)))

    layers = {"first": nn.Conv2d(3, 4, 3), "second": nn.Conv2d(4, 4, 3), "head": nn.Linear(4, 2)}
    place, why = reason(Forward(forward, normal=nn.BatchNorm2d(4, affine=False), **layers))
    assert (place, "is called twice" in why) == ("normal", True)


def test_a_layer_that_is_called_twice_is_refused() -> None:
    network = around(lambda net, x: net.layer(net.layer(x)), layer=nn.Conv2d(4, 4, 1))
    assert reason(network) == ("layer", "is called twice: its units would be frozen in one place and free in another")


def test_a_parameter_of_two_layers_is_refused() -> None:
    network = around(lambda net, x: net.one(net.two(x)), one=nn.Conv2d(4, 4, 1), two=nn.Conv2d(4, 4, 1))
    network.one.weight = network.two.weight
    assert reason(network) == ("one", "shares its weight with two")


def test_hooks_and_lazy_layers_are_refused() -> None:
    network = around(lambda net, x: net.layer(x), layer=nn.Conv2d(4, 4, 1))
    network.layer.register_forward_hook(lambda module, args, output: output * 2)  # type: ignore[operator, union-attr]
    assert reason(network) == ("layer", "has hooks, which can change what it computes, or how it is trained")
    network = around(lambda net, x: net.layer(x), layer=nn.Conv2d(4, 4, 1))
    network.layer.weight.register_hook(lambda grad: grad / 100)  # type: ignore[operator, union-attr]
    assert reason(network)[0] == "layer"
    network = around(lambda net, x: net.layer(x), layer=nn.Conv2d(4, 4, 1))
    network.layer.weight.register_post_accumulate_grad_hook(lambda weight: None)  # type: ignore[operator, union-attr]
    assert reason(network) == ("layer.weight", "has hooks, which can change how it is trained")
    network = around(lambda net, x: net.block(x), block=nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))
    network.block.register_full_backward_hook(lambda module, given, output: None)  # type: ignore[operator, union-attr]
    assert reason(network) == ("block", "has hooks, which can change how it is trained")
    place, text = reason(around(lambda net, x: net.layer(x), layer=nn.LazyConv2d(4, 1)))
    assert (place, "no shape yet" in text) == ("layer", True)


def renormed(net: Any, x: Tensor) -> Tensor:
    net.layer.weight.data = torch.renorm(net.layer.weight.data, 2, 0, 3.0)
    return net.layer(x)


def clamped(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.layer.weight.clamp_(-1.0, 1.0)
    return net.layer(x)


@pytest.mark.parametrize("forward", [renormed, clamped])
def test_a_forward_that_bounds_its_own_weights_is_refused_and_leaves_them(
    forward: Callable[[Any, Tensor], Tensor],
) -> None:
    network = around(forward, layer=nn.Conv2d(4, 4, 1))  # whose weights are too small to be bounded yet
    assert reason(network) == ("layer.weight", "is changed by the forward that reads it")


def test_operands_may_be_given_by_name() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return torch.sub(other=torch.add(x, other=net.one(x)), input=x.mul(other=net.two(x)))

    assert_same(around(forward, one=nn.Conv2d(4, 4, 1), two=nn.Conv2d(4, 4, 1)))


def test_units_that_meet_the_input_or_the_classes_are_refused() -> None:
    layer = nn.Conv2d(3, 3, 3, padding=1)
    meets_input = Forward(
        lambda net, x: net.head(torch.flatten(net.layer(x) + x, 1)), layer=layer, head=nn.Linear(192, 2)
    )
    assert "ties units to the input" in reason(meets_input)[1]
    two = Forward(lambda net, x: net.one(x) + net.two(x), one=nn.Linear(4, 4), two=nn.Linear(4, 4))
    assert "ties units to the classes" in reason(two, (4,))[1]


@pytest.mark.parametrize(
    ("module", "part"),
    [
        (nn.Flatten(), "has no linear layer"),
        (nn.Sequential(nn.Linear(6, 3), nn.LogSoftmax(0)), "logits are wanted as they are"),
        (nn.Sequential(nn.Linear(6, 3), nn.Softmax(1)), "logits are wanted as they are"),
        (nn.Sequential(nn.Linear(6, 3), nn.LogSoftmax(1), nn.ReLU()), "logits are wanted as they are"),
        (nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)), "has parameters after the head"),
        (nn.Sequential(nn.Linear(6, 12), nn.Unflatten(1, (3, 2, 2))), "gives values of shape [batch, 3, 2, 2]"),
        (Forward(lambda net, x: {"out": net.head(x)}, head=nn.Linear(6, 3)), "gives a dict"),
        (Forward(lambda net, x: (net.head(x), x), head=nn.Linear(6, 3)), "gives a tuple"),
        (nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)), "the samples' own"),
        (nn.Sequential(nn.Linear(5, 3)), "fails: RuntimeError"),
        (nn.Bilinear(6, 6, 3), "fails: TypeError"),
    ],
)
def test_what_gives_no_logits_is_refused(module: nn.Module, part: str) -> None:
    found = reasons(module, (6,))
    assert any(part in each.reason for each in found), found


# torchvision's networks


def yardstick(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """One of torchvision's classification networks, and a small input for it."""
    options: dict[str, Any] = {"googlenet": {"init_weights": False}, "vit_b_16": {"image_size": 32}}.get(name, {})
    size = 64 if name == "alexnet" or "squeezenet" in name else 32
    return torchvision.models.get_model(name, weights=None, num_classes=10, **options), (3, size, size)


TRACED = [
    "alexnet",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "squeezenet1_0",
    "squeezenet1_1",
    "vgg11",
    "vgg11_bn",
    "wide_resnet50_2",
]
REFUSED = {
    "convnext_tiny": {"features.0.1", "features.1.0.block.2"},
    "shufflenet_v2_x0_5": {"stage2.0", "stage4.3"},
    "swin_t": {"features.1.0.norm1", "features.1.0.attn"},
    "vit_b_16": {"encoder.layers.encoder_layer_0.ln_1", "encoder.layers.encoder_layer_11.self_attention"},
}


@pytest.mark.filterwarnings("ignore:.*weight initialization:FutureWarning")
@pytest.mark.parametrize("name", TRACED)
def test_a_network_of_torchvision_is_traced(name: str) -> None:
    module, input_shape = yardstick(name)
    for buffer_name, buffer in module.named_buffers():
        if buffer_name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.9)
    graph = assert_same(module, input_shape, trace(module, input_shape))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    auxiliary = sum(each.numel() for name, each in module.named_parameters() if name.startswith("aux"))
    assert sum(graph.parameters(10).values()) == parameters - auxiliary


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore:.*weight init:FutureWarning")
@pytest.mark.parametrize(
    "name", ["densenet121", "efficientnet_b0", "googlenet", "mobilenet_v3_small", "regnet_y_400mf", "resnet50"]
)
def test_groups_are_those_that_an_independent_library_finds(name: str) -> None:
    module, input_shape = yardstick(name)
    graph = trace(module, input_shape).graph
    ours: dict[tuple[str, ...], set[str]] = {}
    for layer in graph.layers:
        ours.setdefault(graph.by_name[layer].groups, set()).add(layer)
    dependencies = torch_pruning.DependencyGraph().build_dependency(module.eval(), torch.rand(1, *input_shape))
    names = {each: name for name, each in module.named_modules()}
    theirs = [
        {
            names[dependency.target.module]
            for dependency, _ in group
            if isinstance(dependency.target.module, nn.Conv2d | nn.Linear)
            and names[dependency.target.module] in graph.layers
            and dependency.handler.__name__ == "prune_out_channels"
        }
        for group in dependencies.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear])
    ]
    assert sorted(map(sorted, ours.values())) == sorted(sorted(group) for group in theirs if group)


@pytest.mark.parametrize("name", REFUSED)
def test_a_network_of_torchvision_is_refused_by_the_names_of_its_modules(name: str) -> None:
    module, input_shape = yardstick(name)
    assert {each.module for each in reasons(module, input_shape)} >= REFUSED[name]


def narrowed(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A network of torchvision; of those with wide dense layers, these are narrow, so that the test is fast."""
    module, input_shape = yardstick(name)
    if name.startswith(("vgg", "alexnet")):
        width = 64
        for layer in [layer for layer in module.classifier if isinstance(layer, nn.Linear)][:-1]:
            inputs = layer.in_features if layer.in_features > 4096 else width
            module.classifier[list(module.classifier).index(layer)] = nn.Linear(inputs, width)
        module.classifier[-1] = nn.Linear(width, 10)
    return module, input_shape


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore:.*weight init:FutureWarning")
@pytest.mark.parametrize("name", TRACED)
def test_a_second_task_leaves_the_first_ones_logits_as_they_were(name: str) -> None:
    torch.manual_seed(0)
    module, input_shape = narrowed(name)
    traced = trace(module, input_shape)
    state, logits = State.empty(Architecture(traced.graph)), []
    sample = torch.rand(2, *input_shape, generator=torch.Generator().manual_seed(0))
    for task in range(2):
        drawn = traced.tensors(narrowed(name)[0])
        activities = {
            group: torch.rand(len(state.free[group]), generator=torch.Generator().manual_seed(task)).double()
            for group in traced.graph.groups
        }
        trained = Pack(state, 10, [(0.0,) * len(traced.graph.layers)], drawn).point(0, activities)
        state = commit_at(state, trained, num_classes=10)
        logits.append(Subnetwork(state, 0)(sample))
    assert all(len(active) > 0 for active in state.active(0).values())
    assert logits[0].isfinite().all()
    assert torch.equal(logits[0], logits[1])
