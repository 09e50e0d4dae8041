"""Faults of a cluster, made for real: each ends, by itself or by `resume`, with the digest of an undisturbed run, no
finished point trained again, and every metric once in MLflow. They take minutes: `uv run pytest -m slow`.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Cli, descendants, kill_everything, wait_until
from mlflow_content import snapshot
from mlflow_store import TrackingServer
from servers import ObjectStore, RayNodes, end

from clnp_search.config import TrackingConfig, sweep_of
from clnp_search.storage import RunFolder, join_uri
from clnp_search.tracking.mlflow import MlflowTracker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),  # MLflow 3.17 on SQLAlchemy 2.1
]
# Packs are the same on every cluster, and one trains for seconds.
LONG = ("--set", "scenario.tasks=2", "--set", "training.epochs=400", "--set", "search.points_per_trial=2")
UNTRACKED = ("--tracking-uri", "none")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder with a short path, which Ray's sockets need."""
    with tempfile.TemporaryDirectory(prefix="clnp-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def digest(cli: Cli) -> str:
    """The state's, after an undisturbed run."""
    return str(cli.json("run", "sweep.yaml", "--name", "calm", *LONG, *UNTRACKED)["state_digest"])


@pytest.fixture
def nodes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayNodes]:
    """A head without CPUs and two nodes of one."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    nodes = RayNodes(Path(tempfile.mkdtemp(dir=folder)))
    try:
        nodes.add()
        nodes.add()
        yield nodes
    finally:
        nodes.end()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    store = ObjectStore(tmp_path)
    for name, value in store.client.items():
        monkeypatch.setenv(name, value)
    yield store
    store.kill()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TrackingServer]:
    server = TrackingServer(tmp_path)
    yield server
    server.kill()


class Watched:
    """A run, and when each of its points was finished first.

    Args:
        uri: Of its folder.
    """

    def __init__(self, uri: str, tasks: int = 2) -> None:
        self.folder = RunFolder(uri)
        self._tasks = tasks
        self._seen: dict[tuple[int, str], float] = {}

    def finished(self) -> dict[tuple[int, str], float]:
        """When each point's training ended, as its record says."""
        return {
            (task, record.point.name_in(record.round)): record.ended
            for task in range(self._tasks)
            for record in self.folder.read_points(task)
        }

    def look(self) -> int:
        """Remembers what is finished; gives its number."""
        self._seen |= self.finished()
        return len(self._seen)

    def has(self, number: int) -> bool:
        """Whether so many points are finished."""
        return self.look() >= number

    def assert_undisturbed(self, digest: str) -> None:
        """It ended as if nothing had happened."""
        summary = self.folder.read_summary()
        assert summary is not None
        assert (summary.status, summary.state_digest) == ("complete", digest)
        final = self.finished()
        assert len(final) == 4 * self._tasks
        assert {point: final[point] for point in self._seen} == self._seen, "a finished point was trained again"


def workers_below(process: subprocess.Popen[str]) -> list[int]:
    """The processes that train packs, below a node or a driver that has started Ray itself."""
    return [pid for pid, command in descendants(process.pid).items() if "ray::_pack_task" in command]


def worker_below(process: subprocess.Popen[str]) -> int:
    """The first of them, as soon as there is one."""
    found: list[int] = []

    def there() -> bool:
        found[:] = workers_below(process)
        return bool(found)

    assert wait_until(there, process)
    return found[0]


def ended(process: subprocess.Popen[str], limit_s: float = 300) -> tuple[int, str]:
    """A command's status and what it said."""
    _, errors = process.communicate(timeout=limit_s)
    return process.returncode, errors


def test_a_node_that_is_killed_in_the_middle_of_a_pack(cli: Cli, digest: str, nodes: RayNodes) -> None:
    run = Watched(str(cli.folder / "runs" / "node"))
    process = cli.start("run", "sweep.yaml", "--name", "node", *LONG, *UNTRACKED, "--address", nodes.address)
    lost: list[subprocess.Popen[str]] = []

    def trains() -> bool:
        lost[:] = [node for node in nodes.workers if workers_below(node)]
        return bool(lost)

    assert wait_until(trains, process)
    run.look()
    kill_everything(lost[0])
    status, errors = ended(process)
    assert status == 0, errors
    run.assert_undisturbed(digest)


def test_a_worker_that_stands_still_for_30_s(cli: Cli, digest: str) -> None:
    run = Watched(str(cli.folder / "runs" / "still"))
    process = cli.start("run", "sweep.yaml", "--name", "still", *LONG, *UNTRACKED)
    worker = worker_below(process)
    os.kill(worker, signal.SIGSTOP)
    time.sleep(30)
    os.kill(worker, signal.SIGCONT)
    status, errors = ended(process)
    assert status == 0, errors
    run.assert_undisturbed(digest)


