"""A committed task's function: the rows and columns of its units, its head and its input transform, and nothing else.

Later tasks cannot change a subnetwork, so its digest is the proof of zero forgetting, on any hardware.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property

import safetensors.torch
import torch
from torch import Tensor, nn

from clnp_search.clnp.graph import INPUT, Graph, chosen, run
from clnp_search.clnp.pack import evaluation_batch
from clnp_search.clnp.state import Parameters, State, TaskInfo, tensors_digest

EXPORT_SUFFIXES = (".safetensors", ".onnx", ".pt2")
SMALL_FLOP = 100_000_000  # about a millisecond of one core


class _Classifier:
    """What is asked of anything that gives logits of raw samples."""

    info: TaskInfo
    graph: Graph
    units: dict[str, Tensor]

    def __call__(self, raw: Tensor) -> Tensor:
        """Logits [N, num_classes] of raw samples [N, *input_shape]."""
        raise NotImplementedError

    def predictions(self, raw: Tensor) -> Tensor:
        """Predicted classes [N] int64 of raw samples [N, ...], in batches of one fixed size."""
        size = evaluation_batch(self.graph, raw.device.type)
        with torch.inference_mode(), _threads_for(min(size, len(raw)) * self._flop):
            return torch.cat([self(part).argmax(1) for part in raw.split(size)])

    def num_correct(self, raw: Tensor, labels: Tensor) -> int:
        """How many of raw samples [N, ...] have their label [N] predicted."""
        return int((self.predictions(raw) == labels).sum())

    def accuracy(self, raw: Tensor, labels: Tensor) -> float:
        """The fraction of raw samples [N, ...] whose label [N] is predicted."""
        return self.num_correct(raw, labels) / len(labels)

    @cached_property
    def _flop(self) -> int:
        """Of one sample."""
        units = {group: len(units) for group, units in self.units.items()}
        return sum(self.graph.flop(units, self.info.num_classes).values())


class Cut(_Classifier):
    """One task's function as plain tensors, cut out of a state: all that evaluation needs, in half of a module's time.

    Raw samples and logits are a `Subnetwork`'s.
    """

    def __init__(self, state: State, task: int) -> None:
        """Takes what belongs to `task` from `state`.

        Raises:
            IndexError: The state has no such task.
        """
        if not 0 <= task < state.num_tasks:
            raise IndexError(f"task {task} is not committed: tasks are 0 to {state.num_tasks - 1}")
        self.info, self.graph, self.units = state.tasks[task], state.graph, state.used(task)
        self.tensors: Parameters = {}
        for node in self.graph.nodes:
            if tensors := state.parameters(node.name, task):
                self.tensors[node.name] = chosen(self.graph, node, tensors, self.units, self.units)
        if state.architecture.head == "single":
            head = self.tensors[self.graph.head]
            head["weight"] = head["weight"] * self._seen(state, task)[:, None]

    def __call__(self, raw: Tensor) -> Tensor:
        """Logits [N, num_classes] of raw samples [N, *input_shape]."""
        return logits(self.graph, self.info.transform(raw), self.tensors)

    def _seen(self, state: State, task: int) -> Tensor:
        """Which of its columns a single head reads [columns]: not what other tasks grew."""
        visible = state.visible(task)
        groups = self.graph.source(self.graph.by_name[self.graph.head]).groups
        return torch.cat([torch.isin(self.units[group], visible[group]) for group in groups])


class Subnetwork(nn.Module, _Classifier):
    """One task's network, cut out of a state.

    Takes raw samples (pixel values as in the data set's files, unpermuted) of shape [N, *input_shape] and gives
    logits [N, num_classes].
    """

    mean: Tensor
    std: Tensor
    permutation: Tensor | None

    def __init__(self, state: State, task: int) -> None:
        """Copies what belongs to `task` out of `state`.

        Raises:
            IndexError: The state has no such task.
        """
        super().__init__()
        cut = Cut(state, task)
        self.info, self.graph, self.units = cut.info, cut.graph, cut.units
        transform = self.info.transform
        self.register_buffer("mean", torch.tensor(transform.mean)[:, None])
        self.register_buffer("std", torch.tensor(transform.std)[:, None])
        self.register_buffer("permutation", transform.permutation)
        self.network = nn.Module()
        self._layers = {name: _place(self.network, name, tensors) for name, tensors in cut.tensors.items()}
        self.eval()

    def forward(self, raw: Tensor) -> Tensor:
        """Logits [N, num_classes] of raw samples [N, *input_shape]."""
        tensors = {name: dict(layer.named_buffers(recurse=False)) for name, layer in self._layers.items()}
        return logits(self.graph, self.inputs(raw), tensors)

    def inputs(self, raw: Tensor) -> Tensor:
        """What the network sees of raw samples."""
        # No dimension is told from the number of values, of which an empty batch has none.
        channels = raw.flatten(1).unflatten(1, (len(self.mean), -1)).to(torch.float32)
        values = ((channels - self.mean) / self.std).flatten(1)
        if self.permutation is not None:
            values = values.index_select(1, self.permutation)
        return values.unflatten(1, self.info.transform.shape)

    @property
    def digest(self) -> str:
        """SHA-256 over the graph's operations, weights, unit indices and the input transform."""
        tensors = dict(self.state_dict()) | {f"units.{group}": units for group, units in self.units.items()}
        header = {"nodes": self.graph.to_json()["nodes"], "classes": self.info.num_classes}
        return tensors_digest(header, tensors)

    def to_bytes(self, suffix: str) -> bytes:
        """The network as a file of one of `EXPORT_SUFFIXES`.

        Raises:
            ValueError: Another suffix.
            ModuleNotFoundError: ONNX was asked for and the `onnx` extra is not installed.
        """
        if suffix == ".safetensors":
            meta = {"task": self.info.name, "graph": self.graph.to_json(), "input_shape": self.info.input_shape}
            tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
            return safetensors.torch.save(tensors, {"subnetwork": json.dumps(meta)})
        example = torch.zeros(2, *self.info.input_shape)
        shapes = {"raw": {0: torch.export.Dim("batch")}}
        if suffix == ".pt2":
            buffer = io.BytesIO()
            torch.export.save(torch.export.export(self, (example,), dynamic_shapes=shapes), buffer)
            return buffer.getvalue()
        if suffix == ".onnx":
            program = torch.onnx.export(
                self,
                (example,),
                input_names=["raw"],
                output_names=["logits"],
                dynamic_shapes=shapes,
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            return program.model_proto.SerializeToString()
        raise ValueError(f"{suffix!r} is no export format; choose one of {', '.join(EXPORT_SUFFIXES)}")


def logits(graph: Graph, inputs: Tensor, tensors: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """A network's last value, of inputs as it sees them."""
    return run(graph, {INPUT: inputs}, tensors)[graph.nodes[-1].name]


def cuts(state: State) -> Iterator[Cut]:
    """What all committed tasks compute, in order."""
    return (Cut(state, task) for task in range(state.num_tasks))


@contextmanager
def _threads_for(flop: int) -> Iterator[None]:
    """Inside, one thread computes if there is little to compute: threads wait for one another, and that takes ten times
    as long as the work itself where other processes have the cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if flop < SMALL_FLOP else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _place(root: nn.Module, path: str, tensors: dict[str, Tensor]) -> nn.Module:
    """Registers tensors as buffers of the module at a dotted path, which is made."""
    module = root
    for part in path.split("."):
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor.clone(memory_format=torch.contiguous_format))
    return module
