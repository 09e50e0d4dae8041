"""Several grid points of one task as one batched program.

All points of a task share the frozen network, the data and its order. So the frozen units' outputs are computed once
for the whole pack (`Features`), gradients and optimizer state exist for free parameters only, and what all points read
meets the weights of all of them in one matrix product. Forward and backward passes are written out: the gradient
buffers live as long as the pack and start from the L1 term, which then costs one pass over the weights.

Outputs of free units are kept unit by unit, [P, F, B]: then one product serves the whole pack, and matrix libraries are
faster on the narrow ones too.

Shapes: P points, B samples of a batch, N samples, A frozen units of the layer below (or the inputs), F free units of
a layer, I free units of the layer below, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from clnp_search.clnp.activations import ACTIVATIONS
from clnp_search.clnp.seeds import generator
from clnp_search.clnp.state import FreeParameters, State

EVALUATION_BATCH = 1000


class Trunk:
    """The frozen units that a new task can read."""

    def __init__(self, state: State, device: torch.device) -> None:
        architecture = state.architecture
        self._activation = ACTIVATIONS[architecture.activation]
        # A single head never reads earlier tasks' units of the last hidden layer.
        readable = state.layers if architecture.head == "multi" else state.layers[:-1]
        columns = torch.arange(architecture.in_features)
        self._linears = []
        for layer in readable:
            rows = layer.active(state.num_tasks)
            self._linears.append((layer.weight[rows][:, columns].to(device), layer.bias[rows].to(device)))
            columns = rows
        self.widths = (architecture.in_features, *(len(bias) for _, bias in self._linears))

    def levels(self, inputs: Tensor) -> list[Tensor]:
        """What each layer reads of the frozen network: `inputs` [B, in_features], then each layer's [B, A]."""
        levels = [inputs]
        for weight, bias in self._linears:
            levels.append(self._activation.apply_(functional.linear(levels[-1], weight, bias)))
        return levels

    def split_levels(self, inputs: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """`levels` of a whole split [N, in_features], computed batch by batch."""
        chunks = [[level.to(dtype) for level in self.levels(chunk)[1:]] for chunk in inputs.split(EVALUATION_BATCH)]
        return [inputs.to(dtype), *(torch.cat(level) for level in zip(*chunks, strict=True))]


class Features:
    """A split of a task's data on the device, with the frozen units' outputs on it.

    Args:
        inputs: [N, in_features] float32.
        labels: [N] int64.
        cache_bytes: The frozen units' outputs are kept for the whole split if they fit into this.
        dtype: In which the levels are handed out.
    """

    def __init__(
        self, trunk: Trunk, inputs: Tensor, labels: Tensor, cache_bytes: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.labels = labels
        self._trunk = trunk
        self._dtype = dtype
        self._cached = len(inputs) * sum(trunk.widths[1:]) * dtype.itemsize <= cache_bytes
        self._levels = trunk.split_levels(inputs, dtype) if self._cached else [inputs]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor | slice) -> tuple[list[Tensor], Tensor]:
        """The levels [B, A] and labels [B] of the samples at `index`."""
        if isinstance(index, slice):
            levels = [level[index] for level in self._levels]
        else:
            levels = [level.index_select(0, index) for level in self._levels]
        if not self._cached:
            levels = [level.to(self._dtype) for level in self._trunk.levels(levels[0])]
        return levels, self.labels[index]

    def batches(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        """The whole split in order."""
        for start in range(0, len(self), EVALUATION_BATCH):
            yield self.batch(slice(start, start + EVALUATION_BATCH))


class PackedLinear:
    """A dense layer of every point of a pack.

    Args:
        shared: [P, F, A] weights from what all points share.
        own: [P, F, I] weights from the point's own free units.
        bias: [P, F].
        alpha: [P] L1 coefficients of this layer's weights.
        trainable_bias: False where an earlier task froze it, or there is none.
        dtype: Of the matrix products; parameters stay float32.
    """

    def __init__(
        self, shared: Tensor, own: Tensor, bias: Tensor, alpha: Tensor, trainable_bias: bool, dtype: torch.dtype
    ) -> None:
        self.shared, self.own, self.bias = shared, own, bias
        self._alpha = alpha[:, None, None]
        self._trainable_bias = trainable_bias
        self._dtype = dtype
        self.parameters = [shared, own, *([bias] if trainable_bias else [])]
        for parameter in self.parameters:
            parameter.grad = torch.empty_like(parameter)

    def forward(self, shared: Tensor, own: Tensor | None, out: Tensor) -> None:
        """Writes the pre-activations [P, F, B] of inputs `shared` [B, A] and `own` [P, I, B] to `out`."""
        bias, weight = self.bias.view(-1, 1).to(self._dtype), self.shared.flatten(0, 1).to(self._dtype)
        torch.addmm(bias, weight, shared.T, out=out.view(-1, len(shared)))
        if own is not None and own.shape[1]:
            torch.baddbmm(out, self.own.to(self._dtype), own, out=out)

    def backward(self, grad: Tensor, shared: Tensor, own: Tensor | None, grad_own: Tensor | None) -> None:
        """Fills the parameters' gradients, L1 term included, and `grad_own` [P, I, B], from `grad` [P, F, B]."""
        self._weight_gradient(self.shared, grad, shared)
        if own is not None:
            self._weight_gradient(self.own, grad, own.mT)
        if grad_own is not None:
            torch.bmm(self.own.to(self._dtype).mT, grad, out=grad_own)
        if self._trainable_bias:
            assert self.bias.grad is not None
            torch.sum(grad, 2, out=self.bias.grad, dtype=torch.float32)

    def _weight_gradient(self, weight: Tensor, grad: Tensor, inputs: Tensor) -> None:
        """Fills a weight's gradient; `inputs` are of the point [P, B, I] or of all points [B, A]."""
        total = weight.grad
        assert total is not None
        if not weight.numel():
            return
        # alpha * sign(weight), with +-alpha at zero: any value between is a sub-gradient of the L1 norm there.
        torch.copysign(self._alpha, weight, out=total)
        if inputs.ndim == 2:
            total, grad = total.flatten(0, 1), grad.flatten(0, 1)
        if self._dtype != torch.float32:
            total.add_(grad @ inputs)
        elif inputs.ndim == 2:
            torch.addmm(total, grad, inputs, out=total)
        else:
            torch.baddbmm(total, grad, inputs, out=total)


@dataclass
class _Workspace:
    """Buffers for one batch size: outputs and their gradients of each hidden layer [P, F, B], and logits [P, C, B]."""

    outputs: list[Tensor]
    gradients: list[Tensor]
    logits: Tensor


class Pack:
    """The free parameters of P points of one task, on top of a committed state.

    All points start from the same parameters, which follow from the seed alone: weights uniform in
    +-1/sqrt(fan-in), PyTorch's default for dense layers; biases zero. The fan-in is the layer's full width below; for a
    single head it is the number of free units of the last hidden layer.

    Args:
        state: What earlier tasks have committed.
        num_classes: C of the new task.
        alphas: For each point, the L1 coefficient of each hidden layer and of the head.
        seed: Of the initial parameters.
        dtype: Of the matrix products: float32 or bfloat16.
    """

    def __init__(
        self,
        state: State,
        num_classes: int,
        alphas: list[tuple[float, ...]],
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        architecture = state.architecture
        self.device = torch.device(device)
        self.dtype = dtype
        self.num_points = len(alphas)
        self.num_classes = num_classes
        self.trunk = Trunk(state, self.device)
        self._activation = ACTIVATIONS[architecture.activation]
        self._free = [len(layer.free) for layer in state.layers]
        self._workspaces: dict[int, _Workspace] = {}
        self._head_reads_frozen = architecture.head == "multi"
        alpha = torch.tensor(alphas, device=self.device).T
        task = state.num_tasks

        def drawn(rows: int, columns: int, fan_in: int, *words: str | int) -> Tensor:
            bound = fan_in**-0.5 if fan_in else 0.0
            values = torch.empty(rows, columns).uniform_(-bound, bound, generator=generator(seed, "init", task, *words))
            return values.to(self.device).expand(self.num_points, -1, -1).contiguous()

        self.layers = []
        below = 0
        for index, (free, fan_in) in enumerate(zip(self._free, architecture.fan_in, strict=True)):
            frozen = self.trunk.widths[index]
            self.layers.append(
                PackedLinear(
                    drawn(free, frozen, fan_in, index, "frozen"),
                    drawn(free, below, fan_in, index, "free"),
                    torch.zeros(self.num_points, free, device=self.device),
                    alpha[index],
                    True,
                    dtype,
                )
            )
            below = free
        frozen = self.trunk.widths[-1] if self._head_reads_frozen else 0
        bias = torch.zeros(self.num_points, num_classes, device=self.device)
        rule = architecture.head_bias if architecture.head == "single" else "per_task"
        if rule == "frozen" and state.heads and state.heads[0].bias is not None:
            bias += state.heads[0].bias.to(self.device)
        self._trainable_head_bias = rule == "per_task" or (rule == "frozen" and not state.heads)
        self.head = PackedLinear(
            drawn(num_classes, frozen, frozen + below, "head", "frozen"),
            drawn(num_classes, below, frozen + below, "head", "free"),
            bias,
            alpha[-1],
            self._trainable_head_bias,
            dtype,
        )
        self._head_has_bias = rule != "none"

    def features(self, inputs: Tensor, labels: Tensor, cache_bytes: int = 4 << 30) -> Features:
        """A split of the task's data as this pack reads it: `inputs` [N, in_features], `labels` [N]."""
        return Features(self.trunk, inputs.to(self.device), labels.to(self.device), cache_bytes, self.dtype)

    @property
    def parameters(self) -> list[Tensor]:
        """All trainable tensors; the first dimension of each is P."""
        return [parameter for layer in (*self.layers, self.head) for parameter in layer.parameters]

    @property
    def training_flop(self) -> int:
        """Floating-point operations of one sample's forward and backward pass through all points' free layers."""
        flop = 0
        for layer in (*self.layers, self.head):
            flop += 4 * layer.shared.numel() + 6 * layer.own.numel()
        return flop

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Logits [P, C, B] of a batch's `levels`; overwritten by the next call of the same batch size."""
        work = self._workspace(len(levels[0]))
        below = None
        for layer, shared, output in zip(self.layers, levels, work.outputs, strict=False):
            layer.forward(shared, below, output)
            self._activation.apply_(output)
            below = output
        self.head.forward(self._head_level(levels), below, work.logits)
        return work.logits

    def backward(self, levels: list[Tensor], grad_logits: Tensor) -> None:
        """Fills all gradients after `forward(levels)`, from the loss's gradient [P, C, B]."""
        work = self._workspace(len(levels[0]))
        self.head.backward(grad_logits, self._head_level(levels), work.outputs[-1], work.gradients[-1])
        for index in reversed(range(len(self.layers))):
            grad = self._activation.backward_(work.gradients[index], work.outputs[index])
            below = (work.outputs[index - 1], work.gradients[index - 1]) if index else (None, None)
            self.layers[index].backward(grad, levels[index], *below)

    def num_correct(self, features: Features) -> list[int]:
        """For each point, the samples of a split that the network gets right."""
        correct = torch.zeros(self.num_points, dtype=torch.int64, device=self.device)
        for levels, labels in features.batches():
            correct += (self.forward(levels).argmax(1) == labels).sum(1)
        return correct.tolist()

    def activities(self, features: Features) -> list[Tensor]:
        """Mean post-activation value of each free unit over a split: for each hidden layer [P, F] float64.

        Source: paper, section 3.2; mean absolute value for activations that can be negative is our choice.
        """
        sums = [torch.zeros(self.num_points, free, dtype=torch.float64, device=self.device) for free in self._free]
        for levels, labels in features.batches():
            self.forward(levels)
            for total, output in zip(sums, self._workspace(len(labels)).outputs, strict=True):
                values = output if self._activation.non_negative else output.abs()
                total += values.sum(2, dtype=torch.float64)
        return [total / len(features) for total in sums]

    def finite(self, activities: Sequence[Tensor] = ()) -> list[bool]:
        """For each point, whether all its parameters, and its units' activities [P, F], are finite."""
        checks = [values.isfinite().flatten(1).all(1) for values in (*self.parameters, *activities)]
        return torch.stack(checks).all(0).tolist()

    def point(self, position: int, activities: list[Tensor]) -> FreeParameters:
        """The parameters of the pack's point at `position`, on the CPU, with its units' activities."""
        weights = (torch.cat([layer.shared[position], layer.own[position]], 1).cpu() for layer in self.layers)
        return FreeParameters(
            weights=tuple(weights),
            biases=tuple(layer.bias[position].cpu().clone() for layer in self.layers),
            head_weight=torch.cat([self.head.shared[position], self.head.own[position]], 1).cpu(),
            head_bias=self.head.bias[position].cpu().clone() if self._head_has_bias else None,
            activities=tuple(activity[position].cpu().clone() for activity in activities),
        )

    def _head_level(self, levels: list[Tensor]) -> Tensor:
        return levels[-1] if self._head_reads_frozen else levels[0][:, :0]

    def _workspace(self, batch: int) -> _Workspace:
        if batch not in self._workspaces:

            def empty(width: int) -> Tensor:
                return torch.empty(self.num_points, width, batch, device=self.device, dtype=self.dtype)

            self._workspaces[batch] = _Workspace(
                [empty(free) for free in self._free], [empty(free) for free in self._free], empty(self.num_classes)
            )
        return self._workspaces[batch]
