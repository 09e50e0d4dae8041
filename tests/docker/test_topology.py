"""The servers of compose.yaml as real processes (`docker/local.py`), and a run that is submitted to them."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Cli, descendants, kill_everything, wait_until

from clnp_search.storage import RunFolder

pytest.importorskip("ray.job_submission")

LOCAL = Path(__file__).resolve().parents[2] / "docker" / "local.py"
SMALL = ("--set", "scenario.tasks=2", "--set", "training.epochs=2", "--set", "search.alpha=[1e-5]")


@pytest.fixture
def servers() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """The process of local.py, which has only just started, and its folder: a short one that other users may pass."""
    with tempfile.TemporaryDirectory(prefix="clnp-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        process = subprocess.Popen([sys.executable, str(LOCAL), name], text=True, stderr=subprocess.PIPE)
        try:
            yield process, folder
        finally:
            kill_everything(process)
            process.communicate()


def test_a_run_that_is_submitted_with_the_token_ends_like_a_local_one(
    cli: Cli, servers: tuple[subprocess.Popen[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    process, folder = servers
    cli("run", "sweep.yaml", *SMALL, "--name", "here", "--tracking-uri", "none")  # while the servers start
    here = RunFolder(str(cli.folder / "runs" / "here")).read_summary()
    if not wait_until((folder / "client.env").exists, process):
        reason = process.communicate()[1]
        assert process.returncode == 2, reason
        pytest.skip(reason)
    client = dict(line.split("=", 1) for line in shlex.split((folder / "client.env").read_text()) if "=" in line)
    for name, value in client.items():
        monkeypatch.setenv(name, value)
    jobs, mlflow = client["RAY_API_SERVER_ADDRESS"], client["MLFLOW_TRACKING_URI"]
    submit = ["submit", "sweep.yaml", *SMALL, "--name", "sent", "--address", jobs]
    submit += ["--storage", "s3://clnp/runs", "--tracking-uri", mlflow]

    assert cli.json(*submit)["status"] == "SUCCEEDED"
    settings = f"?endpoint_override={client['AWS_ENDPOINT_URL']}&scheme=http"
    there = RunFolder(f"s3://clnp/runs/sent{settings}").read_summary()
    assert here is not None
    assert there is not None
    assert there.state_digest == here.state_digest
    assert sequence_in(mlflow) == ("FINISHED", "sent", "summary.json")

    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    assert "wants the token" in cli(*submit, status=2).stderr
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{jobs}/api/jobs/", timeout=30)

    started = descendants(process.pid)
    assert len(started) > 4
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0
    end = time.monotonic() + 30  # one of the dashboard's own processes sees a moment later that it is alone
    while left := [name for pid, name in started.items() if os.path.exists(f"/proc/{pid}")]:
        assert time.monotonic() < end, left
        time.sleep(0.1)


def sequence_in(uri: str) -> tuple[str, str, str]:
    """Status and name of the sequence's run in MLflow, and the name of one of its files in the object store."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    [run] = client.search_runs(experiments, "tags.`clnp.level` = 'sequence'")
    [file] = [file.path for file in client.list_artifacts(run.info.run_id) if file.path == "summary.json"]
    return run.info.status, run.info.run_name, file