def test_a_driver_that_is_killed_while_its_cluster_lives_on(cli: Cli, digest: str, nodes: RayNodes) -> None:
    run = Watched(str(cli.folder / "runs" / "driver"))
    arguments = ("run", "sweep.yaml", "--name", "driver", *LONG, *UNTRACKED, "--address", nodes.address)
    for points in (1, 5):
        process = cli.start(*arguments)
        assert wait_until(lambda: run.has(points), process)  # noqa: B023
        process.kill()
        process.communicate()
        run.look()
    cli("resume", "driver", *UNTRACKED, "--address", nodes.address)
    run.assert_undisturbed(digest)


def test_a_head_that_is_lost_and_a_new_cluster(
    cli: Cli, digest: str, store: ObjectStore, nodes: RayNodes, folder: Path
) -> None:
    run = Watched(join_uri(store.storage, "head"))
    process = cli.start(
        "run", "sweep.yaml", "--name", "head", *LONG, *UNTRACKED, "--storage", store.storage, "--address", nodes.address
    )
    assert wait_until(lambda: run.has(1), process)
    kill_everything(nodes.head)
    status, errors = ended(process)
    assert status == 1, errors  # Ray ends every process of a cluster that has lost its head, this one too
    nodes.end()
    run.look()
    other = RayNodes(Path(tempfile.mkdtemp(dir=folder)))
    try:
        other.add(2)
        cli("resume", run.folder.uri, *UNTRACKED, "--address", other.address)
    finally:
        other.end()
    run.assert_undisturbed(digest)


