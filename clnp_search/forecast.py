"""How long a network's capacity lasts, judged by the tasks so far. Pure functions of records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from clnp_search.records import ScanRecord, TaskResult

RECENT_TASKS = 3


@dataclass(frozen=True)
class Forecast:
    """What is to be expected of a group of units.

    Args:
        free: Units that are free now.
        growth: Units that a task takes: the mean of the last tasks.
        full_in: The first task that finds less than that; None if no task takes any.
    """

    free: int
    growth: float
    full_in: int | None


def forecast(results: Sequence[TaskResult]) -> dict[str, Forecast]:
    """For each group, when it runs out of free units if tasks go on as the last three did; empty before any."""
    found = {}
    for group, units in results[-1].units.items() if results else ():
        growth = fmean(result.units[group].new for result in results[-RECENT_TASKS:])
        tasks_left = int(units.free / growth) if growth else None
        full_in = None if units.free and tasks_left is None else results[-1].index + 1 + (tasks_left or 0)
        found[group] = Forecast(units.free, growth, full_in)
    return found


def in_words(results: Sequence[TaskResult], num_tasks: int | None, widens: bool = False) -> list[str]:
    """A sentence for each group that is full, or will be before the last task.

    Args:
        widens: Whether full groups are widened.
    """
    sentences = []
    for group, each in forecast(results).items():
        if not each.free:
            sentences.append(f"{group} is full" + ", and is widened for the next task" * widens)
        elif each.full_in is not None and (num_tasks is None or each.full_in < num_tasks):
            sentences.append(
                f"{group} will be full in task {each.full_in}: {each.free} units free, "
                f"{each.growth:.1f} a task over the last {min(RECENT_TASKS, len(results))}"
            )
    return sentences


@dataclass(frozen=True)
class Budget:
    """What a task may take of each group, if the free units shall last for all tasks that are planned.

    Args:
        groups: Their names.
        results: Of the tasks before.
        num_tasks: Of the whole sequence.
    """

    groups: tuple[str, ...]
    results: tuple[TaskResult, ...]
    num_tasks: int

    @property
    def tasks_left(self) -> int:
        """Tasks after this one."""
        return self.num_tasks - len(self.results) - 1

    def lasts(self, scan: ScanRecord) -> tuple[float, str]:
        """For how many more tasks there are units if this one takes a model, and the group that then has too few.

        Later tasks are taken to grow each group as the last three did, this one included.
        """
        found = [(math.inf, "")]
        for index, group in enumerate(self.groups):
            taken = self.results[-1].units[group].active if self.results else 0
            if taken == scan.totals[index]:
                continue  # full before, whatever this task does
            recent = [result.units[group].new for result in self.results[1 - RECENT_TASKS :]]
            growth = fmean([*recent, scan.active[index] - taken])
            found.append(((scan.totals[index] - scan.active[index]) / growth if growth else math.inf, group))
        return min(found, key=lambda each: each[0])
