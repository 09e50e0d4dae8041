"""What a task sequence has committed: the frozen part of the network, task after task.

A state holds full-size weight matrices in which only frozen entries differ from zero: the rows of active units, and
in each row only the columns of units that were active at its commit. Free units have no parameters here; every new
task draws fresh ones from the seed (`pack.py`). What a task computes is its `Subnetwork` (`subnetwork.py`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

FREE = -1
FORMAT = "clnp-state-1"


@dataclass(frozen=True)
class Architecture:
    """A multilayer perceptron of fixed size and the kind of its output layer.

    Args:
        in_features: Inputs of the first layer, after flattening.
        hidden: Units of each hidden layer.
        activation: A key of `pack.ACTIVATIONS`.
        head: `multi` (an output layer for each task) or `single` (one for all tasks).
        head_bias: Of a single head: `frozen` after the first task, `per_task`, or `none`.
            A multi head always has a bias of its own.
    """

    in_features: int
    hidden: tuple[int, ...]
    activation: str = "relu"
    head: str = "multi"
    head_bias: str = "frozen"

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the hidden layers, as files and tables show them."""
        return tuple(f"hidden{index}" for index in range(len(self.hidden)))

    @property
    def fan_in(self) -> tuple[int, ...]:
        """Inputs of each hidden layer."""
        return (self.in_features, *self.hidden[:-1])


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
            values = values[:, self.permutation.to(raw.device)]
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


@dataclass(frozen=True)
class Layer:
    """A hidden layer's frozen part.

    Args:
        weight: [U, I], zero where free or cut.
        bias: [U], zero where free.
        born: [U] int64, the task that froze each unit, or FREE.
    """

    weight: Tensor
    bias: Tensor
    born: Tensor

    def active(self, task: int) -> Tensor:
        """Indices of the units that were active when `task` was committed."""
        return torch.nonzero((self.born != FREE) & (self.born <= task)).flatten()

    @property
    def free(self) -> Tensor:
        """Indices of the units that no task owns."""
        return torch.nonzero(self.born == FREE).flatten()


