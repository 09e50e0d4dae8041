"""Whole commands in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SWEEP = """
scenario: {name: permuted_digits, tasks: 3, validation: 300}
network: {name: mlp, hidden: [48, 32]}
head: {kind: single}
training: {epochs: 12, batch_size: 64}
search: {alpha: [1e-5, [1e-4, 3e-4, 1e-4]], learning_rate: [0.005, 0.01]}
forgetting: {margin: 2%}
tracking: {models: false}
"""


@dataclass(frozen=True)
class Cli:
    """The command line, run in a folder."""

    folder: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def end(self) -> None:
        """Leaves nothing running, whatever a failed test has left."""
        for process in self.processes:
            if process.poll() is None:
                kill_everything(process)

    def start(self, *arguments: str, before: Sequence[str] = ()) -> subprocess.Popen[str]:
        """A running command.

        Args:
            before: A program that starts it, with its own arguments.
        """
        command = [*before, sys.executable, "-m", "clnp_search", *arguments]
        environment = os.environ | {"COLUMNS": "200", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=self.folder, env=environment, start_new_session=True, **pipes)  # type: ignore[call-overload]
        self.processes.append(process)
        return process  # type: ignore[no-any-return]

    def __call__(self, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        """A finished command, which must end with `status`."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=400)
        assert process.returncode == status, f"status {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def json(self, *arguments: str, status: int = 0) -> Any:
        """The one JSON document that a command prints."""
        return json.loads(self(*arguments, "--json", status=status).stdout)


def descendants(parent: int) -> dict[int, str]:
    """All processes below one, whatever session they are in."""
    parents, names = {}, {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                name = (path / "cmdline").read_text().replace("\0", " ")
            except OSError:  # it has ended meanwhile
                continue
            parents[int(path.name)], names[int(path.name)] = int(fields[1]), name
    found: dict[int, str] = {}
    front = [parent]
    while front:
        front = [pid for pid, above in parents.items() if above in front]
        found |= {pid: names[pid] for pid in front}
    return found


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
