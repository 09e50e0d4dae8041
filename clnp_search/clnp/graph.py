"""A network as data: nodes in order, and the groups of units that live and die together.

`mlp` and `conv` build one here, `trace.py` makes one of a module. Whoever computes with a network, counts it or writes
it walks its graph, and none of them knows a kind of network by name. The state before and after each task, the pack,
the scan and the subnetwork are the same walk (`run`) over different choices of units.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clnp_search.clnp.ops import (
    ACTIVATIONS,
    OPS,
    Activation,
    AdaptivePool,
    Add,
    AvgPool,
    BatchNorm,
    Concat,
    Conv,
    Dropout,
    Flatten,
    GroupedConv,
    Identity,
    LargestPosition,
    Linear,
    MaxPool,
    MeanPositions,
    Multiply,
    Op,
    Pad,
    Reader,
    Tensors,
    ToMap,
)

INPUT, CLASSES = "input", "classes"
Units = Mapping[str, Tensor]


@dataclass(frozen=True)
class Node:
    """One operation.

    Args:
        name: Unique; a layer's name as files and tables show it.
        inputs: Names of the nodes that it reads, or `INPUT`.
        groups: Of whose units its channels are, one group after another.
        positions: (H, W) of its map, or () if it is flat.
        taps: Flat values of each unit.
    """

    name: str
    op: Op
    inputs: tuple[str, ...]
    groups: tuple[str, ...]
    positions: tuple[int, ...] = ()
    taps: int = 1


@dataclass(frozen=True)
class Graph:
    """A network: nodes in an order in which each one's inputs come before it; the last one's output are the logits.

    Args:
        input_shape: Of a sample as the network takes it: (features,) or (C, H, W).
        groups: Units of each group, in the order of their first writers. The samples' channels (`INPUT`) and the
            classes (`CLASSES`) are groups too, but no part of this: nothing prunes them.
    """

    input_shape: tuple[int, ...]
    groups: dict[str, int]
    nodes: tuple[Node, ...]

    @cached_property
    def by_name(self) -> dict[str, Node]:
        """All nodes, the input included."""
        source = Node(INPUT, Op(), (), (INPUT,), self.input_shape[1:])
        return {INPUT: source} | {node.name: node for node in self.nodes}

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Names of the nodes that have weights, the head last."""
        weighty = [node.name for node in self.nodes if isinstance(node.op, Reader) or "weight" in self.shapes(node)]
        return (*(name for name in weighty if name != self.head), self.head)

    @cached_property
    def head(self) -> str:
        """The node whose output units are the classes."""
        return next(node.name for node in self.nodes if isinstance(node.op, Reader) and node.groups == (CLASSES,))

    def units(self, groups: Iterable[str]) -> int:
        """Units of these groups together; the head's are counted as none, because their number is the task's."""
        return sum(self.input_shape[0] if group == INPUT else self.groups.get(group, 0) for group in groups)

    def source(self, node: Node) -> Node:
        """The first node that a node reads."""
        return self.by_name[node.inputs[0]]

    def shapes(self, node: Node, classes: int = 0) -> dict[str, tuple[int, ...]]:
        """Shapes of a node's parameters at full size; the head's for a number of classes."""
        source = self.source(node)
        rows = classes if node.groups == (CLASSES,) else self.units(node.groups)
        return node.op.shapes(rows, self.units(source.groups), source.taps)

    @cached_property
    def lacking(self) -> dict[str, Tensor]:
        """Of the layers that do not read every unit: which weights they lack, [out unit, in unit, 1] bool."""
        found = {}
        for name in self.layers:
            node = self.by_name[name]
            lacks = node.op.lacks(self.units(node.groups), self.units(self.source(node).groups))
            if lacks is not None:
                found[name] = lacks[:, :, None]
        return found

    def index(self, groups: Sequence[str], units: Units) -> Tensor:
        """Where `units` of each group stand among all units of `groups`."""
        if len(groups) == 1:
            return units[groups[0]]
        start, places = 0, []
        for group in groups:
            places.append(units[group] + start)
            start += self.units([group])
        return torch.cat(places)

    @cached_property
    def observed(self) -> dict[str, tuple[str, ...]]:
        """At which nodes each group's activity is seen: the outputs of its activations, before any pooling.

        A factor of a product is seen as part of the product (a gate says nothing by itself), unless a layer, a sum or a
        concatenation reads it as well. A group without an activation is seen as it is read.
        """
        factors: set[str] = set()
        elsewhere = {name for node in self.nodes if isinstance(node.op, Reader | Add | Concat) for name in node.inputs}
        for node in reversed(self.nodes):  # a factor may have changed its shape after its activation
            is_passed_on = node.name in factors and not _is_activation(node) and not node.op.shapes(1, 1, 1)
            if isinstance(node.op, Multiply) or (is_passed_on and len(node.inputs) == 1):
                factors.update(node.inputs)
        active = [
            node
            for node in self.nodes
            if isinstance(node.op, Multiply) or (_is_activation(node) and node.name not in factors - elsewhere)
        ]
        read = [self.source(node) for node in self.nodes if isinstance(node.op, Reader)]
        return {
            group: tuple(
                dict.fromkeys(
                    [node.name for node in active if group in node.groups]
                    or [node.name for node in read if group in node.groups]
                )
            )
            for group in self.groups
        }

    def non_negative(self, name: str) -> bool:
        """Whether no value of a node is below zero."""
        op = self.by_name[name].op
        return isinstance(op, Activation) and op.non_negative

    @cached_property
    def last_readers(self) -> dict[str, str]:
        """After which node each value is not needed any more."""
        return {name: node.name for node in self.nodes for name in node.inputs}

    @cached_property
    def in_place(self) -> dict[str, int]:
        """Which of its inputs a rectifier or a sum may overwrite while training: one that nothing else needs."""
        fresh = (Reader, BatchNorm, MaxPool, Add)
        reads = [name for node in self.nodes for name in node.inputs]
        found = {}
        for node in self.nodes:
            if isinstance(node.op, Add) or (isinstance(node.op, Activation) and node.op.function == "relu"):
                for index, name in enumerate(node.inputs):
                    read = self.by_name[name]
                    as_large = read.positions == node.positions  # a map of one position is added to all of another
                    if isinstance(read.op, fresh) and as_large and reads.count(name) == 1:
                        found[node.name] = index
                        break
        return found

    def dropout_of(self, node: Node) -> Dropout | None:
        """The dropout that a node's values have gone through, if what came after it could as well have come before.

        That is a rectifier or another shape; and pooling, where a channel is dropped as a whole.
        """
        pools, pooled = MaxPool | AvgPool | AdaptivePool | MeanPositions | LargestPosition, False
        while True:
            if isinstance(node.op, Dropout):
                return None if pooled and node.op.unit == "value" else node.op
            pooled = pooled or isinstance(node.op, pools)
            rectified = isinstance(node.op, Activation) and node.op.function == "relu"
            if not rectified and not isinstance(node.op, pools | Flatten | ToMap | Identity | Pad):
                return None
            node = self.source(node)

    def shift_of(self, name: str) -> tuple[str, str, int] | None:
        """Where a constant that is added to a layer's output goes: node, parameter and sign; None if nowhere.

        Into its bias, or out of the mean that a normalisation subtracts right after it.
        """
        if "bias" in self.shapes(self.by_name[name]):
            return name, "bias", 1
        readers = [node for node in self.nodes if name in node.inputs]
        if len(readers) == 1 and isinstance(readers[0].op, BatchNorm):
            return readers[0].name, "mean", -1
        return None

    def upstream(self, names: Iterable[str]) -> set[str]:
        """These nodes and all that they depend on."""
        found = set(names)
        for node in reversed(self.nodes):
            if node.name in found:
                found.update(node.inputs)
        return found

    def normalised_layer(self, node: Node) -> str:
        """The layer whose output a normalisation scales: the nearest one before it."""
        seen = node
        while not isinstance(seen.op, Reader) and "weight" not in self.shapes(seen):
            seen = self.source(seen)
            if seen.name == INPUT:
                return self.layers[0]
        return seen.name

    @cached_property
    def has_batch_statistics(self) -> bool:
        """Whether a sample's value depends on its batch while training."""
        return any(isinstance(node.op, BatchNorm) for node in self.nodes)

    @cached_property
    def is_dense(self) -> bool:
        """Whether all values are flat, so that all points of a pack are best computed as one batched product."""
        return all(not node.positions for node in self.nodes) and not any(
            isinstance(node.op, Dropout) for node in self.nodes
        )

    @cached_property
    def largest_value(self) -> int:
        """Numbers in the largest value of a sample."""
        return max(self.units(node.groups) * node.taps * math.prod(node.positions) for node in self.by_name.values())

    def parameters(self, classes: int) -> dict[str, int]:
        """Trained parameters of each layer, those of normalisations and slopes counted to the layer before them."""
        counts = dict.fromkeys(self.layers, 0)
        for node in self.nodes:
            if shapes := self.shapes(node, classes):
                layer = node.name if node.name in counts else self.normalised_layer(node)
                counts[layer] += sum(math.prod(shapes[name]) for name in shapes if name not in node.op.STATISTICS)
        for name, lacks in self.lacking.items():
            counts[name] -= int(lacks.sum()) * self.shapes(self.by_name[name])["weight"][2]
        return counts

    def flop(self, units: Mapping[str, int] | None = None, classes: int = 10) -> dict[str, int]:
        """Floating-point operations a sample of each layer's matrix products, with so many units in each group."""
        counts = {**(units or self.groups), INPUT: self.input_shape[0], CLASSES: classes}
        found = {}
        for name in self.layers:
            node = self.by_name[name]
            rows, columns = (sum(counts[group] for group in each.groups) for each in (node, self.source(node)))
            found[name] = node.op.flop(rows, columns, self.source(node).taps, math.prod(node.positions))
        return found

    def value_size(self, name: str, units: Mapping[str, int]) -> int:
        """Numbers of a node's value of one sample, with so many units in each group."""
        node = self.by_name[name]
        return sum(units.get(group, 0) for group in node.groups) * node.taps * math.prod(node.positions)

    def hidden_weights(self, units: Mapping[str, int]) -> int:
        """Weights between so many units of each group, the samples' channels included and the head left out."""
        counts, total = {**units, INPUT: self.input_shape[0]}, 0
        for name in self.layers[:-1]:
            node = self.by_name[name]
            rows, columns = (sum(counts[group] for group in each.groups) for each in (node, self.source(node)))
            weights = math.prod(node.op.shapes(rows, columns, self.source(node).taps)["weight"])
            lacks = self.lacking.get(name)
            total += weights if lacks is None else round(weights * float((~lacks).float().mean()))
        return total

    @cached_property
    def pooled_first(self) -> Graph:
        """The same function with every activation that never falls after the maximum pool that alone reads it.

        Values and gradients are the same, bit for bit, and there are fewer of them to compute. The values between,
        at which activity is seen, are not there.
        """
        readers: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                readers.setdefault(name, []).append(node)
        swapped: dict[str, Node] = {}
        for node in self.nodes:
            after = readers.get(node.name, [])
            rising = isinstance(node.op, Activation) and node.op.monotone
            if rising and len(after) == 1 and isinstance(after[0].op, MaxPool):
                pool = after[0]
                swapped[node.name] = replace(node, op=pool.op, positions=pool.positions)
                swapped[pool.name] = replace(pool, op=node.op)
        return replace(self, nodes=tuple(swapped.get(node.name, node) for node in self.nodes))

    @cached_property
    def in_blocks(self) -> Graph:
        """The same function where all units are computed: convolutions in blocks go block by block.

        But for those that have gained units, whose blocks do not stand one after another.
        """
        nodes = []
        for node in self.nodes:
            op = node.op
            if isinstance(op, GroupedConv):
                units = self.units(node.groups), self.units(self.source(node).groups)
                op = replace(op, apart=units == (op.blocks * op.rows, op.blocks * op.columns))
            nodes.append(replace(node, op=op))
        return replace(self, nodes=tuple(nodes))

    def widened(self, groups: Mapping[str, int]) -> Graph:
        """The same network with other numbers of units in some groups."""
        return replace(self, groups={**self.groups, **groups})

    def to_json(self) -> dict[str, Any]:
        """As plain data, from which `from_json` makes the same graph."""
        nodes = [{**asdict(node), "op": {"kind": type(node.op).__name__, **asdict(node.op)}} for node in self.nodes]
        return {"input_shape": self.input_shape, "groups": self.groups, "nodes": nodes}

    @classmethod
    def from_json(cls, data: Any) -> Graph:
        """The graph that `to_json` wrote.

        Raises:
            ValueError: These are no such data, or no network.
        """
        try:
            nodes = []
            for entry in data["nodes"]:
                op = dict(entry["op"])
                kind = OPS[op.pop("kind")]
                if op.keys() != {field.name for field in fields(kind)}:
                    raise ValueError(f"{entry['name']}: the settings of its {kind.__name__} are others")
                values = {**entry, "op": kind(**{key: _tuples(value) for key, value in op.items()})}
                nodes.append(Node(**{key: _tuples(value) for key, value in values.items()}))
            graph = cls(tuple(data["input_shape"]), dict(data["groups"]), tuple(nodes))
            graph.check()
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"no network: {type(error).__name__}: {error}") from error
        return graph

    def check(self) -> None:
        """Walks the whole network on shapes alone.

        Raises:
            ValueError: Its nodes do not fit each other, or name an activation that is not known.
        """
        builder = Builder(self.input_shape)
        for node in self.nodes:
            units = {group: self.groups[group] for group in node.groups if group in self.groups}
            if isinstance(node.op, Activation) and node.op.function not in ACTIVATIONS:
                raise ValueError(f"{node.name}: {node.op.function!r} is no activation")
            if isinstance(node.op, Reader):
                builder.layer(node.name, node.op, node.inputs[0], sum(units.values()), head=node.groups == (CLASSES,))
            else:
                builder.add(node.name, node.op, *node.inputs)
        if builder.build() != self or self.nodes[-1].groups != (CLASSES,):
            raise ValueError("its groups or shapes are not those of its nodes")


