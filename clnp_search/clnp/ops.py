"""What the nodes of a network compute: one class for each kind, plain and packed.

A value is a tensor over *channels*, each of which belongs to a unit. Plain, it is a map [B, C, H, W] or flat [B, C]
(after a flatten a unit owns several flat channels, its *taps*). Packed, K points stand side by side: maps are
[B, K*F, H, W], and flat values channels first, [K*F, B], so that one matrix product serves all points. What works
channel by channel is the same in both forms; what reads across channels says how each point reads its own.

To add an op, add a class here: its fields are what a graph's file stores; `shapes` names its parameters, whose first
dimension is the output unit (and, for those in `MATRICES`, the second the input unit and the last the tap); `plain` is
its function; `packed` is overridden where a point's channels do not stay among themselves. Everything else (commit,
digest, scan, estimates, exports) follows from that. For modules to be traced to it, name it in `calls.py`.

Letters in shapes: B samples, C channels, K points, F free units, A frozen units that a free unit reads, I free ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

Tensors = Mapping[str, Tensor]

# Elementwise functions of torch.nn.functional: whether never negative, and whether never falling.
ACTIVATIONS: dict[str, tuple[bool, bool]] = {
    "celu": (False, True),
    "elu": (False, True),
    "gelu": (False, False),
    "hardshrink": (False, True),
    "hardsigmoid": (True, True),
    "hardswish": (False, False),
    "hardtanh": (False, True),
    "leaky_relu": (False, True),
    "logsigmoid": (False, True),
    "mish": (False, False),
    "relu": (True, True),
    "relu6": (True, True),
    "selu": (False, True),
    "sigmoid": (True, True),
    "silu": (False, False),
    "softplus": (True, True),
    "softshrink": (False, True),
    "softsign": (False, True),
    "tanh": (False, True),
    "tanhshrink": (False, True),
    "threshold": (False, False),
}


@dataclass(frozen=True)
class Op:
    """A kind of node.

    Class attributes:
        MATRICES: Parameters that read across units, [out unit, in unit, tap].
        STATISTICS: Parameters that no gradient moves.
    """

    MATRICES: ClassVar[tuple[str, ...]] = ()
    STATISTICS: ClassVar[tuple[str, ...]] = ()

    def shapes(self, rows: int, columns: int, taps: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters for `rows` output units that read `columns` input units of `taps` values each."""
        return {}

    def plain(self, inputs: Sequence[Tensor], tensors: Tensors, training: bool = False) -> Tensor:
        """The output value of input values, all in plain form."""
        raise NotImplementedError

    def packed(self, inputs: Sequence[Tensor], tensors: Tensors, points: int, training: bool) -> Tensor:
        """The points' own channels from those of the inputs, in packed form; parameters are [K, ...].

        By default, as plain: maps are alike in both forms, and so is what is elementwise.
        """
        return self.plain(inputs, {name: tensor.flatten(0, 1) for name, tensor in tensors.items()}, training)

    def overwriting(self, inputs: Sequence[Tensor], index: int) -> Tensor:
        """The same, written over one of the inputs; of the ops that `Graph.in_place` names."""
        raise NotImplementedError

    def lacks(self, rows: int, columns: int) -> Tensor | None:
        """Which weights a layer of so many units does not have, [out unit, in unit] bool; None if it has all."""
        return None

    def flop(self, rows: int, columns: int, taps: int, positions: int) -> int:
        """Floating-point operations a sample of the matrix products, as many output positions as given."""
        weights = sum(rows * columns * self.shapes(1, 1, taps)[name][-1] for name in self.MATRICES)
        return 2 * weights * positions


