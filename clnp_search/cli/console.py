"""What is printed where: documents on standard output, all else on standard error, and the exit statuses."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from clnp_search.records import UNWRITABLE

if TYPE_CHECKING:
    from clnp_search.storage import RunFolder

DONE, FAILED, INPUT_WRONG, INTERRUPTED, NOT_VERIFIED = range(5)

# Lines wrap on a terminal only: in a file or a pipe they are for programs, and for `grep`.
UNWRAPPED = 10_000


def _printable(text: str) -> str:
    return UNWRITABLE.sub("\ufffd", text)


class _Console(Console):
    """A console whose terminal obeys no text: reasons and names in a run folder may be anybody's."""

    def render_str(self, text: str, **options: Any) -> Text:
        """What is measured of a string, too: its characters that can be printed, and for each other one a mark."""
        return super().render_str(_printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """What is written of all else, likewise."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=_printable(segment.text))


out = _Console(width=None if sys.stdout.isatty() else UNWRAPPED)
err = _Console(stderr=True, width=None if sys.stderr.isatty() else UNWRAPPED)


_document = sys.stdout  # where the one document of a command goes


def reserve_output(as_json: bool) -> bool:
    """Keeps standard output for the document alone: what libraries and child processes print goes to standard error."""
    global _document
    if as_json:
        sys.stdout.flush()
        _document = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return as_json


def print_json(document: Any) -> None:
    """Prints the one document of a command on standard output."""
    print(json.dumps(document, indent=1), file=_document, flush=True)


def as_typed(folder: RunFolder) -> str:
    """A run as a person would type it here."""
    path = folder.local_path
    if path is None:
        return folder.uri
    here = Path.cwd()
    if path.parent == here / "runs":
        return path.name
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def count(number: int, noun: str) -> str:
    """A number with its noun: `1 pack`, `2 packs`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """A length of time as `M:SS` or `H:MM:SS`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
