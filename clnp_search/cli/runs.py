"""Commands that look at runs: `status`, `runs` and `compare`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from clnp_search.cli.console import as_typed, count, duration, err, out, print_json
from clnp_search.cli.options import AsJson, Run, Storage, open_runs
from clnp_search.errors import InputError
from clnp_search.records import margin_text

if TYPE_CHECKING:
    from clnp_search.progress import FailedPoint, Progress
    from clnp_search.storage import RunFolder

WATCH_S = 2.0
FIGURE_SUFFIXES = (".png", ".svg")
COLOURS = {"complete": "green", "depleted": "green", "running": "cyan", "interrupted": "yellow", "failed": "red"}


def status(
    run: Run,
    storage: Storage = "runs/",
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again every two seconds, as long as the run goes on.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show how far a run has come, the capacity that is left, what it has cost, and what failed."""
    from clnp_search.storage import open_run

    if watch and as_json:
        raise InputError("--watch and --json: there is one document; allowed: one of the two")
    folder = open_run(run, storage)
    while _show_status(folder, as_json) == "running" and watch:
        time.sleep(WATCH_S)
        if out.is_terminal:
            out.clear()


def _show_status(folder: RunFolder, as_json: bool) -> str:
    """Prints where a run stands; gives its status."""
    from clnp_search.cli.view import summary_line, summary_table
    from clnp_search.forecast import forecast, in_words
    from clnp_search.progress import costs_of, progress_of

    progress, costs = progress_of(folder), costs_of(folder)
    num_tasks = progress.sweep.scenario.tasks
    if as_json:
        current = None
        if progress.points:
            current = {"task": progress.task, "points_done": progress.points_done, "points": progress.points}
        document: dict[str, Any] = asdict(progress.summary) | {"status": progress.status, "num_tasks": num_tasks}
        failed = [asdict(each) for each in progress.failed_points]
        capacity = {group: asdict(each) for group, each in forecast(progress.summary.tasks).items()}
        more = {"forecast": capacity, "costs": [asdict(cost) for cost in costs]}
        print_json(document | {"current": current, "failed_points": failed} | more)
        return progress.status
    summary = progress.summary
    if summary.tasks:
        out.print(summary_table(summary, progress.status))
        out.print(summary_line(summary))
        widens = progress.sweep.capacity.widens
        for sentence in in_words(summary.tasks, num_tasks, widens) if progress.sweep.method == "clnp" else ():
            out.print(f"[yellow]{sentence}[/]", highlight=False)
    colour = COLOURS[progress.status]
    done = len(summary.tasks)
    committed = f"{done} of {count(num_tasks, 'task')}" if num_tasks else count(done, "task")
    out.print(f"[{colour}]{progress.status}[/]: {committed} committed")
    if summary.reason and progress.status == "failed":
        out.print(summary.reason, style="red", markup=False, highlight=False)
    if progress.points:
        out.print(f"task {progress.task}: {progress.points_done} of {count(progress.points, 'point')} trained")
    training_s, scans_s = sum(cost.training_s for cost in costs), sum(cost.scans_s for cost in costs)
    if training_s + scans_s:
        resources = progress.sweep.resources
        gpus = f" and {resources.gpu:g} GPU" if resources.gpu else ""
        out.print(
            f"cost: trials of {resources.cpu} CPU{gpus} were busy for {duration(training_s + scans_s)}, "
            f"{duration(training_s)} with training and {duration(scans_s)} with scans",
            highlight=False,
        )
    print_failed(progress.failed_points)
    if progress.status in ("interrupted", "failed"):
        retried = " --retry-failed" if progress.status == "failed" and progress.has_no_model else ""
        out.print(f"go on with `clnp-search resume {as_typed(folder)}{retried}`", markup=False, highlight=False)
    return progress.status


