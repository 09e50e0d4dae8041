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


@pytest.fixture
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


def test_no_job_server_is_a_plain_error(cli: Cli) -> None:
    answer = cli("submit", "sweep.yaml", "--address", f"http://127.0.0.1:{free_port()}", status=2)
    assert "no Ray job server answers there" in answer.stderr
