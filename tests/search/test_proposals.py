"""Which points a task tries: grids, random draws, and what Optuna proposes."""

from __future__ import annotations

import math
from typing import Any

import pytest
from builders import make_sweep

from clnp_search.config import Sweep
from clnp_search.records import Point
from clnp_search.search.proposals import agree, as_points, first_points

LAYERS = ("hidden0", "hidden1", "head")
RANGES: dict[str, Any] = {
    "alpha": {"low": 1e-6, "high": 1e-2},
    "learning_rate": {"low": 1e-3, "high": 1e-1},
    "points": 16,
}


def drawing(**search: Any) -> Sweep:
    return make_sweep(search={"algorithm": "random"} | RANGES | search)


def points_of(sweep: Sweep, task: int = 0) -> tuple[Point, ...]:
    return first_points(sweep, task, None, LAYERS)


# Grids


def test_a_grid_goes_alpha_by_alpha_and_rate_by_rate() -> None:
    sweep = make_sweep(search={"alpha": [1e-6, [1, 2, 3]], "learning_rate": [0.1, 0.2]})
    assert points_of(sweep) == (
        Point(0, (1e-6, 1e-6, 1e-6), 0.1),
        Point(1, (1e-6, 1e-6, 1e-6), 0.2),
        Point(2, (1, 2, 3), 0.1),
        Point(3, (1, 2, 3), 0.2),
    )


@pytest.mark.parametrize("algorithm", ["grid", "random", "optuna"])
def test_a_reused_choice_is_one_point_with_index_zero(algorithm: str) -> None:
    sweep = make_sweep() if algorithm == "grid" else drawing(algorithm=algorithm)
    assert first_points(sweep, 1, Point(3, (1, 2, 3), 0.2), ()) == (Point(0, (1, 2, 3), 0.2),)


# Random draws


def test_random_points_are_in_their_ranges_and_differ() -> None:
    points = points_of(drawing())
    assert [point.index for point in points] == list(range(16))
    assert all(1e-6 <= point.alpha[0] <= 1e-2 and 1e-3 <= point.learning_rate <= 1e-1 for point in points)
    assert all(len(set(point.alpha)) == 1 for point in points)
    assert len({point.alpha for point in points}) == 16


def test_random_points_are_even_on_a_logarithmic_scale() -> None:
    exponents = [math.log10(point.alpha[0]) for point in points_of(drawing(points=400))]
    for decade in range(-6, -2):
        assert 70 <= sum(decade <= exponent < decade + 1 for exponent in exponents) <= 130


def test_random_points_are_the_same_for_the_same_seed_and_task_alone() -> None:
    first = points_of(drawing())
    assert points_of(drawing()) == first
    assert points_of(drawing(), task=1) != first
    assert points_of(drawing(points=17))[:16] == first
    assert points_of(drawing().model_copy(update={"seed": 1})) != first


def test_a_range_for_each_layer_is_drawn_apart_and_numbers_stay() -> None:
    wide = {"low": 1e-5, "high": 1e-1}
    for alpha in ([[wide, wide, 0.5]], {"hidden0": wide, "hidden*": wide, "*": 0.5}):
        for point in points_of(drawing(alpha=alpha)):
            assert point.alpha[0] != point.alpha[1]
            assert point.alpha[2] == 0.5


def test_drawn_values_have_four_digits() -> None:
    for point in points_of(drawing()):
        assert point.learning_rate == float(f"{point.learning_rate:.4g}")


# Optuna


def test_optunas_first_batch_is_a_quarter_of_the_points_by_default() -> None:
    assert len(points_of(drawing(algorithm="optuna"))) == 4
    assert len(points_of(drawing(algorithm="optuna", batch=7))) == 7
    assert len(points_of(drawing(algorithm="optuna", batch=70))) == 16


def test_recorded_points_agree_with_a_sweep_that_they_follow_from() -> None:
    for sweep in (make_sweep(), drawing()):
        points = points_of(sweep)
        assert agree(sweep, 0, None, LAYERS, points)
        assert not agree(sweep, 0, None, LAYERS, points[:-1])


def test_points_that_optuna_may_have_proposed_agree_with_its_sweep() -> None:
    sweep = drawing(algorithm="optuna")
    points = as_points(sweep, LAYERS, [(1e-6, 1e-3), (1e-2, 1e-1), (1e-4, 0.02)])
    assert agree(sweep, 0, None, LAYERS, points)
    assert not agree(sweep, 0, None, LAYERS, points * 2)
    for outside in ((2e-2, 0.02), (1e-4, 0.2), (1e-7, 0.02)):
        assert not agree(sweep, 0, None, LAYERS, as_points(sweep, LAYERS, [outside]))
    assert not agree(drawing(algorithm="optuna", points=2), 0, None, LAYERS, points)
