"""Which points a task tries: a grid, random draws, or what Optuna proposes. Pure functions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from clnp_search.clnp.seeds import generator
from clnp_search.config import AlphaValue, SearchConfig, Sweep
from clnp_search.records import Point


def first_points(sweep: Sweep, task: int, chosen: Point | None, layers: Sequence[str]) -> tuple[Point, ...]:
    """The points of a task that are known before any is trained, in order: all, unless Optuna proposes later ones.

    Those of a grid stand alpha by alpha (of a baseline, strength by strength), rate by rate.

    Args:
        chosen: What the first task chose, if this task shall reuse it.
        layers: Names of the network's layers, the head last.

    Raises:
        InputError: An alpha does not fit the layers.
    """
    search = sweep.search
    if chosen is not None:
        return (Point(0, chosen.alpha, chosen.learning_rate),)
    if sweep.method != "clnp":
        steered = enumerate(itertools.product(sweep.strengths, search.rates))
        return tuple(Point(index, (strength,), rate) for index, (strength, rate) in steered)
    if search.algorithm == "grid":
        return as_points(sweep, layers, search.grid)
    if search.algorithm == "random":
        return as_points(sweep, layers, _random(search, sweep.seed, task))
    from clnp_search.search.study import Study  # not above: few runs need Optuna, whose import is slow

    return as_points(sweep, layers, Study(search, sweep.seed, task, layers).propose(search.batch_size))


def as_points(
    sweep: Sweep, layers: Sequence[str], values: Sequence[tuple[AlphaValue, float]], first: int = 0
) -> tuple[Point, ...]:
    """Points of these alphas and learning rates, counted from `first`."""
    return tuple(
        Point(first + index, sweep.layer_alphas(alpha, layers), rate) for index, (alpha, rate) in enumerate(values)
    )


def agree(sweep: Sweep, task: int, chosen: Point | None, layers: Sequence[str], points: Sequence[Point]) -> bool:
    """Whether a task's recorded points are those of its sweep, as far as that follows from the sweep.

    What Optuna proposes follows from results too, and from its version; then they are those of its ranges.
    """
    search = sweep.search
    if search.algorithm != "optuna" or chosen is not None:
        return tuple(points) == first_points(sweep, task, chosen, layers)
    ends = [{name: getattr(each, end) for name, each in search.ranges.items()} for end in ("low", "high")]
    low, high = as_points(sweep, layers, [search.at(values) for values in ends])
    return len(points) <= search.num_points and all(
        point.index == index
        and low.learning_rate <= point.learning_rate <= high.learning_rate
        and all(a <= b <= c for a, b, c in zip(low.alpha, point.alpha, high.alpha, strict=True))
        for index, point in enumerate(points)
    )


def _random(search: SearchConfig, seed: int, task: int) -> list[tuple[AlphaValue, float]]:
    """All points of a random search."""
    shares = torch.rand(
        search.num_points, len(search.ranges), generator=generator(seed, "search", task), dtype=torch.float64
    )
    return [
        search.at(
            {
                name: each.rounded(each.low * (each.high / each.low) ** share)
                for share, (name, each) in zip(row, search.ranges.items(), strict=True)
            }
        )
        for row in shares.tolist()
    ]
