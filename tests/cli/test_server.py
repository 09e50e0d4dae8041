"""`ui`: what it refuses, where it leads to, and that its server ends with it."""

from __future__ import annotations

import signal
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from builders import make_sweep, write_run
from command_line import Cli, wait_until

from clnp_search.storage import RunFolder


@pytest.fixture
def logged(cli: Cli) -> Cli:
    """A folder with a run that is in experiment 7 of an empty database."""
    (cli.folder / "mlflow.db").write_bytes(b"")
    folder = RunFolder(str(cli.folder / "runs" / "run"))
    list(write_run(folder, make_sweep(tracking={"uri": f"sqlite:///{cli.folder}/mlflow.db"})))
    folder.write_tracking({"key": "k", "experiment_id": "7", "runs": {}})
    return cli


@pytest.fixture
def port() -> Iterator[int]:
    """A port that somebody else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_port_that_is_taken_is_refused_in_a_sentence(logged: Cli, port: int) -> None:
    answer = logged("ui", "run", "--port", str(port), status=2)
    assert answer.stderr.startswith(f"--host 127.0.0.1 --port {port}: Address already in use")


@pytest.mark.parametrize("value", ["0", "65536", "-1", "http"])
def test_a_port_that_is_none_is_refused_in_a_sentence(logged: Cli, value: str) -> None:
    assert "--port" in logged("ui", "run", f"--port={value}", status=2).stderr


def test_an_address_of_another_machine_is_refused(logged: Cli) -> None:
    answer = logged("ui", "run", "--host", "192.0.2.1", status=2)
    assert answer.stderr.startswith("--host 192.0.2.1 --port 5000: ")


def test_a_store_with_a_server_of_its_own_is_named_with_the_page_of_the_runs(logged: Cli) -> None:
    answer = logged("ui", "run", "--tracking-uri", "http://host:1/")
    page = "http://host:1/#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey=clnp-sequences"
    assert answer.stdout == f"This store has a server of its own: {page}\n"


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the addresses that are opened in the user's browser."""
    browser, addresses = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f'#!/bin/sh\necho "$1" >>{addresses}\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    return addresses


def test_open_leads_the_browser_to_a_server_of_its_own(logged: Cli, opened: Path) -> None:
    page = logged("ui", "run", "--tracking-uri", "http://host:1/", "--open").stdout.partition(": ")[2]
    assert opened.read_text() == page


def test_a_run_without_tracking_has_no_page(cli: Cli) -> None:
    list(write_run(RunFolder(str(cli.folder / "runs" / "run")), make_sweep(tracking={"uri": "none"})))
    assert cli("ui", "run", status=2).stderr == "run: nothing is logged to MLflow (tracking.uri is none)\n"


def is_healthy(port: int) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30) as answer:
        return bool(answer.read() == b"OK")
    return False


def test_the_server_shows_the_page_of_the_runs_and_ends_on_an_interrupt(logged: Cli, opened: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with logged.start("ui", "run", "--open", "--port", str(port)) as process:
        assert process.stderr is not None
        try:
            assert process.stderr.readline().endswith("Ctrl-C ends it\n")
            page = f"http://127.0.0.1:{port}/#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey=clnp-sequences\n"
            assert process.stderr.readline() == page
            assert any("startup complete" in line for line in process.stderr)
            assert wait_until(lambda: is_healthy(port), process, 60)  # it says so before it listens
            assert wait_until(opened.exists, process, 30)
            assert opened.read_text() == page
        finally:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)
