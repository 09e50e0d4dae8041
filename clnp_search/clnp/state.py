"""What a task sequence has committed: the frozen part of the network, task after task.

A state holds full-size tensors in which only frozen entries differ from zero: the rows of active units, and in each row
only the columns of units that were active at its commit. Free units have no parameters here; every new task draws
fresh ones (`initial.py`). What a task computes is its `Subnetwork` (`subnetwork.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor

from clnp_search.clnp.graph import CLASSES, INPUT, Graph, Node
from clnp_search.clnp.ops import Reader

KEEP_ALL = -1.0  # as a threshold: below every activity
FREE = 2**31 - 1  # later than any task: a unit is active for a task if it was born at or before it
FORMAT = "clnp-state-2"

Parameters = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Architecture:
    """A network of fixed size and the kind of its output layer.

    Args:
        head: `multi` (an output layer for each task), `single` (one for all tasks, which each task reads through the
            units that it grew), or `shared` (one that all tasks read in the same way: of baselines).
        head_bias: Of a single head: `frozen` after the first task, `per_task`, or `none`. A multi head has a bias of
            its own, if the graph's head has one.
    """

    graph: Graph
    head: str = "multi"
    head_bias: str = "frozen"

    @property
    def head_reads_frozen(self) -> bool:
        """Whether a task's head reads what earlier tasks grew, and the samples themselves."""
        return self.head != "single"

    @property
    def bias_rule(self) -> str:
        """How the head's bias lives: `per_task`, `frozen` after the first, or `none`."""
        op = self.graph.by_name[self.graph.head].op
        if not (isinstance(op, Reader) and op.bias):
            return "none"
        return "per_task" if self.head == "multi" else self.head_bias


