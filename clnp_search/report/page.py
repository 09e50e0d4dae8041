"""A report over runs: one HTML page that needs no other file, and its tables as CSV. Nothing is evaluated for it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from clnp_search.clnp.subnetwork import Subnetwork
from clnp_search.config import network_state
from clnp_search.errors import InputError
from clnp_search.forecast import in_words
from clnp_search.pareto import pareto_front
from clnp_search.progress import progress_of
from clnp_search.records import TaskResult, layer_values, margin_text
from clnp_search.report.comparison import spread_rows
from clnp_search.report.figures import accuracy_matrix, draw_task, runs_compared, scans_of, to_svg, units_grown
from clnp_search.storage import RunFolder

Row = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """A page, and by name the tables beside it as CSV."""

    html: str
    tables: dict[str, bytes]


def report(folders: Sequence[RunFolder]) -> Report:
    """The report over these runs.

    Raises:
        InputError: One of them has no committed task.
    """
    counts = Counter(folder.name for folder in folders)
    runs = [_Run(folder, folder.name if counts[folder.name] == 1 else folder.uri) for folder in folders]
    spread = spread_rows({run.name: run.sweep for run in runs}, {run.name: run.summary for run in runs})
    tables = {
        "spread": spread,
        "runs": [run.row() for run in runs],
        "tasks": [row for run in runs for row in run.task_rows()],
        "accuracies": [row for run in runs for row in run.accuracy_rows()],
        "units": [row for run in runs for row in run.unit_rows()],
        "pareto": [row for run in runs for row in run.pareto_rows()],
    }
    environment = Environment(
        loader=PackageLoader("clnp_search.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"percent": _percent, "compact": partial(layer_values, most=4), "margin": margin_text}
    html = environment.get_template("page.html.j2").render(
        runs=runs,
        spread=spread,
        compared=_inline(runs_compared([run.summary for run in runs]), "compared"),
        version=version("clnp-search"),
    )
    return Report(html, {name: _csv(rows) for name, rows in tables.items()})


class _Run:
    """What the page shows of one run."""

    def __init__(self, folder: RunFolder, name: str) -> None:
        progress = progress_of(folder)
        summary = progress.summary
        if not summary.tasks:
            raise InputError(f"{folder.uri}: no task is committed yet, so there is nothing to report")
        self.name, self.folder, self.summary = name, folder, replace(summary, name=name)
        self.sweep, self.status = progress.sweep, progress.status
        self.sweep_text = folder.read_sweep()
        last = summary.tasks[-1].units
        self.free = sum(units.free for units in last.values())
        self.units = sum(units.total for units in last.values())
        self.scarcest, scarcest = min(last.items(), key=lambda pair: pair[1].free / pair[1].total)
        self.scarcest_free = scarcest.free
        self.seconds = sum(result.seconds for result in summary.tasks)
        plans = (folder.read_plan(result.index) for result in summary.tasks)
        self.environments = list(dict.fromkeys(plan.environment for plan in plans if plan))

    @property
    def figures(self) -> dict[str, str]:
        """Figures of the whole run, as SVG elements."""
        return {
            "Test accuracy of each task after each later one": self._svg(accuracy_matrix, "accuracy"),
            "Units that each task has grown, and what is free": self._svg(units_grown, "units"),
        }

    @cached_property
    def tasks(self) -> list[Row]:
        """Each task: its result, why its point was chosen, its figures."""
        shown = []
        for result in self.summary.tasks:
            selection = self.folder.read_selection(result.index)
            figures = draw_task(self.folder, self.name, result)
            shown.append(
                {
                    "result": result,
                    "now": self.summary.tasks[-1].test_accuracies[result.index],
                    "grown": sum(units.new for units in result.units.values()),
                    "free": sum(units.free for units in result.units.values()),
                    "reasons": selection.reasons if selection else (),
                    "figures": {
                        name: _inline(figure, f"{self.name}-{result.index}-{name}") for name, figure in figures.items()
                    },
                }
            )
        return shown

    @property
    def forecast(self) -> list[str]:
        """What is to be expected of groups that run out of free units."""
        if self.sweep.method != "clnp":
            return []
        return in_words(self.summary.tasks, self.sweep.scenario.tasks, self.sweep.capacity.widens)

    @property
    def certificate(self) -> list[tuple[TaskResult, str]]:
        """Each task, and the digest of its subnetwork now."""
        networks = (
            Subnetwork(network_state(self.folder, self.sweep, each.index), each.index) for each in self.summary.tasks
        )
        return [(result, network.digest) for result, network in zip(self.summary.tasks, networks, strict=True)]

    def row(self) -> Row:
        """The run in the table of runs."""
        summary = self.summary
        return {
            "run": self.name,
            "status": self.status,
            "method": self.sweep.method,
            "scenario": self.sweep.scenario.name,
            "margin": self.sweep.forgetting.margin,
            "theta": self.sweep.forgetting.theta,
            "seed": summary.seed,
            "tasks": len(summary.tasks),
            "average_test_accuracy": summary.average_test_accuracy,
            "max_forgetting": summary.max_forgetting,
            "backward_transfer": summary.backward_transfer,
            "forward_transfer": summary.forward_transfer,
            "free_units": self.free,
            "units": self.units,
            "seconds": self.seconds,
            "state_digest": summary.state_digest,
        }

    def task_rows(self) -> list[Row]:
        """The run's rows in the table of tasks."""
        return [
            {
                "run": self.name,
                "task": result.index,
                "name": result.name,
                "point": result.selected.point,
                "alpha": result.selected.alpha,
                "learning_rate": result.selected.learning_rate,
                "theta": result.selected.theta,
                "best_val_accuracy": result.best_val_accuracy,
                "pruned_val_accuracy": result.selected.val_accuracy,
                "test_accuracy": result.test_accuracy,
                "unit_sparsity": result.selected.unit_sparsity,
                "points": result.points,
                "seconds": result.seconds,
                "digest": result.digest,
            }
            for result in self.summary.tasks
        ]

    def accuracy_rows(self) -> list[Row]:
        """The run's rows in the table of accuracies: each task after each later one."""
        return [
            {"run": self.name, "after_task": result.index, "task": task, "test_accuracy": accuracy}
            for result in self.summary.tasks
            for task, accuracy in enumerate(result.test_accuracies)
        ]

    def unit_rows(self) -> list[Row]:
        """The run's rows in the table of units: each group after each task."""
        return [
            {"run": self.name, "after_task": result.index, "group": group} | vars(units)
            for result in self.summary.tasks
            for group, units in result.units.items()
        ]

    def pareto_rows(self) -> list[Row]:
        """The run's rows in the table of models that no other one of their task beats in both accuracy and sparsity."""
        return [
            {"run": self.name, "task": result.index} | vars(model)
            for result in self.summary.tasks
            for model in pareto_front(scans_of(self.folder, result.index))
        ]

    def _svg(self, draw: Callable[[str, Sequence[TaskResult]], Figure], name: str) -> str:
        return _inline(draw(self.name, self.summary.tasks), f"{self.name}-{name}")


def _csv(rows: Sequence[Row]) -> bytes:
    """Rows as CSV; lists are JSON, as in a run's own tables."""
    plain = [
        {key: json.dumps(value) if isinstance(value, list | tuple) else value for key, value in row.items()}
        for row in rows
    ]
    return pd.DataFrame(plain).to_csv(index=False).encode()


def _inline(figure: Figure, name: str) -> str:
    """A figure as an element of a page, as wide as there is room; its ids begin with its name."""
    svg = to_svg(figure).decode()
    svg = svg[svg.index("<svg") :]
    prefix = re.sub(r"[^\w-]", "-", name)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)


def _percent(value: float | str) -> str:
    return value if isinstance(value, str) else f"{100 * value:.2f}"
