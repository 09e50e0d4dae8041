"""The command `report`: one page over one or more runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clnp_search.cli.console import out, print_json
from clnp_search.cli.options import AsJson, Storage, open_runs
from clnp_search.errors import InputError


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, or names.", show_default=False)],
    out_file: Annotated[Path, typer.Option("--out", metavar="FILE.html", help="The page.")] = Path("report.html"),
    storage: Storage = "runs/",
    as_json: AsJson = False,
) -> None:
    """Write one HTML page over runs: figures, choices with their reasons, digests. Its tables go beside it as CSV."""
    from clnp_search.report.page import report as report_over

    written = report_over(open_runs(runs, storage))
    tables = {name: out_file.with_suffix(f".{name}.csv") for name in written.tables}
    try:
        out_file.write_text(written.html, "utf-8")
        for name, path in tables.items():
            path.write_bytes(written.tables[name])
    except OSError as error:
        raise InputError(f"--out {out_file}: {error}") from error
    if as_json:
        print_json({"page": str(out_file), "tables": {name: str(path) for name, path in tables.items()}})
        return
    for path in (out_file, *tables.values()):
        out.print(str(path), markup=False, highlight=False, soft_wrap=True)
