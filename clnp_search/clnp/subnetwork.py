"""A committed task's function: the rows and columns of its units, its head and its input transform, and nothing else.

Later tasks cannot change a subnetwork, so its digest is the proof of zero forgetting, on any hardware.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from clnp_search.clnp.activations import ACTIVATIONS
from clnp_search.clnp.state import State, tensors_digest

EXPORT_SUFFIXES = (".safetensors", ".onnx", ".pt2")


class Subnetwork(nn.Module):
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
        if not 0 <= task < state.num_tasks:
            raise IndexError(f"task {task} is not committed: tasks are 0 to {state.num_tasks - 1}")
        self.info = state.tasks[task]
        self.activation = state.architecture.activation
        self._activate = ACTIVATIONS[self.activation].function
        transform = self.info.transform
        self.register_buffer("mean", torch.tensor(transform.mean)[:, None])
        self.register_buffer("std", torch.tensor(transform.std)[:, None])
        self.register_buffer("permutation", transform.permutation)
        layers, units, columns = [], [], torch.arange(state.architecture.in_features)
        for index, layer in enumerate(state.layers):
            last = index == len(state.layers) - 1
            rows = state.visible(task) if last else layer.active(task)
            layers.append(_Dense(layer.weight[rows][:, columns], layer.bias[rows]))
            units.append(rows)
            columns = rows
        head = state.heads[task]
        self.hidden = nn.ModuleList(layers)
        self.head = _Dense(head.weight[:, columns], head.bias)
        self.units = tuple(units)
        self.eval()

    def forward(self, raw: Tensor) -> Tensor:
        """Logits [N, num_classes] of raw samples [N, *input_shape]."""
        channels = raw.reshape(raw.shape[0], len(self.mean), -1)
        values = ((channels.to(torch.float32) - self.mean) / self.std).flatten(1)
        if self.permutation is not None:
            values = values[:, self.permutation]
        for layer in self.hidden:
            values = self._activate(layer(values))
        return self.head(values)

    @property
    def digest(self) -> str:
        """SHA-256 over weights, biases, masks (as unit indices) and the input transform."""
        tensors = dict(self.state_dict())
        tensors |= {f"units.{index}": units for index, units in enumerate(self.units)}
        return tensors_digest({"activation": self.activation, "classes": self.info.num_classes}, tensors)

    def predictions(self, raw: Tensor, batch_size: int = 1000) -> Tensor:
        """Predicted classes [N] int64 of raw samples [N, ...], in batches of one fixed size."""
        with torch.inference_mode():
            return torch.cat(
                [self(raw[start : start + batch_size]).argmax(1) for start in range(0, len(raw), batch_size)]
            )

    def accuracy(self, raw: Tensor, labels: Tensor) -> float:
        """The fraction of raw samples [N, ...] whose label [N] is predicted."""
        return (self.predictions(raw) == labels).sum().item() / len(labels)

    def to_bytes(self, suffix: str) -> bytes:
        """The network as a file of one of `EXPORT_SUFFIXES`.

        Raises:
            ValueError: Another suffix.
            ModuleNotFoundError: ONNX was asked for and the `onnx` extra is not installed.
        """
        if suffix == ".safetensors":
            meta = {"task": self.info.name, "activation": self.activation, "input_shape": self.info.input_shape}
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


def subnetworks(state: State) -> Iterator[Subnetwork]:
    """The subnetworks of all committed tasks, in order."""
    return (Subnetwork(state, task) for task in range(state.num_tasks))


class _Dense(nn.Module):
    """A dense layer of given weights; unlike `nn.Linear` it draws none, and may have no unit."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.clone(memory_format=torch.contiguous_format))
        self.register_buffer("bias", None if bias is None else bias.clone())

    def forward(self, values: Tensor) -> Tensor:
        """Outputs [N, O] of inputs [N, I]."""
        return functional.linear(values, self.weight, self.bias)