@dataclass(frozen=True)
class Head:
    """An output layer: weight [C, U] over the last hidden layer, and a bias [C] or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class State:
    """Everything that the tasks so far have committed.

    Args:
        heads: One for each task. With a single head, all of them share one weight matrix.
        tasks: One for each committed task.
        parent: Digest of the state before the last task; empty for the state before the first.
    """

    architecture: Architecture
    layers: tuple[Layer, ...]
    heads: tuple[Head, ...] = ()
    tasks: tuple[TaskInfo, ...] = ()
    parent: str = ""

    @classmethod
    def empty(cls, architecture: Architecture) -> State:
        """The state before the first task: every unit is free."""
        layers = tuple(
            Layer(torch.zeros(units, inputs), torch.zeros(units), torch.full((units,), FREE))
            for units, inputs in zip(architecture.hidden, architecture.fan_in, strict=True)
        )
        return cls(architecture, layers)

    @property
    def num_tasks(self) -> int:
        """Tasks committed so far."""
        return len(self.tasks)

    def visible(self, task: int) -> Tensor:
        """Indices of the last hidden layer's units that `task`'s output layer reads.

        Multi-head: all that were active at its commit. Single head: those that it grew itself (paper, section 3.1).
        """
        last = self.layers[-1]
        if self.architecture.head == "multi":
            return last.active(task)
        return torch.nonzero(last.born == task).flatten()

    @property
    def digest(self) -> str:
        """SHA-256 of the state, its parent's digest included."""
        return tensors_digest(self._header(), self._tensors())

    def faults(self) -> list[str]:
        """What breaks the guarantee of zero forgetting in these tensors; empty if nothing does."""
        found = []
        for index, layer in enumerate(self.layers):
            name = self.architecture.layer_names[index]
            if not (layer.weight.isfinite().all() and layer.bias.isfinite().all()):
                found.append(f"{name}: a parameter is not finite")
            below = torch.full((layer.weight.shape[1],), 0) if index == 0 else self.layers[index - 1].born
            born = layer.born[:, None]
            cut = (born == FREE) | (below[None, :] == FREE) | (below[None, :] > born)
            if bool((layer.weight[cut] != 0).any()) or bool((layer.bias[layer.born == FREE] != 0).any()):
                found.append(f"{name}: a weight that was cut, or that belongs to a free unit, is not zero")
        for task, head in enumerate(self.heads):
            if not head.weight.isfinite().all() or (head.bias is not None and not head.bias.isfinite().all()):
                found.append(f"head of task {task}: a parameter is not finite")
            hidden_columns = torch.ones(head.weight.shape[1], dtype=torch.bool)
            seen = range(self.num_tasks) if self.architecture.head == "single" else (task,)
            for owner in seen:
                hidden_columns[self.visible(owner)] = False
            if bool((head.weight[:, hidden_columns] != 0).any()):
                found.append(f"head of task {task}: a column of a unit that it does not read is not zero")
        return found

    def to_bytes(self) -> bytes:
        """The state as a safetensors file."""
        tensors = {name: tensor.clone() for name, tensor in self._tensors().items()}
        return safetensors.torch.save(tensors, {"state": json.dumps(self._header(), sort_keys=True)})

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
            raw = header["architecture"]
            architecture = Architecture(**{**raw, "hidden": tuple(raw["hidden"])})
            layers = tuple(
                Layer(tensors[f"{name}.weight"], tensors[f"{name}.bias"], tensors[f"{name}.born"])
                for name in architecture.layer_names
            )
            tasks = tuple(
                TaskInfo(
                    entry["name"],
                    entry["num_classes"],
                    tuple(entry["input_shape"]),
                    InputTransform(
                        tuple(entry["mean"]),
                        tuple(entry["std"]),
                        tuple(entry["shape"]),
                        tensors.get(f"task{index}.permutation"),
                    ),
                )
                for index, entry in enumerate(header["tasks"])
            )
            single = architecture.head == "single"
            heads = tuple(
                Head(
                    tensors["head.weight" if single else f"head{index}.weight"],
                    tensors.get(_bias_name(architecture, index)),
                )
                for index in range(len(tasks))
            )
            return cls(architecture, layers, heads, tasks, header["parent"])
        except (KeyError, TypeError, safetensors.SafetensorError) as error:
            raise ValueError(f"not a state file: {error}") from error

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "architecture": asdict(self.architecture),
            "parent": self.parent,
            "tasks": [
                {
                    "name": info.name,
                    "num_classes": info.num_classes,
                    "input_shape": info.input_shape,
                    "mean": info.transform.mean,
                    "std": info.transform.std,
                    "shape": info.transform.shape,
                }
                for info in self.tasks
            ],
        }

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, layer in zip(self.architecture.layer_names, self.layers, strict=True):
            tensors |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias, f"{name}.born": layer.born}
        for index, (head, info) in enumerate(zip(self.heads, self.tasks, strict=True)):
            tensors["head.weight" if self.architecture.head == "single" else f"head{index}.weight"] = head.weight
            if head.bias is not None:
                tensors[_bias_name(self.architecture, index)] = head.bias
            if info.transform.permutation is not None:
                tensors[f"task{index}.permutation"] = info.transform.permutation
        return tensors


