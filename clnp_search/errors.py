"""The ways a run ends that callers treat differently from a failure of the software."""

from __future__ import annotations


class InputError(Exception):
    """What the user asked for is wrong: names the thing, what is allowed, what to try. Exit status 2."""


class MachineFault(Exception):  # noqa: N818 - not what the user asked for, nor what a point did
    """What a run needs failed: a disk, memory, a GPU, a process. It can be resumed. Exit status 1."""


class Damaged(RuntimeError):  # noqa: N818 - it says what is the case
    """A file of a run is not as it was written: cut short, changed, swapped, made by somebody else. Exit status 1."""


class NoModel(RuntimeError):  # noqa: N818 - it says what is the case
    """A task has no model to keep; going on as before ends the same. Says what would not. Exit status 1."""


class Interrupted(Exception):  # noqa: N818 - it says what is the case
    """The run was stopped on request and can be resumed. Exit status 3."""
