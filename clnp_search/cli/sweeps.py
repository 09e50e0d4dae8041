"""Commands that look at a sweep file: `plan` and `schema`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.table import Table

from clnp_search.cli.console import out, print_json
from clnp_search.cli.options import Address, AsJson, Overrides, RunName, RunStorage, SweepFile, located


def plan(
    sweep_file: SweepFile,
    overrides: Overrides = None,
    name: RunName = None,
    storage: RunStorage = None,
    address: Address = "local",
    as_json: AsJson = False,
) -> None:
    """Show what a run would do: points, packs, resources asked and present, memory, and what is done already."""
    from clnp_search.config import load_sweep
    from clnp_search.search.capacity import local_capacity
    from clnp_search.search.points import grid
    from clnp_search.sequence import TaskSequence, plan_packs
    from clnp_search.storage import run_folder

    sweep = located(load_sweep(sweep_file, overrides), storage, None)
    folder = run_folder(sweep.storage, name or sweep.name)
    if address == "local":
        capacity = local_capacity(sweep.resources)
    else:
        from clnp_search.search.cluster import connect

        with connect(address, sweep.resources) as cluster:
            capacity = replace(cluster.capacity, slot_bytes=cluster.slot_bytes)
    sequence = TaskSequence(sweep)
    results = folder.read_results()
    state = folder.read_state(len(results) - 1) if results else sequence.empty_state()
    points = grid(sweep, None, state.graph.layers)
    memory = sequence.memory(state, min(len(results), len(sequence) - 1))
    packs = plan_packs(sweep, points, memory, capacity.num_slots, capacity.slot_bytes)
    searched = len(sequence) if sweep.search.tasks == "every" else 1
    trial_bytes = memory.total(max(len(pack) for pack in packs))
    document: dict[str, Any] = {
        "run": folder.uri,
        "tasks": len(sequence),
        "tasks_done": len(results),
        "points_per_searched_task": len(points),
        "points_in_all": len(points) * searched + len(sequence) - searched,
        "packs": [[points[index].name for index in pack] for pack in packs],
        "points": [
            {"point": point.name, "alpha": point.alpha, "learning_rate": point.learning_rate} for point in points
        ],
        "resources_asked": sweep.resources.model_dump(),
        "resources_present": {"cpu": capacity.cpus, "gpu": capacity.gpus},
        "trials_at_once": min(capacity.num_slots, len(packs)),
        "memory_per_trial_bytes": trial_bytes,
        "memory_present_per_trial_bytes": capacity.slot_bytes,
    }
    if as_json:
        print_json(document)
        return
    out.print(f"[bold]{sweep.name}[/]: {document['tasks']} tasks of {sweep.scenario.name}, run folder {folder.uri}")
    out.print(
        f"{len(results)} tasks done; {document['points_in_all']} grid points in all, {len(points)} a searched task"
    )
    out.print(
        f"each trial: {sweep.resources.cpu} CPU, {sweep.resources.gpu:g} GPU; present: {capacity.cpus:g} CPU, "
        f"{capacity.gpus:g} GPU; {document['trials_at_once']} trials at a time"
    )
    out.print(f"memory of a trial: about {trial_bytes / 2**20:.0f} MiB of {capacity.slot_bytes / 2**20:.0f} MiB")
    table = Table("point", "pack", "alpha", "learning rate", header_style="bold")
    for point in points:
        pack = next(index for index, pack in enumerate(packs) if point.index in pack)
        table.add_row(
            point.name, str(pack), " ".join(f"{value:g}" for value in point.alpha), f"{point.learning_rate:g}"
        )
    out.print(table)


def schema() -> None:
    """Print the sweep file's JSON schema, for editors."""
    from clnp_search.config import Sweep

    print_json(Sweep.model_json_schema())
