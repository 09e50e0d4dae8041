"""A run sent as a job to a real job server on loopback."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Cli
from servers import RayNodes, free_port

pytest.importorskip("ray.job_submission")


@pytest.fixture(scope="module")
def job_server() -> Iterator[str]:
    """The URL of a cluster's job server; its head trains nothing, and a node has two CPUs."""
    with tempfile.TemporaryDirectory(prefix="clnp-") as name:
        nodes = RayNodes(Path(name))
        try:
            nodes.add(cpus=2)
            yield nodes.url
        finally:
            nodes.end()


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
from pathlib import Path
import numpy as np
from types import SimpleNamespace
from helping.shapes import SIZE


def tasks():
    assert "modules0" in __file__, __file__
    assert not (Path(__file__).parent / "data.bin").exists(), "data are not sent"
    chance = np.random.default_rng(0)
    for name in ("one", "two"):
        parts = [(chance.integers(0, 255, (200, *SIZE), np.uint8), np.arange(200) % 2) for _ in range(2)]
        (train, train_labels), (test, test_labels) = parts
        yield SimpleNamespace(name=name, num_classes=2, train_inputs=train, train_labels=train_labels,
                              test_inputs=test, test_labels=test_labels)
"""
OWN_SWEEP = """
scenario: {name: "own_tasks:tasks"}
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


@pytest.mark.slow
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
