"""The command `reselect`: a task's choice made again by other rules."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from clnp_search.cli.console import as_typed, count, err, out, print_json
from clnp_search.cli.options import AsJson, Run, Storage, TaskIndex, open_named, require_task


def reselect(
    run: Run,
    task: TaskIndex,
    margin: Annotated[
        str | None, typer.Option("--margin", metavar="M", help="Another margin: 0.5% or 0.005.", show_default=False)
    ] = None,
    theta: Annotated[
        Literal["global", "per_layer"] | None, typer.Option("--theta", help="Another rule.", show_default=False)
    ] = None,
    sparsity: Annotated[
        Literal["units", "weights", "scarcest_layer"] | None,
        typer.Option("--sparsity", help="Another measure.", show_default=False),
    ] = None,
    storage: Storage = "runs/",
    as_json: AsJson = False,
) -> None:
    """Show what a task would have chosen by another margin, theta rule or sparsity. Nothing is
    trained and no choice changed; scans that are missing are recorded."""
    from clnp_search.branching import reselect as choose_again
    from clnp_search.config import overridden, sweep_at

    sweep, folder = open_named(run, storage)
    require_task(folder, task)
    plan = folder.read_plan(task)
    assert plan is not None, "the task is committed"
    given = {"margin": margin, "theta": theta, "sparsity": sparsity}
    asked = [f"forgetting.{key}={value}" for key, value in given.items() if value is not None]
    rules = overridden(sweep_at(folder, sweep, plan), asked, "reselect").forgetting

    def listen(done: int, total: int) -> None:
        err.print(f"scanning thresholds: {done} of {total} done", highlight=False)

    found = choose_again(folder, sweep, task, rules, listen)
    scans = {scan.point: scan for scan in found.scans}
    rows: list[dict[str, Any]] = []
    for record in found.records:
        scan = scans.get(record.point.index)
        passes = scan is not None and scan.theta is not None
        rows.append(
            {
                "point": record.point.name,
                "alpha": record.point.alpha,
                "learning_rate": record.point.learning_rate,
                "val_accuracy": record.val_accuracy if record.status == "done" else None,
                "in_margin": record.point.index in found.choice.candidates,
                "theta": scan.theta if scan else None,
                "pruned_val_accuracy": scan.val_accuracy if scan and passes else None,
                "unit_sparsity": scan.unit_sparsity if scan and passes else None,
                "weight_sparsity": scan.weight_sparsity if scan and passes else None,
                "chosen": record.point.index == found.choice.chosen,
                "recorded": record.point.index == found.recorded.chosen,
            }
        )
    if as_json:
        document = {"run": folder.uri, "task": task, "margin": rules.margin, "theta": rules.theta}
        document |= {"sparsity": rules.sparsity, "min_correct": found.choice.min_correct, "points": rows}
        print_json(document | {"scans_evaluated": found.evaluated, "reasons": found.choice.reasons})
        return
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("point")
    for column in ("alpha", "learning rate", "val", "theta", "pruned", "free units", "free weights"):
        table.add_column(column, justify="right")
    table.add_column("")
    for row in rows:
        marks = [mark for mark, is_set in (("chosen", row["chosen"]), ("the run's", row["recorded"])) if is_set]
        table.add_row(
            row["point"],
            " ".join(f"{value:g}" for value in dict.fromkeys(row["alpha"])),
            f"{row['learning_rate']:g}",
            _percent(row["val_accuracy"]),
            "" if row["theta"] is None else " ".join(f"{value:.3g}" for value in dict.fromkeys(row["theta"])),
            *(_percent(row[key]) for key in ("pruned_val_accuracy", "unit_sparsity", "weight_sparsity")),
            ", ".join(marks),
            style="bold" if row["chosen"] else "",
        )
    out.print(table)
    for reason in found.choice.reasons:
        out.print(escape(reason), highlight=False)
    out.print(f"{count(found.evaluated, 'scan')} evaluated, the rest was recorded; nothing was trained")
    changes = " ".join(f"--set {each}" for each in asked)
    if changes:
        fork = f"clnp-search fork {as_typed(folder)} --after-task {task - 1} --name NAME {changes}"
        out.print(f"go on with it: `{fork}`", highlight=False)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"
