"""A sweep's seeds side by side on one cluster, each in a process of its own: none depends on another one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from clnp_search.cli.console import DONE, INPUT_WRONG, INTERRUPTED
from clnp_search.cli.logs import is_json, relay
from clnp_search.config import Sweep
from clnp_search.errors import InputError, Interrupted, MachineFault


def run_seeds(sweep: Sweep, name: str, address: str, at_once: int) -> None:
    """Runs the sequences of each seed, `at_once` seeds at a time; what they say goes to standard error, by name.

    Raises:
        InputError: What a sequence was asked for cannot be had.
        Interrupted: By a signal; every finished point is kept.
        MachineFault: A sequence failed; the others have gone on to their ends.
    """
    statuses: dict[str, int] = {}
    children: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory() as folder, _cluster(sweep, address) as (joined, environment):
        path = Path(folder, "sweep.yaml")
        path.write_text(sweep.to_yaml(), encoding="utf-8")

        def drive(seed: int) -> None:
            own = f"{name}-s{seed}"
            command = [
                sys.executable,
                "-m",
                "clnp_search",
                "run",
                str(path),
                "--name",
                own,
                "--address",
                joined,
                "--json",
            ]
            command += ["--set", f"seed={seed}", "--set", "repetitions=1"]
            # In a session of its own, so that an interrupt reaches it once, from here.
            child = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | environment,
                start_new_session=True,
            )
            children.append(child)
            assert child.stderr is not None
            for line in child.stderr:
                relay(line if is_json() else f"{own}: {line}")
            statuses[own] = child.wait()

        pool = ThreadPoolExecutor(at_once)
        try:
            for done in [pool.submit(drive, seed) for seed in range(sweep.seed, sweep.seed + sweep.repetitions)]:
                done.result()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                with suppress(ProcessLookupError):
                    child.send_signal(signal.SIGINT)
            raise Interrupted("interrupted; every finished point is kept. Go on with: the same command") from None
        finally:
            pool.shutdown()
    failed = {own: status for own, status in statuses.items() if status != DONE}
    if not failed:
        return
    listed = f"{', '.join(failed)} ended early, as said above. The same command goes on with what is left."
    kinds = {INPUT_WRONG: InputError, INTERRUPTED: Interrupted}
    raise kinds.get(max(failed.values()), MachineFault)(listed)


@contextmanager
def _cluster(sweep: Sweep, address: str) -> Iterator[tuple[str, dict[str, str]]]:
    """A cluster that several drivers can join: its address, and what their environments need besides."""
    if address != "local":
        yield address, {}
        return
    import ray

    from clnp_search.search.cluster import connect

    with connect("local", sweep.resources):
        yield ray.get_runtime_context().gcs_address, {"RAY_AUTH_MODE": "token"}
