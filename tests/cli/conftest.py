"""A folder of its own for each test of commands that need no Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import SWEEP, Cli


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    """The command line in a folder with `sweep.yaml`."""
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    cli = Cli(tmp_path)
    yield cli
    cli.end()
