"""`gc`: frees what a run folder holds and nothing needs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from clnp_search.cli.console import as_typed, count, err, out, print_json
from clnp_search.cli.options import AsJson, Storage
from clnp_search.errors import InputError

if TYPE_CHECKING:
    from clnp_search.cleaning import Garbage
    from clnp_search.storage import RunFolder


def gc(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="RUN...", help="Run folders, or names.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All runs under the storage.")] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Delete it; otherwise it is only shown.")] = False,
    storage: Storage = "runs/",
    as_json: AsJson = False,
) -> None:
    """Show, or delete, what no command needs any more: Ray's own files, old checkpoints, remnants.

    Whatever was trained and chosen stays, so that verify, resume, reselect and fork find all they need.
    """
    from clnp_search.storage import open_run

    if bool(runs) == everything:
        raise InputError("gc: name runs, or give --all for those under --storage; allowed: one of the two")
    if runs:
        folders = [open_run(run, storage) for run in runs]
        for folder in folders:  # all are checked before the first one is touched
            _collect(folder, delete=False)
        found = {folder: _collect(folder, delete) for folder in folders}
    else:
        found = {}
        for folder in _folders_of(storage):
            try:
                if folder.exists("sweep.yaml"):
                    found[folder] = _collect(folder, delete)
            except (InputError, RuntimeError, OSError) as error:
                err.print(f"left as it is: {error}", markup=False, highlight=False)
    if as_json:
        listed = {folder.uri: [vars(each) for each in garbage] for folder, garbage in found.items()}
        print_json({"deleted": delete, "runs": listed})
        return
    for folder, garbage in found.items():
        for each in garbage:
            line = f"{as_typed(folder)}: {each.path}, {_size(each.num_bytes)}: {each.reason}"
            out.print(line, markup=False, highlight=False)
    number = sum(len(garbage) for garbage in found.values())
    size = _size(sum(each.num_bytes for garbage in found.values() for each in garbage))
    more = "deleted" if delete else "`--delete` deletes them" if number else "nothing to delete"
    out.print(f"{count(number, 'place')}, {size}; {more}", highlight=False)


def _collect(folder: RunFolder, delete: bool) -> tuple[Garbage, ...]:
    """What a run does not need; deletes it if asked to.

    Raises:
        InputError: A process drives the run.
    """
    from clnp_search import cleaning
    from clnp_search.lease import Lease
    from clnp_search.progress import is_running

    if is_running(folder):
        raise InputError(f"{folder.uri} is being run by {folder.read_lease()}: its files are in use")
    with Lease(folder, lambda: None) if delete else nullcontext():
        garbage = cleaning.garbage_of(folder)
        if delete:
            cleaning.delete(folder, garbage)
    return garbage


def _folders_of(storage: str) -> list[RunFolder]:
    from clnp_search.storage import RunFolder, join_uri

    return [RunFolder(join_uri(storage, name)) for name in RunFolder(storage).folders()]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
