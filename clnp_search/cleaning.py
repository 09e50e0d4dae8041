"""What of a run folder nothing needs any more: no command that reads it, no resume, no fork."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from clnp_search.records import TaskPlan
from clnp_search.search.points import pack_name
from clnp_search.storage import RunFolder


@dataclass(frozen=True)
class Garbage:
    """A file, or with a slash at its end a folder, that can be deleted.

    Args:
        reason: Why nothing needs it.
    """

    path: str
    num_bytes: int
    reason: str


def garbage_of(folder: RunFolder) -> tuple[Garbage, ...]:
    """What can be deleted while no process drives the run."""
    sizes = folder.sizes()
    found = []
    ray = sum(num_bytes for path, num_bytes in sizes.items() if path.startswith("ray/"))
    if ray:
        found.append(Garbage("ray/", ray, "Ray Tune's own files of sessions that have ended"))
    reasons = {path: "left behind by a process that was killed" for path in sizes if path.endswith(".tmp")}
    task, committed = 0, len(folder.read_results())
    while (plan := folder.read_plan(task)) is not None:
        reasons |= dict(_of_task(folder, plan, sizes, committed=task < committed))
        task += 1
    found += [Garbage(path, sizes[path], reason) for path, reason in sorted(reasons.items()) if path[:4] != "ray/"]
    return tuple(found)


def delete(folder: RunFolder, garbage: tuple[Garbage, ...]) -> None:
    """Deletes what `garbage_of` has found."""
    for each in garbage:
        folder.delete_folder(each.path) if each.path.endswith("/") else folder.delete(each.path)


def _of_task(folder: RunFolder, plan: TaskPlan, sizes: dict[str, int], committed: bool) -> Iterator[tuple[str, str]]:
    """Files of a task that nothing needs, and why."""
    records = folder.read_points(plan.task)
    recorded = {record.point.index for record in records if record.round == 0}
    trained = {pack_name([plan.keys[point] for point in pack]) for pack in plan.packs if recorded.issuperset(pack)}
    for name, path in folder.checkpoints(plan.task).items():
        if committed or name in trained:
            yield path, "the checkpoint of a pack whose points are recorded"
    whole = {record.point.name_in(record.round) for record in records}
    for name, path in folder.parameters(plan.task).items():
        if name not in whole:
            yield path, "parameters without a record"
