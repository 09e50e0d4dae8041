"""A cluster of several nodes on this machine, one of which does not see the storage, or has another torch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import Cli

pytestmark = pytest.mark.slow

RAY = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"]
SMALL = ("--set", "scenario.tasks=1", "--set", "training.epochs=1", "--tracking-uri", "none")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def node(*arguments: str, prefix: tuple[str, ...] = (), **environment: str) -> Iterator[None]:
    """A node, for the length of a context."""
    command = [*prefix, *RAY, *arguments]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, env=os.environ | environment, **quiet)  # type: ignore[call-overload]
    try:
        yield
        assert process.poll() is None, "the node has ended"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster whose head trains nothing, and of one node that sees all that the driver sees."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    os.environ["RAY_AUTH_MODE"] = "disabled"
    arguments = (f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=0", "--include-dashboard=false")
    try:
        with node("--head", *arguments, f"--temp-dir={tmp_path_factory.mktemp('r')}"):
            wait_for_nodes(address, 1)
            with node(f"--address={address}", "--node-ip-address=127.0.0.2", "--num-cpus=1"):
                wait_for_nodes(address, 2)
                yield address
    finally:
        del os.environ["RAY_AUTH_MODE"]


def wait_for_nodes(address: str, number: int) -> None:
    """Waits until a cluster has so many nodes."""
    code = f"import ray; ray.init('{address}', logging_level=50);print(sum(each['Alive'] for each in ray.nodes()))"
    for _ in range(60):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.stdout.strip() == str(number):
            return
        time.sleep(0.5)
    pytest.fail(f"no {number} nodes: {done.stderr}")


def test_a_node_that_does_not_see_the_storage_is_named_before_anything_is_trained(cli: Cli, head: str) -> None:
    (cli.folder / "runs").mkdir(exist_ok=True)
    hidden = f"mount -t tmpfs none '{cli.folder / 'runs'}' && exec \"$@\""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mounts need root")
    arguments = ("run", "sweep.yaml", *SMALL, "--name", "spread", "--address", head)
    with node(
        f"--address={head}",
        "--node-ip-address=127.0.0.3",
        "--num-cpus=1",
        prefix=("unshare", "-m", "sh", "-c", hidden, "sh"),
    ):
        wait_for_nodes(head, 3)
        message = cli(*arguments, status=2).stderr
    assert "1 of 2 nodes cannot train with storage" in message
    assert f"{socket.gethostname()} (127.0.0.3): what the driver writes there is not seen" in message
    assert "127.0.0.2" not in message
    assert not (cli.folder / "runs" / "spread").exists()
    assert not list((cli.folder / "runs").glob(".probe*"))


def test_a_run_on_nodes_that_see_the_storage_trains_and_leaves_no_probe(cli: Cli, head: str) -> None:
    cli("run", "sweep.yaml", *SMALL, "--name", "seen", "--address", head)
    assert (cli.folder / "runs" / "seen" / "summary.json").exists()
    assert not list((cli.folder / "runs").glob(".probe*"))


def test_a_node_with_another_torch_is_named(cli: Cli, head: str, tmp_path: Path) -> None:
    (tmp_path / "torch-1.0.dist-info").mkdir()
    (tmp_path / "torch-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
    with node(f"--address={head}", "--node-ip-address=127.0.0.4", "--num-cpus=1", PYTHONPATH=str(tmp_path)):
        wait_for_nodes(head, 3)
        message = cli("run", "sweep.yaml", *SMALL, "--name", "other", "--address", head, status=2).stderr
    assert "(127.0.0.4): has torch 1.0; the driver has clnp-search " in message
