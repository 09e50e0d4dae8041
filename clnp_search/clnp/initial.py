"""Where a task's free parameters start: drawn from the seed, at full size, whatever earlier tasks have frozen."""

from __future__ import annotations

import math

import torch

from clnp_search.clnp.graph import CLASSES, INPUT, Graph
from clnp_search.clnp.seeds import generator
from clnp_search.clnp.state import Parameters, State

NEUTRAL = {"scale": 1.0, "variance": 1.0, "slope": 0.25}


def draw(state: State, num_classes: int, seed: int, task: int) -> Parameters:
    """What each node's parameters of a task start from, at full size, the head's last.

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
            lacks = graph.lacking.get(node.name)
            fan_in = math.prod(shape[1:]) if lacks is None else int((~lacks).sum()) // shape[0] * shape[2]
            if node.groups == (CLASSES,) and state.architecture.head == "single":
                free = state.free
                fan_in = shape[2] * sum(len(free[group]) for group in graph.source(node).groups)
            bound = fan_in**-0.5 if fan_in else 0.0
            random = generator(seed, "init", task, node.name)
            tensors[name] = torch.empty(shape).uniform_(-bound, bound, generator=random)
            if lacks is not None:
                tensors[name].masked_fill_(lacks, 0.0)
        if tensors:
            drawn[node.name] = tensors
    return drawn


def overlaid(drawn: Parameters, graph: Graph, own: Parameters, of: Graph) -> Parameters:
    """Drawn parameters with those that a module's constructor has drawn in their place.

    What the constructor does not have stays as it was drawn: units that the network has gained since, and a head of
    another number of classes.

    Args:
        graph: The network, of which `drawn` are the parameters.
        own: Those of the module.
        of: The module's graph.
    """
    first = {group: torch.arange(units) for group, units in of.groups.items()}
    first[INPUT] = torch.arange(graph.input_shape[0])
    for node in graph.nodes:
        for name, values in own.get(node.name, {}).items():
            full = drawn[node.name].get(name)
            if full is None or (node.groups == (CLASSES,) and len(values) != len(full)):
                continue
            rows = torch.arange(len(full)) if node.groups == (CLASSES,) else graph.index(node.groups, first)
            if name in node.op.MATRICES:
                full[rows[:, None], graph.index(graph.source(node).groups, first)] = values
            else:
                full[rows] = values
    return drawn