@dataclass(frozen=True)
class InputTransform:
    """How a task sees a raw sample: subtract `mean` and divide by `std`, channel by channel, then take values in order.

    Args:
        mean: Of each channel of a raw sample; one value where it has none.
        std: Likewise.
        shape: Of one input: (values,) for a network that sees flat samples, else (C, H, W).
        permutation: [values] source of each value of the flattened sample, or None for the natural order.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    shape: tuple[int, ...]
    permutation: Tensor | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        """The float32 inputs [N, *shape] of raw samples [N, ...]."""
        mean, std = (torch.tensor(values, device=raw.device)[:, None] for values in (self.mean, self.std))
        channels = raw.reshape(raw.shape[0], len(self.mean), -1)
        values = channels.to(torch.float32, copy=True).sub_(mean).div_(std).flatten(1)
        if self.permutation is not None:
            values = values.index_select(1, self.permutation.to(raw.device))
        return values.reshape(-1, *self.shape)


@dataclass(frozen=True)
class TaskInfo:
    """What a state remembers of a committed task besides its weights.

    Args:
        input_shape: Shape of one raw sample.
    """

    name: str
    num_classes: int
    input_shape: tuple[int, ...]
    transform: InputTransform

    def to_json(self) -> dict[str, Any]:
        """As plain data, but for the permutation."""
        return {
            "name": self.name,
            "num_classes": self.num_classes,
            "input_shape": self.input_shape,
            "mean": self.transform.mean,
            "std": self.transform.std,
            "shape": self.transform.shape,
        }

    @classmethod
    def from_json(cls, data: Any, tensors: Mapping[str, Tensor], index: int) -> TaskInfo:
        """What `to_json` gave, with its permutation from a state's tensors.

        Raises:
            ValueError: The permutation is none.
        """
        permutation = tensors.get(f"task{index}/permutation")
        if permutation is not None and not torch.equal(permutation.sort().values, torch.arange(len(permutation))):
            raise ValueError(f"task {index}: its permutation names a value twice, or none")
        mean, std, shape = (tuple(data[name]) for name in ("mean", "std", "shape"))
        transform = InputTransform(mean, std, shape, permutation)
        return cls(data["name"], data["num_classes"], tuple(data["input_shape"]), transform)


@dataclass(frozen=True)
class State:
    """Everything that the tasks so far have committed.

    Args:
        born: For each group [U] int64, the task that froze each unit, or FREE.
        tensors: For each hidden node, its parameters at full size, zero where free or cut.
        heads: One for each task: `weight` [C, U, taps] over the units that the head reads, and perhaps `bias` [C].
            With a single head, all of them share one weight.
        tasks: One for each committed task.
        parent: Digest of the state before the last task; empty for the state before the first.
        memory: What a baseline keeps besides (`baselines.py`): by its name, full-size tensors by `node/parameter`.
            Weights with an `owner` are there for that task and later ones alone.
    """

    architecture: Architecture
    born: dict[str, Tensor]
    tensors: Parameters
    heads: tuple[dict[str, Tensor], ...] = ()
    tasks: tuple[TaskInfo, ...] = ()
    parent: str = ""
    memory: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def empty(cls, architecture: Architecture) -> State:
        """The state before the first task: every unit is free."""
        graph = architecture.graph
        born = {group: torch.full((units,), FREE) for group, units in graph.groups.items()}
        return cls(architecture, born, {node.name: _zeros(graph.shapes(node)) for node in _hidden(graph)})

    @property
    def graph(self) -> Graph:
        """The network."""
        return self.architecture.graph

    @property
    def num_tasks(self) -> int:
        """Tasks committed so far."""
        return len(self.tasks)

    def active(self, task: int | None = None) -> dict[str, Tensor]:
        """For each group, the units that were active when `task` (by default the last) was committed; all inputs."""
        last = self.num_tasks - 1 if task is None else task
        active = {group: torch.nonzero(born <= last).flatten() for group, born in self.born.items()}
        return {INPUT: torch.arange(self.graph.input_shape[0]), **active}

    @property
    def free(self) -> dict[str, Tensor]:
        """For each group, the units that no task owns; of the inputs none."""
        free = {group: torch.nonzero(born == FREE).flatten() for group, born in self.born.items()}
        return {INPUT: torch.arange(0), **free}

    def visible(self, task: int) -> dict[str, Tensor]:
        """For each group, the units that `task`'s output layer reads.

        Single head: those that it grew itself (paper, section 3.1). Else all that were active at its commit.
        """
        if self.architecture.head != "single":
            return self.active(task)
        own = {group: torch.nonzero(born == task).flatten() for group, born in self.born.items()}
        return {INPUT: torch.arange(0), **own}

    def used(self, task: int) -> dict[str, Tensor]:
        """For each group, the units that `task` computes with: its active ones, but of what only its output layer
        reads, those that this reads.
        """
        graph, units = self.graph, self.active(task)
        if self.architecture.head != "single":
            return units
        readers = [node for node in graph.nodes if isinstance(node.op, Reader)]
        elsewhere = {group for node in readers if node.name != graph.head for group in graph.source(node).groups}
        visible = self.visible(task)
        return {group: units[group] if group in elsewhere else visible[group] for group in units} | {
            INPUT: units[INPUT]
        }

    def parameters(self, node: str, task: int) -> dict[str, Tensor]:
        """A node's parameters at full size as `task` sees them: weights of later owners are zero."""
        own = self.heads[task] if node == self.graph.head else self.tensors.get(node, {})
        owners = self.memory.get("owner", {})
        return {
            name: tensor.where(owners[f"{node}/{name}"] <= task, 0.0) if f"{node}/{name}" in owners else tensor
            for name, tensor in own.items()
        }

    @property
    def bias_is_frozen(self) -> bool:
        """Whether the bias of a single head is what the first task has made it."""
        return self.architecture.bias_rule == "frozen" and bool(self.heads)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the state, its parent's digest included."""
        return tensors_digest(self._header(), self._tensors())

    def faults(self, first: int = 0) -> list[str]:
        """What breaks the guarantee of zero forgetting in these tensors; empty if nothing does.

        Args:
            first: The first task whose head is looked at; those before it are known.
        """
        found = []
        for node in _hidden(self.graph):
            row, column = self._born_of(node), self._born_of(self.graph.source(node))
            for name, tensor in self.tensors[node.name].items():
                cut = row == FREE
                if name in node.op.MATRICES:
                    cut = cut[:, None] | (column[None, :] > row[:, None])
                if not tensor.isfinite().all():
                    found.append(f"{node.name}.{name}: a value is not finite")
                if bool((tensor[cut] != 0).any()):
                    found.append(f"{node.name}.{name}: what was cut, or belongs to a free unit, is not zero")
        column = self._born_of(self.graph.source(self.graph.by_name[self.graph.head]))
        single = self.architecture.head == "single"
        for task, head in enumerate(self.heads[first:], first):
            if not all(tensor.isfinite().all() for tensor in head.values()):
                found.append(f"head of task {task}: a value is not finite")
            unseen = (column < 0) | (column == FREE) if single else column > task  # as `visible` says
            if bool((head["weight"][:, unseen] != 0).any()):
                found.append(f"head of task {task}: a column of a unit that it does not read is not zero")
        remembered = flat(self.memory).items()
        return found + [f"{name}: a value is not finite" for name, tensor in remembered if not tensor.isfinite().all()]

    def widened(self, units: Mapping[str, int]) -> State:
        """The same state in a network with more units in some groups: the new ones are free, their weights zero.

        No subnetwork changes, and so no digest of a task.
        """
        graph, inputs = self.graph.widened(units), torch.arange(self.graph.input_shape[0])
        old = {INPUT: inputs, **{group: torch.arange(len(born)) for group, born in self.born.items()}}

        def grown(node: Node, tensors: dict[str, Tensor], classes: int = 0) -> dict[str, Tensor]:
            wide = _zeros(graph.shapes(node, classes))
            rows = torch.arange(classes) if classes else graph.index(node.groups, old)
            columns = graph.index(graph.source(node).groups, old)
            for name, tensor in tensors.items():
                if name in node.op.MATRICES:
                    wide[name][rows[:, None], columns] = tensor
                else:
                    wide[name][rows] = tensor
            return {name: wide[name] for name in tensors}

        born = {group: torch.full((graph.groups[group],), FREE) for group in self.born}
        for group, values in self.born.items():
            born[group][: len(values)] = values
        tensors = {node.name: grown(node, self.tensors[node.name]) for node in _hidden(graph)}
        head = graph.by_name[graph.head]
        heads = [grown(head, each, len(each["weight"])) for each in self.heads]
        if self.architecture.head == "single":
            heads = [each | {"weight": heads[0]["weight"]} for each in heads]
        return replace(
            self, architecture=replace(self.architecture, graph=graph), born=born, tensors=tensors, heads=tuple(heads)
        )

    @property
    def as_one_task(self) -> State:
        """The same frozen units as if the first task had grown them all: what the next task trains on, however many
        have been. Of later tasks, what only they read is left out.
        """
        born = {group: born.where(born == FREE, 0) for group, born in self.born.items()}
        return replace(self, born=born, heads=self.heads[:1], tasks=self.tasks[:1])

    def to_bytes(self) -> bytes:
        """The state as a safetensors file."""
        # Many small tensors take numpy half of torch's time.
        tensors = {name: tensor.contiguous().numpy() for name, tensor in self._tensors().items()}
        return safetensors.numpy.save(tensors, {"state": json.dumps(self._header())})

    def __reduce__(self) -> tuple[Callable[[bytes], State], tuple[bytes]]:
        return State.from_bytes, (self.to_bytes(),)  # twice as fast as torch pickles many small tensors

    @classmethod
    def from_bytes(cls, data: bytes) -> State:
        """The state that `to_bytes` wrote.

        Raises:
            ValueError: The bytes are no state of this format.
        """
        try:
            header, tensors = read_safetensors(data, "state")
            if header["format"] != FORMAT:
                raise ValueError(f"its format is {header['format']!r}, this version reads {FORMAT!r}")
            graph = Graph.from_json(header["graph"])
            tasks = tuple(TaskInfo.from_json(entry, tensors, index) for index, entry in enumerate(header["tasks"]))
            memory: dict[str, dict[str, Tensor]] = {}
            for name in tensors:
                kind, _, rest = name.partition("/")
                if kind == "memory":
                    what, _, path = rest.partition("/")
                    memory.setdefault(what, {})[path] = tensors[name]
            with torch.device("meta"):  # of what is only said to be there, no memory is taken
                empty = cls.empty(Architecture(graph, header["head"], header["head_bias"]))
                heads = empty._empty_heads(tasks)
            read = replace(empty, tasks=tasks, parent=header["parent"], heads=heads, memory=memory)
            expected = read._tensors()
            for name, tensor in expected.items():
                if tensors[name].shape != tensor.shape or tensors[name].dtype != tensor.dtype:
                    raise ValueError(f"{name} is of another shape or kind")
            if tensors.keys() != expected.keys():
                raise ValueError("it has tensors of no known name")
            return read._with(tensors)
        except (KeyError, TypeError, AttributeError, RuntimeError, safetensors.SafetensorError) as error:
            raise ValueError(f"not a state file: {type(error).__name__}: {error}") from error

    def _born_of(self, node: Node) -> Tensor:
        """The birth of each of a node's units; samples were there before any task."""
        before = torch.full((self.graph.input_shape[0],), -1)
        return torch.cat([before if group == INPUT else self.born[group] for group in node.groups])

    def _header(self) -> dict[str, Any]:
        architecture = self.architecture
        return {
            "format": FORMAT,
            "graph": architecture.graph.to_json(),
            "head": architecture.head,
            "head_bias": architecture.head_bias,
            "parent": self.parent,
            "tasks": [info.to_json() for info in self.tasks],
        }

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"born/{group}": born for group, born in self.born.items()}
        tensors |= flat(self.tensors) | flat({f"memory/{what}": each for what, each in self.memory.items()})
        for index, (head, info) in enumerate(zip(self.heads, self.tasks, strict=True)):
            tensors |= {self._head_name(index, name): tensor for name, tensor in head.items()}
            if info.transform.permutation is not None:
                tensors[f"task{index}/permutation"] = info.transform.permutation
        return tensors

    def _with(self, tensors: dict[str, Tensor]) -> State:
        """This state with other values in its tensors."""
        return replace(
            self,
            born={group: tensors[f"born/{group}"] for group in self.born},
            tensors={node: {name: tensors[f"{node}/{name}"] for name in own} for node, own in self.tensors.items()},
            heads=tuple(
                {name: tensors[self._head_name(index, name)] for name in head} for index, head in enumerate(self.heads)
            ),
        )

    def _empty_heads(self, tasks: tuple[TaskInfo, ...]) -> tuple[dict[str, Tensor], ...]:
        """Heads of nothing but zeros; those of as many classes are one and the same."""
        node = self.graph.by_name[self.graph.head]
        wanted = ("weight",) if self.architecture.bias_rule == "none" else ("weight", "bias")
        heads = {}
        for classes in {info.num_classes for info in tasks}:
            shapes = self.graph.shapes(node, classes)
            heads[classes] = _zeros({name: shapes[name] for name in wanted})
        return tuple(heads[info.num_classes] for info in tasks)

    def _head_name(self, task: int, name: str) -> str:
        one = self.architecture.head != "multi"
        shared = one and (name == "weight" or self.architecture.bias_rule == "frozen")
        return f"heads/{name}" if shared else f"heads/{task}/{name}"


