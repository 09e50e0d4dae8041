"""What is printed where: documents on standard output, all else on standard error, and the exit statuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from clnp_search.storage import RunFolder

DONE, FAILED, INPUT_WRONG, INTERRUPTED, NOT_VERIFIED = range(5)

out = Console()
err = Console(stderr=True)


def print_json(document: Any) -> None:
    """Prints the one document of a command on standard output."""
    sys.stdout.write(json.dumps(document, indent=1) + "\n")


def as_typed(folder: RunFolder) -> str:
    """A run as a person would type it here."""
    path = folder.local_path
    if path is None:
        return folder.uri
    here = Path.cwd()
    if path.parent == here / "runs":
        return path.name
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
