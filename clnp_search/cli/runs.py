"""Commands that look at runs: `status`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from clnp_search.cli.console import out, print_json
from clnp_search.cli.options import AsJson, Run, Storage, open_named

if TYPE_CHECKING:
    from clnp_search.storage import RunFolder


def status(run: Run, storage: Storage = "runs/", as_json: AsJson = False) -> None:
    """Show how far a run has come, and the capacity that is left."""
    from clnp_search.cli.view import summary_line, summary_table

    sweep, folder = open_named(run, storage)
    summary = folder.read_summary()
    task = len(summary.tasks) if summary else 0
    plan = folder.read_plan(task)
    done = sum(folder.read_point(task, point.name) is not None for point in plan.points) if plan else 0
    current = {"task": task, "points_done": done, "points": len(plan.points)} if plan else None
    if as_json:
        document: dict[str, Any] = (
            asdict(summary) if summary else {"name": folder.name, "status": "running", "tasks": []}
        )
        failed = failed_points(folder)
        print_json(document | {"num_tasks": sweep.scenario.tasks, "current": current, "failed_points": failed})
        return
    if summary and summary.tasks:
        out.print(summary_table(summary))
        out.print(summary_line(summary))
    of_all = f" of {sweep.scenario.tasks}" if sweep.scenario.tasks else ""
    out.print(f"{task}{of_all} tasks committed")
    if current:
        out.print(f"task {task}: {done} of {current['points']} points trained; go on with `clnp-search resume {run}`")
    print_failed(failed_points(folder))


def failed_points(folder: RunFolder) -> list[dict[str, Any]]:
    """Every point that failed: its task, its name and why."""
    return [
        {"task": task, "point": record.point.name_in(record.round), "reason": record.reason}
        for task, record in folder.read_failed()
    ]


def print_failed(failed: list[dict[str, Any]]) -> None:
    """Says which points failed and why."""
    for each in failed:
        line = f"task {each['task']}: {each['point']} failed: {each['reason']}"
        out.print(line, style="yellow", markup=False, highlight=False)
