"""Hyperparameter search and graceful forgetting for Continual Learning via Neural Pruning.

The command line is `clnp_search.cli`, the method itself `clnp_search.clnp`, and for scripts and notebooks there are

- `run(sweep, ...)`: a sweep to its end,
- `load(run)`: a run's tasks, points and curves as pandas frames, and each task's network as a torch module,
- `load_export(path)`: what `clnp-search export` wrote,
- `Sweep`, `load_sweep`: a sweep file as an object.

Importing this package imports none of it: each name is found when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clnp_search.api import Run, load, load_export, run
    from clnp_search.config import Sweep, load_sweep
    from clnp_search.errors import InputError, Interrupted, MachineFault

__all__ = ["InputError", "Interrupted", "MachineFault", "Run", "Sweep", "load", "load_export", "load_sweep", "run"]

_MODULES = dict.fromkeys(("Run", "load", "load_export", "run"), "api")
_MODULES |= dict.fromkeys(("Sweep", "load_sweep"), "config")
_MODULES |= dict.fromkeys(("InputError", "Interrupted", "MachineFault"), "errors")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
