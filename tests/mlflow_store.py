"""MLflow's stores in tests: a real server on this machine, and processes that end between two writes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from clnp_search.config import Sweep, TrackingConfig

WRITES = (
    "create_experiment",
    "set_experiment_tag",
    "create_run",
    "log_batch",
    "log_artifacts",
    "set_terminated",
    "update_run",
    "create_logged_model",
    "log_model_artifacts",
    "log_outputs",
    "finalize_logged_model",
    "create_registered_model",
    "create_model_version",
    "set_logged_model_tags",
    "set_registered_model_alias",
)


def at(sweep: Sweep, uri: str, models: bool = False) -> Sweep:
    """The sweep with its records there; models take seconds."""
    return sweep.model_copy(update={"tracking": TrackingConfig(uri=uri, models=models)})


@contextmanager
def answering(folder: Path, port: int, *options: object, **env: str) -> Iterator[str]:
    """A process of MLflow's command line, with its log in a folder; gives its address once it answers there."""
    command = [sys.executable, "-m", "mlflow", *map(str, options), "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **env}
    uri = f"http://127.0.0.1:{port}"
    with open(folder / f"{options[0]}.log", "wb") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"{uri}/health", timeout=1).close()
                    break
                except OSError:
                    with pytest.raises(subprocess.TimeoutExpired):  # it is still running
                        process.wait(0.2)
            yield uri
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # it and its worker, nothing else
            process.wait(60)


def server(database: str, folder: Path, port: int) -> AbstractContextManager[str]:
    """A tracking server on this machine; gives its address once it answers."""
    artifacts = folder / "served"
    store = ("--backend-store-uri", database, "--artifacts-destination", artifacts)
    return answering(folder, port, "server", "--workers", 1, *store)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Killed(BaseException):
    """Stands for the end of the process."""


def unexpected(*args: Any, **kwargs: Any) -> None:
    """Stands for a write to MLflow."""
    raise AssertionError("nothing was left to write")


def kill_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Lets the process end at a write to MLflow that is done but not yet answered."""
    left = call

    def killing(method: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            answer = method(*args, **kwargs)
            left -= 1
            if left == 0:
                raise Killed
            return answer

        return wrapped

    for name in WRITES:
        monkeypatch.setattr(MlflowClient, name, killing(getattr(MlflowClient, name)))