@dataclass(frozen=True)
class FreeParameters:
    """One trained point's free parameters, seen from the state that it was trained on.

    Args:
        units: For each group, its free units that have parameters here: all of them, or those that a round of
            pruning has left.
        tensors: For each node, the head included, its parameters for these units; a `weight` in two parts,
            `weight.shared` [F, A, taps] over the frozen units that it reads (in the order of groups, ascending) and
            `weight.own` [F, I, taps] over the free ones.
        activities: For each group [F] float64, the mean post-activation value over the training split.
        means: For each layer whose bias makes up for the units that pruning takes from its input (none by default):
            the mean of each free unit's values there [I, taps], or [I, 1] over all positions of a map.
        learned: What a baseline has learned of them (`baselines.py`): full-size tensors by `node/parameter`.
    """

    units: dict[str, Tensor]
    tensors: Parameters
    activities: dict[str, Tensor]
    means: dict[str, Tensor] = field(default_factory=dict)
    learned: dict[str, Tensor] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The parameters as a safetensors file."""
        own = {"units": self.units, "activities": self.activities, "means": self.means, "learned": self.learned}
        tensors = flat(own)
        tensors |= {f"parameters/{name}": tensor for name, tensor in flat(self.tensors).items()}
        return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})

    @classmethod
    def from_bytes(cls, data: bytes) -> FreeParameters:
        """The parameters that `to_bytes` wrote.

        Raises:
            ValueError: The bytes are no such file.
        """
        try:
            read: dict[str, dict[str, Tensor]] = {"units": {}, "activities": {}, "means": {}, "learned": {}}
            found: dict[str, Tensor] = {}
            for name, tensor in sorted(_load(data).items()):
                kind, _, rest = name.partition("/")
                (found if kind == "parameters" else read[kind])[rest] = tensor
            if not found or read["units"].keys() != read["activities"].keys():
                raise KeyError("parameters of a network")
            return cls(read["units"], nested(found), read["activities"], read["means"], read["learned"])
        except (KeyError, safetensors.SafetensorError) as error:
            raise ValueError(f"not a trained point: {error}") from error

    def kept(self, theta: Mapping[str, float]) -> dict[str, Tensor]:
        """For each group, the positions among its units of those whose activity is strictly above its theta."""
        return {group: torch.nonzero(values > theta[group]).flatten() for group, values in self.activities.items()}

    def pruned(self, graph: Graph, theta: Mapping[str, float]) -> FreeParameters:
        """What a threshold leaves of them; biases make up for the mean of what is gone, where it is known."""
        kept = self.kept(theta)
        sizes = {group: len(units) for group, units in self.units.items()}
        tensors = {}
        for node in graph.nodes:
            if node.name in self.tensors:
                rows, columns = (own_index(each.groups, kept, sizes) for each in (node, graph.source(node)))
                parts = self.tensors[node.name]
                cut = dict(parts) if node.groups == (CLASSES,) else {name: part[rows] for name, part in parts.items()}
                if "weight.own" in cut:
                    cut["weight.own"] = cut["weight.own"][:, columns]
                tensors[node.name] = cut
        means = {}
        for name, each in self.means.items():
            node = graph.by_name[name]
            rows, columns = (own_index(one.groups, kept, sizes) for one in (node, graph.source(node)))
            gone = torch.ones(len(each), dtype=torch.bool)
            gone[columns] = False
            given = mean_outputs(self.tensors[name]["weight.own"], each)[:, gone].sum(1)
            shift(graph, tensors, name, given if node.groups == (CLASSES,) else given[rows])
            means[name] = each[columns]
        return FreeParameters(
            {group: units[kept[group]] for group, units in self.units.items()},
            tensors,
            {group: values[kept[group]] for group, values in self.activities.items()},
            means,
        )


def mean_outputs(weight: Tensor, means: Tensor) -> Tensor:
    """What each input unit adds to each output unit on average [F, I] float64: weights [F, I, taps], means [I, ...]."""
    return (weight.double() * means.double()).sum(2)


def shift(graph: Graph, tensors: Parameters, name: str, constant: Tensor) -> None:
    """Adds a constant [..., F] to a layer's output, by other values of one of `tensors`."""
    if (where := graph.shift_of(name)) is not None:
        node, parameter, sign = where
        moved = tensors[node][parameter].double() + sign * constant
        tensors[node] = tensors[node] | {parameter: moved.float()}


