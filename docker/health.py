"""Whether a server does what its clients ask of it: `python health.py CHECK URL` ends with an error if it does not.

Ray's own health address answers without a token, and MLflow's whatever host is asked for: both are green while every
client is refused. So these checks send what clients send.
"""

import json
import os
import socket
import sys
import urllib.request
from pathlib import Path
from typing import Any

TIMEOUT_S = 10.0


def ray_head(url: str) -> None:
    """The job server lists its jobs for whoever has the token."""
    _ray(url, "/api/jobs/")


def ray_worker(url: str) -> None:
    """The cluster has a living worker of this machine's name."""
    nodes = _ray(url, "/api/v0/nodes")["data"]["result"]["result"]
    workers = [node["node_name"] for node in nodes if node["state"] == "ALIVE" and not node["is_head_node"]]
    if socket.gethostname() not in workers:
        raise RuntimeError(f"{socket.gethostname()} is not among the workers: {workers}")


def mlflow(url: str) -> None:
    """The server finds experiments, which are in the database, and lists artifacts, which are in the object store."""
    search = json.dumps({"max_results": 1}).encode()
    _json(f"{url}/api/2.0/mlflow/experiments/search", search, {"Content-Type": "application/json"})
    _json(f"{url}/api/2.0/mlflow-artifacts/artifacts")


def _ray(url: str, path: str) -> Any:
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
    return _json(url + path, headers={"Authorization": f"Bearer {token}"})


def _json(url: str, data: bytes | None = None, headers: dict[str, str] | None = None) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, data, headers or {}), timeout=TIMEOUT_S) as answer:
        return json.load(answer)


if __name__ == "__main__":
    {check.__name__: check for check in (ray_head, ray_worker, mlflow)}[sys.argv[1]](sys.argv[2])
