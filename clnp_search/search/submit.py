"""A run as a job on a Ray cluster, through its job server (the `cluster` extra)."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clnp_search.config import Sweep
from clnp_search.errors import InputError

POLL_S = 1.0


@dataclass(frozen=True)
class Job:
    """A submitted run.

    Args:
        address: The job server's URL.
        submission_id: The same for the same sweep and name, so that sending it twice is one job.
    """

    address: str
    submission_id: str

    def follow(self, show: Callable[[str], None]) -> str:
        """Shows the job's log until it ends; gives its last status: SUCCEEDED, FAILED or STOPPED."""
        client = _client(self.address)
        shown = 0
        while True:
            status = client.get_job_status(self.submission_id)
            log = client.get_job_logs(self.submission_id)
            show(log[shown:])
            shown = len(log)
            if status.is_terminal():
                return str(status.value)
            time.sleep(POLL_S)


def submit_run(sweep: Sweep, name: str, address: str) -> Job:
    """Sends a run to a cluster; one that is there already is not sent again.

    Raises:
        InputError: No job server answers there, or the `cluster` extra is not installed.
    """
    client = _client(address)
    text = sweep.to_yaml()
    job = Job(address, f"clnp-{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}")
    known = {details.submission_id: details.status for details in client.list_jobs()}
    if job.submission_id in known:
        if not known[job.submission_id].is_terminal() or known[job.submission_id].value == "SUCCEEDED":
            return job
        client.delete_job(job.submission_id)  # it failed or was stopped: the same run goes on from its folder
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sweep.yaml").write_text(text, encoding="utf-8")
        client.submit_job(
            entrypoint=f"python -m clnp_search run sweep.yaml --name {name} --address auto",
            submission_id=job.submission_id,
            runtime_env={
                "working_dir": folder,
                # An interrupt, and time to act on it: a stopped job keeps every finished point.
                "env_vars": {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60"},
            },
        )
    return job


def _client(address: str):  # type: ignore[no-untyped-def]
    try:
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(address)
    except ImportError as error:
        raise InputError(f"submit needs the cluster extra: `pip install 'clnp-search[cluster]'` ({error})") from error
    except AuthenticationError as error:
        raise InputError(
            f"--address {address}: this cluster wants the token that its head was started with: set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise InputError(f"--address {address}: no Ray job server answers there: {error}") from error
