"""A run sent as a job to a real job server on loopback."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from builders import make_sweep
from command_line import Cli
from servers import HEAD, RayNodes, free_port

from clnp_search.cli.options import located
from clnp_search.config import load_sweep
from clnp_search.errors import MachineFault
from clnp_search.search import retries
from clnp_search.search.submit import Job, job_of, submit_run

JobSubmissionClient = pytest.importorskip("ray.job_submission").JobSubmissionClient


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    """A cluster whose head trains nothing, and a node with two CPUs."""
    with tempfile.TemporaryDirectory(prefix="clnp-") as name:
        nodes = RayNodes(Path(name))
        try:
            nodes.add(cpus=2)
            yield nodes
        finally:
            nodes.end()


@pytest.fixture
def job_server(nodes: RayNodes, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of the cluster's job server."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    return nodes.url


def test_a_job_is_the_same_from_wherever_it_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sent(root: str, seed: int = 0) -> str:
        scenario = {"name": "permuted_digits", "root": root}
        sweep = make_sweep(seed=seed, modules=["."], scenario=scenario, storage="s3://bucket/runs")
        return job_of(located(sweep, None, "http://mlflow:5000"), "run", "http://head:8265").submission_id

    here = sent("data/"), sent("/data"), sent("/data", seed=1)
    monkeypatch.chdir(tmp_path)
    assert (sent("data/"), sent("/data"), sent("/data", seed=1)) == here
    assert len(set(here)) == 3


def test_a_submitted_run_ends_like_a_local_one_and_is_one_job_when_sent_twice(
    cli: Cli, finished: Path, job_server: str
) -> None:
    arguments = ["submit", "sweep.yaml", "--address", job_server, "--name", "sent", "--tracking-uri", "none"]
    first = cli.json(*arguments)
    assert first["status"] == "SUCCEEDED"
    summary = json.loads((cli.folder / "runs" / "sent" / "summary.json").read_text())
    assert summary["state_digest"] == json.loads((finished / "summary.json").read_text())["state_digest"]
    assert cli.json(*arguments, "--detach")["submission_id"] == first["submission_id"]


def test_a_run_that_another_client_sends_meanwhile_is_one_job(
    cli: Cli, job_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = load_sweep(cli.folder / "sweep.yaml", ["tracking.uri=none"])
    submit_job, others = JobSubmissionClient.submit_job, list[Job]()

    def second(*own: Any, **options: Any) -> str:
        monkeypatch.setattr(JobSubmissionClient, "submit_job", submit_job)
        others.append(submit_run(sweep, "twice", job_server, {}))
        return str(submit_job(*own, **options))

    monkeypatch.setattr(JobSubmissionClient, "submit_job", second)
    job = submit_run(sweep, "twice", job_server, {})
    job.stop()
    assert others == [job]


def test_following_a_job_ends_with_status_3_where_the_job_goes_on_and_where_it_is_stopped(
    cli: Cli, job_server: str
) -> None:
    arguments = ["submit", "sweep.yaml", "--address", job_server, "--name", "followed", "--tracking-uri", "none"]
    arguments += ["--set", "training.epochs=20000"]
    interrupted = followed(cli, arguments)
    interrupted.send_signal(signal.SIGINT)
    said = interrupted.communicate(timeout=60)[1]
    assert interrupted.returncode == 3, said
    assert "goes on; the same command follows it" in said
    stopped = followed(cli, arguments)
    cli(*arguments, "--stop")
    said = stopped.communicate(timeout=60)[1]
    assert stopped.returncode == 3, said
    assert "was stopped; every finished point is kept" in said


def followed(cli: Cli, arguments: list[str]) -> subprocess.Popen[str]:
    """A command that has begun to show a job's log."""
    process = cli.start(*arguments)
    assert process.stderr is not None
    while "tasks of permuted_digits" not in process.stderr.readline():
        assert process.poll() is None
    return process


@pytest.fixture
def job(job_server: str) -> Job:
    """One that says a word and ends."""
    return Job(job_server, JobSubmissionClient(job_server).submit_job(entrypoint="echo done"))


def test_a_job_is_followed_over_requests_that_fail(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, times=2)
    said = list[str]()
    assert job.follow(said.append) == "SUCCEEDED"
    assert "done\n" in "".join(said)


def test_a_job_that_cannot_be_followed_any_more_is_said_to_go_on(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, times=100)
    with pytest.raises(MachineFault, match=r"does not answer: ConnectionError: .+\n.+ goes on .+ the same command"):
        job.follow(lambda log: None)