@dataclass(frozen=True)
class Reader(Op):
    """An op with a weight matrix. In a pack it reads what all points share and each point's own channels."""

    MATRICES: ClassVar[tuple[str, ...]] = ("weight",)
    bias: bool = True

    def read(
        self, shared: Tensor | None, own: Tensor | None, tensors: Tensors, points: int, dtype: torch.dtype
    ) -> Tensor:
        """The points' own output channels, in packed form.

        Args:
            shared: The frozen channels in plain form, or None if there are none.
            own: The points' own channels in packed form, or None if there are none.
            tensors: `weight.shared` [K, F, A, taps], `weight.own` [K, F, I, taps] and perhaps `bias` [K, F].
            dtype: Of the products.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Channelwise(Op):
    """An op with parameters for each channel of a map or of flat values."""

    def packed(self, inputs: Sequence[Tensor], tensors: Tensors, points: int, training: bool) -> Tensor:
        (value,) = inputs
        if value.ndim == 4:
            return super().packed(inputs, tensors, points, training)
        return super().packed([value.T], tensors, points, training).T


@dataclass(frozen=True)
class Linear(Reader):
    """A dense layer; its input is flat."""

    def shapes(self, rows: int, columns: int, taps: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (rows, columns, taps)} | ({"bias": (rows,)} if self.bias else {})

    def plain(self, inputs: Sequence[Tensor], tensors: Tensors, training: bool = False) -> Tensor:
        return functional.linear(inputs[0], tensors["weight"].flatten(1), tensors.get("bias"))

    def read(
        self, shared: Tensor | None, own: Tensor | None, tensors: Tensors, points: int, dtype: torch.dtype
    ) -> Tensor:
        own = None if own is None else own.view(points, -1, own.shape[-1])
        weights = tensors["weight.shared"], tensors["weight.own"]
        result: Tensor = _Dense.apply(shared, own, *weights, tensors.get("bias"), dtype)
        return result


class _Dense(torch.autograd.Function):
    """A dense layer of every point, whose weight gradients go straight into buffers that start from the L1 term.

    Autograd would make a new gradient of every weight matrix in every step and add it; for wide layers that costs a
    tenth of the step.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        shared, own, weight_shared, weight_own, bias, dtype = inputs
        points, rows = weight_shared.shape[:2]
        batch = len(shared) if shared is not None else own.shape[-1]
        weight, like = weight_shared.flatten(2), {"dtype": dtype, "device": weight_shared.device}
        first = torch.zeros(points * rows, 1, **like) if bias is None else bias.reshape(-1, 1).to(dtype)
        if shared is None or not weight.shape[2]:
            out = first.repeat(1, batch)  # a copy, also of one sample: it is written over
        else:
            out = torch.addmm(first, weight.flatten(0, 1).to(dtype), shared.T)
        if own is not None and own.shape[1]:
            each = out.view(points, rows, batch)
            torch.baddbmm(each, weight_own.flatten(2).to(dtype), own, out=each)
        ctx.save_for_backward(shared, own)
        ctx.weights, ctx.has_bias = (weight_shared, weight_own), bias is not None
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (all_points,), (shared, own), (weight_shared, weight_own) = grads, ctx.saved_tensors, ctx.weights
        grad, grad_own = all_points.unflatten(0, weight_own.shape[:2]), None
        if shared is not None:
            _add_product(weight_shared, all_points, shared)
        if own is not None:
            _add_product(weight_own, grad, own.mT)
            if ctx.needs_input_grad[1]:
                grad_own = torch.bmm(weight_own.flatten(2).to(grad.dtype).mT, grad)
        grad_bias = grad.sum(2, dtype=torch.float32) if ctx.has_bias and ctx.needs_input_grad[4] else None
        return None, grad_own, None, None, grad_bias, None


def _add_product(weight: Tensor, grad: Tensor, inputs: Tensor) -> None:
    """Adds to a weight's gradient the product of grad and inputs, each point's [F, B] and [B, I] or all of one."""
    total = weight.grad
    assert total is not None
    total = total.flatten(2) if grad.ndim == 3 else total.flatten(2).flatten(0, 1)
    if not total.numel():
        return
    if grad.dtype != torch.float32:
        total.add_(grad @ inputs)
    elif grad.ndim == 2:
        torch.addmm(total, grad, inputs, out=total)
    else:
        torch.baddbmm(total, grad, inputs, out=total)


