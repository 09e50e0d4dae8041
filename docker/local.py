"""The topology of compose.yaml as plain processes on this machine, until Ctrl-C or SIGTERM ends them all.

    uv run python docker/local.py FOLDER

Everything is in FOLDER: data, secrets, logs, and `client.env`, which tells clients where the servers are. Ports are
free ones, new at each start. Exit status: 0 ended when it was told to, 1 a server failed, 2 a program is missing.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import health
from make_secrets import make_secrets

LOOPBACK = "127.0.0.1"
START_S = 180.0
STOP_S = 60.0
BIN = Path(sys.executable).parent


class ServerError(Exception):
    """A server did not come up, or ended."""


class Servers:
    """Processes that this one has started, each with its log.

    Args:
        folder: Where the logs go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, tuple[subprocess.Popen[bytes], signal.Signals]] = {}

    def start(
        self, name: str, *command: object, stop: signal.Signals = signal.SIGTERM, user: str | None = None, **env: str
    ) -> None:
        """Starts one, in a session of its own, so that it ends only when this process says so."""
        with (self._folder / f"{name}.log").open("ab") as log:
            self._running[name] = (
                subprocess.Popen(
                    [str(part) for part in command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self._folder,
                    env=os.environ | env,
                    start_new_session=True,
                    **_as(user),  # type: ignore[call-overload]
                ),
                stop,
            )

    def wait(self, name: str, check: Callable[[], object]) -> None:
        """Waits until a check of one passes.

        Raises:
            ServerError: It ended, or the wait is over.
        """
        end = time.monotonic() + START_S
        while True:
            self.require_running()
            try:
                check()
                return
            except Exception as error:  # whatever a server that is not up yet does to its clients
                if time.monotonic() > end:
                    raise ServerError(f"{name}: not healthy after {START_S:.0f} s: {error}; see {name}.log") from error
                time.sleep(0.2)

    def require_running(self) -> None:
        """Nothing, if all are running.

        Raises:
            ServerError: One has ended.
        """
        for name, (process, _) in self._running.items():
            if process.poll() is not None:
                said = (self._folder / f"{name}.log").read_text(errors="replace")
                raise ServerError(f"{name} ended with status {process.returncode}:\n{said[-2000:]}")

    def end(self) -> None:
        """Ends all."""
        for process, stop in reversed(self._running.values()):  # those first that use the others
            process.send_signal(stop)
        for process, _ in self._running.values():
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def serve(folder: Path, cpus: int, programs: dict[str, str]) -> None:
    """Starts everything, says how to use it, and waits."""
    make_secrets(folder / "secrets")
    servers = Servers(folder)
    try:
        client = _start(servers, folder, cpus, programs)
        text = "".join(f"export {name}={value}\n" for name, value in client.items())
        (folder / "client.env").write_text(text)
        print(f"{text}# all servers are up; in another shell: . {folder}/client.env", flush=True)
        while True:
            servers.require_running()
            time.sleep(1)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        servers.end()


def _start(servers: Servers, folder: Path, cpus: int, programs: dict[str, str]) -> dict[str, str]:
    secrets = folder / "secrets"
    dashboard, gcs = (free_port() for _ in range(2))
    client = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(secrets / "ray_token"),
        "RAY_API_SERVER_ADDRESS": f"http://{LOOPBACK}:{dashboard}",
    } | start_objects(servers, folder, programs)
    os.environ.update(client, PATH=f"{BIN}:{os.environ['PATH']}", RAY_USAGE_STATS_ENABLED="0")
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # under `uv run`, Ray would send this folder to its workers
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")

    def start_ray(name: str, *options: str) -> None:
        # Each node has its own folder: one deletes the unpacked working directory that the other's job still runs in.
        # Ports would otherwise be the same for every node, or be drawn from one range.
        own = ("--node-name", socket.gethostname(), f"--temp-dir={folder / name}", "--min-worker-port=0")
        ports = ("--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}")
        servers.start(name, programs["ray"], "start", "--block", *own, *ports, *options)

    at_head = (f"--port={gcs}", f"--node-ip-address={LOOPBACK}", f"--ray-client-server-port={free_port()}")
    shown = (f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard}")
    start_ray("ray-head", "--head", "--num-cpus=0", *at_head, *shown)
    uri = start_postgres(servers, folder, programs)
    servers.wait("weed", _list_bucket)
    tracking = free_port()
    mlflow = (sys.executable, "-m", "mlflow", "server", "-w", 1, "--host", LOOPBACK, "--port", tracking)
    hosts = f"{LOOPBACK}:{tracking},localhost:{tracking}"
    stores = ("--backend-store-uri", uri, "--artifacts-destination", "s3://mlflow", "--allowed-hosts", hosts)
    servers.start("mlflow", *mlflow, *stores, PGPASSWORD=(secrets / "postgres_password").read_text())

    servers.wait("ray-head", partial(health.ray_head, f"http://{LOOPBACK}:{dashboard}"))
    start_ray("ray-worker", f"--address={LOOPBACK}:{gcs}", f"--num-cpus={cpus}")
    servers.wait("ray-worker", partial(health.ray_worker, f"http://{LOOPBACK}:{dashboard}"))
    servers.wait("mlflow", partial(health.mlflow, f"http://{LOOPBACK}:{tracking}"))
    return client | {"MLFLOW_TRACKING_URI": f"http://{LOOPBACK}:{tracking}"}


