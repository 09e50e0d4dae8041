"""Commands that look at a sweep file: `plan` and `schema`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from clnp_search.cli.console import count, duration, out, print_json
from clnp_search.cli.options import (
    Address,
    AsJson,
    Overrides,
    RunName,
    RunStorage,
    SweepFile,
    located,
    run_of,
)

if TYPE_CHECKING:
    from clnp_search.planning import PlannedTask


def plan(
    sweep_file: SweepFile,
    overrides: Overrides = None,
    name: RunName = None,
    storage: RunStorage = None,
    address: Address = "local",
    measure: Annotated[bool, typer.Option("--measure", help="Train a few steps for the estimate of time.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a run would do: points, packs, resources, memory, time, and what is done already."""
    import torch

    from clnp_search.config import load_sweep
    from clnp_search.planning import plan_run
    from clnp_search.search.capacity import gpu_slot_bytes, local_capacity
    from clnp_search.sequence import TaskSequence

    family = located(load_sweep(sweep_file, overrides), storage, None)
    members = family.members(family.name if name is None else name)
    first, member = next(iter(members.items()))
    sweep, folder = run_of(member, first)
    if address == "local":
        capacity = local_capacity(sweep.resources)
        if sweep.resources.gpu and torch.cuda.is_available():
            whole = torch.cuda.get_device_properties(0).total_memory
            capacity = replace(capacity, slot_bytes=gpu_slot_bytes(sweep.resources, whole))
    else:
        from clnp_search.search.cluster import connect

        with connect(address, sweep.resources) as cluster:
            capacity = replace(cluster.capacity, slot_bytes=cluster.slot_bytes)
    sequence = TaskSequence(sweep)
    found = plan_run(sequence, folder, capacity, measure)
    following = found.tasks[0] if found.tasks else None
    points, packs = (following.points, following.packs) if following else ((), ())
    num_points = sum(result.points for result in found.done) + sum(task.num_points for task in found.tasks)
    known = [task.seconds for task in found.tasks if task.seconds is not None]
    document: dict[str, Any] = {
        "run": folder.uri,
        "sequences": list(members),
        "tasks": len(sequence),
        "tasks_done": len(found.done),
        "points_per_searched_task": sweep.num_points,
        "points_in_all": num_points,
        "packs": [[points[index].name for index in pack] for pack in packs],
        "points": [
            {"point": point.name, "alpha": point.alpha, "learning_rate": point.learning_rate} for point in points
        ],
        "resources_asked": sweep.resources.model_dump(),
        "resources_present": {"cpu": capacity.cpus, "gpu": capacity.gpus},
        "trials_at_once": min(capacity.num_slots, len(packs)),
        "memory_per_trial_bytes": following.trial_bytes if following else 0,
        "memory_present_per_trial_bytes": capacity.slot_bytes,
        "seconds_done": sum(result.seconds for result in found.done),
        "seconds_per_task": [task.seconds for task in found.tasks],
        "seconds_left": sum(known) if known else None,
        "seconds_from": found.pace,
    }
    if as_json:
        print_json(document)
        return
    out.print(
        f"[bold]{folder.name}[/]: {count(len(sequence), 'task')} of {sweep.scenario.name}, run folder {folder.uri}",
        highlight=False,
    )
    if len(members) > 1:
        out.print(f"the first of {len(members)} sequences: {', '.join(members)}", highlight=False)
    searched = count(sweep.num_points, "grid point" if sweep.search.algorithm == "grid" else "point")
    out.print(f"{count(len(found.done), 'task')} done; {searched} a searched task, {num_points} in all")
    if following is None:
        return
    out.print(
        f"each trial: {sweep.resources.cpu} CPU, {sweep.resources.gpu:g} GPU; present: {capacity.cpus:g} CPU, "
        f"{capacity.gpus:g} GPU; {count(document['trials_at_once'], 'trial')} at a time"
    )
    needed, present = _memory(following.trial_bytes), _memory(capacity.slot_bytes)
    if following.trial_bytes <= capacity.slot_bytes:
        out.print(f"memory of a trial: needs about {needed}, {present} present")
    else:
        out.print(f"[red]memory of a trial: needs about {needed}, {present} present: it does not fit[/]")
    if known:
        out.print(f"time: {_times(found.tasks)}; {duration(sum(known))} in all ({found.pace})", highlight=False)
    else:
        out.print("time: not known without a GPU here")
    table = Table("point", "pack", "alpha", "learning rate", title=f"task {following.index}", header_style="bold")
    for point in points:
        pack = next(index for index, pack in enumerate(packs) if point.index in pack)
        table.add_row(
            point.name, str(pack), " ".join(f"{value:g}" for value in point.alpha), f"{point.learning_rate:g}"
        )
    out.print(table)
    if following.num_points > len(points):
        later = count(following.num_points - len(points), "point")
        out.print(f"then {later} more, which Optuna proposes on the results of those before")


def schema() -> None:
    """Print the sweep file's JSON schema, for editors."""
    from clnp_search.config import Sweep

    print_json(Sweep.model_json_schema())


def _memory(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def _times(tasks: Sequence[PlannedTask]) -> str:
    """What each task takes; equal ones are said once."""
    parts = []
    for text, group in groupby(tasks, lambda task: duration(task.seconds or 0.0)):
        indices = [task.index for task in group]
        span = f"task {indices[0]}" if len(indices) == 1 else f"tasks {indices[0]} to {indices[-1]}"
        parts.append(f"{span} about {text}{' each' if len(indices) > 1 else ''}")
    return ", ".join(parts)
