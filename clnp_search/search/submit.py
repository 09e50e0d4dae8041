"""A run as a job on a Ray cluster, through its job server (the `cluster` extra)."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from clnp_search.config import ModuleConfig, Sweep
from clnp_search.errors import InputError, MachineFault
from clnp_search.search.cluster import TOKEN
from clnp_search.search.retries import cause_of, pause, tried
from clnp_search.storage import require_name
from clnp_search.tasks import SCENARIOS, kind_of

logger = logging.getLogger(__name__)
POLL_S = 1.0
MAX_MODULES_BYTES = 16 << 20
ATTEMPTS = 6


@dataclass(frozen=True)
class Job:
    """A submitted run.

    Args:
        address: The job server's URL.
        submission_id: The same for the same sweep and name, so that sending it twice is one job.
    """

    address: str
    submission_id: str

    def stop(self) -> str:
        """Interrupts the job, which keeps every finished point, and waits for its end; gives its last status.

        Raises:
            InputError: There is no such job.
        """
        client = _client(self.address)
        if not self._is_known(client):
            raise InputError(f"{self.address}: no job {self.submission_id}: this sweep was not sent there by this name")
        client.stop_job(self.submission_id)
        return self.follow(lambda log: None)

    def follow(self, show: Callable[[str], None]) -> str:
        """Shows the job's log until it ends; gives its last status: SUCCEEDED, FAILED or STOPPED.

        Raises:
            MachineFault: The job server does not answer any more, or has no such job.
        """
        client = _client(self.address)
        shown = 0
        while True:
            status, log = self._ask(client)
            show(log[shown:])
            shown = max(shown, len(log))
            if status.is_terminal():
                if status.value == "FAILED" and not log:  # it has not come to a log of its own
                    logger.error("the job has not begun: %s", client.get_job_info(self.submission_id).message)
                return str(status.value)
            time.sleep(POLL_S)

    def _is_known(self, client: Any) -> bool:
        return any(details.submission_id == self.submission_id for details in client.list_jobs())

    def _ask(self, client: Any) -> tuple[Any, str]:
        """The job's status, and its log so far; asked again where the server, or the way to it, is away for a while."""
        failures = 0
        while True:
            try:
                return client.get_job_status(self.submission_id), client.get_job_logs(self.submission_id)
            except (OSError, RuntimeError) as error:
                with suppress(OSError, RuntimeError):
                    if not self._is_known(client):
                        again = "is not there any more; the same command sends it again"
                        raise MachineFault(f"{self.address}: {self.submission_id} {again}") from error
                failures += 1
                fault = f"{self.address}: the job server does not answer: {cause_of(error)}"
                if failures == ATTEMPTS:
                    raise MachineFault(
                        f"{fault}{tried(failures)}\n{self.submission_id} goes on as long as its cluster does; "
                        "the same command follows it"
                    ) from error
                logger.warning("%s; trying again", fault)
                pause(failures)


def job_of(sweep: Sweep, name: str, address: str) -> Job:
    """The job that a run is at a job server, whether it was sent there or not.

    Raises:
        InputError: As `require_name`.
    """
    require_name(name)
    told = sweep.model_dump(mode="json", exclude={"modules"})  # the same from wherever it is typed
    told["scenario"]["root"] = sweep.scenario.root.removeprefix(f"{Path.cwd()}/")
    return Job(address, f"clnp-{name}-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]}")


