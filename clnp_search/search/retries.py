"""Another try after a fault of the machine: a process that died, no space, no memory, no store."""

from __future__ import annotations

import time

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