@dataclass(frozen=True)
class FreeParameters:
    """One trained point's free parameters, seen from the state that it was trained on.

    Args:
        weights: For each hidden layer [F, A + F'] (first layer: [F, in_features]): rows of its free units; columns
            are the frozen units of the layer below in ascending order, then its free units.
        biases: For each hidden layer [F].
        head_weight: [C, A + F'] (multi) or [C, F'] (single), over the last hidden layer in the same order.
        head_bias: [C] (where an earlier task froze it, that one), or None if the head has no bias.
        activities: For each hidden layer [F] float64, the mean post-activation value over the training split.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    head_weight: Tensor
    head_bias: Tensor | None
    activities: tuple[Tensor, ...]

    def to_bytes(self) -> bytes:
        """The parameters as a safetensors file."""
        tensors = {"head.weight": self.head_weight}
        if self.head_bias is not None:
            tensors["head.bias"] = self.head_bias
        for index, (weight, bias, activity) in enumerate(zip(self.weights, self.biases, self.activities, strict=True)):
            tensors |= {f"{index}.weight": weight, f"{index}.bias": bias, f"{index}.activity": activity}
        return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})

    @classmethod
    def from_bytes(cls, data: bytes) -> FreeParameters:
        """The parameters that `to_bytes` wrote.

        Raises:
            ValueError: The bytes are no such file.
        """
        try:
            tensors = _load(data)
            depth = sum(name.endswith(".activity") for name in tensors)
            if not depth:
                raise KeyError("0.activity")
            weights, biases, activities = (
                tuple(tensors[f"{index}.{kind}"] for index in range(depth)) for kind in ("weight", "bias", "activity")
            )
            return cls(weights, biases, tensors["head.weight"], tensors.get("head.bias"), activities)
        except (KeyError, safetensors.SafetensorError) as error:
            raise ValueError(f"not a trained point: {error}") from error


def commit(state: State, info: TaskInfo, trained: FreeParameters, theta: tuple[float, ...]) -> State:
    """The state after one more task: units above the threshold frozen, all that they must not hear cut.

    A free unit joins if its activity is strictly above its layer's theta; units frozen earlier stay. Weights from
    inactive units, and the head's columns of units that it must not read, are left at zero: nothing that belongs to
    a free unit is copied, so nothing of it can ever reach a committed task.

    Raises:
        ValueError: A parameter that would be committed is not finite.

    Source: paper, section 3.2, "Partitioning the network".
    """
    task = state.num_tasks
    layers: list[Layer] = []
    frozen_below = torch.arange(state.architecture.in_features)
    grown_below = kept_below = torch.arange(0)
    for index, layer in enumerate(state.layers):
        free = layer.free
        kept = torch.nonzero(trained.activities[index] > theta[index]).flatten()
        grown = free[kept]
        weight, bias, born = layer.weight.clone(), layer.bias.clone(), layer.born.clone()
        rows = trained.weights[index][kept]
        weight[grown[:, None], frozen_below] = rows[:, : len(frozen_below)]
        weight[grown[:, None], grown_below] = rows[:, len(frozen_below) :][:, kept_below]
        bias[grown] = trained.biases[index][kept]
        born[grown] = task
        layers.append(Layer(weight, bias, born))
        frozen_below, grown_below, kept_below = layer.active(task), grown, kept
    head_bias = trained.head_bias
    if state.architecture.head == "single":
        weight = state.heads[-1].weight.clone() if state.heads else torch.zeros(info.num_classes, len(born))
        weight[:, grown_below] = trained.head_weight[:, kept_below]
        if state.architecture.head_bias == "frozen" and state.heads:
            head_bias = state.heads[0].bias
        heads = (*(replace(head, weight=weight) for head in state.heads), Head(weight, head_bias))
    else:
        weight = torch.zeros(info.num_classes, len(born))
        weight[:, frozen_below] = trained.head_weight[:, : len(frozen_below)]
        weight[:, grown_below] = trained.head_weight[:, len(frozen_below) :][:, kept_below]
        heads = (*state.heads, Head(weight, head_bias))
    after = State(state.architecture, tuple(layers), heads, (*state.tasks, info), state.digest)
    if faults := after.faults():
        raise ValueError(f"task {task} cannot be committed: " + "; ".join(faults))
    return after


def tensors_digest(header: Any, tensors: dict[str, Tensor]) -> str:
    """SHA-256 (hex) of a JSON header and of named tensors: names, dtypes, shapes and little-endian bytes."""
    sha = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def _load(data: bytes) -> dict[str, Tensor]:
    return safetensors.torch.load(data)  # runs nothing: a JSON header and raw numbers, never a pickle


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


def _bias_name(architecture: Architecture, task: int) -> str:
    shared = architecture.head == "single" and architecture.head_bias == "frozen"
    return "head.bias" if shared else f"head{task}.bias"