def test_a_worker_that_runs_out_of_memory(cli: Cli, digest: str) -> None:
    run = Watched(str(cli.folder / "runs" / "memory"))
    process = cli.start("run", "sweep.yaml", "--name", "memory", *LONG, *UNTRACKED)
    worker = worker_below(process)
    used = int(Path(f"/proc/{worker}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(worker, resource.RLIMIT_AS, (used, used))  # no byte more
    status, errors = ended(process)
    assert status == 0, errors
    run.assert_undisturbed(digest)


@pytest.mark.parametrize("away_s", [20, 60])
def test_a_storage_that_is_away_for_a_while(cli: Cli, digest: str, store: ObjectStore, away_s: int) -> None:
    run = Watched(join_uri(store.storage, "away"))
    process = cli.start("run", "sweep.yaml", "--name", "away", *LONG, *UNTRACKED, "--storage", store.storage)
    assert wait_until(lambda: run.has(1), process)
    store.kill()
    time.sleep(away_s)
    store.start()
    status, errors = ended(process)
    run.look()
    assert status in (0, 1), errors
    if status == 1:
        assert "clnp-search resume" in errors
        cli("resume", run.folder.uri, *UNTRACKED)
    run.assert_undisturbed(digest)


def test_a_storage_that_is_away_from_the_start_is_said_in_a_sentence(cli: Cli, store: ObjectStore) -> None:
    store.kill()
    errors = cli("run", "sweep.yaml", "--name", "away", *LONG, *UNTRACKED, "--storage", store.storage, status=2).stderr
    assert f"storage {join_uri(store.storage, 'away')}" in errors.replace("\n", "")
    assert "Traceback" not in errors


def test_a_storage_that_stands_still_for_30_s(cli: Cli, digest: str, store: ObjectStore) -> None:
    run = Watched(join_uri(store.storage, "stands"))
    process = cli.start("run", "sweep.yaml", "--name", "stands", *LONG, *UNTRACKED, "--storage", store.storage)
    assert wait_until(lambda: run.has(1), process)
    store.stop()
    time.sleep(30)
    store.go_on()
    status, errors = ended(process)
    run.look()
    if status:
        assert status == 1, errors
        cli("resume", run.folder.uri, *UNTRACKED)
    run.assert_undisturbed(digest)


def assert_all_in_mlflow(folder: RunFolder, uri: str, tmp_path: Path) -> None:
    """MLflow has what a run folder holds, everything once: what a new store is given at once."""
    sweep = sweep_of(folder)
    there = sweep.model_copy(update={"tracking": TrackingConfig(uri=uri, models=False)})
    fresh = sweep.model_copy(update={"tracking": TrackingConfig(uri=f"sqlite:///{tmp_path}/fresh.db", models=False)})
    found = snapshot(there)
    kept = folder.read_tracking()
    MlflowTracker(folder, fresh).sync()
    folder.write_tracking(kept)
    assert snapshot(fresh) == found


@pytest.mark.parametrize("from_the_start", [False, True])
def test_a_tracking_server_that_is_away_for_a_while(
    cli: Cli, digest: str, server: TrackingServer, tmp_path: Path, from_the_start: bool
) -> None:
    name = f"untracked{from_the_start:d}"
    run = Watched(str(cli.folder / "runs" / name))
    server.start()
    if from_the_start:
        server.kill()
    process = cli.start(
        "run", "sweep.yaml", "--name", name, *LONG, "--set", f"name={name}", "--tracking-uri", server.uri
    )
    assert wait_until(lambda: run.has(2), process)
    server.kill()
    status, errors = ended(process)
    assert status == 0, errors
    assert "MLflow" in errors
    run.look()
    server.start()
    cli("resume", name)
    run.assert_undisturbed(digest)
    assert_all_in_mlflow(run.folder, server.uri, tmp_path)


@pytest.fixture
def elsewhere() -> tuple[str, ...]:
    """What starts a command as on another machine, as far as processes can tell, whose clock is an hour ahead."""
    for program in ("unshare", "faketime"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    return ("unshare", "--pid", "--fork", "--mount-proc", "faketime", "-f", "+1h")


def test_two_drivers_on_two_machines_whose_clocks_differ(cli: Cli, digest: str, elsewhere: tuple[str, ...]) -> None:
    run = Watched(str(cli.folder / "runs" / "two"))
    first = cli.start("run", "sweep.yaml", "--name", "two", *LONG, *UNTRACKED, "--set", "search.max_failures=0")
    assert wait_until(lambda: run.has(1), first)
    status, errors = ended(cli.start("resume", "two", *UNTRACKED, before=elsewhere))
    assert status == 2, errors
    assert "is being run by" in errors
    for pid in [first.pid, *descendants(first.pid)]:
        os.kill(pid, signal.SIGSTOP)
    run.look()
    status, errors = ended(cli.start("resume", "two", *UNTRACKED, before=elsewhere))
    assert status == 0, errors
    run.assert_undisturbed(digest)
    for pid in [*descendants(first.pid), first.pid]:
        os.kill(pid, signal.SIGCONT)
    status, errors = ended(first)
    assert status == 3, errors
    run.assert_undisturbed(digest)


def test_fifty_random_kills(
    cli: Cli,
    store: ObjectStore,
    nodes: RayNodes,
    server: TrackingServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tasks = ("--set", "scenario.tasks=20", "--set", "name=kills")
    expected = cli.json("run", "sweep.yaml", "--name", "calm-kills", *LONG, *tasks, *UNTRACKED)["state_digest"]
    run = Watched(join_uri(store.storage, "kills"), 20)
    server.start()
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    places = ("--storage", store.storage, "--tracking-uri", server.uri, "--address", nodes.address)
    killed: Counter[str] = Counter()
    began = time.monotonic()
    begin = ("run", "sweep.yaml", "--name", "kills", *LONG, *tasks, *places)
    process = cli.start(*begin)
    while killed.total() < 50:
        victim = chance.choice(("driver", "worker", "node", "MLflow", "storage"))
        time.sleep(chance.uniform(0, 3))
        if process.poll() is not None:
            status, errors = ended(process)
            # A store that is away when a run is begun or resumed is a refusal.
            assert status in (1, -signal.SIGKILL) or (status == 2 and "NETWORK_CONNECTION" in errors), errors
            run.look()
            has_begun = run.folder.exists("sweep.yaml")
            process = cli.start(*(("resume", run.folder.uri, *places[2:]) if has_begun else begin))
            continue
        if victim == "worker":
            busy = [
                pid for node in nodes.workers for pid, what in descendants(node.pid).items() if "ray::_pack" in what
            ]
            if not busy:
                continue
            os.kill(chance.choice(busy), signal.SIGKILL)
        elif victim == "node":
            end(nodes.workers.pop(chance.randrange(2)))
            nodes.add()
        elif victim == "driver":
            process.kill()
        else:
            away = store if victim == "storage" else server
            away.kill()
            time.sleep(chance.uniform(0, 10))
            away.start()
        killed[victim] += 1
    while True:
        status, errors = ended(process, 600)
        assert status in (0, 1, -signal.SIGKILL), errors
        run.look()
        if status == 0:
            break
        process = cli.start("resume", run.folder.uri, *places[2:])
    cli("resume", run.folder.uri, *places[2:])  # logs what waited
    with capsys.disabled():
        print(f"\nseed {seed}: killed {dict(killed)} in {time.monotonic() - began:.0f} s")
    run.assert_undisturbed(expected)
    assert_all_in_mlflow(run.folder, server.uri, tmp_path)
