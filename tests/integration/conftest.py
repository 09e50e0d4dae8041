"""One undisturbed run, which many tests look at: real Ray, real files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import SWEEP, Cli


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """A folder with `sweep.yaml`, in which the commands of this session run."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "sweep.yaml").write_text(SWEEP)
    return Cli(folder)


@pytest.fixture(autouse=True)
def nothing_left(cli: Cli) -> Iterator[None]:
    """No command of a test runs on into the next one."""
    yield
    cli.end()


@pytest.fixture(scope="session")
def finished(cli: Cli) -> Path:
    """The folder of an undisturbed run of `sweep.yaml`."""
    cli("run", "sweep.yaml", "--name", "undisturbed")
    return cli.folder / "runs" / "undisturbed"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An SQLite store of a file's tests, for making its tables takes seconds; each has its own experiment."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
