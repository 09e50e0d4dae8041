"""The Pareto front of hand-made scans."""

from __future__ import annotations

from clnp_search.pareto import pareto_front
from clnp_search.records import CurveStep, ScanRecord


def scan(point: int, *steps: tuple[float, float, int], end: tuple[float, int, int] | None = None) -> ScanRecord:
    """Steps are theta, accuracy and active units of ten; the end is theta, right samples of 100 and active units."""
    curve = tuple(CurveStep((theta,), accuracy, (active,)) for theta, accuracy, active in steps)
    theta, correct, active = end or (None, 0, 10)
    return ScanRecord(point, None if theta is None else (theta,), correct, 100, (active,), (10,), 0.0, curve)


def test_no_model_on_the_front_is_beaten_and_every_other_one_is() -> None:
    scans = [
        scan(0, (3.0, 0.2, 1), (2.0, 0.6, 4), (1.0, 0.7, 8)),
        scan(1, (3.0, 0.1, 0), (2.0, 0.65, 4), (1.0, 0.6, 6)),
    ]
    found = [(each.point, each.theta, each.val_accuracy, round(each.unit_sparsity, 6)) for each in pareto_front(scans)]
    assert found == [
        ("p001", (3.0,), 0.1, 1.0),
        ("p000", (3.0,), 0.2, 0.9),
        ("p001", (2.0,), 0.65, 0.6),
        ("p000", (1.0,), 0.7, 0.2),
    ]


def test_of_equal_models_the_first_point_is_named() -> None:
    scans = [scan(2, (1.0, 0.5, 5)), scan(1, (1.0, 0.5, 5))]
    assert [each.point for each in pareto_front(scans)] == ["p001"]


def test_thresholds_of_single_groups_and_the_chosen_ones_count_too() -> None:
    assert [each.val_accuracy for each in pareto_front([scan(0, (1.0, 0.5, 5), end=(1.5, 60, 3))])] == [0.6]


def test_no_scan_has_no_front() -> None:
    assert pareto_front([]) == []
