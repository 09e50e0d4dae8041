"""Options and arguments that several commands share, and the sweep or run folder that they name."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clnp_search.cli.console import reserve_output
from clnp_search.errors import InputError
from clnp_search.passwords import masked, require_no_password

if TYPE_CHECKING:
    from clnp_search.config import Sweep
    from clnp_search.storage import RunFolder

SweepFile = Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="The sweep file.", show_default=False)]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a name under --storage.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. training.epochs=3.")
]
Storage = Annotated[str, typer.Option("--storage", metavar="URI", help="Where run folders are.")]
Address = Annotated[
    str, typer.Option("--address", help="Ray: local (starts one), auto (finds one), HOST:PORT, or ray://HOST:PORT.")
]
AsJson = Annotated[
    bool, typer.Option("--json", callback=reserve_output, help="Print one JSON document on standard output.")
]
TaskIndex = Annotated[int, typer.Option("--task", metavar="K", min=0, help="Which task, from 0.", show_default=False)]
RunName = Annotated[str | None, typer.Option("--name", help="Name of the run folder. Default: the sweep's name.")]
RunStorage = Annotated[
    str | None, typer.Option("--storage", metavar="URI", help="Where the run folder goes. Default: the sweep's.")
]
TrackingUri = Annotated[
    str | None, typer.Option("--tracking-uri", metavar="URI", help="MLflow store or server; none: no tracking.")
]


def located(sweep: Sweep, storage: str | None, tracking_uri: str | None) -> Sweep:
    """The sweep with every place made absolute, so that it means the same from another folder.

    Raises:
        InputError: As `require_place`.
    """
    storage = sweep.storage if storage is None else storage
    tracking_uri = sweep.tracking.uri if tracking_uri is None else tracking_uri
    require_place("--storage", storage)
    require_place("--tracking-uri", tracking_uri)
    return sweep.model_copy(
        update={
            "scenario": sweep.scenario.model_copy(update={"root": _absolute(sweep.scenario.root)}),
            "modules": tuple(map(_absolute, sweep.modules)),
            "storage": storage if "://" in storage else _absolute(storage),
            "tracking": sweep.tracking.model_copy(update={"uri": absolute_sqlite(tracking_uri)}),
        }
    )


def _absolute(path: str) -> str:
    """A path that means the same from another folder; `~` is the user's own, as in a shell."""
    return str(Path(os.path.expanduser(path)).absolute())


def require_place(option: str, uri: str) -> None:
    """Nothing, if an option names a place that may be recorded and shown.

    Raises:
        InputError: It names none, or also a password.
    """
    if not uri:
        raise InputError(f"{option} is empty; leave it out for the sweep's own")
    try:
        require_no_password(uri)
    except ValueError as error:
        raise InputError(f"{option} {masked(uri)}: {error}") from error


def absolute_sqlite(uri: str) -> str:
    """The tracking URI with the path of a local database made absolute."""
    prefix = "sqlite:///"
    path = uri.removeprefix(prefix)
    return f"{prefix}{_absolute(path)}" if uri.startswith(prefix) and not path.startswith("/") else uri


def run_of(sweep: Sweep, name: str | None) -> tuple[Sweep, RunFolder]:
    """A sweep's run, which may be partly done, and the settings with which it goes on: its own, with the number of
    tasks, the tracking, the resources, the patience and the places of data and modules that are asked for now.

    Raises:
        InputError: It was begun with other settings, or cannot be stored there.
    """
    from clnp_search.agreement import check_sweep
    from clnp_search.config import sweep_of
    from clnp_search.storage import run_folder

    folder = run_folder(sweep.storage, sweep.name if name is None else name)
    if folder.exists("sweep.yaml"):
        recorded = sweep_of(folder)
        if different := sweep.differences(recorded):
            listed = "\n  ".join(different)
            raise InputError(
                f"{folder.uri} is a run with other settings:\n  {listed}\n"
                "Give the new run another name with --name, or resume the old one with `clnp-search resume`."
            )
        scenario = recorded.scenario.model_copy(update={"tasks": sweep.scenario.tasks, "root": sweep.scenario.root})
        search = recorded.search.model_copy(update={"max_failures": sweep.search.max_failures})
        asked = {"tracking": sweep.tracking, "modules": sweep.modules, "resources": sweep.resources}
        sweep = recorded.model_copy(update={"scenario": scenario, "search": search, **asked})
    check_sweep(folder, sweep)
    return sweep, folder


def open_named(run: str, storage: str) -> tuple[Sweep, RunFolder]:
    """The sweep and the folder of a run that exists.

    Raises:
        InputError: There is none of that name.
    """
    from clnp_search.config import sweep_of
    from clnp_search.storage import open_run

    folder = open_run(run, storage)
    return sweep_of(folder), folder


def open_runs(names: Sequence[str], storage: str) -> list[RunFolder]:
    """The folders of runs that exist.

    Raises:
        InputError: There is none of a name, or one is named more than once.
    """
    from clnp_search.storage import open_run

    folders = [open_run(name, storage) for name in names]
    times = Counter(folder.uri for folder in folders)
    if repeated := sorted(uri for uri in times if times[uri] > 1):
        raise InputError(f"RUN...: {', '.join(repeated)} is named more than once")
    return folders


def require_task(folder: RunFolder, task: int) -> None:
    """Nothing, if the task is committed.

    Raises:
        InputError: It is not.
    """
    committed = len(folder.read_results())
    if task >= committed:
        allowed = f"0 to {committed - 1}" if committed else "none yet"
        raise InputError(f"--task {task}: not committed; allowed: {allowed}")
