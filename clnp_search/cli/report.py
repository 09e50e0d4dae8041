"""The command `report`: one page over one or more runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clnp_search.errors import InputError


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, or names.", show_default=False)],
    out_file: Annotated[Path, typer.Option("--out", metavar="FILE.html", help="The page.")] = Path("report.html"),
    storage: Annotated[str, typer.Option("--storage", metavar="URI", help="Where run folders are.")] = "runs/",
) -> None:
    """Write one HTML page over runs: figures, choices with their reasons, digests. Its tables go beside it as CSV."""
    from clnp_search.report.page import report as report_over
    from clnp_search.storage import open_run

    written = report_over([open_run(run, storage) for run in runs])
    files = {out_file: written.html.encode()}
    files |= {out_file.with_suffix(f".{name}.csv"): data for name, data in written.tables.items()}
    try:
        for path, data in files.items():
            path.write_bytes(data)
    except OSError as error:
        raise InputError(f"--out {out_file}: {error}") from error
    typer.echo("\n".join(map(str, files)))
