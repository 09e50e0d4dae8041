"""What each call of a traced module becomes in a graph: a node, or the reason why there is none.

To have another op traced, write a function under `@_traces(names)`. Names are compared without case and underscores,
so that `nn.ReLU`, `torch.relu`, `functional.relu_` and `Tensor.relu` are one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from clnp_search.clnp.ops import (
    ACTIVATIONS,
    Activation,
    AdaptivePool,
    Add,
    Affine,
    AvgPool,
    BatchNorm,
    Concat,
    Conv,
    Depthwise,
    Dropout,
    Flatten,
    GroupedConv,
    InstanceNorm,
    LargestPosition,
    Linear,
    MaxPool,
    MeanPositions,
    Multiply,
    Op,
    Pad,
    PRelu,
    Subtract,
    ToMap,
)

_SAME = {
    "iadd": "add",
    "isub": "sub",
    "subtract": "sub",
    "imul": "mul",
    "multiply": "mul",
    "itruediv": "div",
    "truediv": "div",
    "truedivide": "div",
    "divide": "div",
    "concat": "cat",
    "concatenate": "cat",
    "clip": "clamp",
}
# Arguments by numpy's names, which torch takes too.
_NUMPY = {"axis": "dim", "keepdims": "keepdim"}


def plain_name(name: str) -> str:
    """A name as names are compared: without case and underscores, one for all ways to write an operation."""
    plain = name.lower().replace("_", "")
    return _SAME.get(plain, plain)


class NoNode(Exception):  # noqa: N818 - never leaves the trace
    """A call becomes no node: the reason, or none if something that it reads is no node either."""


@dataclass
class Step:
    """A node to be. Without an op there is none: `reason` says why, or something before it does."""

    name: str
    module: str
    shape: tuple[int, ...]
    inputs: tuple[str, ...]
    op: Op | None = None
    units: int = 0
    sources: dict[str, str] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Value:
    """A step's value, in the shape that the forward sees it in: a view of a map or an expanded gate has another one."""

    step: Step
    shape: tuple[int, ...]


@dataclass
class Call:
    """A call of a module, a function or a method.

    Args:
        label: The name of what is called.
        path: Dotted name of the module that is called, or that calls.
        module: What is called, if it is a module.
        args: Tensors as values; sizes and numbers as they are.
        shape: Of what it gives.
    """

    label: str
    path: str
    module: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: tuple[int, ...]

    def settings(self, **defaults: Any) -> list[Any]:
        """Settings by name: a module's attributes, or a function's arguments after the first, in this order."""
        if self.module is not None:
            return [getattr(self.module, name, default) for name, default in defaults.items()]
        named = {_NUMPY.get(name, name): value for name, value in self.kwargs.items()}
        given = {**dict(zip(defaults, self.args[1:], strict=False)), **named}
        return [given.get(name, default) for name, default in defaults.items()]

    @property
    def in_place(self) -> bool:
        """Whether it changes what it reads."""
        named = self.label.endswith("_") or self.label in ("iadd", "isub", "imul", "itruediv")
        positional = HANDLERS.get(plain_name(self.label)) is _activation and bool(self.args) and self.args[-1] is True
        return named or positional or bool(self.kwargs.get("inplace", getattr(self.module, "inplace", False)))

    def value(self, position: int = 0) -> Value:
        """The tensor that it reads there, in any shape."""
        values = self.args or tuple(self.kwargs.values())
        value = values[position] if position < len(values) else None
        if not isinstance(value, Value):
            raise NoNode(f"{self.label} of something else than tensors of the network")
        if value.step.op is None:
            raise NoNode
        return value

    def read(self, position: int = 0, dims: int = 0) -> Value:
        """The map or the flat values that it reads there; of so many dimensions, if any are given."""
        value = self.value(position)
        if value.shape != value.step.shape or len(value.shape) not in ((dims,) if dims else (2, 4)):
            raise NoNode(f"{self.label} of values of shape {batch_of(value.shape)}")
        return value

    def node(
        self, op: Op, inputs: Value | Sequence[Value], units: int = 0, sources: dict[str, str] | None = None
    ) -> Step:
        """A step of this call. Sources are the parameters' names in the module."""
        paths = {parameter: f"{self.path}.{name}".lstrip(".") for parameter, name in (sources or {}).items()}
        inputs = [inputs] if isinstance(inputs, Value) else inputs
        function = self.label.strip("_")
        name = self.path if self.module is not None else f"{self.path}.{_SAME.get(function, function)}".lstrip(".")
        return Step(name, self.path, self.shape, tuple(each.step.name for each in inputs), op, units, paths)


