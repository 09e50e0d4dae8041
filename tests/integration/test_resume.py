"""Kills at random moments, and resume: the digest of an undisturbed run, and no finished point trained again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Cli


def descendants(parent: int) -> dict[int, str]:
    """All processes below one, whatever session they are in."""
    parents, names = {}, {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                parents[int(path.name)] = int(fields[1])
                names[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
    found: dict[int, str] = {}
    front = [parent]
    while front:
        front = [pid for pid, above in parents.items() if above in front]
        found |= {pid: names[pid] for pid in front}
    return found


def kill_driver(process: subprocess.Popen[str]) -> None:
    process.kill()


def kill_everything(process: subprocess.Popen[str]) -> None:
    below = descendants(process.pid)
    process.kill()
    for pid in below:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], limit_s: float = 300) -> bool:
    """Whether the condition came true while the process ran."""
    end = time.monotonic() + limit_s
    while process.poll() is None and time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def point_times(run: Path) -> dict[str, int]:
    """When each point's record was written."""
    return {str(path.relative_to(run)): path.stat().st_mtime_ns for path in run.glob("tasks/*/points/*.json")}


@pytest.mark.parametrize("kill", [kill_driver, kill_everything])
def test_a_killed_run_resumes_to_the_undisturbed_digest(
    cli: Cli, finished: Path, kill: Callable[[subprocess.Popen[str]], None]
) -> None:
    name = f"killed-{kill.__name__}"
    run = cli.folder / "runs" / name
    seen: dict[str, int] = {}
    for points_before in random.sample(range(1, 9), 2):
        process = cli.start("run", "sweep.yaml", "--name", name)
        reached = wait_until(lambda: len(point_times(run)) >= points_before, process)  # noqa: B023
        assert reached
        time.sleep(random.uniform(0, 1.5))
        kill(process)
        process.communicate()
        seen |= point_times(run)
    summary = cli.json("resume", name)
    assert summary["state_digest"] == json.loads((finished / "summary.json").read_text())["state_digest"]
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


@pytest.mark.parametrize("name", ["ImplicitFunc", "_pack_task"])
def test_a_killed_worker_is_replaced_and_nothing_changes(cli: Cli, finished: Path, name: str) -> None:
    process = cli.start("run", "sweep.yaml", "--name", f"killed{name}", "--tracking-uri", "none")
    kill_one(process, name)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    summary = json.loads((cli.folder / "runs" / f"killed{name}" / "summary.json").read_text())
    assert summary["state_digest"] == json.loads((finished / "summary.json").read_text())["state_digest"]


def test_a_pack_that_dies_for_good_is_recorded_and_the_search_goes_on(cli: Cli) -> None:
    settings = ["scenario.tasks=1", "search.max_failures=0", "search.points_per_trial=2", "training.epochs=60"]
    process = cli.start(
        "run", "sweep.yaml", "--name", "dies", "--tracking-uri", "none", *(f"--set={each}" for each in settings)
    )
    kill_one(process, "_pack_task")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    files = (cli.folder / "runs" / "dies" / "tasks" / "000" / "points").glob("*.json")
    records = [json.loads(path.read_text()) for path in files]
    assert sorted(record["status"] for record in records) == ["done", "done", "failed", "failed"]
    assert all("died" in record["reason"] for record in records if record["status"] == "failed")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_within_seconds_with_status_3(cli: Cli, finished: Path, number: signal.Signals) -> None:
    name = f"interrupted-{number.name}"
    run = cli.folder / "runs" / name
    process = cli.start("run", "sweep.yaml", "--name", name)
    assert wait_until(lambda: len(point_times(run)) >= 4, process)
    before = point_times(run)
    started = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    assert "clnp-search resume" in errors
    assert time.monotonic() - started < 30  # seconds even on a loaded machine
    summary = cli.json("run", "sweep.yaml", "--name", name)
    assert summary["state_digest"] == json.loads((finished / "summary.json").read_text())["state_digest"]
    after = point_times(run)
    assert {path: after[path] for path in before} == before
