"""MLflow's stores in tests: a real server on this machine, and processes that end between two writes."""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from servers import HEAD, end, free_port, start, until_up

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
    uri, log = f"http://{HEAD}:{port}", folder / f"{options[0]}.log"
    process = start(log, sys.executable, "-m", "mlflow", *options, "--host", HEAD, "--port", port, **env)
    try:
        until_up(process, log, lambda: urllib.request.urlopen(f"{uri}/health", timeout=5).close())
        yield uri
    finally:
        end(process)


def server(database: str, folder: Path, port: int) -> AbstractContextManager[str]:
    """A tracking server on this machine; gives its address once it answers."""
    artifacts = folder / "served"
    store = ("--backend-store-uri", database, "--artifacts-destination", artifacts)
    return answering(folder, port, "server", "--workers", 1, *store)


class TrackingServer:
    """A tracking server that can be taken away and brought back.

    Args:
        folder: For its files and its log.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self._running = ExitStack()
        self.uri = f"http://{HEAD}:{self._port}"

    def start(self) -> None:
        """Brings it (back), with what was in it."""
        self._running.enter_context(server(f"sqlite:///{self._folder}/served.db", self._folder, self._port))

    def kill(self) -> None:
        """Takes it away."""
        self._running.close()


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