@dataclass(frozen=True)
class Conv(Reader):
    """A convolution over all channels of its input."""

    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def shapes(self, rows: int, columns: int, taps: int) -> dict[str, tuple[int, ...]]:
        weight = (rows, columns, self.kernel[0] * self.kernel[1])
        return {"weight": weight} | ({"bias": (rows,)} if self.bias else {})

    def plain(self, inputs: Sequence[Tensor], tensors: Tensors, training: bool = False) -> Tensor:
        return self._convolve(inputs[0], tensors["weight"], tensors.get("bias"))

    def read(
        self, shared: Tensor | None, own: Tensor | None, tensors: Tensors, points: int, dtype: torch.dtype
    ) -> Tensor:
        bias = tensors.get("bias")
        bias = None if bias is None else bias.flatten().to(dtype)
        out = None
        if shared is not None and shared.shape[1]:
            out = self._convolve(shared, tensors["weight.shared"].flatten(0, 1).to(dtype), bias)
            bias = None
        if own is not None and own.shape[1]:
            # Two convolutions beat one over both parts put together.
            other = self._convolve(own, tensors["weight.own"].flatten(0, 1).to(dtype), bias, groups=points)
            out = other if out is None else out.add_(other)
        if out is None:
            raise ValueError("a convolution reads no unit at all")
        return out

    def _convolve(self, value: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
        weight, stride = weight.unflatten(2, self.kernel), self.stride
        if self.kernel == (1, 1) and self.padding == (0, 0) and stride != (1, 1):
            # What it reads is taken beforehand: given the stride, oneDNN 3.13 writes beyond its memory in the backward
            # pass, on CPUs without AVX-512 and with fewer than eight channels.
            value, stride = value[:, :, :: stride[0], :: stride[1]], (1, 1)
        return functional.conv2d(value, weight, bias, stride, self.padding, self.dilation, groups)


@dataclass(frozen=True)
class GroupedConv(Conv):
    """A convolution in `blocks`, each of so many output channels (`rows`) that read so many of its input's (`columns`).

    It is computed as one over all channels, whose other weights are zero, so that any unit can be frozen or free by
    itself; block by block (`apart`, of no graph that is stored) only where all units are there. Units that a network
    has gained are dealt out over the blocks.
    """

    blocks: int = 2
    rows: int = 1
    columns: int = 1
    apart: bool = False

    def __post_init__(self) -> None:
        sizes = self.blocks, self.rows, self.columns
        if not all(isinstance(size, int) and 0 < size < 2**31 for size in sizes):
            raise ValueError(f"no blocks of a convolution: {sizes}")

    def lacks(self, rows: int, columns: int) -> Tensor:
        of_row, of_column = (
            torch.arange(units) // each % self.blocks for units, each in ((rows, self.rows), (columns, self.columns))
        )
        return of_row[:, None] != of_column

    def _convolve(self, value: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
        if self.apart:
            by_block = weight.unflatten(1, (self.blocks, -1)).unflatten(0, (groups, self.blocks, -1))
            weight = by_block.diagonal(0, 1, 3).movedim(-1, 1).flatten(0, 2)
            groups *= self.blocks
        return super()._convolve(value, weight, bias, groups)


@dataclass(frozen=True)
class Depthwise(Op):
    """A convolution of each channel by itself."""

    bias: bool = True
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def shapes(self, rows: int, columns: int, taps: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (rows, self.kernel[0] * self.kernel[1])} | ({"bias": (rows,)} if self.bias else {})

    def plain(self, inputs: Sequence[Tensor], tensors: Tensors, training: bool = False) -> Tensor:
        (value,), bias = inputs, tensors.get("bias")
        weight = tensors["weight"].unflatten(1, self.kernel)[:, None].to(value.dtype)
        bias = None if bias is None else bias.to(value.dtype)
        return functional.conv2d(value, weight, bias, self.stride, self.padding, self.dilation, len(weight))

    def flop(self, rows: int, columns: int, taps: int, positions: int) -> int:
        return 2 * rows * self.kernel[0] * self.kernel[1] * positions


@dataclass(frozen=True)
class BatchNorm(Channelwise):
    """Batch normalisation of maps or flat values: batch statistics while training, running ones otherwise."""

    STATISTICS: ClassVar[tuple[str, ...]] = ("mean", "variance")
    affine: bool = True
    epsilon: float = 1e-5
    momentum: float = 0.1

    def shapes(self, rows: int, columns: int, taps: int) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys((*(("scale", "shift") if self.affine else ()), "mean", "variance"), (rows,))

    def plain(self, inputs: Sequence[Tensor], tensors: Tensors, training: bool = False) -> Tensor:
        (value,), statistics = inputs, (tensors["mean"], tensors["variance"])
        affine = tensors.get("scale"), tensors.get("shift")
        training = training and value.numel() > value.shape[1]  # one value alone has no variance
        return functional.batch_norm(value, *statistics, *affine, training, self.momentum, self.epsilon)


@dataclass(frozen=True)
class InstanceNorm(Op):
    """Each channel's map of each sample to mean 0 and deviation 1, in training and otherwise."""

    affine: bool = True
    epsilon: float = 1e-5

    def shapes(self, rows: int, columns: int, taps: int) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(("scale", "shift") if self.affine else (), (rows,))

    def plain(self, inputs: Sequence[Tensor], tensors: Tensors, training: bool = False) -> Tensor:
        value = inputs[0].float()
        value = value - value.mean((2, 3), keepdim=True)
        value = value * (value.square().mean((2, 3), keepdim=True) + self.epsilon).rsqrt()
        if self.affine:
            value = value * tensors["scale"][:, None, None] + tensors["shift"][:, None, None]
        return value.to(inputs[0].dtype)


@dataclass(frozen=True)
class Activation(Op):
    """An elementwise function of `torch.nn.functional`, a key of `ACTIVATIONS`, with its arguments."""

    function: str = "relu"
    arguments: tuple[tuple[str, float | str], ...] = ()

    @property
    def non_negative(self) -> bool:
        """Whether no output is below zero."""
        return ACTIVATIONS[self.function][0]

    @property
    def monotone(self) -> bool:
        """Whether it never falls, so that it may change places with a maximum."""
        rising = ACTIVATIONS[self.function][1]
        return rising and all(not isinstance(value, float | int) or value >= 0 for _, value in self.arguments[:1])

    def plain(self, inputs: Sequence[Tensor], tensors: Tensors, training: bool = False) -> Tensor:
        result: Tensor = getattr(functional, self.function)(inputs[0], **dict(self.arguments))
        return result

    def overwriting(self, inputs: Sequence[Tensor], index: int) -> Tensor:
        return torch.relu_(inputs[index])


@dataclass(frozen=True)
class PRelu(Channelwise):
    """A leaky rectifier with a learned slope for each channel."""

    def shapes(self, rows: int, columns: int, taps: int) -> dict[str, tuple[int, ...]]:
        return {"slope": (rows,)}

    def plain(self, inputs: Sequence[Tensor], tensors: Tensors, training: bool = False) -> Tensor:
        return functional.prelu(inputs[0], tensors["slope"].to(inputs[0].dtype))


@dataclass(frozen=True)
class Affine(Op):
    """A constant factor and a constant summand, as in hand-written activations."""

    factor: float = 1.0
    summand: float = 0.0

    def plain(self, inputs: Sequence[Tensor], tensors: Tensors, training: bool = False) -> Tensor:
        return inputs[0] * self.factor + self.summand


@dataclass(frozen=True)
class MaxPool(Op):
    """The largest value of each window."""

    kernel: tuple[int, int] = (2, 2)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil: bool = False

    def plain(self, inputs: Sequence[Tensor], tensors: Tensors, training: bool = False) -> Tensor:
        return functional.max_pool2d(inputs[0], self.kernel, self.stride, self.padding, self.dilation, self.ceil)


@dataclass(frozen=True)
class AvgPool(Op):
    """The mean of each window."""

    kernel: tuple[int, int] = (2, 2)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int] = (0, 0)
    ceil: bool = False
    count_padding: bool = True

    def plain(self, inputs: Sequence[Tensor], tensors: Tensors, training: bool = False) -> Tensor:
        return functional.avg_pool2d(
            inputs[0], self.kernel, self.stride, self.padding, self.ceil, count_include_pad=self.count_padding
        )


@dataclass(frozen=True)
class AdaptivePool(Op):
    """The mean, or the largest value, of each of a fixed number of windows."""

    size: tuple[int, int] = (1, 1)
    maximum: bool = False

    def plain(self, inputs: Sequence[Tensor], tensors: Tensors, training: bool = False) -> Tensor:
        (value,) = inputs
        if not self.maximum:
            return functional.adaptive_avg_pool2d(value, self.size)
        if value.is_cuda or torch.compiler.is_exporting():  # torch adds up gradients in any order there; ONNX has none
            return largest_of_windows(value, self.size)
        return functional.adaptive_max_pool2d(value, self.size)


def largest_of_windows(value: Tensor, size: tuple[int, int]) -> Tensor:
    """What `torch.nn.functional.adaptive_max_pool2d` gives for [B, C, H, W]; gradients are added in a fixed order."""
    for dim, windows in zip((2, 3), size, strict=True):
        positions = value.shape[dim]
        bounds = [(index * positions // windows, -(-(index + 1) * positions // windows)) for index in range(windows)]
        value = torch.cat([value.narrow(dim, low, high - low).amax(dim, True) for low, high in bounds], dim)
    return value


@dataclass(frozen=True)
class Dropout(Op):
    """Zeroes values at random while training: single values, whole channels, or all channels of a sample.

    Points draw alike, whoever shares a pack with whom. Frozen units are computed without it; it acts on what free units
    read of them, unless something stands between that changes what a mask does (`Graph.dropout_of`).
    """

    share: float = 0.5
    unit: str = "value"  # value | channel | sample

    def plain(self, inputs: Sequence[Tensor], tensors: Tensors, training: bool = False) -> Tensor:
        (value,) = inputs
        return value * tensors["mask"] if "mask" in tensors else value

    def packed(self, inputs: Sequence[Tensor], tensors: Tensors, points: int, training: bool) -> Tensor:
        (value,) = inputs
        if "mask" not in tensors:
            return value
        samples_first = value if value.ndim == 4 else value.T
        dropped = (samples_first.unflatten(1, (points, -1)) * tensors["mask"].unsqueeze(1)).flatten(1, 2)
        return dropped if value.ndim == 4 else dropped.T

    def mask(self, value: Tensor) -> Tensor:
        """Random zeros among 1 / (1 - share), to multiply a value with [B, C, ...].

        They are made of 16 random bits each, which is four times as fast as `bernoulli_`.
        """
        dims = {"value": value.ndim, "channel": 2, "sample": 1}[self.unit]
        like = torch.empty_like(value) if dims == value.ndim else value.new_empty(value.shape[:dims])
        bits = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device).random_(-(2**63), None)
        zeros = round(self.share * 2**16)
        kept = bits.view(torch.int16).as_strided(like.shape, like.stride()) >= zeros - 2**15
        like.copy_(kept).mul_(2**16 / (2**16 - zeros) if zeros < 2**16 else 0.0)
        return like.view(*like.shape, *[1] * (value.ndim - dims)) if dims < value.ndim else like


@dataclass(frozen=True)
class Identity(Op):
    """The value as it is."""

    def plain(self, inputs: Sequence[Tensor], tensors: Tensors, training: bool = False) -> Tensor:
        return inputs[0]


@dataclass(frozen=True)
class Pad(Op):
    """Zeros around each map: left, right, above and below; fewer than none cut it."""

    sides: tuple[int, int, int, int] = (1, 1, 1, 1)

    def plain(self, inputs: Sequence[Tensor], tensors: Tensors, training: bool = False) -> Tensor:
        return functional.pad(inputs[0], self.sides)


class _ToFlat(Op):
    """A map becomes flat: packed, its channels come first."""

    def packed(self, inputs: Sequence[Tensor], tensors: Tensors, points: int, training: bool) -> Tensor:
        (value,) = inputs
        return self.plain(inputs, {}).T if value.ndim == 4 else value


@dataclass(frozen=True)
class Flatten(_ToFlat):
    """A map as flat values: unit c owns those from c*H*W to (c+1)*H*W."""

    def plain(self, inputs: Sequence[Tensor], tensors: Tensors, training: bool = False) -> Tensor:
        return inputs[0].flatten(1)


@dataclass(frozen=True)
class MeanPositions(_ToFlat):
    """The mean of each channel's map, as a flat value."""

    def plain(self, inputs: Sequence[Tensor], tensors: Tensors, training: bool = False) -> Tensor:
        return inputs[0].mean((2, 3))


@dataclass(frozen=True)
class LargestPosition(_ToFlat):
    """The largest value of each channel's map, as a flat value."""

    def plain(self, inputs: Sequence[Tensor], tensors: Tensors, training: bool = False) -> Tensor:
        return inputs[0].amax((2, 3))


@dataclass(frozen=True)
class ToMap(Op):
    """Flat values as maps of one position, for example of a gate."""

    def plain(self, inputs: Sequence[Tensor], tensors: Tensors, training: bool = False) -> Tensor:
        return inputs[0][:, :, None, None]

    def packed(self, inputs: Sequence[Tensor], tensors: Tensors, points: int, training: bool) -> Tensor:
        return self.plain([inputs[0].T], tensors)


@dataclass(frozen=True)
class Add(Op):
    """The sum of values over the same units."""

    def plain(self, inputs: Sequence[Tensor], tensors: Tensors, training: bool = False) -> Tensor:
        total = inputs[0] + inputs[1]
        for value in inputs[2:]:
            total = total + value
        return total

    def overwriting(self, inputs: Sequence[Tensor], index: int) -> Tensor:
        total = inputs[index]
        for position, value in enumerate(inputs):
            if position != index:
                total.add_(value)
        return total


@dataclass(frozen=True)
class Subtract(Add):
    """The difference of two values over the same units."""

    def plain(self, inputs: Sequence[Tensor], tensors: Tensors, training: bool = False) -> Tensor:
        return inputs[0] - inputs[1]

    def overwriting(self, inputs: Sequence[Tensor], index: int) -> Tensor:
        first, second = inputs
        return second.neg_().add_(first) if index else first.sub_(second)


@dataclass(frozen=True)
class Multiply(Op):
    """The product of values over the same units, for example by a gate."""

    def plain(self, inputs: Sequence[Tensor], tensors: Tensors, training: bool = False) -> Tensor:
        product = inputs[0] * inputs[1]
        for value in inputs[2:]:
            product = product * value
        return product


@dataclass(frozen=True)
class Concat(Op):
    """The channels of several values, one after another."""

    def plain(self, inputs: Sequence[Tensor], tensors: Tensors, training: bool = False) -> Tensor:
        return torch.cat(list(inputs), 1)

    def packed(self, inputs: Sequence[Tensor], tensors: Tensors, points: int, training: bool) -> Tensor:
        dim = 1 if inputs[0].ndim == 4 else 0
        blocks = [value.unflatten(dim, (points, -1)) for value in inputs]
        return torch.cat(blocks, dim + 1).flatten(dim, dim + 1)


OPS: dict[str, type[Op]] = {
    kind.__name__: kind
    for kind in (
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
        Identity,
        InstanceNorm,
        LargestPosition,
        Linear,
        MaxPool,
        MeanPositions,
        Multiply,
        Pad,
        PRelu,
        Subtract,
        ToMap,
    )
}