def runs(storage: Storage = "runs/", as_json: AsJson = False) -> None:
    """List the runs under a storage: status, method, margin, seed, tasks, average accuracy, free units."""
    from clnp_search.progress import runs_under

    rows = [_row(folder, progress) for folder, progress in runs_under(storage)]
    if as_json:
        print_json(rows)
        return
    if not rows:
        out.print(f"no runs under {storage}", highlight=False)
        return
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for column in ("name", "status", "method"):
        table.add_column(column)
    for column in ("margin", "seed", "tasks", "average accuracy", "free units"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        if row["status"] == "unreadable":
            table.add_row(escape(row["name"]), "[red]unreadable[/]")
            continue
        accuracy, free = row["average_test_accuracy"], row["free_units"]
        table.add_row(
            escape(row["name"]),
            f"[{COLOURS[row['status']]}]{row['status']}[/]",
            row["method"],
            margin_text(row["margin"]),
            str(row["seed"]),
            f"{row['tasks']}/{row['num_tasks'] or '?'}",
            "" if accuracy is None else f"{accuracy:.2%}",
            "" if free is None else _shares(free, row["units"]),
        )
    out.print(table)


def compare(
    names: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, or names under --storage.")],
    storage: Storage = "runs/",
    csv_file: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", help="Write each run's tasks, a row each.", show_default=False),
    ] = None,
    figure_file: Annotated[
        Path | None,
        typer.Option(
            "--figure", metavar="FILE", help="Draw accuracy and free capacity: .png or .svg.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs: accuracy and free capacity, task after task."""
    from clnp_search.progress import progress_of
    from clnp_search.report.comparison import comparison_csv, comparison_rows, spread_rows

    if figure_file and figure_file.suffix.lower() not in FIGURE_SUFFIXES:
        raise InputError(f"--figure {figure_file}: the name must end in one of {', '.join(FIGURE_SUFFIXES)}")
    folders = open_runs(names, storage)
    found = [(folder, progress_of(folder)) for folder in folders]
    labels = _labels(folders)
    summaries = dict(zip(labels, (progress.summary for _, progress in found), strict=True))
    if empty := [label for label, summary in summaries.items() if not summary.tasks]:
        raise InputError(f"compare: no task of {', '.join(empty)} is committed yet")
    spread = spread_rows(dict(zip(labels, (progress.sweep for _, progress in found), strict=True)), summaries)
    cells = [_row(folder, progress) | {"name": label} for label, (folder, progress) in zip(labels, found, strict=True)]
    if csv_file:
        _write("--csv", csv_file, comparison_csv(summaries).encode())
    if figure_file:
        from clnp_search.report.figures import runs_compared, to_png, to_svg

        figure = runs_compared([replace(summary, name=label) for label, summary in summaries.items()])
        _write("--figure", figure_file, to_svg(figure) if figure_file.suffix.lower() == ".svg" else to_png(figure))
    if as_json:
        print_json({"runs": cells, "spread": spread, "tasks": comparison_rows(summaries)})
        return
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("")
    for label in labels:
        table.add_column(escape(label), justify="right")
    table.add_row("status", *(f"[{COLOURS[row['status']]}]{row['status']}[/]" for row in cells))
    table.add_row("method", *(row["method"] for row in cells))
    table.add_row("margin", *(margin_text(row["margin"]) for row in cells))
    for key in ("seed", "tasks", "points"):
        table.add_row(key, *(str(row[key]) for row in cells))
    table.add_row("seconds", *(f"{row['seconds']:.0f}" for row in cells))
    table.add_row("average test accuracy", *(f"{row['average_test_accuracy']:.2%}" for row in cells))
    table.add_row("free units", *(_shares(row["free_units"], row["units"]) for row in cells), end_section=True)
    for task in range(max(len(summary.tasks) for summary in summaries.values())):
        texts = []
        for summary in summaries.values():
            done = task < len(summary.tasks)
            texts.append(f"{summary.tasks[-1].test_accuracies[task]:.2%}" if done else "")
        table.add_row(f"task {task}, test accuracy now", *texts)
    out.print(table)
    print_spread(spread)
    settings = [progress.sweep for _, progress in found]
    if different := settings[0].differing(settings[1:]):
        out.print("settings that differ:")
        for key, values in different.items():
            out.print(f"  {key}: {', '.join(map(str, values))}", markup=False, highlight=False)
    for file in (csv_file, figure_file):
        if file:
            err.print(f"written: {file}", highlight=False)


def print_family(folders: Sequence[RunFolder], as_json: bool) -> list[dict[str, Any]]:
    """Shows the sequences of one sweep beside one another; gives their means over seeds (`spread_rows`)."""
    from clnp_search.branching import points_taken_over
    from clnp_search.progress import progress_of
    from clnp_search.report.comparison import spread_rows

    found = {folder.name: (folder, progress_of(folder)) for folder in folders}
    spread = spread_rows(
        {name: progress.sweep for name, (_, progress) in found.items()},
        {name: progress.summary for name, (_, progress) in found.items()},
    )
    rows = []
    for folder, progress in found.values():
        taken, trained = points_taken_over(folder)
        rows.append(_row(folder, progress) | {"points_taken_over": taken, "points_trained": trained})
    if as_json:
        summaries = [asdict(progress.summary) for _, progress in found.values()]
        print_json({"runs": rows, "spread": spread, "summaries": summaries})
        return spread
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("name")
    for column in ("margin", "seed", "average accuracy", "free units", "points", "taken over"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        free = _shares(row["free_units"], row["units"])
        shown = (f"{row['average_test_accuracy']:.2%}", free, row["points_trained"], row["points_taken_over"])
        table.add_row(escape(row["name"]), margin_text(row["margin"]), str(row["seed"]), *map(str, shown))
    out.print(table)
    print_spread(spread)
    typed = " ".join(as_typed(folder) for folder in folders)
    out.print(f"compare them: `clnp-search report {typed}`", markup=False, highlight=False)
    return spread


def print_spread(rows: Sequence[dict[str, Any]]) -> None:
    """Says mean and standard deviation of runs that differ in their seed alone."""
    for row in rows:
        if len(row["runs"]) > 1:
            accuracy, deviation, free, free_deviation = (
                row[f"{name}_{figure}"]
                for name in ("average_test_accuracy", "free_units")
                for figure in ("mean", "deviation")
            )
            out.print(
                f"{_rule(row)}, {len(row['runs'])} seeds: average accuracy {100 * accuracy:.2f} "
                f"± {100 * deviation:.2f}%, free units {free:.0f} ± {free_deviation:.0f}",
                highlight=False,
            )


def print_failed(failed: Sequence[FailedPoint]) -> None:
    """Says how many points failed, which and why."""
    if failed:
        out.print(f"{count(len(failed), 'point')} failed:", style="yellow", highlight=False)
    for each in failed:
        out.print(
            f"  task {each.task}: {each.point} failed: {each.reason}", style="yellow", markup=False, highlight=False
        )


def _row(folder: RunFolder, progress: Progress | None) -> dict[str, Any]:
    """A run in the columns of `runs`."""
    if progress is None:
        return {"name": folder.name, "run": folder.uri, "status": "unreadable"}
    summary = progress.summary
    units = summary.tasks[-1].units.values() if summary.tasks else None
    return {
        "name": folder.name,
        "run": folder.uri,
        "status": progress.status,
        "method": progress.sweep.method,
        "margin": progress.sweep.forgetting.margin if progress.sweep.method == "clnp" else None,
        "seed": summary.seed,
        "tasks": len(summary.tasks),
        "num_tasks": progress.sweep.scenario.tasks,
        "points": sum(result.points for result in summary.tasks),
        "failed_points": len(progress.failed_points),
        "seconds": sum(result.seconds for result in summary.tasks),
        "average_test_accuracy": summary.average_test_accuracy if summary.tasks else None,
        "free_units": None if units is None else sum(each.free for each in units),
        "units": None if units is None else sum(each.total for each in units),
        "state_digest": summary.state_digest,
    }


def _rule(row: dict[str, Any]) -> str:
    """What tells the families of runs apart: a margin, or a baseline."""
    return f"margin {margin_text(row['margin'])}" if row["method"] == "clnp" else f"method {row['method']}"


def _shares(free: int, units: int) -> str:
    return f"{free} of {units} ({free / units:.1%})"


def _labels(folders: Sequence[RunFolder]) -> list[str]:
    """The runs' names, or their places where names repeat."""
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else [folder.uri for folder in folders]


def _write(option: str, path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise InputError(f"{option} {path}: {error}") from error
