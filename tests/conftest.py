"""What all tests share: one thread, no usage data, the device, and where the image data are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# Before ray and mlflow are imported by anything.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")

import command_line
import pytest
import torch
from in_process import SWEEP, run_in_process

from clnp_search.clnp.training import set_precision
from clnp_search.storage import RunFolder, run_folder

torch.set_num_threads(1)
set_precision("float32")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that this machine has."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real image sets beside the checkout."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"the shared image sets are not at {path}")
    return path


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of `in_process.SWEEP`."""
    folder = run_folder(str(tmp_path_factory.mktemp("runs")), "whole")
    run_in_process(SWEEP, folder)
    return folder


@pytest.fixture
def copy(whole: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of it, to go on with or to damage."""
    assert whole.local_path is not None
    shutil.copytree(whole.local_path, tmp_path / "whole")
    return run_folder(str(tmp_path), "whole")


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[command_line.Cli]:
    """The command line in a folder of its own with `sweep.yaml`."""
    (tmp_path / "sweep.yaml").write_text(command_line.SWEEP)
    cli = command_line.Cli(tmp_path)
    yield cli
    cli.end()