def submit_run(sweep: Sweep, name: str, address: str, environment: dict[str, str], packages: Sequence[str] = ()) -> Job:
    """Sends a run to a cluster; one that is there already is not sent again.

    With the sweep go the user's own modules, if it names any, and no data.

    Args:
        environment: Variables that it shall have.
        packages: What uv installs for it on the nodes, beside what they have: requirements, and wheels, which are sent.

    Raises:
        InputError: No run may have this name, no job server answers there, the `cluster` extra is not installed, there
            is too much to send, or a package is none.
        MachineFault: The server takes no job.
    """
    job = job_of(sweep, name, address)
    client = _client(address)
    # An interrupt, and time to act on it: a stopped job keeps every finished point.
    variables = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60"} | environment
    with tempfile.TemporaryDirectory() as folder:
        shipped = _ship_modules(sweep, Path(folder))
        (Path(folder) / "sweep.yaml").write_text(shipped.to_yaml(), encoding="utf-8")
        runtime_env: dict[str, Any] = {"working_dir": folder, "env_vars": variables}
        if packages:
            required = [_ship_package(package, Path(folder)) for package in packages]
            runtime_env["uv"] = {"packages": required, "uv_pip_install_options": []}  # by default without uv's cache
        for failures in range(1, ATTEMPTS + 1):
            try:
                # Each time, for another client may have sent it meanwhile.
                known = {details.submission_id: details.status for details in client.list_jobs()}
                if (status := known.get(job.submission_id)) is not None:
                    if not status.is_terminal() or status.value == "SUCCEEDED":
                        break
                    client.delete_job(job.submission_id)  # the same run goes on from its folder
                client.submit_job(
                    entrypoint=f"python -m clnp_search run sweep.yaml --name {name} --address auto",
                    submission_id=job.submission_id,
                    runtime_env=runtime_env,
                )
                break
            except RuntimeError as error:  # a server that is up answers before its agents, which start jobs, are
                if failures == ATTEMPTS:
                    raise MachineFault(f"{address}: the job is not taken: {error}{tried(failures)}") from error
                pause(failures)
    return job


def _ship_modules(sweep: Sweep, target: Path) -> Sweep:
    """Copies the Python files of a sweep's module folders, packages included; gives the sweep that looks there first.

    Raises:
        InputError: They are too large to be nothing but modules.
    """
    own = [sweep.scenario.name] if kind_of(sweep.scenario.name) not in SCENARIOS.values() else []
    own += [sweep.network.module] if isinstance(sweep.network, ModuleConfig) else []
    if not own:
        return sweep
    shipped, num_bytes = [], 0
    for index, folder in enumerate(sweep.module_folders):
        shipped.append(f"modules{index}")
        for path in _modules(folder):
            num_bytes += path.stat().st_size
            if num_bytes > MAX_MODULES_BYTES:
                raise InputError(
                    f"modules: the Python files in {', '.join(sweep.modules)} have more than {MAX_MODULES_BYTES} "
                    "bytes; name a folder that holds your modules alone"
                )
            copy = target / shipped[-1] / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return sweep.model_copy(update={"modules": (*shipped, *sweep.modules)})


def _ship_package(package: str, target: Path) -> str:
    """The requirement of a package on the nodes; a wheel is copied to what is sent.

    Raises:
        InputError: It is neither a requirement nor a wheel that is there.
    """
    if package.endswith(".whl"):
        if not Path(package).is_file():
            raise InputError(f"--uv {package}: no such wheel")
        shutil.copy(package, target)
        return f"${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{Path(package).name}"
    try:
        return str(Requirement(package))
    except InvalidRequirement as error:
        raise InputError(
            f"--uv {package}: neither a requirement, as in name==1.0, nor a wheel (.whl): {error}"
        ) from error


def _modules(folder: Path) -> Iterator[Path]:
    """The Python files of a folder and of the packages in it."""
    yield from (path for path in folder.glob("*.py") if path.is_file())
    for package in folder.glob("*/__init__.py"):
        yield from _modules(package.parent)


def _client(address: str):  # type: ignore[no-untyped-def]
    try:
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(address)
    except ImportError as error:
        raise InputError(f"submit needs the cluster extra: `pip install 'clnp-search[cluster]'` ({error})") from error
    except AuthenticationError as error:
        raise InputError(f"--address {address}: this cluster wants {TOKEN}") from error
    except (ConnectionError, RuntimeError) as error:
        raise InputError(f"--address {address}: no Ray job server answers there: {error}") from error
