"""A folder of its own for each test of commands that need no Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import SWEEP, Cli


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """The command line in a folder with `sweep.yaml`."""
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    return Cli(tmp_path)