def own_index(groups: tuple[str, ...], kept: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor:
    """Where kept units of each group stand among the own units of `groups`, of which there are `sizes` each."""
    start, places = 0, [torch.arange(0)]
    for group in groups:
        if group in kept:
            places.append(kept[group] + start)
            start += sizes[group]
    return torch.cat(places)


def commit(state: State, info: TaskInfo, trained: FreeParameters, theta: Mapping[str, float]) -> State:
    """The state after one more task: units above the threshold frozen, all that they must not hear cut.

    A free unit joins if its activity is strictly above its group's theta; units frozen earlier stay. Weights from
    inactive units, and the head's columns of units that it must not read, are left at zero: nothing that belongs to
    a free unit is copied, so nothing of it can ever reach a committed task.

    Raises:
        ValueError: A parameter that would be committed is not finite.

    Source: paper, section 3.2, "Partitioning the network".
    """
    task, graph, before = state.num_tasks, state.graph, state.active()
    joined = trained.pruned(graph, theta)
    grown = {INPUT: torch.arange(0), **joined.units}
    born = {group: values.clone() for group, values in state.born.items()}
    for group, units in joined.units.items():
        born[group][units] = task
    tensors: Parameters = {}
    for node in _hidden(graph):
        rows, columns = graph.index(node.groups, grown), graph.source(node).groups
        tensors[node.name] = after = {}
        for name, tensor in state.tensors[node.name].items():
            after[name] = full = tensor.clone()
            if name in node.op.MATRICES:
                parts = joined.tensors[node.name]
                full[rows[:, None], graph.index(columns, before)] = parts[f"{name}.shared"]
                full[rows[:, None], graph.index(columns, grown)] = parts[f"{name}.own"]
            else:
                full[rows] = joined.tensors[node.name][name]
    committed = State(state.architecture, born, tensors, (), (*state.tasks, info), state.digest)
    committed = replace(committed, heads=_heads(state, info, joined, before, grown))
    if faults := committed.faults(first=task):
        raise ValueError(f"task {task} cannot be committed: " + "; ".join(faults))
    return committed


def _heads(
    state: State, info: TaskInfo, joined: FreeParameters, before: dict[str, Tensor], grown: dict[str, Tensor]
) -> tuple[dict[str, Tensor], ...]:
    """The heads of all tasks, the new one's last."""
    graph, single = state.graph, state.architecture.head == "single"
    node, parts = graph.by_name[graph.head], joined.tensors[graph.head]
    columns = graph.source(node).groups
    head = state._empty_heads((info,))[0]
    if single and state.heads:
        head["weight"] = state.heads[-1]["weight"].clone()
    head["weight"][:, graph.index(columns, grown)] = parts["weight.own"]
    if not single:
        head["weight"][:, graph.index(columns, before)] = parts["weight.shared"]
    if "bias" in head:
        head["bias"] = parts["bias"]
        if state.bias_is_frozen:
            head["bias"] = state.heads[0]["bias"]
    earlier = ({**each, "weight": head["weight"]} if single else each for each in state.heads)
    return (*earlier, head)


def flat(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by node and name as tensors by `node/name`."""
    return {f"{node}/{name}": tensor for node, own in tensors.items() for name, tensor in own.items()}


def nested(tensors: Mapping[str, Tensor]) -> Parameters:
    """Tensors by `node/name` as tensors by node and name."""
    found: Parameters = {}
    for path, tensor in tensors.items():
        node, _, name = path.rpartition("/")
        found.setdefault(node, {})[name] = tensor
    return found


def _hidden(graph: Graph) -> list[Node]:
    """The nodes that have parameters, but for the head."""
    return [node for node in graph.nodes if node.groups != (CLASSES,) and graph.shapes(node)]


def _zeros(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def tensors_digest(header: Any, tensors: dict[str, Tensor]) -> str:
    """SHA-256 (hex) of a JSON header and of named tensors: names, dtypes, shapes and little-endian bytes."""
    sha = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def _load(data: bytes) -> dict[str, Tensor]:
    # The format is a JSON header and raw numbers: unlike a pickle it names no code, so that nothing in it can run.
    return safetensors.torch.load(data)


def read_safetensors(data: bytes, key: str) -> tuple[Any, dict[str, Tensor]]:
    """The JSON metadata entry `key` and the tensors of a safetensors file held in memory.

    Raises:
        KeyError: The file has no such entry.
        safetensors.SafetensorError: The bytes are no safetensors file.
    """
    tensors = _load(data)
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    return json.loads(metadata[key]), tensors
