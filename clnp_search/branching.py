"""Choices made again, and runs that branch off from others: `reselect` and `fork`.

The margin, the threshold rule and the measure of sparsity act after training. So what others would have chosen follows
from what is recorded, and a run that goes on with them shares all tasks before, and every point whose key is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch

from clnp_search import selection
from clnp_search.agreement import check_sweep, recorded_choice
from clnp_search.config import FORKED_SECTIONS, ForgettingConfig, Sweep, planned_with, sweep_at, sweep_of
from clnp_search.errors import InputError
from clnp_search.forecast import Budget
from clnp_search.records import Fork, PointRecord, ScanRecord, Selection, summarise
from clnp_search.search.proposals import first_points
from clnp_search.search.trial import TaskInputs, scan_point
from clnp_search.sequence import TaskSequence
from clnp_search.storage import RunFolder


@dataclass(frozen=True)
class Reselected:
    """What a task would have chosen by other rules.

    Args:
        records: All points of the task.
        scans: Of the candidates.
        choice: By the rules that were asked for.
        recorded: The choice that the run has made.
        evaluated: How many scans were made for it; the others were recorded already.
    """

    records: list[PointRecord]
    scans: list[ScanRecord]
    choice: Selection
    recorded: Selection
    evaluated: int


def reselect(
    folder: RunFolder,
    sweep: Sweep,
    task: int,
    rules: ForgettingConfig,
    listen: Callable[[int, int], None] = lambda done, total: None,
) -> Reselected:
    """What a committed task would have chosen by other rules; trains nothing, and changes no choice.

    Scans that are missing are evaluated on this machine, and recorded.

    Args:
        rules: Margin, threshold rule and sparsity; the rounds of fine-tuning must be the run's.
        listen: Is told how many of how many missing scans are done.

    Raises:
        InputError: The task is not committed, or was fine-tuned, so that other rules need other training; or the sweep
            or the data are not those that it was planned with.
        Damaged: A record is missing.
        NoModel: No candidate stays inside the margin.
    """
    if sweep.method != "clnp":
        raise InputError(
            f"{folder.uri}: method {sweep.method} prunes by no margin or threshold; nothing to choose again"
        )
    plan = folder.read_plan(task)
    if plan is None or task >= len(folder.read_results()):
        raise InputError(f"{folder.uri}: task {task} is not committed")
    check_sweep(folder, sweep)
    own = sweep_at(folder, sweep, plan).forgetting
    made = recorded_choice(folder, plan, own)
    if own.finetune_rounds:
        spends_else = own.margin == "auto" and rules.sparsity != own.sparsity
        if rules != own.model_copy(update={"sparsity": rules.sparsity}) or spends_else:
            raise InputError(
                f"{folder.uri}: task {task} was fine-tuned: with another margin or threshold rule it would have been "
                "trained otherwise; only --sparsity can be chosen again, of a fixed margin; else use `clnp-search fork`"
            )
        choice = selection.choose(made.records, made.scans, made.choice.margin, rules.sparsity, made.reasons)
        return Reselected(made.records, made.scans, choice, made.choice, 0)
    evaluated = 0

    def scan(inside: list[PointRecord], limit: int) -> list[ScanRecord]:
        nonlocal evaluated
        recorded = {
            record.point: scan
            for record in inside
            if (scan := folder.read_scan(task, record.point.index, rules.rule, limit)) is not None
            and scan.is_of(record, rules.rule, limit)
        }
        missing = [record.point for record in inside if record.point not in recorded]
        for done, point in enumerate(missing):
            listen(done, len(missing))
            recorded[point] = scan_point(inputs(), point, limit, rules.rule)
            folder.write_scan(task, recorded[point])
        evaluated += len(missing)
        return [recorded[record.point] for record in inside]

    @cache
    def inputs() -> TaskInputs:  # which needs the data set
        sequence = TaskSequence(sweep)
        state = sequence.start_of(task, folder.read_state(task - 1)) if task else sequence.empty_state()
        sequence.read_plan(folder, task, state.digest)  # raises where its scans would be of something else
        device = plan.environment.device if torch.cuda.is_available() else "cpu"
        here = replace(plan, environment=replace(plan.environment, device=device))
        return TaskInputs(sequence.run_inputs(folder), here, state)

    results = folder.read_results()
    budget = Budget(tuple(results[task].units), results[:task], plan.num_tasks)
    spent = selection.spend(made.records, rules.margins, rules.sparsity, budget, scan)
    choice = selection.choose(made.records, spent.scans, spent.margin, rules.sparsity, spent.reasons)
    return Reselected(made.records, spent.scans, choice, made.choice, evaluated)


def fork(origin: RunFolder, sweep: Sweep, after_task: int, folder: RunFolder) -> None:
    """Begins a run that shares the tasks up to `after_task` with another one; `Runner` goes on with it.

    Args:
        origin: The run that it branches off from.
        after_task: -1 shares no task, but takes over points all the same.
        sweep: The new run's settings.
        folder: Of the new run.

    Raises:
        InputError: The task is not committed, the run exists, its settings would change what is shared, or those of the
            origin were changed; nothing was written.
    """
    results = origin.read_results()
    if not -1 <= after_task < len(results):
        allowed = f"-1 to {len(results) - 1}" if results else "-1 (no task is committed yet)"
        raise InputError(f"--after-task {after_task}: not committed; allowed: {allowed}")
    if folder.exists("sweep.yaml"):
        raise InputError(f"{folder.uri}: there is a run of that name already; resume it, or take another --name")
    changed = {}
    if after_task >= 0:
        recorded = sweep_of(origin)
        check_sweep(origin, recorded)
        changed = sweep.differing([recorded])
    kept = [
        f"  {key}: {new} here, {old} there"
        for key, (new, old) in changed.items()
        if key.partition(".")[0] not in FORKED_SECTIONS and (key != "scenario.tasks" or key in sweep.settings)
    ]
    if kept:
        listed = "\n".join(kept)
        raise InputError(
            f"the tasks so far would be others with these settings:\n{listed}\n"
            f"A fork may change {', '.join(FORKED_SECTIONS)}, and the number of tasks where the tasks stay the same."
        )
    if sweep.scenario.tasks is not None and sweep.scenario.tasks <= after_task:
        raise InputError(f"scenario.tasks: {sweep.scenario.tasks} is fewer than the tasks that are shared")
    for task in range(after_task + 1):
        if (plan := origin.read_plan(task)) is not None:
            planned_with(sweep, plan.settings)  # as which the shared task is read, in this run too
    if after_task >= 0:
        first_points(sweep, after_task + 1, None, origin.read_state(after_task).graph.layers)  # whose alphas must fit
    folder.require_writable()
    if folder.has(after_task + 1):
        held = f"has something of task {after_task + 1}, as of a fork that was interrupted"
        raise InputError(f"{folder.uri}: {held}; delete the folder, or take another --name")
    for task in range(after_task + 1):
        folder.copy_task(origin, task)
    folder.write_fork(Fork(origin.uri, after_task))
    if after_task >= 0:
        shared = results[: after_task + 1]
        folder.write_summary(summarise(folder.name, "running", sweep.seed, shared[-1].state_digest, shared))
    folder.write_sweep(sweep.to_yaml())  # last: with it, it is a run


def points_taken_over(folder: RunFolder) -> tuple[int, int]:
    """Points of a fork's own tasks that were taken over from runs before it, and that were trained."""
    branch = folder.read_fork()
    first = 0 if branch is None else branch.after_task + 1
    taken = trained = 0
    task = first
    while folder.read_plan(task) is not None:
        origins = [bool(record.origin) for record in folder.read_points(task) if not record.round]
        taken, trained, task = taken + sum(origins), trained + len(origins) - sum(origins), task + 1
    return taken, trained