def run(
    graph: Graph,
    values: dict[str, Tensor],
    tensors: Mapping[str, Tensors],
    wanted: Iterable[str] | None = None,
    keep: Iterable[str] = (),
) -> dict[str, Tensor]:
    """Computes a network, or the part of it that is wanted, on a choice of units, in evaluation.

    Args:
        values: What is known, at least the input; is not changed.
        tensors: Each node's parameters, for the chosen units.
        wanted: Nodes to compute; all by default.
        keep: Nodes whose values are needed besides the wanted ones, or, by default, the last node's.

    Returns:
        The values of the wanted nodes (of the last one by default) and of those to keep.
    """
    targets = set(wanted if wanted is not None else [graph.nodes[-1].name])
    needed, kept, values = graph.upstream(targets - values.keys()), targets | set(keep), dict(values)
    batch = next(iter(values.values())).shape[0]
    for node in graph.nodes:
        if node.name in needed and node.name not in values:
            inputs = [values[name] for name in node.inputs]
            values[node.name] = compute(node, inputs, tensors.get(node.name, {}), batch)
            for name in node.inputs:
                if graph.last_readers[name] == node.name and name not in kept:
                    values.pop(name, None)
    return {name: values[name] for name in kept if name in values}


def compute(node: Node, inputs: Sequence[Tensor], tensors: Tensors, batch: int) -> Tensor:
    """A node's plain value; what has no channel, or reads none, is empty, or its bias alone."""
    if isinstance(node.op, Reader):
        weight = tensors["weight"]
        if not weight.shape[0] or not weight.shape[1]:
            bias = tensors.get("bias")
            start = weight.new_zeros(len(weight)) if bias is None else bias
            return start.view(1, -1, *[1] * len(node.positions)).expand(batch, -1, *node.positions)
    elif not inputs[0].shape[1] and not isinstance(node.op, Concat):
        return inputs[0].new_zeros(batch, 0, *node.positions)
    return node.op.plain(inputs, tensors)


