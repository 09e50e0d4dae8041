"""The method itself, as a library: needs torch, numpy and safetensors alone.

From a network to a proven sequence: build a `Graph` (`mlp`, `conv`, `zenke`, or `trace.trace` of your own module) and
begin with `State.empty(Architecture(graph))`; for each task `draw` initial parameters, train a `Pack` by a `Training`,
scan a `Candidate` (`scan.scan`), `commit` it, and cut out its `Subnetwork`. Names are found when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clnp_search.clnp.graph import Builder, Graph, conv, mlp, zenke
    from clnp_search.clnp.initial import draw
    from clnp_search.clnp.pack import L1, Pack
    from clnp_search.clnp.scan import Candidate
    from clnp_search.clnp.state import Architecture, FreeParameters, InputTransform, State, TaskInfo, commit
    from clnp_search.clnp.subnetwork import Subnetwork
    from clnp_search.clnp.trace import NetworkRefused
    from clnp_search.clnp.training import Training, TrainingSettings

_NAMES = {
    "graph": ("Builder", "Graph", "conv", "mlp", "zenke"),
    "initial": ("draw",),
    "pack": ("L1", "Pack"),
    "scan": ("Candidate",),
    "state": ("Architecture", "FreeParameters", "InputTransform", "State", "TaskInfo", "commit"),
    "subnetwork": ("Subnetwork",),
    "trace": ("NetworkRefused",),
    "training": ("Training", "TrainingSettings"),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "L1",
    "Architecture",
    "Builder",
    "Candidate",
    "FreeParameters",
    "Graph",
    "InputTransform",
    "NetworkRefused",
    "Pack",
    "State",
    "Subnetwork",
    "TaskInfo",
    "Training",
    "TrainingSettings",
    "commit",
    "conv",
    "draw",
    "mlp",
    "zenke",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
