"""How long the capacity lasts."""

from __future__ import annotations

import pytest
from builders import make_result

from clnp_search.forecast import Forecast, forecast, in_words
from clnp_search.records import TaskResult, Units


def grown(*new: int, total: int = 100) -> list[TaskResult]:
    """Tasks that have grown so many units of one group."""
    results, active = [], 0
    for index, each in enumerate(new):
        active += each
        units = {"hidden0": Units(total, active, each, total - active)}
        results.append(make_result(index, (0.9,) * (index + 1), units))
    return results


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        ((40,), Forecast(60, 40.0, 2)),  # task 1 takes 40 of 60, task 2 finds 20
        ((50,), Forecast(50, 50.0, 2)),  # task 1 takes the last
        ((70, 4, 2, 0), Forecast(24, 2.0, 16)),  # the last three count
        ((70, 0, 0, 0), Forecast(30, 0.0, None)),
        ((60, 40), Forecast(0, 50.0, 2)),
        ((100, 0, 0, 0), Forecast(0, 0.0, 4)),
    ],
)
def test_a_group_lasts_as_long_as_the_last_tasks_growth_fits(new: tuple[int, ...], expected: Forecast) -> None:
    assert forecast(grown(*new)) == {"hidden0": expected}


def test_before_any_task_nothing_is_expected() -> None:
    assert forecast([]) == {}
    assert in_words([], 5) == []


def test_only_what_ends_before_the_last_task_is_worth_a_word() -> None:
    results = grown(40)
    assert in_words(results, 2) == []
    sentence = "hidden0 will be full in task 2: 60 units free, 40.0 a task over the last 1"
    assert in_words(results, 3) == in_words(results, None) == [sentence]
    assert in_words(grown(60, 40), 3) == ["hidden0 is full"]
    assert in_words(grown(60, 40), 3, widens=True) == ["hidden0 is full, and is widened for the next task"]
