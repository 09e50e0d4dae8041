"""The margin and the choice, on hand-made records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import pytest
from builders import make_point, make_record, make_result, make_scan

from clnp_search.errors import NoModel
from clnp_search.forecast import Budget
from clnp_search.records import Point, PointRecord, ScanRecord, TaskResult, Units
from clnp_search.selection import SPARSITY, Spent, candidates, choose, min_correct, spend

# The margin


@pytest.mark.parametrize(
    ("best", "total", "margin", "expected"),
    [
        (9848, 10000, 0.0005, 9843),
        (9848, 10000, 0.0, 9848),
        (9848, 10000, 0.00059, 9843),
        (9848, 10000, 0.00051, 9843),
        (9848, 10000, 0.00049, 9844),
        (290, 300, 0.0005, 290),
        (100, 100, 1.0, 0),
        # 0.29 * 100 is 28.999999999999996 in floating point.
        (90, 100, 0.29, 61),
        (90, 100, 0.07, 83),
        (58, 60, 0.05, 55),
    ],
)
def test_min_correct_is_the_fewest_right_samples_inside_the_margin(
    best: int, total: int, margin: float, expected: int
) -> None:
    assert min_correct(best, total, margin) == expected


@pytest.mark.parametrize("percent", range(1, 100))
def test_a_margin_of_whole_samples_admits_a_model_at_exactly_that_loss(percent: int) -> None:
    assert min_correct(100, 100, percent / 100) == 100 - percent


def test_a_point_at_the_limit_is_a_candidate_and_one_sample_less_is_not() -> None:
    records = [make_record(0, 9848), make_record(1, 9843), make_record(2, 9842)]
    limit, inside = candidates(records, 0.0005)
    assert limit == 9843
    assert [record.point.index for record in inside] == [0, 1]


def test_the_best_point_is_a_candidate_at_margin_zero_with_all_its_equals() -> None:
    records = [make_record(0, 9847), make_record(1, 9848), make_record(2, 9848)]
    assert [record.point.index for record in candidates(records, 0.0)[1]] == [1, 2]


def test_the_margin_counts_from_the_best_of_all_points_and_not_from_a_points_own() -> None:
    records = [make_record(0, 9848), make_record(1, 9840)]
    scans = [make_scan(0, 9844, (4, 4)), make_scan(1, 9840, (1, 1))]
    assert choose(records, scans[:1], 0.0005).candidates == (0,)


def test_a_failed_point_neither_is_a_candidate_nor_sets_the_best() -> None:
    records = [make_record(0, 9999, status="failed", reason="diverged"), make_record(1, 9000)]
    limit, inside = candidates(records, 0.0)
    assert limit == 9000
    assert [record.point.index for record in inside] == [1]


def test_points_that_all_failed_raise_with_every_reason_once() -> None:
    records = [
        make_record(0, 0, status="failed", reason="diverged"),
        make_record(1, 0, status="failed", reason="out of memory"),
        make_record(2, 0, status="failed", reason="diverged"),
    ]
    with pytest.raises(
        NoModel, match=r"every grid point of this task failed: diverged; out of memory\n.*--retry-failed"
    ):
        candidates(records, 0.5)
    with pytest.raises(NoModel, match="every grid point"):
        choose(records, [], 0.5)


# The choice


def test_the_candidate_with_the_highest_unit_sparsity_is_chosen() -> None:
    records = [make_record(index, 9848) for index in range(3)]
    scans = [make_scan(0, 9848, (3, 3)), make_scan(1, 9843, (1, 2)), make_scan(2, 9848, (2, 2))]
    assert choose(records, scans, 0.0005).chosen == 1


def test_a_candidate_without_a_theta_is_never_chosen() -> None:
    records = [make_record(0, 9848), make_record(1, 9848)]
    scans = [make_scan(0, 9000, (0, 0), theta=None), make_scan(1, 9848, (4, 4))]
    assert choose(records, scans, 0.0005).chosen == 1


def test_a_choice_without_a_passing_candidate_raises_and_says_what_would_help() -> None:
    records = [make_record(0, 9848)]
    with pytest.raises(RuntimeError, match=r"9843 of 10000 .* theta = 0; a larger forgetting.margin"):
        choose(records, [make_scan(0, 9000, theta=None)], 0.0005)


SPARSE = {
    # Most free units; most free weights; most free units in the scarcest layer.
    "units": (0, make_scan(0, 9848, (0, 3), weight_sparsity=0.5)),
    "weights": (1, make_scan(1, 9848, (3, 3), weight_sparsity=0.9)),
    "scarcest_layer": (2, make_scan(2, 9848, (2, 2), weight_sparsity=0.5)),
}


@pytest.mark.parametrize("measure", SPARSITY)
def test_each_measure_of_sparsity_chooses_by_itself(measure: str) -> None:
    expected, _ = SPARSE[measure]
    records = [make_record(index, 9848) for index in range(3)]
    assert choose(records, [scan for _, scan in SPARSE.values()], 0.0005, measure).chosen == expected


def test_every_measure_of_sparsity_is_covered_here() -> None:
    assert SPARSE.keys() == SPARSITY.keys()


def tied(points: list[Point], correct: list[int]) -> int:
    """The choice among candidates of equal sparsity."""
    records = [make_record(point.index, 9848, point=point) for point in points]
    scans = [make_scan(point.index, right) for point, right in zip(points, correct, strict=True)]
    return choose(records, scans, 0.01).chosen


def test_equal_sparsity_goes_to_the_higher_pruned_accuracy() -> None:
    assert tied([make_point(0, alpha=1e-7), make_point(1, alpha=1e-5)], [9843, 9844]) == 1


def test_equal_accuracy_goes_to_the_smaller_alpha() -> None:
    assert tied([make_point(0, 1e-5, 1e-3), make_point(1, 1e-6, 1e-2)], [9843, 9843]) == 1


def test_equal_alpha_goes_to_the_smaller_learning_rate() -> None:
    assert tied([make_point(0, 1e-5, 2e-3), make_point(1, 1e-5, 1e-3)], [9843, 9843]) == 1


def test_the_same_alphas_in_another_order_are_equal() -> None:
    # 0.1 + 0.2 + 0.3 is more than 0.3 + 0.2 + 0.1 in floating point; the smaller learning rate decides.
    assert tied([Point(0, (0.1, 0.2, 0.3), 1e-3), Point(1, (0.3, 0.2, 0.1), 2e-3)], [9843, 9843]) == 0


def test_equal_in_everything_goes_to_point_order() -> None:
    # The same alpha in sum, spread over layers in two ways.
    points = [Point(1, (1e-5, 3e-5), 1e-3), Point(0, (2e-5, 2e-5), 1e-3)]
    assert tied(points, [9843, 9843]) == 0


def test_the_choice_does_not_depend_on_the_order_of_scans_or_records() -> None:
    records = [make_record(index, 9848 - index) for index in range(4)]
    scans = [make_scan(index, 9843 + index, (index % 2, 1)) for index in range(4)]
    assert choose(records[::-1], scans[::-1], 0.01).chosen == choose(records, scans, 0.01).chosen == 2


# The record of it


def chosen_of_three() -> tuple[list[PointRecord], list[ScanRecord]]:
    records = [make_record(0, 9848), make_record(1, 9845), make_record(2, 9000)]
    return records, [make_scan(0, 9846, (3, 3)), make_scan(1, 9844, (2, 2))]


def test_a_selection_holds_the_best_accuracy_the_limit_and_the_candidates() -> None:
    choice = choose(*chosen_of_three(), 0.0005)
    assert choice.best_val_accuracy == 0.9848
    assert choice.margin == 0.0005
    assert choice.min_correct == 9843
    assert choice.candidates == (0, 1)


def test_a_selection_gives_its_reasons_with_the_figures() -> None:
    reasons = choose(*chosen_of_three(), 0.0005).reasons
    assert len(reasons) == 4
    assert all(figure in reasons[0] for figure in ("98.4800%", "0.0500%", "9843", "10000"))
    assert reasons[1].startswith("2 of 3 points are inside before pruning; 2 stay")
    assert all(figure in reasons[2] for figure in ("p001", "units", "0.5000", "98.4400%"))
    assert reasons[3] == "Next: p000 with 0.2500 at 98.4600%."


def test_a_selection_without_a_second_candidate_names_none() -> None:
    records, scans = chosen_of_three()
    reasons = choose(records[:1], scans[:1], 0.0005).reasons
    assert not any(reason.startswith("Next") for reason in reasons)


def test_a_selection_is_plain_data() -> None:
    choice = choose(*chosen_of_three(), 0.0005)
    assert json.loads(json.dumps(asdict(choice)))["chosen"] == 1


# The margin that is spent


def spent(*active: tuple[int, int], results: Sequence[TaskResult] = (), num_tasks: int = 4) -> Spent:
    """Of margins 0, 1, 2 ... % of the best point, what is spent if they leave so many of 40 and 40 units active."""
    asked = {10000 - 100 * percent: each for percent, each in enumerate(active)}

    def scan(inside: list[PointRecord], limit: int) -> list[ScanRecord]:
        assert [record.point.index for record in inside] == [0]
        return [make_scan(0, limit, asked[limit], totals=(40, 40))]

    budget = Budget(("low", "high"), tuple(results), num_tasks)
    margins = [percent / 100 for percent in range(len(active))]
    return spend([make_record(0, 10000)], margins, "units", budget, scan)


def grown(*units: tuple[int, int]) -> list[TaskResult]:
    """Tasks that have grown so many of 40 and 40 units."""
    results: list[TaskResult] = []
    for index in range(len(units)):
        groups = {}
        for place, group in enumerate(("low", "high")):
            active = sum(each[place] for each in units[: index + 1])
            groups[group] = Units(40, active, units[index][place], 40 - active)
        results.append(make_result(index, (0.9,) * (index + 1), groups))
    return results


def test_the_least_margin_with_which_all_tasks_have_units_is_spent() -> None:
    assert spent((20, 5), (11, 5), (10, 10), (1, 1)).margin == 0.02  # 30 and 30 are left to three tasks of 10 and 10
    assert spent((10, 10), (1, 1)).margin == 0.0
    assert spent((40, 40), (39, 1), num_tasks=1).margin == 0.0


def test_where_no_margin_lasts_it_is_the_one_that_lasts_longest() -> None:
    assert spent((30, 30), (20, 20), (25, 5)).margin == 0.01


def test_growth_is_that_of_the_last_three_tasks() -> None:
    before = grown((9, 1), (1, 1), (3, 1))
    # 13 are taken; with 5 more 22 are left to tasks that take 3, the mean of 1, 3 and 5.
    assert spent((18, 4), (14, 4), results=before, num_tasks=11).margin == 0.0
    assert spent((18, 4), (14, 4), results=before, num_tasks=12).margin == 0.01


def test_a_group_that_was_full_before_is_not_waited_for() -> None:
    assert spent((40, 8), (40, 4), results=grown((40, 2)), num_tasks=6).margin == 0.0


def test_the_reasons_say_what_was_tried_and_why_it_was_not_enough() -> None:
    assert spent((20, 5), (10, 10), (1, 1)).reasons == (
        "Margin 0.00%: low lasts for 1 more tasks; 3 are to come.",
        "Margin 1.00%: low lasts for 3 more tasks; 3 are to come.",
    )
    assert spent((20, 5)).reasons == ()


def test_margins_that_are_the_same_number_of_samples_are_tried_once() -> None:
    records, asked = [make_record(0, 99, 100)], []

    def scan(inside: list[PointRecord], limit: int) -> list[ScanRecord]:
        asked.append(limit)
        return [make_scan(0, limit, (4, 4))]

    spend(records, (0.0, 0.001, 0.01, 0.02), "units", Budget(("low", "high"), (), 3), scan)
    assert asked == [99, 98, 97]


def test_a_margin_that_no_candidate_stays_inside_is_passed_over() -> None:
    def scan(inside: list[PointRecord], limit: int) -> list[ScanRecord]:
        return [make_scan(0, limit, (1, 1), theta=None if limit == 100 else (0.5, 0.5))]

    found = spend([make_record(0, 100, 100)], (0.0, 0.01), "units", Budget(("low", "high"), (), 2), scan)
    assert found.margin == 0.01
    assert found.reasons[0] == "Margin 0.00%: no candidate stays inside it."