def batch_of(shape: Sequence[int]) -> str:
    """A shape in words: `[batch, 3, 8, 8]`."""
    return f"[batch{''.join(f', {size}' for size in shape[1:])}]"


_Handler = Callable[[Call], Step]
HANDLERS: dict[str, _Handler] = {}


def _traces(names: str) -> Callable[[_Handler], _Handler]:
    def register(handler: _Handler) -> _Handler:
        HANDLERS.update(dict.fromkeys(names.split(), handler))
        return handler

    return register


def _size(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


REASONS = {
    name: reason
    for names, reason in {
        "layernorm rmsnorm groupnorm localresponsenorm crossmaplrn2d": (
            "normalises each sample by itself, mostly over several units; use batch normalisation"
        ),
        "softmax softmax2d softmin logsoftmax logsumexp normalize glu": (
            "makes a unit's value from other units, some of which may be free; logits are wanted as they are"
        ),
        "multiheadattention scaleddotproductattention shiftedwindowattention matmul bmm baddbmm einsum transformer "
        "transformerencoder transformerencoderlayer transformerdecoder transformerdecoderlayer": (
            "weighs units by one another, some of which may be free"
        ),
        "permute transpose swapaxes swapdims movedim t channelshuffle pixelshuffle pixelunshuffle roll flip": (
            "moves values between channels, positions or samples, where units cannot be followed"
        ),
        "chunk split tensorsplit unbind narrow indexselect": "takes channels apart, where units cannot be followed",
        "max min": "is of two tensors, or gives positions too; x.amax((2, 3)) gives the largest value of each map",
    }.items()
    for name in names.split()
}


def _layer(call: Call) -> Any:
    """The layer that is called."""
    if call.module is None:
        call.value(1)
        raise NoNode(f"{call.label} with weights as arguments; write a layer of torch.nn")
    return call.module


def _pair(value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values[0], values[-1]


@_traces("linear")
def _linear(call: Call) -> Step:
    module = _layer(call)
    sources = {name: name for name, _ in module.named_parameters()}
    return call.node(Linear("bias" in sources), call.read(dims=2), module.out_features, sources)


@_traces("conv2d")
def _convolution(call: Call) -> Step:
    module = _layer(call)
    depthwise = 1 < module.groups == module.in_channels == module.out_channels
    if module.padding_mode != "zeros":
        raise NoNode(f"{call.label} with padding_mode {module.padding_mode!r}; allowed: zeros")
    kernel, stride, dilation = _pair(module.kernel_size), _pair(module.stride), _pair(module.dilation)
    if module.padding == "same":
        both = [spread * (size - 1) for spread, size in zip(dilation, kernel, strict=True)]
        if any(each % 2 for each in both):
            raise NoNode(f"{call.label} with padding 'same', which an even kernel cannot have on both sides")
        padding = _pair([each // 2 for each in both])
    else:
        padding = (0, 0) if module.padding == "valid" else _pair(module.padding)
    sources = {name: name for name, _ in module.named_parameters()}
    settings = "bias" in sources, kernel, stride, padding, dilation
    op: Op = (Depthwise if depthwise else Conv)(*settings)
    if module.groups > 1 and not depthwise:
        each = module.out_channels // module.groups, module.in_channels // module.groups
        op = GroupedConv(*settings, module.groups, *each)
    return call.node(op, call.read(dims=4), module.out_channels, sources)


@_traces("batchnorm1d batchnorm2d")
def _batch_norm(call: Call) -> Step:
    module = _layer(call)
    if module.running_mean is None:
        raise NoNode(f"{call.label} without running statistics: what a sample gives would depend on its batch")
    if module.momentum is None:
        raise NoNode(f"{call.label} with momentum None; allowed: a number")
    sources = {"scale": "weight", "shift": "bias"} if module.affine else {}
    sources |= {"mean": "running_mean", "variance": "running_var"}
    return call.node(BatchNorm(module.affine, module.eps, module.momentum), call.read(), sources=sources)


@_traces("instancenorm2d groupnorm")
def _instance_norm(call: Call) -> Step:
    module = _layer(call)
    if isinstance(module, nn.GroupNorm) and module.num_groups < module.num_channels:
        raise NoNode(f"{call.label} {REASONS['groupnorm']}, or one group for each channel")
    if getattr(module, "track_running_stats", False):
        raise NoNode(f"{call.label} with running statistics: it would compute something else while training")
    sources = {"scale": "weight", "shift": "bias"} if module.affine else {}
    return call.node(InstanceNorm(module.affine, module.eps), call.read(dims=4), sources=sources)


@_traces("prelu")
def _prelu(call: Call) -> Step:
    module, value = _layer(call), call.read()
    if module.num_parameters != value.shape[1]:
        raise NoNode(f"PReLU with one slope for all channels, frozen and free ones; use PReLU({value.shape[1]})")
    return call.node(PRelu(), value, sources={"slope": "weight"})


_ARGUMENTS = {
    "celu": ["alpha"],
    "elu": ["alpha"],
    "gelu": ["approximate"],
    "hardshrink": ["lambd"],
    "hardtanh": ["min_val", "max_val"],
    "leaky_relu": ["negative_slope"],
    "softplus": ["beta", "threshold"],
    "softshrink": ["lambd"],
    "threshold": ["threshold", "value"],
}


@_traces(" ".join(map(plain_name, ACTIVATIONS)))
def _activation(call: Call) -> Step:
    function = next(name for name in ACTIVATIONS if plain_name(name) == plain_name(call.label))
    names = _ARGUMENTS.get(function, [])
    given = zip(names, call.settings(**dict.fromkeys(names)), strict=True)
    return call.node(
        Activation(function, tuple((name, value) for name, value in given if value is not None)), call.read()
    )


@_traces("clamp clampmin")
def _clamp(call: Call) -> Step:
    low, high = call.settings(min=None, max=None)
    if low == 0 and high is None:
        return call.node(Activation("relu"), call.read())
    if not all(each is None or isinstance(each, int | float) for each in (low, high)):
        raise NoNode(f"{call.label} between {low} and {high}; allowed: numbers")
    largest = torch.finfo(torch.bfloat16).max  # infinity is no JSON; float32 goes hardly further
    bounds = ("min_val", -largest if low is None else low), ("max_val", largest if high is None else high)
    return call.node(Activation("hardtanh", bounds), call.read())


@_traces("maxpool2d")
def _max_pool(call: Call) -> Step:
    kernel, stride, padding, dilation, ceil, indices = call.settings(
        kernel_size=2, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
    )
    if indices:
        raise NoNode(f"{call.label} with return_indices")
    op = MaxPool(_pair(kernel), _pair(stride or kernel), _pair(padding), _pair(dilation), ceil)
    return call.node(op, call.read(dims=4))


@_traces("avgpool2d")
def _average_pool(call: Call) -> Step:
    kernel, stride, padding, ceil, count_padding, divisor = call.settings(
        kernel_size=2, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
    )
    if divisor is not None:
        raise NoNode(f"{call.label} with divisor_override")
    op = AvgPool(_pair(kernel), _pair(stride or kernel), _pair(padding), ceil, count_padding)
    return call.node(op, call.read(dims=4))


@_traces("adaptiveavgpool2d adaptivemaxpool2d")
def _adaptive_pool(call: Call) -> Step:
    size, indices = call.settings(output_size=1, return_indices=False)
    if indices:
        raise NoNode(f"{call.label} with return_indices")
    value = call.read(dims=4)
    height, width = (
        own if wanted is None else wanted for wanted, own in zip(_pair(size), value.shape[2:], strict=True)
    )
    return call.node(AdaptivePool((height, width), "max" in plain_name(call.label)), value)


@_traces("pad zeropad2d constantpad2d")
def _pad(call: Call) -> Step:
    sides, mode, value = call.settings(pad=getattr(call.module, "padding", ()), mode="constant", value=0)
    if mode != "constant" or value:
        raise NoNode(f"{call.label} with {value if mode == 'constant' else mode}; allowed: zeros")
    if any(sides[4:]):
        raise NoNode(f"{call.label} of channels: those that it adds are no units of a layer")
    return call.node(Pad(tuple((*sides, 0, 0)[:4])), call.read(dims=4))


@_traces("dropout dropout2d featuredropout")
def _dropout(call: Call) -> Step:
    share, training = call.settings(p=0.5, training=True)
    if training:
        raise NoNode(f"{call.label} acts in evaluation too; give it training=self.training")
    single = plain_name(call.label) == "dropout"
    return call.node(Dropout(share, "value" if single else "channel"), call.read(dims=0 if single else 4))


@_traces("stochasticdepth")
def _stochastic_depth(call: Call) -> Step:
    share, mode, training = call.settings(p=0.5, mode="batch", training=True)
    if training or mode != "row":
        raise NoNode(f"{call.label} with mode {mode!r} and training {training}; allowed: 'row', and self.training")
    return call.node(Dropout(share, "sample"), call.read())


@_traces("identity contiguous clone")
def _identity(call: Call) -> Step:
    return call.value().step


@_traces("float to")
def _precision(call: Call) -> Step:
    others = [each for each in (*call.args, *call.kwargs.values()) if isinstance(each, torch.dtype)]
    if any(each != torch.float32 for each in others):
        raise NoNode(f"{call.label} {others[0]}; training.precision says what products are computed in")
    return call.value().step


@_traces("expand expandas")
def _expand(call: Call) -> Step:
    """A map of one position seen as a larger one: the product or the sum that reads it expands it by itself."""
    value = call.read()
    if call.shape[:2] != value.shape[:2] or len(call.shape) != len(value.shape):
        raise NoNode(f"{call.label} from {batch_of(value.shape)} to {batch_of(call.shape)} copies units")
    return value.step


@_traces("flatten unflatten view viewas reshape reshapeas squeeze unsqueeze getitem")
def _reshape(call: Call) -> Step:
    """By what it does to the shape: while no value is left out, their order stays."""
    value, new = call.value(), call.shape
    step, old = value.step, value.step.shape
    index = call.args[1] if plain_name(call.label) == "getitem" else ()
    index = index if isinstance(index, tuple) else (index,)
    in_order = all(each is None or isinstance(each, int | slice | type(...)) for each in index)
    if in_order and _size(new) == _size(old):
        if len(old) == 4 and new == (old[0], _size(old[1:])):
            return call.node(Flatten(), value)
        if new == old or (new[:2] == old[:2] and (len(old) == 4 or len(new) == 3)):
            return step
        if len(old) == 2 and new == (*old, 1, 1):
            return call.node(ToMap(), value)
    if value.shape == old and len(new) == len(old) == 4 and (sides := _cut(index, old)):
        return call.node(Pad(sides), value)
    raise NoNode(f"{call.label} from {batch_of(value.shape)} to {batch_of(new)}, where units cannot be followed")


def _cut(index: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[int, int, int, int] | None:
    """The sides of a padding that does what an index of maps does, if that cuts edges off and nothing else."""
    if ... in index:
        place = index.index(...)
        index = (*index[:place], *[slice(None)] * (len(shape) + 1 - len(index)), *index[place + 1 :])
    if not all(isinstance(each, slice) and each.step in (None, 1) for each in index):
        return None  # single positions, or every second one
    bounds = [each.indices(size) for each, size in zip(index, shape, strict=False)]
    bounds += [(0, size, 1) for size in shape[len(bounds) :]]
    samples, units, (top, bottom, _), (left, right, _) = bounds
    if samples[:2] != (0, shape[0]) or units[:2] != (0, shape[1]):
        return None
    return -left, right - shape[3], -top, bottom - shape[2]


@_traces("mean amax")
def _over_positions(call: Call) -> Step:
    """Over all positions of a map, also of one that is seen with one dimension of positions; or over one of both."""
    dim, keep = call.settings(dim=None, keepdim=False)
    value, largest = call.value(), plain_name(call.label) == "amax"
    old, seen = value.step.shape, value.shape
    dims = {each % len(seen) for each in (range(len(seen)) if dim is None else [dim] if isinstance(dim, int) else dim)}
    if seen == old and dims in ({2}, {3}):
        left = (1, old[3]) if dims == {2} else (old[2], 1)
        return replace(call, shape=(*old[:2], *left)).node(AdaptivePool(left, largest), value)
    over_positions = len(old) == 4 and old[:2] == seen[:2] and _size(old) == _size(seen)
    if not over_positions or dims != set(range(2, len(seen))) or (keep and len(seen) != 4):
        raise NoNode(
            f"{call.label} of {batch_of(seen)} over dimensions {sorted(dims)}; allowed: over all positions at once"
        )
    if keep:
        return call.node(AdaptivePool(maximum=largest), value)
    return call.node(LargestPosition() if largest else MeanPositions(), value)


@_traces("add sub mul div neg")
def _arithmetic(call: Call) -> Step:
    """A sum or a product of two tensors, or a constant factor or summand."""
    kind = plain_name(call.label)
    operands = (*call.args, *(call.kwargs[name] for name in ("input", "other") if name in call.kwargs))[:2]
    numbers = [each for each in operands if isinstance(each, int | float)]
    if call.kwargs.get("alpha", 1) != 1 or call.kwargs.get("rounding_mode"):
        raise NoNode(f"{call.label} with alpha or rounding_mode")
    if kind != "neg" and not numbers:
        if kind == "div":
            raise NoNode(f"{call.label} of two tensors; allowed: their sum, their difference and their product")
        return call.node({"add": Add, "sub": Subtract, "mul": Multiply}[kind](), _alike(replace(call, args=operands)))
    number = float(numbers[0]) if numbers else 0.0
    reverse = bool(numbers) and numbers[0] is operands[0]
    if kind == "div" and (reverse or not number):
        raise NoNode(f"{call.label} of or by something else than a number other than 0")
    factor, summand = {
        "add": (1.0, number),
        "sub": (-1.0, number) if reverse else (1.0, -number),
        "mul": (number, 0.0),
        "div": (1 / (number or 1.0), 0.0),
        "neg": (-1.0, 0.0),
    }[kind]
    value = call.read(int(reverse))
    return value.step if (factor, summand) == (1.0, 0.0) else call.node(Affine(factor, summand), value)


def _alike(call: Call) -> list[Value]:
    """The two values of a sum or a product: both flat, or both maps, one of which may have a single position."""
    one, other = values = [call.value(0), call.value(1)]
    whole = all(each.shape[:2] == each.step.shape[:2] and len(each.shape) == len(each.step.shape) for each in values)
    if not whole or len(one.shape) not in (2, 4) or len(one.shape) != len(other.shape):
        raise NoNode(f"{call.label} of {batch_of(one.shape)} and {batch_of(other.shape)}, whose units are not alike")
    return values


@_traces("cat")
def _concatenation(call: Call) -> Step:
    (dim,) = call.settings(dim=0)
    parts = call.args[0] if call.args else call.kwargs["tensors"]
    if dim % len(call.shape) != 1:
        raise NoNode(f"{call.label} over dimension {dim}; allowed: 1, over channels")
    whole = replace(call, args=tuple(parts))
    return call.node(Concat(), [whole.read(position) for position in range(len(parts))])
