"""Kills at random moments, and resume: the digest of an undisturbed run, and no finished point trained again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import Cli, descendants, kill_everything, wait_until

from clnp_search.storage import RunFolder


def kill_driver(process: subprocess.Popen[str]) -> None:
    process.kill()


def digest(finished: Path) -> str:
    """What the undisturbed run ended with."""
    return json.loads((finished / "summary.json").read_text())["state_digest"]  # type: ignore[no-any-return]


def point_times(run: Path) -> dict[str, int]:
    """When each point's record was written."""
    return {str(path.relative_to(run)): path.stat().st_mtime_ns for path in run.glob("tasks/*/points/*.json")}


def test_a_run_that_is_killed_again_and_again_resumes_to_the_undisturbed_digest(cli: Cli, finished: Path) -> None:
    run = cli.folder / "runs" / "killed"
    seen: dict[str, int] = {}
    for kill, points_before in zip([kill_driver, kill_everything], sorted(random.sample(range(1, 9), 2)), strict=True):
        process = cli.start("run", "sweep.yaml", "--name", "killed")
        reached = wait_until(lambda: len(point_times(run)) >= points_before, process)  # noqa: B023
        assert reached
        time.sleep(random.uniform(0, 1.5))
        kill(process)
        process.communicate()
        seen |= point_times(run)
    summary = cli.json("resume", "killed")
    assert summary["state_digest"] == digest(finished)
    after = point_times(run)
    assert len(after) == 12
    assert {path: after[path] for path in seen} == seen


def kill_one(process: subprocess.Popen[str], name: str) -> None:
    """Kills the first worker that does what is named below a run, as soon as there is one."""
    found: list[int] = []

    def there() -> bool:
        # With its prefix: a process that the run has just forked still shows the run's own arguments.
        found[:] = [pid for pid, command in descendants(process.pid).items() if f"ray::{name}" in command]
        return bool(found)

    assert wait_until(there, process)
    os.kill(found[0], signal.SIGKILL)


def test_killed_workers_are_replaced_and_nothing_changes(cli: Cli, finished: Path) -> None:
    process = cli.start("run", "sweep.yaml", "--name", "replaced", "--tracking-uri", "none", "--json")
    for name in ("ImplicitFunc", "_pack_task"):  # a trial, and what trains its pack
        kill_one(process, name)
    document, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    summary = json.loads(document)  # nothing else is there, though Ray prints that a worker died
    assert summary["state_digest"] == digest(finished)


def statuses(run: Path) -> list[str]:
    """Of all points that have a record."""
    return [json.loads(path.read_text())["status"] for path in run.glob("tasks/*/points/*.json")]


def test_a_pack_whose_worker_is_killed_more_often_than_the_retries_stops_the_run_which_can_be_resumed(
    cli: Cli, finished: Path
) -> None:
    untracked = ["--tracking-uri", "none", "--set", "search.max_failures=1"]
    process = cli.start("run", "sweep.yaml", "--name", "dies", *untracked)
    killed: set[int] = set()

    def died_often() -> bool:
        """Kills every worker that trains a pack, as soon as it does."""
        for pid, command in descendants(process.pid).items():
            if "ray::_pack_task" in command and pid not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        return False

    wait_until(died_often, process)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert "of task 0: WorkerCrashedError: The worker died unexpectedly" in errors
    assert "(tried 2 times)" in errors
    assert "clnp-search resume dies" in errors
    assert "failed" not in statuses(cli.folder / "runs" / "dies")
    summary = cli.json("resume", "dies", "--tracking-uri", "none")
    assert summary["state_digest"] == digest(finished)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a part of a run."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=350k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_room(cli: Cli, finished: Path, small_disk: Path) -> None:
    untracked = ["--storage", str(small_disk), "--tracking-uri", "none"]
    errors = cli("run", "sweep.yaml", "--name", "full", *untracked, status=1).stderr
    assert "No space left on device" in errors
    assert "clnp-search resume" in errors
    assert "failed" not in statuses(small_disk / "full")
    cli("resume", "full", *untracked, status=1)
    subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)
    summary = cli.json("resume", "full", *untracked)
    assert summary["state_digest"] == digest(finished)


def test_a_failed_point_is_said_and_can_be_trained_again(cli: Cli, finished: Path) -> None:
    run = cli.folder / "runs" / "retried"
    shutil.copytree(finished, run)
    task = run / "tasks" / "002"
    for name in ("result.json", "state.safetensors"):
        (task / name).unlink()
    folder = RunFolder(str(run))
    record = folder.read_point(2, "p001")
    assert record is not None
    folder.write_point(2, replace(record, status="failed", reason="no luck"), None)
    failed = [{"task": 2, "point": "p001", "reason": "no luck"}]
    assert cli.json("status", "retried")["failed_points"] == failed
    assert "task 2: p001 failed: no luck" in cli("status", "retried").stdout
    summary = cli.json("resume", "retried", "--tracking-uri", "none", "--retry-failed")
    assert summary["failed_points"] == []
    assert summary["state_digest"] == digest(finished)


def test_a_second_driver_is_refused_and_one_that_is_replaced_stops(cli: Cli) -> None:
    run = cli.folder / "runs" / "driven"
    long = ["--set", "training.epochs=100000", "--tracking-uri", "none"]
    process = cli.start("run", "sweep.yaml", "--name", "driven", *long)
    assert wait_until((run / "tasks" / "000" / "plan.json").exists, process)
    refused = cli("resume", "driven", status=2).stderr
    assert f"is being run by process {process.pid}" in refused
    folder = RunFolder(str(run))
    holder = folder.read_lease()
    assert holder is not None
    other = replace(holder, token="other", host="elsewhere")
    folder.write_lease(other)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 3, errors
    assert "was taken over by process" in errors
    assert folder.read_lease() == other


def test_an_interrupt_ends_within_seconds_with_status_3(cli: Cli, finished: Path) -> None:
    run = cli.folder / "runs" / "interrupted"
    seen: dict[str, int] = {}
    for number, points_before in ((signal.SIGINT, 4), (signal.SIGTERM, 8)):
        process = cli.start("run", "sweep.yaml", "--name", "interrupted")
        reached = wait_until(lambda: len(point_times(run)) >= points_before, process)  # noqa: B023
        assert reached
        seen = point_times(run) | seen  # as each was written first
        started = time.monotonic()
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 3, errors
        assert "clnp-search resume" in errors
        assert time.monotonic() - started < 30  # seconds even on a loaded machine
    summary = cli.json("run", "sweep.yaml", "--name", "interrupted")
    assert summary["state_digest"] == digest(finished)
    after = point_times(run)
    assert {path: after[path] for path in seen} == seen


def test_a_sigterm_while_ray_starts_ends_with_status_3(cli: Cli) -> None:
    process = cli.start("run", "sweep.yaml", "--name", "early", "--tracking-uri", "none")
    assert wait_until(lambda: any("gcs_server" in command for command in descendants(process.pid).values()), process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    assert "interrupted; every finished point is kept. Go on with: the same command" in errors


def test_several_margins_that_are_interrupted_go_on_with_the_same_command(cli: Cli) -> None:
    margins = ["--set", "margins=[1%, 2%]", "--set", "training.epochs=100000"]
    process = cli.start("run", "sweep.yaml", "--name", "both", "--tracking-uri", "none", *margins)
    assert wait_until((cli.folder / "runs" / "both-m1" / "tasks" / "000" / "plan.json").exists, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    assert "interrupted; every finished point is kept. Go on with: the same command" in errors
