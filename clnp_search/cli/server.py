"""The command `ui`: MLflow's own server."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from clnp_search.cli.console import err, out
from clnp_search.cli.options import Storage, TrackingUri, absolute_sqlite, open_named
from clnp_search.errors import InputError


def ui(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run whose store to show.", show_default=False)
    ] = None,
    storage: Storage = "runs/",
    tracking_uri: TrackingUri = None,
    host: Annotated[str, typer.Option(help="Where the server listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Its port.")] = 5000,
) -> None:
    """Open MLflow's UI on the store that runs are logged to."""
    from clnp_search.config import TrackingConfig

    uri = tracking_uri or (open_named(run, storage)[0].tracking.uri if run else absolute_sqlite(TrackingConfig().uri))
    if uri.startswith(("http://", "https://")):
        out.print(f"This store has a server of its own: {uri}")
        return
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise InputError(f"{uri}: no such database; runs make it, or name another one with --tracking-uri")
    err.print(f"MLflow on http://{host}:{port} with {uri}; Ctrl-C ends it")
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        uri,
        "--host",
        host,
        "--port",
        str(port),
    ]
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    os.execv(sys.executable, [*command, "--workers", "1"])
