"""A run folder held against its own sweep, and its records against one another; reads only.

Whatever decides a task is recorded with it, so that a changed setting, data set, record or scan is found before
anything is built on it. What is written down by hand is not trusted more than what can be computed again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from clnp_search import selection
from clnp_search.clnp.state import KEEP_ALL
from clnp_search.config import ForgettingConfig, Sweep, sweep_at
from clnp_search.errors import Damaged, InputError
from clnp_search.forecast import Budget
from clnp_search.records import PointRecord, ScanRecord, Selection, TaskPlan, Units
from clnp_search.search.points import point_key, retrained, round_plan
from clnp_search.selection import Spent, Step
from clnp_search.storage import RunFolder
from clnp_search.tasks import Task


def check_sweep(folder: RunFolder, sweep: Sweep) -> None:
    """Holds a run's tasks, as far as they are planned, against a sweep; needs no data.

    Raises:
        InputError: A task was planned with other settings, or more tasks are committed than the sweep has.
    """
    committed = len(folder.read_results())
    if sweep.scenario.tasks is not None and committed > sweep.scenario.tasks:
        raise InputError(f"{folder.uri}: scenario.tasks is {sweep.scenario.tasks}, but {committed} are committed")
    for index in range(committed + 1):
        if (plan := folder.read_plan(index)) is not None:
            _check_settings(folder, plan, sweep_at(folder, sweep, plan))


def check_plan(folder: RunFolder, plan: TaskPlan, sweep: Sweep, parent: str, data: str, task: Task) -> None:
    """Holds a task's plan against all that should have decided it.

    Args:
        parent: Digest of the state before the task.
        data: Digest of the data set.

    Raises:
        InputError: Something is not as it was when the task was planned; says what.
    """
    where, sweep = f"{folder.uri}: task {plan.task}", sweep_at(folder, sweep, plan)
    _check_settings(folder, plan, sweep)
    check_data(folder, plan, data)
    if plan.parent_digest != parent:
        raise InputError(
            f"{where} was planned on another state than the one before it; a file of this run was changed"
            if plan.task
            else f"{folder.uri}: the run was begun with another network than its sweep gives now: the module, or a "
            "library that it is made of, has changed"
        )
    of_task = parent, task, data, plan.drawn_digest
    keys = tuple(point_key(*of_task, sweep, point, plan.numerics) for point in plan.points)
    if plan.keys != keys:
        raise InputError(f"{where}: the keys of its points are not those of its settings; its plan was changed")


def check_data(folder: RunFolder, plan: TaskPlan, data: str) -> None:
    """Holds a task's plan against the digest of its data set.

    Raises:
        InputError: It was planned on another one.
    """
    if plan.data_digest != data:
        raise InputError(
            f"{folder.uri}: task {plan.task} was planned on another data set: its digest was "
            f"{plan.data_digest[:12]}, is {data[:12]}"
        )


@dataclass(frozen=True)
class Chosen:
    """What a task has chosen, and from what.

    Args:
        records: All its points, as the search has trained them.
        scans: Of the candidates; after fine-tuning, what they came to in the round that is chosen from.
        kept: The record of the chosen point, after that round if there is one.
        is_pruned: Whether that model is committed as it is, since nothing is pruned after the last round.
        reasons: For what was chosen from, in sentences.
    """

    records: list[PointRecord]
    scans: list[ScanRecord]
    choice: Selection
    kept: PointRecord
    is_pruned: bool = False
    reasons: tuple[str, ...] = ()

    @property
    def scan(self) -> ScanRecord:
        """Of the chosen point."""
        return next(scan for scan in self.scans if scan.point == self.choice.chosen)

    def theta(self, groups: Iterable[str]) -> dict[str, float]:
        """For each group, above which activity its units are committed."""
        assert self.scan.theta is not None, "chosen points have a theta"
        return dict.fromkeys(groups, KEEP_ALL) if self.is_pruned else dict(zip(groups, self.scan.theta, strict=True))


def chosen_from(steps: Sequence[Step], spent: Spent, rules: ForgettingConfig) -> Chosen:
    """What a task chooses after its fine-tune rounds: of the last one after which a candidate is inside the margin.

    Retraining may lose a sample or two, which can be all that a small validation split allows; a model that was inside
    before it is not given up for that.

    Args:
        steps: Before the rounds, and after each that there was.
    """
    number = max((number for number, step in enumerate(steps) if step.passing), default=0)
    reasons = spent.reasons
    if number < len(steps) - 1:
        since = f"after fine-tune round {number}" if number else "before fine-tuning"
        failed = all(record.status == "failed" for record in steps[-1].records)
        why = "every model failed in" if failed else "no candidate is inside after"
        reasons += (f"The choice is among those {since}: {why} round {number + 1}.",)
    records, step = steps[0].records, steps[number]
    choice = selection.choose(records, step.scans, spent.margin, rules.sparsity, reasons)
    kept = next(record for record in step.records if record.point.index == choice.chosen)
    return Chosen(records, step.scans, choice, kept, 0 < number == rules.finetune_rounds, reasons)


def step_after(
    plan: TaskPlan,
    records: list[PointRecord],
    before: Sequence[ScanRecord],
    rules: ForgettingConfig,
    scan: Callable[[list[PointRecord]], list[ScanRecord]],
) -> Step:
    """What a task's candidates have come to after a fine-tune round.

    Args:
        records: Of the round's end.
        before: The scans by which they were pruned before it.
        scan: Gives the scans of candidates; after the last round nothing is pruned, and none is needed.
    """
    if plan.round == rules.finetune_rounds:
        return Step(records, retrained(before, records))
    return Step(records, scan([record for record in records if record.status == "done"]))


def chosen_by_mean(records: list[PointRecord]) -> Chosen:
    """What a baseline's task chooses."""
    choice = selection.best_mean(records)
    return Chosen(records, [], choice, next(record for record in records if record.point.index == choice.chosen))


