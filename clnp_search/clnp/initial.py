"""Where a task's free parameters start: drawn from the seed, at full size, whatever earlier tasks have frozen."""

from __future__ import annotations

import math

import torch

from clnp_search.clnp.graph import CLASSES
from clnp_search.clnp.seeds import generator
from clnp_search.clnp.state import Parameters, State

NEUTRAL = {"scale": 1.0, "variance": 1.0, "slope": 0.25}


def draw(state: State, num_classes: int, seed: int) -> Parameters:
    """Each node's parameters at full size, the head's last.

    Weights are uniform in +-1/sqrt(fan-in), PyTorch's default for dense layers and convolutions; biases are zero, and
    normalisations do nothing yet. The fan-in is that of the whole layer; a single head's counts only the free units
    that it will read.
    """
    graph, drawn = state.graph, {}
    for node in graph.nodes:
        tensors = {}
        for name, shape in graph.shapes(node, num_classes).items():
            if name != "weight":
                tensors[name] = torch.full(shape, NEUTRAL.get(name, 0.0))
                continue
            fan_in = math.prod(shape[1:])
            if node.groups == (CLASSES,) and state.architecture.head == "single":
                free = state.free
                fan_in = shape[2] * sum(len(free[group]) for group in graph.source(node).groups)
            bound = fan_in**-0.5 if fan_in else 0.0
            random = generator(seed, "init", state.num_tasks, node.name)
            tensors[name] = torch.empty(shape).uniform_(-bound, bound, generator=random)
        if tensors:
            drawn[node.name] = tensors
    return drawn
