"""Runs beside one another: their tasks as one table. Their figure is in `figures`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

from clnp_search.config import Sweep
from clnp_search.records import Summary


def comparison_rows(summaries: Mapping[str, Summary]) -> list[dict[str, Any]]:
    """A row for each run and task: what was chosen, accuracies, and what was left free after the task."""
    rows = []
    for run, summary in summaries.items():
        for result in summary.tasks:
            units = result.units.values()
            rows.append(
                {
                    "run": run,
                    "task": result.index,
                    "name": result.name,
                    "point": result.selected.point,
                    "learning_rate": result.selected.learning_rate,
                    "best_val_accuracy": result.best_val_accuracy,
                    "val_accuracy": result.selected.val_accuracy,
                    "test_accuracy": result.test_accuracy,
                    "test_accuracy_now": summary.tasks[-1].test_accuracies[result.index],
                    "average_test_accuracy": fmean(result.test_accuracies),
                    "new_units": sum(each.new for each in units),
                    "free_units": sum(each.free for each in units),
                    "units": sum(each.total for each in units),
                    "seconds": result.seconds,
                }
            )
    return rows


def spread_rows(sweeps: Mapping[str, Sweep], summaries: Mapping[str, Summary]) -> list[dict[str, Any]]:
    """A row for each set of runs that differ in nothing but their seed: mean and standard deviation of their figures.

    Of several runs of one seed the first counts. The deviation is the sample's; None of a single run.
    """
    families: dict[frozenset[tuple[str, str]], dict[int, str]] = {}
    for run, sweep in sweeps.items():
        if tasks := len(summaries[run].tasks):
            settings = sweep.settings | {"seed": None, "tasks": tasks}
            family = frozenset((key, json.dumps(value)) for key, value in settings.items())
            of_seeds = families.setdefault(family, {})
            of_seeds.setdefault(sweep.seed, run)
    rows = []
    for runs in (list(of_seeds.values()) for of_seeds in families.values()):
        figures = {
            "average_test_accuracy": [summaries[run].average_test_accuracy for run in runs],
            "max_forgetting": [summaries[run].max_forgetting for run in runs],
            "free_units": [float(sum(each.free for each in summaries[run].tasks[-1].units.values())) for run in runs],
        }
        sweep = sweeps[runs[0]]
        margin = sweep.forgetting.margin if sweep.method == "clnp" else None
        row: dict[str, Any] = {"method": sweep.method, "margin": margin, "runs": runs}
        row |= {"seeds": [summaries[run].seed for run in runs], "tasks": len(summaries[runs[0]].tasks)}
        for name, values in figures.items():
            deviation = stdev(values) if len(values) > 1 else None
            row |= {f"{name}_mean": fmean(values), f"{name}_deviation": deviation}
        rows.append(row)
    return rows


def comparison_csv(summaries: Mapping[str, Summary]) -> str:
    """`comparison_rows` as CSV."""
    rows, stream = comparison_rows(summaries), io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
