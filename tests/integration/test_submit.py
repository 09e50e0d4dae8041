"""A run sent as a job to a real job server on loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Cli

pytest.importorskip("ray.job_submission")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def job_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a head node's job server; the node ends with the test."""
    dashboard, gcs = free_port(), free_port()
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2"]
    command += [f"--port={gcs}", "--node-ip-address=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += ["--dashboard-host=127.0.0.1", f"--temp-dir={tmp_path_factory.mktemp('r')}"]
    node = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{dashboard}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/api/jobs/", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert node.poll() is None, "ray start has ended"
                time.sleep(0.2)
        else:
            pytest.fail("the job server did not come up")
        yield url
    finally:
        node.send_signal(signal.SIGTERM)
        node.wait(60)


def test_a_submitted_run_ends_like_a_local_one_and_is_one_job_when_sent_twice(
    cli: Cli, finished: Path, job_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    arguments = ["submit", "sweep.yaml", "--address", job_server, "--name", "sent", "--tracking-uri", "none"]
    first = cli.json(*arguments)
    assert first["status"] == "SUCCEEDED"
    summary = json.loads((cli.folder / "runs" / "sent" / "summary.json").read_text())
    assert summary["state_digest"] == json.loads((finished / "summary.json").read_text())["state_digest"]
    assert cli.json(*arguments, "--detach")["submission_id"] == first["submission_id"]


OWN = """
import numpy as np
from types import SimpleNamespace
from helping.shapes import SIZE


def tasks(path):
    assert not __import__("os").path.exists("data.bin"), "data are not sent"
    print("looked for by", path)
    chance = np.random.default_rng(0)
    for name in ("one", "two"):
        parts = [(chance.integers(0, 255, (200, *SIZE), np.uint8), np.arange(200) % 2) for _ in range(2)]
        (train, train_labels), (test, test_labels) = parts
        yield SimpleNamespace(name=name, num_classes=2, train_inputs=train, train_labels=train_labels,
                              test_inputs=test, test_labels=test_labels)
"""
OWN_SWEEP = """
scenario: {name: "own_tasks:tasks", arguments: {path: here}}
network: {hidden: [6, 4]}
training: {epochs: EPOCHS, batch_size: 16}
search: {alpha: [1e-5], learning_rate: [0.005, 0.01]}
forgetting: {margin: 2%}
"""


def write_own(folder: Path, epochs: int) -> None:
    """A sweep with a module of its own, which has a helper in a package, and data beside them."""
    (folder / "helping").mkdir(parents=True)
    (folder / "helping" / "__init__.py").touch()
    (folder / "helping" / "shapes.py").write_text("SIZE = (4, 4)\n")
    (folder / "own_tasks.py").write_text(OWN)
    (folder / "data.bin").write_bytes(bytes(1 << 20))
    (folder / "own.yaml").write_text(OWN_SWEEP.replace("EPOCHS", str(epochs)))


def test_modules_of_ones_own_are_sent_without_data_and_a_stopped_job_keeps_its_points(
    cli: Cli, job_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    write_own(tmp_path / "own", epochs=2)
    sweep, own = str(tmp_path / "own" / "own.yaml"), tmp_path / "own"
    arguments = ["submit", sweep, "--address", job_server, "--name", "own", "--tracking-uri", "none"]
    arguments += ["--set", f"modules={own}"]
    assert "no job clnp-own-" in cli(*arguments, "--stop", status=2).stderr
    assert cli.json(*arguments)["status"] == "SUCCEEDED"
    recorded = (cli.folder / "runs" / "own" / "sweep.yaml").read_text()
    assert "modules0" in recorded

    long = [*arguments, "--set", "training.epochs=20000", "--set", "search.points_per_trial=1"]
    long[long.index("own")] = "long"
    cli(*long, "--detach")
    for _ in range(600):
        if (cli.folder / "runs" / "long" / "tasks" / "000" / "plan.json").exists():
            break
        time.sleep(0.2)
    assert cli.json(*long, "--stop")["status"] == "STOPPED"
    assert not (cli.folder / "runs" / "long" / "lease.json").exists()  # it ended in order, with status 3


def test_modules_that_are_too_large_are_refused_before_anything_is_sent(
    cli: Cli, job_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    write_own(tmp_path / "own", epochs=2)
    with (tmp_path / "own" / "numbers.py").open("wb") as stream:
        stream.truncate(17 << 20)
    arguments = ["submit", str(tmp_path / "own" / "own.yaml"), "--address", job_server, "--name", "large"]
    assert "have more than 16777216 bytes" in cli(*arguments, status=2).stderr


def test_no_job_server_is_a_plain_error(cli: Cli) -> None:
    answer = cli("submit", "sweep.yaml", "--address", f"http://127.0.0.1:{free_port()}", status=2)
    assert "no Ray job server answers there" in answer.stderr