def chosen(graph: Graph, node: Node, tensors: Tensors, rows: Units, columns: Units) -> dict[str, Tensor]:
    """A node's parameters for some units of its output and of its input, cut out of full-size ones."""
    row_index = None if node.groups == (CLASSES,) else graph.index(node.groups, rows)
    cut = {}
    for name, tensor in tensors.items():
        part = tensor if row_index is None else tensor.index_select(0, row_index)
        if name in node.op.MATRICES:
            part = part.index_select(1, graph.index(graph.source(node).groups, columns))
        cut[name] = part
    return cut


class Builder:
    """Puts a graph together node by node, working out shapes and groups.

    Args:
        input_shape: (features,) or (C, H, W).
    """

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        self._input_shape = input_shape
        self._nodes: dict[str, Node] = {INPUT: Node(INPUT, Op(), (), (INPUT,), tuple(input_shape[1:]))}
        self._sizes = {INPUT: input_shape[0], CLASSES: 1}
        self._merged: dict[str, str] = {}

    def layer(self, name: str, op: Reader, source: str, units: int, head: bool = False) -> str:
        """Adds a node with a weight matrix and a new group of units, or the head. Gives its name.

        Raises:
            ValueError: It does not fit what it reads.
        """
        if isinstance(op, GroupedConv) and (head or len(self._nodes[source].groups) > 1):
            raise ValueError("has groups, which a head, or what reads a concatenation, cannot have")
        group = CLASSES if head else name
        if not head:
            self._sizes[group] = units
        return self._append(name, op, (source,), (group,))

    def add(self, name: str, op: Op, *inputs: str) -> str:
        """Adds any other node. Gives its name.

        Raises:
            ValueError: Its inputs do not fit each other; the message says how.
        """
        read = [self._nodes[each] for each in inputs]
        if isinstance(op, Concat):
            groups = tuple(group for node in read for group in self._groups(node))
            if len({(node.positions, node.taps) for node in read}) > 1:
                sizes = ", ".join(str(node.taps) for node in read)
                raise ValueError(
                    "joins values of different shapes"
                    if any(node.positions for node in read)
                    else f"joins flattened maps of {sizes} values a channel; give each a linear layer of its own"
                )
            return self._append(name, op, inputs, groups)
        if "weight" in op.shapes(1, 1, 1) and not read[0].positions:
            raise ValueError("convolves flat values")
        if op.shapes(1, 1, 1) and INPUT in read[0].groups:
            raise ValueError("has parameters for the samples' own channels, which no task could own")
        if op.shapes(1, 1, 1) and read[0].taps > 1:
            raise ValueError("has a parameter for each position of a flattened map")
        for other in read[1:]:
            self._tie(read[0], other)
        return self._append(name, op, inputs, self._groups(read[0]))

    def node(self, name: str) -> Node:
        """A node that was added."""
        return self._nodes[name]

    def units(self, name: str) -> int:
        """Channels of a node, a unit's taps counted once."""
        return sum(self._sizes[group] for group in self._groups(self._nodes[name]))

    def build(self) -> Graph:
        """The graph of all nodes so far; what does not lead to the last one is left out."""
        nodes = [replace(node, groups=self._groups(node)) for node in self._nodes.values() if node.name != INPUT]
        used = Graph(self._input_shape, {}, tuple(nodes)).upstream([nodes[-1].name])
        nodes = [node for node in nodes if node.name in used]
        names = dict.fromkeys(group for node in nodes for group in node.groups if group not in (INPUT, CLASSES))
        return Graph(self._input_shape, {name: self._sizes[name] for name in names}, tuple(nodes))

    def _groups(self, node: Node) -> tuple[str, ...]:
        return tuple(self._root(group) for group in node.groups)

    def _root(self, group: str) -> str:
        while group in self._merged:
            group = self._merged[group]
        return group

    def _tie(self, one: Node, other: Node) -> None:
        """What meets in a sum or a product lives and dies together."""
        first, second = self._groups(one), self._groups(other)
        if CLASSES in set(first) ^ set(second):
            raise ValueError(f"ties units to the {CLASSES}")
        if [self._sizes[group] for group in first] != [self._sizes[group] for group in second]:
            raise ValueError(f"joins {one.name} and {other.name}, whose units do not stand one to one")
        order = list(self._sizes)
        for pair in zip(first, second, strict=True):
            mine, yours = map(self._root, pair)  # one may have been tied just now
            if mine != yours:
                if INPUT in (mine, yours):
                    raise ValueError(f"ties units to the {INPUT}")
                early, late = sorted((mine, yours), key=order.index)
                self._merged[late] = early

    def _append(self, name: str, op: Op, inputs: tuple[str, ...], groups: tuple[str, ...]) -> str:
        if name in self._nodes:
            raise ValueError(f"there are two nodes named {name!r}")
        read = [self._nodes[each] for each in inputs]
        if not all(self._sizes[self._root(group)] for group in groups):
            raise ValueError("has no units")
        # No samples, of one unit of each group, tell all shapes and take no memory. (So would the meta device, but it
        # imports torch.compile and sympy for them: a second of every command.)
        rows = len(groups)
        values = [torch.empty(0, len(node.groups) * node.taps, *node.positions) for node in read]
        try:
            shapes = op.shapes(rows, len(read[0].groups), read[0].taps)
            shape = op.plain(values, {parameter: torch.empty(size) for parameter, size in shapes.items()}).shape
        except (RuntimeError, IndexError, TypeError, ArithmeticError) as error:
            raise ValueError(str(error).strip().partition("\n")[0]) from error
        positions = tuple(shape[2:])
        if len(shape) < 2 or shape[0] or len(positions) not in (0, 2) or shape[1] % rows:
            raise ValueError(f"gives values of shape {tuple(shape[1:])} for one unit of each group")
        self._nodes[name] = Node(name, op, inputs, groups, positions, shape[1] // rows)
        return name


def mlp(in_features: int, hidden: Sequence[int], activation: str = "relu", head_bias: bool = True) -> Graph:
    """A multilayer perceptron with layers hidden0, hidden1, ... and a head."""
    builder = Builder((in_features,))
    last = INPUT
    for index, units in enumerate(hidden):
        layer = builder.layer(f"hidden{index}", Linear(), last, units)
        last = builder.add(f"hidden{index}.{activation}", Activation(activation), layer)
    builder.layer("head", Linear(bias=head_bias), last, 0, head=True)
    return builder.build()


def conv(
    input_shape: tuple[int, ...],
    layers: Sequence[int | str],
    dense: Sequence[int] = (),
    activation: str = "relu",
    dropout: float = 0.0,
    batch_norm: bool = False,
    head_bias: bool = True,
) -> Graph:
    """A convolutional network: 3 x 3 convolutions of as many channels as named, and maximum pools, then dense layers.

    Args:
        input_shape: (C, H, W).
        layers: A number of channels for each convolution (padding 1); `valid N` for one without padding; `pool`.
        dropout: After each pool, and twice as much, at most a half, after each dense layer.
        batch_norm: Whether each convolution is normalised; it then has no bias.
    """
    builder = Builder(input_shape)
    last, number = INPUT, 0
    for index, entry in enumerate(layers):
        if entry == "pool":
            last = builder.add(f"pool{index}", MaxPool(), last)
            if dropout:
                last = builder.add(f"pool{index}.dropout", Dropout(dropout), last)
            continue
        name, (padding, units) = f"conv{number}", _convolution(entry)
        number += 1
        op = Conv(bias=not batch_norm, padding=(padding, padding))
        last = builder.layer(name, op, last, units)
        if batch_norm:
            last = builder.add(f"{name}.norm", BatchNorm(), last)
        last = builder.add(f"{name}.{activation}", Activation(activation), last)
    last = builder.add("flatten", Flatten(), last)
    for index, units in enumerate(dense):
        layer = builder.layer(f"dense{index}", Linear(), last, units)
        last = builder.add(f"dense{index}.{activation}", Activation(activation), layer)
        if dropout:
            last = builder.add(f"dense{index}.dropout", Dropout(min(0.5, 2 * dropout)), last)
    builder.layer("head", Linear(bias=head_bias), last, 0, head=True)
    return builder.build()


def zenke(input_shape: tuple[int, ...], width: float = 1.0, head_bias: bool = True) -> Graph:
    """The network of Zenke, Poole and Ganguli (2017) for split CIFAR, every layer `width` times as wide."""
    narrow, wide, dense = (max(1, round(width * units)) for units in (32, 64, 512))
    layers: list[int | str] = [narrow, f"valid {narrow}", "pool", wide, f"valid {wide}", "pool"]
    return conv(input_shape, layers, [dense], dropout=0.25, head_bias=head_bias)


def _convolution(entry: int | str) -> tuple[int, int]:
    """Padding and channels of an entry of `conv`'s layers."""
    return (1, entry) if isinstance(entry, int) else (0, int(entry.removeprefix("valid ")))


def _is_activation(node: Node) -> bool:
    return isinstance(node.op, Activation) or "slope" in node.op.shapes(1, 1, 1)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, list | tuple) else value
