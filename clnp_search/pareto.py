"""The models of a task that no other one beats in both accuracy and sparsity. Pure functions of records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from clnp_search.records import ScanRecord, point_name


@dataclass(frozen=True)
class Model:
    """A point, pruned at a threshold.

    Args:
        point: Its name.
        theta: Threshold of each group of units.
        unit_sparsity: Free units over all hidden units.
    """

    point: str
    theta: tuple[float, ...]
    val_accuracy: float
    unit_sparsity: float


def pareto_front(scans: Sequence[ScanRecord]) -> list[Model]:
    """Of all models that these scans have evaluated, those that no other one beats, the sparsest first."""
    ranked = sorted(_models(scans), key=lambda model: (-model.unit_sparsity, -model.val_accuracy, model.point))
    front: list[Model] = []
    for model in ranked:
        if not front or model.val_accuracy > front[-1].val_accuracy:
            front.append(model)
    return front


def _models(scans: Sequence[ScanRecord]) -> Iterator[Model]:
    for scan in scans:
        point = point_name(scan.point)
        for curve in (scan.curve, *scan.layer_curves):
            for step in curve:
                yield Model(point, step.theta, step.val_accuracy, 1.0 - sum(step.active) / sum(scan.totals))
        if scan.theta is not None:
            yield Model(point, scan.theta, scan.val_accuracy, scan.unit_sparsity)
