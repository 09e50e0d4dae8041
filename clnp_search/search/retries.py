"""Another try after a fault of the machine: a process that died, no space, no memory, no store."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ray.exceptions import RayTaskError

PAUSE_S = 1.0


def cause_of(error: Exception) -> str:
    """What went wrong in another process, in a line and without its traceback."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return " ".join([f"{type(cause).__name__}:", *str(cause).strip().splitlines()[:1]])


def tried(failures: int) -> str:
    """How often something failed, to end a sentence with."""
    return f" (tried {failures} times)" if failures > 1 else ""


def pause(failures: int) -> None:
    """Waits before the next try, after each failure twice as long."""
    time.sleep(PAUSE_S * 2 ** (failures - 1))


def in_new_process(failures: int, environment: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Options of a Ray task that has failed so often: a process that failed may be out of memory, and is asked no more.

    Args:
        environment: The task's runtime environment, if it has one of its own.
    """
    if not failures:
        return {}
    variables = environment["env_vars"] if environment else {}
    return {"runtime_env": {"env_vars": {**variables, "CLNP_SEARCH_TRY": str(failures)}}}
