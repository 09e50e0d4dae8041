"""Whether a run can be logged, asked before it starts; without MLflow, whose import takes seconds."""

from __future__ import annotations

import os
import socket
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from clnp_search.storage import unwritable

TIMEOUT_S = 2.0
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


def fault_of(uri: str) -> str:
    """Why nothing can be logged there now, in a sentence without its end; nothing if no reason is seen."""
    scheme, separator, path = uri.partition("://")
    kind = scheme.partition("+")[0]
    if uri == "none" or uri.startswith("databricks"):
        return ""
    if kind == "sqlite" and separator:
        file = Path(path.removeprefix("/").partition("?")[0]).absolute()
        fault = f"{file} is a folder" if file.is_dir() else unwritable(file.parent)
        return f"{uri} cannot be made: {fault}" if fault else ""
    if not separator or kind == "file":
        allowed = os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() == "true"
        return "" if allowed else f"it keeps no runs in plain folders such as {uri} any more; try sqlite:///mlflow.db"
    if kind not in PORTS:
        return f"{uri} is of no kind that it knows; allowed: sqlite, {', '.join(PORTS)}"
    try:
        address = urlsplit(uri)
        host, port = address.hostname or "localhost", address.port or PORTS[kind]
        if not kind.startswith("http"):
            from sqlalchemy import make_url

            make_url(uri).get_dialect().import_dbapi()
        socket.create_connection((host, port), TIMEOUT_S).close()
    except OSError as error:
        return f"nothing answers at {host}:{port}: {error}"
    except Exception as error:  # an address that is none, or a driver that is not there
        return f"{scheme}: {error}"
    return ""


def missing_packages() -> str:
    """What has to be installed before a task can be an MLflow model, in a sentence without its end; or nothing."""
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    return f"{', '.join(missing)} not found; install the extra: `pip install 'clnp-search[onnx]'`" if missing else ""