def recorded_choice(folder: RunFolder, plan: TaskPlan, rules: ForgettingConfig) -> Chosen:
    """The records and scans of a task that has chosen, and the choice as it follows from them.

    Raises:
        Damaged: A record or a scan is missing or is of something else, or `selection.json` says another choice.
    """
    records = _recorded(folder, plan)
    results = folder.read_results()
    budget = Budget(tuple(results[plan.task].units), results[: plan.task], plan.num_tasks)
    find = partial(_recorded_scans, folder, rule=rules.rule)
    spent = selection.spend(records, rules.margins, rules.sparsity, budget, partial(find, plan))
    steps = [Step(records, spent.scans)]
    while steps[-1].passing and plan.round < rules.finetune_rounds:
        scans = steps[-1].scans
        plan = round_plan(plan, scans, rules)
        scan = partial(find, plan, limit=spent.limit)
        steps.append(step_after(plan, _recorded(folder, plan), scans, rules, scan))
    return _as_recorded(folder, plan.task, chosen_from(steps, spent, rules))


def recorded_best(folder: RunFolder, plan: TaskPlan) -> Chosen:
    """The records of a baseline's task that has chosen, and the choice as it follows from them.

    Raises:
        Damaged: As `recorded_choice`.
    """
    return _as_recorded(folder, plan.task, chosen_by_mean(_recorded(folder, plan)))


def _as_recorded(folder: RunFolder, task: int, chosen: Chosen) -> Chosen:
    """A choice that follows from records, if it is the one that was written down."""
    if folder.read_selection(task) is None:
        raise Damaged(f"{folder.uri}: task {task}: selection.json is missing")
    check_selection(folder, task, chosen.choice)
    return chosen


def _recorded(folder: RunFolder, plan: TaskPlan) -> list[PointRecord]:
    """The records of a plan's points."""
    records = []
    for point in plan.trained:
        name = point.name_in(plan.round)
        record = folder.read_point(plan.task, name)
        if record is None or (record.key, record.point) != (plan.keys[point.index], point):
            what = "of another point" if record else "missing"
            raise Damaged(f"{folder.uri}: task {plan.task}: the record of {name} is {what}")
        records.append(record)
    return records


def _recorded_scans(
    folder: RunFolder, plan: TaskPlan, records: Sequence[PointRecord], limit: int, rule: str
) -> list[ScanRecord]:
    """The scans of some of a plan's points."""
    scans = []
    for record in records:
        scan = folder.read_scan(plan.task, record.point.index, rule, limit, plan.round)
        if scan is None or not scan.is_of(record, rule, limit):
            what = "of other parameters or another rule" if scan else "missing"
            name = record.point.name_in(plan.round)
            raise Damaged(f"{folder.uri}: task {plan.task}: the scan of {name} is {what}")
        scans.append(scan)
    return scans


def check_selection(folder: RunFolder, task: int, choice: Selection) -> None:
    """Holds a task's recorded choice, if there is one, against the one that follows from its records and scans.

    Raises:
        Damaged: They differ, in more than the wording of their reasons.
    """
    recorded = folder.read_selection(task)
    if recorded is not None and replace(recorded, reasons=choice.reasons) != choice:
        raise Damaged(
            f"{folder.uri}: task {task}: selection.json, which keeps point {recorded.chosen}, does not follow from "
            f"the task's records and scans, by which it is point {choice.chosen}"
        )


def check_commit(units: Mapping[str, Units], num_correct: int, scan: ScanRecord) -> None:
    """Holds a task's subnetwork against the scan whose threshold it was cut at.

    Args:
        units: Of the state after the task.
        num_correct: Validation samples that the subnetwork gets right, evaluated by itself, in float32.

    Raises:
        RuntimeError: It is not the model that was scanned.
    """
    active = tuple(each.active for each in units.values())
    if active != scan.active:
        raise RuntimeError(f"the scan of point {scan.point} left {scan.active} units active, the commit {active}")
    # A scan adds up the same products in another order: a sample whose two best logits are equal but for the last
    # bits may fall to either side. One is allowed, or one in 5000.
    if abs(num_correct - scan.val_correct) > max(1, scan.val_total // 5000):
        raise RuntimeError(
            f"the subnetwork gets {num_correct} of {scan.val_total} validation samples right, "
            f"the scan of point {scan.point} counted {scan.val_correct}"
        )


def _check_settings(folder: RunFolder, plan: TaskPlan, sweep: Sweep) -> None:
    then, now = plan.settings, sweep.settings
    changed = [
        f"{key} {then.get(key, 'unset')} -> {now.get(key, 'unset')}"
        for key in (now | then)
        if json.dumps(then.get(key)) != json.dumps(now.get(key))  # as text: the order of an alpha's patterns counts
    ]
    if changed:
        raise InputError(
            f"{folder.uri}: sweep.yaml was changed since task {plan.task} was planned: {', '.join(changed)}\n"
            "Put it back, or start a run of another name."
        )