def failing(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Has so many requests for a job's log go where nothing answers."""
    get_job_logs, left = JobSubmissionClient.get_job_logs, iter(range(times))

    def get(client: Any, submission_id: str) -> str:
        address = client._address
        client._address = client._address if next(left, None) is None else f"http://127.0.0.1:{free_port()}"
        try:
            return str(get_job_logs(client, submission_id))
        finally:
            client._address = address

    monkeypatch.setattr(JobSubmissionClient, "get_job_logs", get)
    monkeypatch.setattr(retries, "PAUSE_S", 0.0)


def test_a_command_that_is_interrupted_says_so_and_ends_with_status_3(cli: Cli) -> None:
    with socket.create_server((HEAD, 0)) as silent:
        process = cli.start("submit", "sweep.yaml", "--address", f"http://{HEAD}:{silent.getsockname()[1]}")
        silent.settimeout(60)
        with silent.accept()[0]:
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60) == ("", "interrupted\n")
    assert process.returncode == 3


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
    cli: Cli, job_server: str, tmp_path: Path
) -> None:
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


@pytest.mark.slow  # Ray copies the environment of a node that is in one
def test_uv_installs_what_a_job_needs_on_the_nodes(cli: Cli, job_server: str, tmp_path: Path) -> None:
    write_own(tmp_path / "own", epochs=2)
    (tmp_path / "own" / "helping" / "shapes.py").write_text("from clnp_search_test_shapes import SIZE\n")
    wheel = tmp_path / "clnp_search_test_shapes-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        about = f"{wheel.name[: -len('-py3-none-any.whl')]}.dist-info"
        archive.writestr("clnp_search_test_shapes.py", "SIZE = (4, 4)\n")
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: clnp_search_test_shapes\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    arguments = ["submit", str(tmp_path / "own" / "own.yaml"), "--address", job_server, "--tracking-uri", "none"]
    arguments += ["--set", f"modules={tmp_path / 'own'}"]
    without = cli(*arguments, "--name", "without", status=1)
    assert "clnp_search_test_shapes" in without.stdout + without.stderr
    assert cli.json(*arguments, "--name", "with", "--uv", str(wheel))["status"] == "SUCCEEDED"


@pytest.mark.parametrize(
    ("package", "said"), [("absent-1.0-py3-none-any.whl", "no such wheel"), ("not a package", "neither a requirement")]
)
def test_a_package_that_is_none_is_refused_before_anything_is_sent(
    cli: Cli, job_server: str, package: str, said: str
) -> None:
    arguments = ["submit", "sweep.yaml", "--address", job_server, "--name", "refused"]
    assert said in cli(*arguments, "--uv", package, status=2).stderr


def test_modules_that_are_too_large_are_refused_before_anything_is_sent(
    cli: Cli, job_server: str, tmp_path: Path
) -> None:
    write_own(tmp_path / "own", epochs=2)
    with (tmp_path / "own" / "numbers.py").open("wb") as stream:
        stream.truncate(17 << 20)
    arguments = ["submit", str(tmp_path / "own" / "own.yaml"), "--address", job_server, "--name", "large"]
    assert "have more than 16777216 bytes" in cli(*arguments, status=2).stderr


def test_a_heads_metrics_agent_shows_how_far_a_run_is_and_its_log_is_an_object_a_line(
    cli: Cli, nodes: RayNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "100")  # ten seconds by default
    monkeypatch.setenv("CLNP_SEARCH_LOG_FORMAT", "json")
    run = cli.start(
        "run", "sweep.yaml", "--address", nodes.address, "--name", "scraped", "--tracking-uri", "none", "--json"
    )
    seen: dict[str, float] = {}
    pattern = re.compile(r'^ray_clnp_search_(\w+)\{(?=.*run="scraped")(?:.*(?:task|group)="(\w+)")?.*\} (\S+)$', re.M)
    while run.poll() is None:
        with suppress(OSError), urllib.request.urlopen(nodes.metrics, timeout=5) as answer:
            found = pattern.findall(answer.read().decode())
            seen |= {f"{name} {of}".strip(): float(value) for name, of, value in found}
        time.sleep(0.05)
    logged = [json.loads(line) for line in run.communicate()[1].splitlines()]
    assert run.returncode == 0, logged
    assert (seen["points 0"], seen["points_done 0"], seen["points_failed 0"]) == (4, 4, 0)
    assert seen["epoch_seconds 0"] > 0
    assert seen["tasks_committed"] > 0
    assert 0 <= seen["free_units hidden0"] < 48
    assert {line["run"] for line in logged} == {"scraped"}
    messages = [line["message"] for line in logged if line.get("task") == 1]
    assert (messages[0], messages[-1]) == ("task planned", "task committed")


def test_no_job_server_is_a_plain_error(cli: Cli) -> None:
    answer = cli("submit", "sweep.yaml", "--address", f"http://127.0.0.1:{free_port()}", status=2)
    assert "no Ray job server answers there" in answer.stderr
