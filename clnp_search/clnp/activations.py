"""Elementwise activations whose gradient follows from their output, so that a pack keeps one buffer a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An activation function.

    Args:
        function: The output of a tensor of any shape.
        apply_: The same, in place.
        backward_: Multiplies a gradient by the derivative, in place, given the output.
        non_negative: Whether the output is never below zero; otherwise activity is its mean absolute value.
    """

    function: Callable[[Tensor], Tensor]
    apply_: Callable[[Tensor], Tensor]
    backward_: Callable[[Tensor, Tensor], Tensor]
    non_negative: bool


ACTIVATIONS = {
    "relu": Activation(
        torch.relu,
        torch.relu_,
        lambda grad, output: aten.threshold_backward(grad, output, 0, grad_input=grad),
        non_negative=True,
    ),
    "sigmoid": Activation(
        torch.sigmoid,
        torch.sigmoid_,
        lambda grad, output: aten.sigmoid_backward(grad, output, grad_input=grad),
        non_negative=True,
    ),
    "tanh": Activation(
        torch.tanh,
        torch.tanh_,
        lambda grad, output: aten.tanh_backward(grad, output, grad_input=grad),
        non_negative=False,
    ),
}
