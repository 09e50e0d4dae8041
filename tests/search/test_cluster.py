"""How a cluster is found, started and left."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from builders import make_inputs
from command_line import Cli
from servers import BIN, HEAD, end, free_port, start, until_up

from clnp_search.config import ResourcesConfig
from clnp_search.errors import InputError, MachineFault
from clnp_search.search import cluster, retries
from clnp_search.search.cluster import connect


@pytest.mark.parametrize("address", ["foo", "foo:bar", ":6379", "ray://foo"])
def test_an_address_of_no_known_form_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="allowed are local, auto, HOST:PORT"), connect(address, ResourcesConfig()):
        pass


@pytest.mark.parametrize("address", ["127.0.0.1:9", "127.0.0.1:99999", "ray://127.0.0.1:9"])
def test_an_address_where_nothing_answers_is_refused_at_once(address: str) -> None:
    with pytest.raises(InputError, match="no Ray cluster can be reached"), connect(address, ResourcesConfig()):
        pass


def test_a_cluster_that_wants_another_token_is_refused_with_what_to_set(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    command = (BIN / "ray", "start", "--block", "--head", f"--port={port}", "--include-dashboard=false", "--num-cpus=0")
    with tempfile.TemporaryDirectory(prefix="clnp-") as name:  # a short path
        log, own = Path(name) / "head.log", (f"--temp-dir={name}", f"--node-ip-address={HEAD}")
        head = start(log, *command, *own, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a" * 64)
        try:
            until_up(head, log, lambda: socket.create_connection((HEAD, port)).close())
            for mode in ("disabled", "token"):
                monkeypatch.setenv("RAY_AUTH_MODE", mode)
                monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
                said = cli("run", "sweep.yaml", "--address", f"{HEAD}:{port}", status=2).stderr
                assert f"--address {HEAD}:{port}: no Ray cluster can be reached" in said
                assert "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH" in said
        finally:
            end(head)


def test_a_process_handles_sigterm_as_it_did_before_it_had_a_cluster() -> None:
    def handle(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, handle)
    try:
        with connect("local", ResourcesConfig()):
            assert signal.getsignal(signal.SIGTERM) is handle
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_token_that_ray_makes_is_its_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    started = f"from {cluster.__name__} import _start; _start()"
    subprocess.run([sys.executable, "-c", started], check=True)  # here, Ray has read a token already
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600


def test_a_ray_that_cannot_be_started_is_tried_again_and_then_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 100)))  # longer than the name of a socket may be
    monkeypatch.setattr(retries, "PAUSE_S", 0.0)
    with pytest.raises(MachineFault, match=r"Ray cannot be started here: .+ \(tried 4 times\)"):
        connect("local", ResourcesConfig()).__enter__()
    assert [record.getMessage().endswith("trying again") for record in caplog.records] == [True] * 3


def test_a_scan_that_fails_is_tried_again_and_then_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "PAUSE_S", 0.0)
    inputs = make_inputs(tmp_path)  # nothing is trained
    with connect("local", ResourcesConfig()) as here:
        shared, of_task = here.share(inputs.run), here.share((inputs.plan, inputs.state, None))
        scans = here.scan(shared, of_task, inputs.plan.points[:1], 0, "global", max_failures=1)
        with pytest.raises(MachineFault, match=r"threshold scan of p000: FileNotFoundError: .+ \(tried 2 times\)"):
            next(scans)


def test_what_runs_beside_the_search_has_a_process_of_its_own_and_where_that_fails_runs_here(tmp_path: Path) -> None:
    def note(name: str, only_in: int | None = None) -> None:
        if only_in not in (None, os.getpid()):
            raise FileNotFoundError
        (tmp_path / name).write_text(f"{os.getpid()} {os.getpriority(os.PRIO_PROCESS, 0)}")

    with connect("local", ResourcesConfig()) as here:
        here.beside(note, "first")
        here.beside(note, "second")
        here.beside(note, "third", os.getpid())
    notes = [(tmp_path / name).read_text().split() for name in ("first", "second", "third")]
    assert notes[0] == notes[1]
    assert notes[0] != notes[2] == [str(os.getpid()), "0"]
    assert notes[0][1] == str(cluster.BESIDE_NICENESS)


def test_a_cluster_that_is_left_waits_for_no_process_beside_the_search_and_takes_no_other(tmp_path: Path) -> None:
    def stay() -> None:
        (tmp_path / "begun").touch()
        time.sleep(600)

    with connect("local", ResourcesConfig()) as here, ThreadPoolExecutor(1) as other:
        staying = other.submit(here.beside, stay)
        while not (tmp_path / "begun").exists() and not staying.done():
            time.sleep(0.02)
        here.leave()
        for left in (staying, other.submit(here.beside, stay)):
            with pytest.raises(RuntimeError, match="the cluster is left"):
                left.result()


def test_no_other_thread_can_free_what_is_rays_while_it_shuts_down(monkeypatch: pytest.MonkeyPatch) -> None:
    class Holding:
        def __init__(self) -> None:
            self.reference, self.itself = cluster.ray.put(1), self

    shut_down, held, seen = cluster.ray.shutdown, list[weakref.ref[Holding]](), list[tuple[bool, bool]]()

    def watched() -> None:
        seen.append((gc.isenabled(), all(each() is None for each in held)))
        shut_down()

    monkeypatch.setattr(cluster.ray, "shutdown", watched)
    with connect("local", ResourcesConfig()):
        held.append(weakref.ref(Holding()))
    assert seen[-1] == (False, True)
    assert gc.isenabled()
