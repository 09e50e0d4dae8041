"""The two ways a run ends that callers treat differently from a failure."""

from __future__ import annotations


class InputError(Exception):
    """What the user asked for is wrong: names the thing, what is allowed, what to try. Exit status 2."""


class Interrupted(Exception):  # noqa: N818 - it says what is the case
    """The run was stopped on request and can be resumed. Exit status 3."""
