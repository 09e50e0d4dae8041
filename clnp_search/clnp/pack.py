"""Several grid points of one task as one program, on top of what earlier tasks have frozen.

All points of a task share the frozen network, the data and its order. So the frozen units' outputs are computed once
for the whole pack (`Trunk`, `Features`), and gradients and optimizer state exist for free parameters only. Points that
are computed together stand side by side as blocks of channels (`ops.py`): dense networks all at once, where what all
points read meets the weights of all of them in one matrix product; networks of maps on a CPU one after another, because
a point's maps then stay in the cache from layer to layer, and microbatches keep them small. Gradients accumulate in
buffers that live as long as the pack and start from the L1 term. On a GPU a step's kernels are launched as one
(`replay.py`).

Shapes: P points of a pack, K of a block, B samples of a batch, N samples, F free units, C classes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from clnp_search.clnp.graph import CLASSES, INPUT, Graph, Node, Units, chosen, run
from clnp_search.clnp.ops import Dropout, Reader
from clnp_search.clnp.replay import Replay
from clnp_search.clnp.state import FreeParameters, Parameters, State

# What the largest value of the samples that are trained, or evaluated, at a time may take: on a CPU, so that it stays
# in the cache.
TRAINED_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}
EVALUATED_BYTES = {"cpu": 16 << 20, "cuda": 1 << 30}
LARGEST_BATCH = 1000
CACHE_BYTES = 4 << 30  # frozen outputs of a split are kept if they fit into this

Levels = Mapping[str, Tensor]
View = Callable[[Tensor, torch.Generator | None], Tensor]


def evaluation_batch(graph: Graph, device: str) -> int:
    """Samples that are evaluated at a time on a kind of device."""
    return max(1, min(LARGEST_BATCH, EVALUATED_BYTES[device] // (4 * graph.largest_value)))


def microbatch(graph: Graph, batch_size: int, device: str, width: int = 4) -> int:
    """Samples that are trained at a time: a batch, or as many as the cache holds where that changes nothing.

    Args:
        device: Its kind.
        width: Bytes of a value.
    """
    if graph.has_batch_statistics or graph.is_dense:
        return batch_size
    fitting = max(1, TRAINED_BYTES[device] // (width * graph.largest_value))
    return min(batch_size, 1 << (fitting.bit_length() - 1))


def is_one_block(graph: Graph, device: str) -> bool:
    """Whether all points of a pack are best computed together on a kind of device."""
    return graph.is_dense or device != "cpu"


class Trunk:
    """The frozen units that a new task can read."""

    def __init__(self, state: State, device: torch.device) -> None:
        self.graph = state.graph
        self._active = state.active()
        free = state.free
        # What is read by nobody that can still learn is not computed. A single head never reads earlier tasks' units.
        readers = [
            node
            for node in self.graph.nodes
            if isinstance(node.op, Reader) and _can_learn(node, free, state.architecture.head_reads_frozen)
        ]
        self.levels_read = tuple(dict.fromkeys(self.graph.source(node).name for node in readers))
        needed = self.graph.upstream(self.levels_read)
        self._tensors = {
            name: {each: tensor.to(device) for each, tensor in cut.items()}
            for name, tensors in state.tensors.items()
            if name in needed
            for cut in [chosen(self.graph, self.graph.by_name[name], tensors, self._active, self._active)]
        }

    def levels(self, inputs: Tensor) -> dict[str, Tensor]:
        """What free units read of the frozen network: the values of nodes, for inputs [B, ...]."""
        return run(self.graph, {INPUT: inputs}, self._tensors, self.levels_read)

    @property
    def level_size(self) -> int:
        """Numbers a sample in all levels but the input."""
        active = {group: len(units) for group, units in self._active.items()}
        return sum(self.graph.value_size(name, active) for name in self.levels_read if name != INPUT)


class Features:
    """A split of a task's data on the device, with the frozen units' outputs on it.

    Args:
        inputs: [N, ...] float32, as the network takes samples; with `view`, raw ones.
        labels: [N] int64.
        cache_bytes: The frozen units' outputs are kept for the whole split if they fit into this.
        dtype: In which the levels are handed out.
        view: Makes inputs of raw samples, at random if it is given a generator; then nothing is kept.
    """

    def __init__(
        self,
        trunk: Trunk,
        inputs: Tensor,
        labels: Tensor,
        cache_bytes: int,
        dtype: torch.dtype = torch.float32,
        view: View | None = None,
    ) -> None:
        self.labels, self.batch_size = labels, evaluation_batch(trunk.graph, inputs.device.type)
        self._trunk, self._dtype, self._view = trunk, dtype, view
        self._cached = view is None and len(inputs) * trunk.level_size * dtype.itemsize <= cache_bytes
        inputs = _channels_last(inputs)
        self._levels = {INPUT: inputs}
        if self._cached:
            for start in range(0, len(inputs), self.batch_size):
                chunk = slice(start, start + self.batch_size)
                for name, level in trunk.levels(inputs[chunk]).items():
                    if name == INPUT:
                        continue
                    if not start:
                        self._levels[name] = _room(level, len(inputs), dtype)
                    self._levels[name][chunk] = level
            self._levels[INPUT] = inputs.to(dtype)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor | slice, seed: int | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """The levels [B, ...] and labels [B] of the samples at `index`; of a random view of them, if it has a seed."""
        levels = {name: _rows(level, index) for name, level in self._levels.items()}
        if not self._cached:
            inputs = levels[INPUT]
            if self._view is not None:
                random = None if seed is None else torch.Generator().manual_seed(seed)
                inputs = _channels_last(self._view(inputs, random))
            computed = {INPUT: inputs, **self._trunk.levels(inputs)}
            levels = {name: level.to(self._dtype) for name, level in computed.items()}
        return levels, self.labels[index]

    def batches(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """The whole split in order."""
        for start in range(0, len(self), self.batch_size):
            yield self.batch(slice(start, start + self.batch_size))


class Block:
    """Free units of K points that are computed together: parameters [K, ...], and the walk over the graph.

    Args:
        units: For each group, how many own units each of the points has.
        tensors: For each node, its parameters [K, F, ...], as in `FreeParameters`.
        reads_frozen: Whether the head reads frozen units.
    """

    def __init__(self, graph: Graph, units: Mapping[str, int], tensors: Parameters, reads_frozen: bool) -> None:
        self.graph, self.units, self.tensors = graph, dict(units), tensors
        self.points = len(next(iter(tensors[graph.head].values())))
        self._reads_frozen = reads_frozen

    def width(self, node: Node) -> int:
        """Own channels that each point has at a node."""
        if node.groups == (CLASSES,):
            return self.tensors[self.graph.head]["weight.own"].shape[1]
        return node.taps * sum(self.units.get(group, 0) for group in node.groups)

    def forward(
        self,
        levels: Levels,
        training: bool = False,
        dtype: torch.dtype = torch.float32,
        graph: Graph | None = None,
        keep: bool = False,
        drawn: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The points' own values at each node, in packed form (`ops.py`); the last node's are the logits.

        Args:
            graph: Another order of the same nodes.
            keep: Whether all values are wanted, and not the logits alone.
            drawn: What other points of as many units have drawn for these samples, which is drawn if it is not there.
        """
        graph, drawn = graph or self.graph, {} if drawn is None else drawn
        values: dict[str, Tensor] = {}
        for node in graph.nodes:
            if self.width(node):
                values[node.name] = self.compute(graph, node, values, levels, training, dtype, drawn=drawn)
                if not keep:
                    for name in node.inputs:
                        if graph.last_readers[name] == node.name:
                            values.pop(name, None)
        return values

    def logits(self, values: Mapping[str, Tensor]) -> Tensor:
        """The logits [K, C, B] among what `forward` gave."""
        return values[self.graph.nodes[-1].name].unflatten(0, (self.points, -1))

    def compute(
        self,
        graph: Graph,
        node: Node,
        values: Mapping[str, Tensor],
        levels: Levels,
        training: bool = False,
        dtype: torch.dtype = torch.float32,
        first: int = 0,
        drawn: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """A node's own value, from those that it reads.

        Args:
            first: The first unit that is wanted, if not all are: of one point, and of one group. What is no layer is
                given its inputs from there on.
            drawn: As in `forward`.
        """
        tensors = self.tensors.get(node.name, {})
        drawn = {} if drawn is None else drawn
        if first:
            tensors = {name: tensor[:, first:] for name, tensor in tensors.items()}
        if not isinstance(node.op, Reader):
            own = [values[name] for name in node.inputs if name in values]
            if training and node.name in graph.in_place:
                return node.op.overwriting(own, graph.in_place[node.name])
            if training and isinstance(node.op, Dropout) and node.op.share:
                if node.name not in drawn:
                    samples_first = own[0] if own[0].ndim == 4 else own[0].T
                    drawn[node.name] = node.op.mask(samples_first.unflatten(1, (self.points, -1))[:, 0])
                tensors = {"mask": drawn[node.name]}
            return node.op.packed(own, tensors, self.points, training)
        source = graph.source(node)
        own_value, shared = values.get(source.name), self.shared(graph, node, levels)
        if shared is None and own_value is None:
            return self._bias_alone(node, tensors, len(levels[INPUT]), dtype)
        if shared is not None and training and (dropout := graph.dropout_of(source)) is not None and dropout.share:
            key = f"{source.name} shared"  # which all its readers see alike
            if key not in drawn:
                by_unit = shared.unflatten(1, (-1, source.taps)) if source.taps > 1 else shared
                drawn[key] = (by_unit * dropout.mask(by_unit)).reshape(shared.shape)
            shared = drawn[key]
        return node.op.read(shared, own_value, tensors, self.points, dtype)

    def shared(self, graph: Graph, node: Node, levels: Levels) -> Tensor | None:
        """The frozen channels that a layer reads, if there are any."""
        shared = levels.get(graph.source(node).name) if self._reads_frozen or node.name != graph.head else None
        return shared if shared is not None and shared.shape[1] else None

    def _bias_alone(self, node: Node, tensors: Mapping[str, Tensor], batch: int, dtype: torch.dtype) -> Tensor:
        """The value of a layer that reads no unit."""
        own = tensors["weight.own"]
        bias = tensors["bias"] if "bias" in tensors else own.new_zeros(own.shape[:2])
        if node.positions:
            return bias.to(dtype).view(1, -1, 1, 1).repeat(batch, 1, *node.positions)
        return bias.to(dtype).view(-1, 1).repeat(1, batch)


@dataclass(frozen=True)
class L1:
    """How the L1 penalty acts.

    Args:
        proximal: By soft thresholds after each step, which give exact zeros, instead of by its sub-gradient.
        scales: What multiplies alpha for the scales of normalisations: a normalised layer does not feel the size of
            its weights (Source: Liu et al. 2017, "network slimming").
    """

    proximal: bool = False
    scales: float = 1.0


class Regulariser:
    """What a method adds to the training of a pack besides L1; as it stands, nothing.

    It is made for one pack before its first step. What it does to a point must not depend on the point's pack-mates.
    """

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that it changes while it trains, by name: a part of the pack's checkpoints."""
        return {}

    def begin(self) -> None:
        """Adds to the gradients' buffers, before the data do."""

    def stepped(self) -> None:
        """Is told that the optimizer has moved the parameters."""

    def ended(self, epoch: int, epochs: int) -> None:
        """Is told that so many epochs of all are done."""


class Pack:
    """The free parameters of P points of one task, on top of a committed state.

    Args:
        state: What earlier tasks have committed.
        num_classes: C of the new task.
        alphas: For each point, the L1 coefficient of each layer, the head's last.
        initial: Each node's parameters at full size (`initial.draw`), from which all points start; or for each point
            the parameters that it starts from, which may have fewer units (after a round of pruning).
        dtype: Of the matrix products: float32 or bfloat16.
        together: How many points are computed as one block; by default one of a network of maps on a CPU, else all.

    Attributes:
        regulariser: Of a method that has one.
        class_tasks: [C] which task each class is of, where the classes are those of several; a sample is then told
            apart among those of its own task (logits of the others are masked out).
    """

    regulariser: Regulariser | None = None
    class_tasks: Tensor | None = None

    def __init__(
        self,
        state: State,
        num_classes: int,
        alphas: Sequence[Sequence[float]],
        initial: Parameters | Sequence[FreeParameters],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        l1: L1 | None = None,
        together: int | None = None,
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.num_points, self.num_classes = len(alphas), num_classes
        self.state, self.graph = state, state.graph
        self.trunk = Trunk(state, self.device)
        self._l1 = l1 or L1()
        columns = torch.tensor(alphas, dtype=torch.float32, device=self.device).T
        self._alphas = dict(zip(self.graph.layers, columns, strict=True))
        if isinstance(initial, Mapping):
            start = free_part(state, initial)
            size = together or (self.num_points if is_one_block(self.graph, self.device.type) else 1)
            starts = [start] * self.num_points
        else:
            size, starts = 1, list(initial)
        self.units = [start.units for start in starts]
        self._first = list(range(0, self.num_points, size))
        self.blocks = [self._block(starts[first : first + size]) for first in self._first]
        self._trained_order = self.graph.pooled_first
        whole = all(len(units) == self.graph.groups[group] for group, units in self.units[0].items())
        if whole and size == 1 and isinstance(initial, Mapping) and self.device.type == "cpu":
            self._trained_order = self._trained_order.in_blocks
        cpu = self.device.type == "cpu"  # elsewhere steps are recorded, each with memory of its own
        self._draw_once = cpu and all(block.units == self.blocks[0].units for block in self.blocks)
        self._random = any(isinstance(node.op, Dropout) and node.op.share for node in self.graph.nodes)
        self.replay = Replay(self.device)
        if self.device.type == "cuda":
            with torch.enable_grad():  # autograd's thread has a context after a first kernel; cuBLAS, without it, warns
                torch.ones((), device=self.device, requires_grad=True).exp().backward()

    def features(
        self, inputs: Tensor, labels: Tensor, cache_bytes: int = CACHE_BYTES, view: View | None = None
    ) -> Features:
        """A split of the task's data as this pack reads it: `inputs` [N, ...], `labels` [N]; see `Features`."""
        return Features(self.trunk, inputs.to(self.device), labels.to(self.device), cache_bytes, self.dtype, view)

    def parts(self, learning_rates: Sequence[float]) -> Iterator[tuple[float, list[Tensor]]]:
        """The trainable tensors, with their gradients, in parts that move at one rate, and that rate.

        Each point is a part. On a GPU neighbours of one rate are one: no value's bits depend there on where it stands.
        """
        apart = self.device.type == "cpu"
        for first, block in zip(self._first, self.blocks, strict=True):
            rates = learning_rates[first : first + block.points]
            for _, alike in itertools.groupby(range(block.points), lambda point: point if apart else rates[point]):  # noqa: B023
                start, *others = alike
                points = slice(start, start + 1 + len(others))
                yield rates[start], [_part(tensor, points) for tensor in self._trainable(block)]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that training changes, by name."""
        parameters = {
            f"{index}/{node}/{name}": tensor
            for index, block in enumerate(self.blocks)
            for node, own in block.tensors.items()
            for name, tensor in own.items()
        }
        return parameters | ({} if self.regulariser is None else self.regulariser.tensors)

    def trainable(self) -> Iterator[tuple[str, slice, Tensor]]:
        """What gradients move: its name as `node/parameter`, of which points it is, and its tensor [K, ...]."""
        for first, block in zip(self._first, self.blocks, strict=True):
            names = {
                id(tensor): f"{node}/{name}" for node, own in block.tensors.items() for name, tensor in own.items()
            }
            for tensor in self._trainable(block):
                yield names[id(tensor)], slice(first, first + block.points), tensor

    @property
    def training_flop(self) -> int:
        """Floating-point operations of one sample's forward and backward pass through all points' free layers."""
        flop = 0
        for block in self.blocks:
            for name in self.graph.layers:
                positions = math.prod(self.graph.by_name[name].positions)
                tensors = block.tensors[name]
                if "weight" in tensors:
                    flop += 6 * tensors["weight"].numel() * positions
                else:
                    flop += (4 * tensors["weight.shared"].numel() + 6 * tensors["weight.own"].numel()) * positions
        return flop

    def train_batch(self, features: Features, index: Tensor, seed: int = 0) -> Tensor:
        """Fills all gradients from the samples at `index`, L1 term included; gives each point's loss [P], summed.

        Args:
            seed: Of what is random in the network and in the samples' views.
        """
        self.replay("gradients", self._begin_gradients)
        losses = torch.zeros(self.num_points, device=self.device)
        size = microbatch(self.graph, len(index), self.device.type, self.dtype.itemsize)
        for part, chunk in enumerate(index.split(size)):
            batch, labels = features.batch(chunk, seed + part)
            levels = {name: self.replay.stage(name, level) for name, level in batch.items()}
            labels = self.replay.stage("labels", labels)
            drawn: dict[str, Tensor] = {}
            for first, block in zip(self._first, self.blocks, strict=True):
                if self._random:  # alike for all points, whoever shares a pack with whom
                    torch.manual_seed(seed + part)
                learn = partial(self._learn, block, levels, labels, len(index), drawn if self._draw_once else {})
                losses[first : first + block.points] += self.replay((first, len(labels), len(index)), learn)
        return losses

    def _learn(self, block: Block, levels: Levels, labels: Tensor, batch_size: int, drawn: dict[str, Tensor]) -> Tensor:
        """Adds a block's gradients of some samples of a batch; gives its points' losses [K], summed."""
        values = block.forward(levels, True, self.dtype, self._trained_order, drawn=drawn)
        logits = block.logits(values)
        loss, grad = cross_entropy(self._masked(logits.detach(), labels), labels, batch_size)
        if logits.requires_grad:
            # For `logits.backward(grad)` PyTorch imports sympy, to compare two shapes: half a second of every process.
            logits.register_hook(lambda _: grad)
            logits.sum().backward()
        return loss

    @torch.no_grad()
    def shrink(self, step_sizes: Sequence[float]) -> None:
        """Moves all penalised weights towards zero by alpha times the point's step size, as a proximal step does."""
        if not self._l1.proximal:
            return
        sizes = torch.tensor(step_sizes, device=self.device)
        for first, block in zip(self._first, self.blocks, strict=True):
            for tensor, alpha in self._penalised(first, block):
                bound = alpha * sizes[first : first + block.points].view(alpha.shape)
                tensor.copy_(tensor.sign() * (tensor.abs() - bound).clamp_(min=0))

    def num_correct(self, features: Features) -> list[int]:
        """For each point, the samples of a split that the network gets right, in the pack's precision."""
        correct = torch.zeros(self.num_points, dtype=torch.int64, device=self.device)
        with torch.no_grad():
            for levels, labels in features.batches():
                for first, block in zip(self._first, self.blocks, strict=True):
                    logits = block.logits(block.forward(levels, dtype=self.dtype, graph=self._trained_order))
                    correct[first : first + block.points] += (self._masked(logits, labels).argmax(1) == labels).sum(1)
        return correct.tolist()

    def activities(self, features: Features) -> list[dict[str, Tensor]]:
        """For each point, the mean post-activation value of each own unit over a split: for each group [F] float64.

        Source: paper, section 3.2. That maps count by their mean, activations that can be negative by their absolute
        value, and units that are seen at several nodes by the largest, is our choice.
        """
        watched = dict.fromkeys(name for names in self.graph.observed.values() for name in names)
        found: list[dict[str, Tensor]] = []
        for block in self.blocks:
            sums = self._sums(block, features, watched, self._summed)
            found.extend(self._by_group(block, sums, len(features)))
        return found

    def means(self, features: Features) -> list[dict[str, Tensor]]:
        """For each point, what `FreeParameters.means` holds, over a split."""
        keeps_bias = self.state.bias_is_frozen or self.state.architecture.bias_rule == "none"
        layers = [
            node
            for node in self.graph.nodes
            if isinstance(node.op, Reader)
            and self.graph.shift_of(node.name)
            and not (node.name == self.graph.head and keeps_bias)
        ]
        sources = dict.fromkeys(self.graph.source(node).name for node in layers)
        found: list[dict[str, Tensor]] = []
        for block in self.blocks:
            sums = self._sums(block, features, sources, _total)
            for point in range(block.points):
                found.append({})
                for node in layers:
                    source = self.graph.source(node)
                    if source.name in sums:
                        mean = (sums[source.name] / len(features)).view(block.points, -1, source.taps)[point]
                        found[-1][node.name] = mean.float().cpu()
        return found

    def finite(self, activities: Sequence[Mapping[str, Tensor]] = ()) -> list[bool]:
        """For each point, whether all its parameters, and its units' activities, are finite."""
        checks = [
            torch.stack(
                [values.isfinite().flatten(1).all(1) for own in block.tensors.values() for values in own.values()]
            )
            for block in self.blocks
        ]
        finite = torch.cat([check.all(0) for check in checks]).tolist()
        for position, seen in enumerate(activities):
            finite[position] = finite[position] and all(bool(values.isfinite().all()) for values in seen.values())
        return finite

    def point(
        self, position: int, activities: Mapping[str, Tensor], means: Mapping[str, Tensor] | None = None
    ) -> FreeParameters:
        """The parameters of the pack's point at `position`, on the CPU, with its units' activities and means."""
        which = max(index for index, first in enumerate(self._first) if first <= position)
        own = {
            node: {name: tensor[position - self._first[which]].detach().cpu().clone() for name, tensor in each.items()}
            for node, each in self.blocks[which].tensors.items()
        }
        cpu = {group: values.cpu() for group, values in activities.items()}
        return FreeParameters(self.units[position], own, cpu, dict(means or {}))

    def _masked(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits [K, C, B] without those of other tasks than the samples'."""
        tasks = self.class_tasks
        return logits if tasks is None else logits.masked_fill(tasks[:, None] != tasks[labels], -math.inf)

    def _block(self, starts: Sequence[FreeParameters]) -> Block:
        tensors: Parameters = {
            node: {
                name: torch.stack([start.tensors[node][name] for start in starts]).to(self.device, copy=True)
                for name in each
            }
            for node, each in starts[0].tensors.items()
        }
        units = {group: len(units) for group, units in starts[0].units.items()}
        block = Block(self.graph, units, tensors, self.state.architecture.head_reads_frozen)
        for tensor in self._trainable(block):
            tensor.requires_grad_()
            tensor.grad = torch.zeros_like(tensor)
        self._keep_lacking(block, {INPUT: torch.arange(0), **starts[0].units})
        return block

    def _keep_lacking(self, block: Block, own: Units) -> None:
        """Keeps weights that a layer lacks at zero: no gradient of the data reaches them, and of zero L1 makes none."""
        for layer, lacks in self.graph.lacking.items():
            for name, columns in (("weight.shared", self.state.active()), ("weight.own", own)):
                cut = chosen(self.graph, self.graph.by_name[layer], {"weight": lacks}, own, columns)["weight"]
                mask = cut.to(self.device)
                block.tensors[layer][name].register_hook(partial(torch.masked_fill, mask=mask, value=0.0))

    def _trainable(self, block: Block) -> list[Tensor]:
        return [
            tensor
            for node, own in block.tensors.items()
            for name, tensor in own.items()
            if name not in self.graph.by_name[node].op.STATISTICS
            and not (self.state.bias_is_frozen and node == self.graph.head and name == "bias")
        ]

    def _penalised(self, first: int, block: Block) -> Iterator[tuple[Tensor, Tensor]]:
        """What the L1 term acts on: tensors [K, ...], and each point's coefficient [K, 1, ...]."""
        for node, own in block.tensors.items():
            for name, tensor in own.items():
                if name.startswith("weight"):
                    alpha = self._alphas[node]
                elif name == "scale" and self._l1.scales:
                    alpha = self._l1.scales * self._alphas[self.graph.normalised_layer(self.graph.by_name[node])]
                else:
                    continue
                yield tensor, alpha[first : first + block.points].view(-1, *[1] * (tensor.ndim - 1))

    @torch.no_grad()
    def _begin_gradients(self) -> None:
        """Puts the L1 term's sub-gradient, alpha times the sign, into the buffers; zeros where there is none."""
        for first, block in zip(self._first, self.blocks, strict=True):
            penalised = {id(tensor): alpha for tensor, alpha in self._penalised(first, block)}
            for tensor in self._trainable(block):
                assert tensor.grad is not None
                if self._l1.proximal or id(tensor) not in penalised:
                    tensor.grad.zero_()
                else:
                    torch.sign(tensor, out=tensor.grad).mul_(penalised[id(tensor)])
        if self.regulariser is not None:
            self.regulariser.begin()

    @torch.no_grad()
    def _sums(
        self, block: Block, features: Features, names: Iterable[str], total: Callable[[Node, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """What `total` makes of a batch's values at each node, summed over a split."""
        sums: dict[str, Tensor] = {}
        for levels, _ in features.batches():
            values = block.forward(levels, dtype=self.dtype, keep=True)
            for name in names:
                if name in values:
                    of_batch = total(self.graph.by_name[name], values[name])
                    sums[name] = sums[name] + of_batch if name in sums else of_batch
        return sums

    def _summed(self, node: Node, values: Tensor) -> Tensor:
        """The sum of a batch's absolute values [K * units] of a node; the mean over positions and taps."""
        total = _total(node, values if self.graph.non_negative(node.name) else values.abs())
        return total.unflatten(0, (-1, node.taps)).mean(1)

    def _by_group(self, block: Block, sums: Mapping[str, Tensor], samples: int) -> list[dict[str, Tensor]]:
        largest = {
            group: torch.zeros(block.points, units, dtype=torch.float64, device=self.device)
            for group, units in block.units.items()
        }
        for name, total in sums.items():
            groups = [group for group in self.graph.by_name[name].groups if block.units.get(group)]
            by_point = total.view(block.points, -1)
            for group, seen in zip(groups, by_point.split([block.units[group] for group in groups], 1), strict=True):
                if name in self.graph.observed[group]:
                    largest[group] = torch.maximum(largest[group], seen / samples)
        return [{group: values[point] for group, values in largest.items()} for point in range(block.points)]


def _total(node: Node, values: Tensor) -> Tensor:
    """The sum of a batch's values [K * channels] of a node, in float64; the mean over positions."""
    if values.ndim == 4:
        return values.sum((0, 2, 3), dtype=torch.float64) / math.prod(node.positions)
    return values.sum(1, dtype=torch.float64)


def cross_entropy(logits: Tensor, labels: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Each point's loss [K], summed over these samples, and the gradient [K, C, B] of its mean over a batch.

    Args:
        logits: [K, C, B].
        labels: [B] int64.
        batch_size: Of the batch that these samples are of.
    """
    # Written out: torch.log_softmax over ten classes is several times slower on a CPU than these elementwise passes.
    shifted = logits.float() - logits.amax(1, keepdim=True).float()
    target = labels.expand(len(logits), 1, -1)
    at_target = shifted.gather(1, target)
    exponential = shifted.exp_()
    total = exponential.sum(1, keepdim=True)
    loss = (total.log() - at_target).sum((1, 2))
    grad = exponential.div_(total)
    grad.scatter_add_(1, target, torch.full_like(at_target, -1.0))
    return loss, grad.div_(batch_size).to(logits.dtype)


def _can_learn(node: Node, free: Mapping[str, Tensor], head_reads_frozen: bool) -> bool:
    """Whether a layer has weights from frozen units to something that is free."""
    if node.groups == (CLASSES,):
        return head_reads_frozen
    return any(len(free[group]) for group in node.groups)


def free_part(state: State, initial: Parameters) -> FreeParameters:
    """The free units' part of full-size parameters."""
    graph, free, active, tensors = state.graph, state.free, state.active(), {}
    nothing = dict.fromkeys(free, torch.arange(0))
    for node in graph.nodes:
        if node.name not in initial:
            continue
        full = dict(initial[node.name])
        if node.groups == (CLASSES,):
            if state.bias_is_frozen:
                full["bias"] = state.heads[0]["bias"]
            if state.architecture.bias_rule == "none":
                full.pop("bias", None)
        own = chosen(graph, node, full, free, free)
        if isinstance(node.op, Reader):
            of_head = node.groups == (CLASSES,)
            frozen = active if state.architecture.head_reads_frozen or not of_head else nothing
            own["weight.own"] = own.pop("weight")
            own["weight.shared"] = chosen(graph, node, {"weight": full["weight"]}, free, frozen)["weight"]
        tensors[node.name] = own
    units = {group: free[group] for group in graph.groups}
    return FreeParameters(units, tensors, {})


def _part(tensor: Tensor, points: slice) -> Tensor:
    """The part of some points of a tensor [K, ...], with its part of the gradient."""
    part = tensor.detach()[points]
    assert tensor.grad is not None
    part.grad = tensor.grad[points]
    return part


def _rows(level: Tensor, index: Tensor | slice) -> Tensor:
    """Some samples of a level, in the memory order that it has."""
    if isinstance(index, slice):
        return level[index]
    if level.ndim == 4:
        return level.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return level.index_select(0, index)


def _room(level: Tensor, samples: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised values of a level, in the memory order that levels have, for so many samples."""
    order = torch.channels_last if level.ndim == 4 else torch.contiguous_format
    return torch.empty((samples, *level.shape[1:]), dtype=dtype, device=level.device, memory_format=order)


def _channels_last(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last) if values.ndim == 4 else values
