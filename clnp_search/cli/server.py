"""The command `ui`: MLflow's own server, and the page on it where a sweep's runs are."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from clnp_search.cli.console import err, out
from clnp_search.cli.options import Storage, TrackingUri, absolute_sqlite, require_place
from clnp_search.errors import InputError

WAIT_S = 60.0


def ui(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run whose store to show.", show_default=False)
    ] = None,
    storage: Storage = "runs/",
    tracking_uri: TrackingUri = None,
    host: Annotated[str, typer.Option(help="Where the server listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Its port.")] = 5000,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the runs in a browser.")] = False,
) -> None:
    """Open MLflow's UI on the store that runs are logged to."""
    from clnp_search.config import TrackingConfig, sweep_of
    from clnp_search.storage import open_run

    uri, experiment = absolute_sqlite(TrackingConfig().uri), ""
    if run is not None:
        folder = open_run(run, storage)
        uri, experiment = sweep_of(folder).tracking.uri, folder.read_tracking().get("experiment_id", "")
    uri = tracking_uri or uri
    require_place("--tracking-uri", uri)
    if uri == "none":
        raise InputError(f"{run}: nothing is logged to MLflow (tracking.uri is none)")
    if uri.startswith(("http://", "https://")):
        link = _link(uri, experiment)
        out.print(f"This store has a server of its own: {link}", highlight=False)
        if open_browser:
            webbrowser.open(link)
        return
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///").partition("?")[0]).exists():
        raise InputError(f"{uri}: no such database; runs make it, or name another one with --tracking-uri")
    _require_free(host, port)
    link = _link(f"http://{host}:{port}", experiment)
    err.print(f"MLflow with {uri}; Ctrl-C ends it\n{link}", highlight=False)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    # In a session of its own, so that it ends with all its processes, and only when this one says so.
    server = subprocess.Popen(command, start_new_session=True)
    try:
        if open_browser and _answers(server, host, port):
            webbrowser.open(link)
        status = server.wait()
    except KeyboardInterrupt:
        return
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()
    raise RuntimeError(f"MLflow's server ended with status {status}; what it said stands above")


def _link(server: str, experiment: str) -> str:
    """The page of an experiment's runs; MLflow's home shows none of them."""
    page = (
        f"experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey=clnp-sequences"
        if experiment
        else "experiments"
    )
    return f"{server.rstrip('/')}/#/{page}"


def _require_free(host: str, port: int) -> None:
    try:
        socket.create_server((host, port), reuse_port=False).close()
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror}; try another, such as {port + 1}") from error


def _answers(server: subprocess.Popen[bytes], host: str, port: int) -> bool:
    """Whether the server answers before it ends or the wait is over."""
    end = time.monotonic() + WAIT_S
    while server.poll() is None and time.monotonic() < end:
        try:
            socket.create_connection((host, port), 1.0).close()
        except OSError:
            time.sleep(0.1)
        else:
            return True
    return False
