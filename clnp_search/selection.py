"""Margin and choice: which points are candidates, and which one is kept. Pure functions of records."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from clnp_search.errors import NoModel
from clnp_search.forecast import Budget
from clnp_search.records import PointRecord, ScanRecord, Selection

SPARSITY: dict[str, Callable[[ScanRecord], float]] = {
    "units": lambda scan: scan.unit_sparsity,
    "weights": lambda scan: scan.weight_sparsity,
    "scarcest_layer": lambda scan: scan.scarcest_layer,
}


def min_correct(best_correct: int, total: int, margin: float) -> int:
    """The fewest right validation samples inside the margin.

    Counted in samples, so that a model at exactly best - margin is inside, whatever floating point makes of it.
    """
    return max(0, best_correct - math.floor(margin * total + 1e-9))


def candidates(records: Sequence[PointRecord], margin: float) -> tuple[int, list[PointRecord]]:
    """The margin's limit in right samples, and the points inside it before pruning, in point order.

    Raises:
        NoModel: No point was trained successfully.
    """
    done = [record for record in records if record.status == "done"]
    if not done:
        reasons = "; ".join(sorted({record.reason for record in records}))
        raise NoModel(
            f"every grid point of this task failed: {reasons}\n"
            "`clnp-search resume RUN --retry-failed` trains them again; "
            "with other learning rates or alphas `clnp-search fork` goes on after the task before"
        )
    best = max(done, key=lambda record: record.val_correct)
    limit = min_correct(best.val_correct, best.val_total, margin)
    return limit, [record for record in done if record.val_correct >= limit]


def best_mean(records: Sequence[PointRecord]) -> Selection:
    """The point of a baseline with the highest mean validation accuracy, over all tasks that it is chosen by.

    What may forget cannot be judged by its last task alone. Ties go to the smaller strength, the smaller learning
    rate, point order.

    Raises:
        NoModel: No point was trained successfully.
    """
    _, done = candidates(records, margin=1.0)
    ranked = sorted(done, key=lambda each: (-each.val_accuracy, sum(each.point.alpha), each.point.learning_rate))
    first = ranked[0]
    inside = tuple(record.point.index for record in done if record.val_accuracy == first.val_accuracy)
    shown = ", ".join(f"{accuracy:.4%}" for accuracy in first.val_accuracies)
    reasons = [
        f"{len(done)} of {len(records)} points were trained; nothing is pruned by a margin.",
        f"{first.point.name} has the highest validation accuracy, {first.val_accuracy:.4%}: the mean over "
        f"{len(first.val_accuracies)} task(s), {shown}.",
    ]
    if len(ranked) > 1:
        reasons.append(f"Next: {ranked[1].point.name} at {ranked[1].val_accuracy:.4%}.")
    return Selection(first.val_accuracy, 0.0, first.val_correct, inside, first.point.index, tuple(reasons))


@dataclass(frozen=True)
class Step:
    """What a task's candidates have come to before its fine-tune rounds, or after one of them.

    Args:
        records: Of the models; before the rounds, of all points.
        scans: One for each candidate.
    """

    records: list[PointRecord]
    scans: list[ScanRecord]

    @property
    def passing(self) -> tuple[int, ...]:
        """The points inside the margin."""
        return tuple(scan.point for scan in self.scans if scan.theta is not None)


@dataclass(frozen=True)
class Spent:
    """The margin that a task spends.

    Args:
        limit: The fewest right validation samples inside it.
        scans: Of its candidates.
        reasons: Why it is this one, in sentences; empty if there was no choice.
    """

    margin: float
    limit: int
    scans: list[ScanRecord]
    reasons: tuple[str, ...] = ()


def spend(
    records: Sequence[PointRecord],
    margins: Sequence[float],
    sparsity: str,
    budget: Budget,
    scan: Callable[[list[PointRecord], int], list[ScanRecord]],
) -> Spent:
    """Of these margins the least with which the network lasts for all planned tasks, or with which it lasts longest.

    Args:
        margins: To choose from, the least first.
        scan: Gives the scans of candidates for a limit.

    Raises:
        NoModel: No point was trained successfully.
    """
    tried: list[tuple[float, Spent]] = []
    reasons: list[str] = []
    for margin in margins:
        limit, inside = candidates(records, margin)
        if any(limit == spent.limit for _, spent in tried):
            continue  # so few validation samples that it is the one before
        spent = Spent(margin, limit, scan(inside, limit))
        if len(margins) == 1:
            return spent
        if all(each.theta is None for each in spent.scans):
            reasons.append(f"Margin {margin:.2%}: no candidate stays inside it.")
            continue
        choice = choose(records, spent.scans, margin, sparsity)
        kept = next(each for each in spent.scans if each.point == choice.chosen)
        tasks, group = budget.lasts(kept)
        enough = tasks >= budget.tasks_left
        room = f"{group} lasts for {int(tasks)} more tasks" if group else "every group lasts"
        reasons.append(f"Margin {margin:.2%}: {room}; {budget.tasks_left} are to come.")
        tried.append((tasks, spent))
        if enough:
            break
    if not tried:
        return replace(spent, reasons=tuple(reasons))
    lasting = tried[-1] if enough else max(tried, key=lambda each: each[0])
    return replace(lasting[1], reasons=tuple(reasons))


def choose(
    records: Sequence[PointRecord],
    scans: Sequence[ScanRecord],
    margin: float,
    sparsity: str = "units",
    reasons: Sequence[str] = (),
) -> Selection:
    """The candidate with the highest sparsity.

    Ties go to the higher pruned validation accuracy, then the smaller alpha, the smaller learning rate, point order.

    Args:
        records: All points of the task.
        scans: One for each candidate.
        sparsity: A key of `SPARSITY`.
        reasons: For the margin.

    Raises:
        NoModel: No candidate stays inside the margin even at theta = 0.
    """
    limit, inside = candidates(records, margin)
    points = {record.point.index: record.point for record in records}
    passing = [scan for scan in scans if scan.theta is not None]
    best = max(record.val_accuracy for record in inside)
    if not passing:
        raise NoModel(
            f"no candidate keeps {limit} of {inside[0].val_total} validation samples right at theta = 0; "
            "a larger forgetting.margin would admit one, with which `clnp-search fork` goes on after the task before"
        )
    measure = SPARSITY[sparsity]

    def rank(scan: ScanRecord) -> tuple[float, ...]:
        point = points[scan.point]
        # The exact sum, rounded once: a plain one differs between orders of the same values.
        return (-measure(scan), -scan.val_correct, math.fsum(point.alpha), point.learning_rate, point.index)

    ranked = sorted(passing, key=rank)
    chosen = ranked[0]
    total = inside[0].val_total
    said = [
        *reasons,
        f"Best unpruned validation accuracy: {best:.4%}; with margin {margin:.4%}, models with at least {limit} of "
        f"{total} samples right are inside.",
        f"{len(inside)} of {len(records)} points are inside before pruning; {len(passing)} stay inside after it.",
        f"{points[chosen.point].name} has the highest sparsity ({sparsity}): {measure(chosen):.4f} at "
        f"{chosen.val_accuracy:.4%}.",
    ]
    if len(ranked) > 1:
        second = ranked[1]
        said.append(f"Next: {points[second.point].name} with {measure(second):.4f} at {second.val_accuracy:.4%}.")
    return Selection(best, margin, limit, tuple(record.point.index for record in inside), chosen.point, tuple(said))