def start_objects(servers: Servers, folder: Path, programs: dict[str, str]) -> dict[str, str]:
    """Starts the object store, with the buckets `clnp` and `mlflow`; gives what its clients have in the environment."""
    secrets, port = folder / "secrets", free_port()
    (folder / "s3").mkdir(exist_ok=True)
    bind = (f"-ip={LOOPBACK}", f"-ip.bind={LOOPBACK}", f"-s3.port={port}", "-s3.port.iceberg=0", "-s3.port.lance=0")
    off = ("-webdav=false", "-admin.ui=false")
    identities = f"-s3.config={secrets / 's3_identities'}"
    servers.start("weed", programs["weed"], "mini", "-dir=s3", *bind, *off, identities, "-bucket=clnp,mlflow")
    return {
        "AWS_SHARED_CREDENTIALS_FILE": str(secrets / "s3_credentials"),
        "AWS_ENDPOINT_URL": f"http://{LOOPBACK}:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def start_postgres(servers: Servers, folder: Path, programs: dict[str, str]) -> str:
    """Starts PostgreSQL, as a user of its own where this one is root, which it refuses; its URI lacks the password."""
    import psycopg

    password = (folder / "secrets" / "postgres_password").read_text()
    data, port = folder / "postgres", free_port()
    user = "postgres" if os.geteuid() == 0 else None
    if not (data / "PG_VERSION").exists():
        data.mkdir(mode=0o700, exist_ok=True)
        if user:
            shutil.chown(data, user, user)
        with tempfile.NamedTemporaryFile("w", dir=folder) as file:
            print(password, file=file, flush=True)
            if user:
                shutil.chown(file.name, user, user)
            command = [programs["initdb"], "-D", data, "-U", "mlflow", "-A", "scram-sha-256", f"--pwfile={file.name}"]
            made = subprocess.run(command, capture_output=True, text=True, cwd="/", **_as(user))  # type: ignore[call-overload]
        if made.returncode:
            raise ServerError(f"initdb: {made.stderr.strip()}")
    options = ("-c", f"listen_addresses={LOOPBACK}", "-c", "unix_socket_directories=", "-p", port)
    command = (programs["postgres"], "-D", data, *options)
    servers.start("postgres", *command, stop=signal.SIGINT, user=user)
    servers.wait(
        "postgres",
        lambda: psycopg.connect(host=LOOPBACK, port=port, user="mlflow", password=password, dbname="postgres").close(),
    )
    return f"postgresql+psycopg://mlflow@{LOOPBACK}:{port}/postgres"


def _as(user: str | None) -> dict[str, Any]:
    return {"user": user, "group": user, "extra_groups": []} if user else {}


def _list_bucket() -> None:
    import boto3

    boto3.client("s3").list_objects_v2(Bucket="clnp")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def find_programs() -> dict[str, str]:
    """Paths of the programs that are started; exits with status 2 if one is missing."""
    newest = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    places = os.pathsep.join([str(BIN), os.environ["PATH"], *map(str, newest)])
    found = {name: shutil.which(name, path=places) for name in ("initdb", "postgres", "weed", "ray")}
    if missing := [name for name, path in found.items() if path is None]:
        print(f"not found: {', '.join(missing)} (PostgreSQL; `uv sync` brings weed and ray)", file=sys.stderr)
        sys.exit(2)
    return {name: path for name, path in found.items() if path}


def main() -> None:
    """Parses, serves, and ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cpus", type=int, default=os.cpu_count(), help="CPUs of the worker; the head has none")
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        serve(folder, arguments.cpus, find_programs())
    except ServerError as failure:
        sys.exit(str(failure))
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
