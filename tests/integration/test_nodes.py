"""A node that does not see the storage, or has another torch, is named before anything is trained. Real nodes."""

from __future__ import annotations

import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Cli
from servers import RayNodes

pytestmark = pytest.mark.slow
SMALL = ("--set", "scenario.tasks=1", "--set", "training.epochs=1", "--tracking-uri", "none")


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    """A head without CPUs and a node of one, 127.0.0.2, which sees all that the driver sees."""
    with tempfile.TemporaryDirectory(prefix="clnp-") as name:
        nodes = RayNodes(Path(name))
        try:
            nodes.add()
            yield nodes
        finally:
            nodes.end()


@pytest.fixture
def arguments(nodes: RayNodes, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    return ("run", "sweep.yaml", *SMALL, "--address", nodes.address, "--name")


def test_nodes_that_see_the_storage_train_and_leave_nothing_there(cli: Cli, arguments: tuple[str, ...]) -> None:
    cli(*arguments, "trained")
    assert (cli.folder / "runs" / "trained" / "summary.json").exists()
    assert not [*(cli.folder / "runs").glob(".probe*")]


def test_nodes_that_cannot_train_are_named_with_their_reasons(
    cli: Cli, nodes: RayNodes, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mounts need root")
    (cli.folder / "runs").mkdir(exist_ok=True)
    hidden = f"mount -t tmpfs none '{cli.folder / 'runs'}' && exec \"$@\""
    nodes.add(within=("unshare", "-m", "sh", "-c", hidden, "sh"))
    (tmp_path / "torch-1.0.dist-info").mkdir()
    (tmp_path / "torch-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
    nodes.add(PYTHONPATH=str(tmp_path))

    message = cli(*arguments, "refused", status=2).stderr
    assert "2 of 3 nodes cannot train with storage" in message
    assert f"{socket.gethostname()} (127.0.0.3): what the driver writes there is not seen" in message
    assert "(127.0.0.4): has torch 1.0; the driver has clnp-search " in message
    assert "(127.0.0.2)" not in message
    assert not [*(cli.folder / "runs").glob(".probe*"), *(cli.folder / "runs").glob("refused")]
