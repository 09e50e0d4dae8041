"""Figures, by what is drawn and where; not by their pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from builders import make_curve, make_point, make_record, make_result, make_scan, make_sweep, write_run
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from clnp_search.records import Selection, TaskResult, Units
from clnp_search.report.figures import (
    CHOSEN,
    accuracy_against_sparsity,
    accuracy_matrix,
    draw_run,
    threshold_curves,
    to_png,
    units_grown,
)
from clnp_search.storage import RunFolder, run_folder

PNG = b"\x89PNG"
# Three candidates inside the margin of 0.01, the last of them chosen; point 3 outside, point 4 failed.
POINTS = [make_point(index, alpha=10.0 ** (index - 6), learning_rate=0.001 * (1 + index % 2)) for index in range(5)]
RECORDS = [make_record(index, correct, point=POINTS[index]) for index, correct in enumerate([9800, 9750, 9740, 9600])]
RECORDS.append(make_record(4, 0, 0, point=POINTS[4], status="failed"))
SCANS = [
    make_scan(
        index, 9700 + index, (4 - index, 3), theta=(theta, theta), curve=make_curve((2.0, theta, 0.0), accuracies)
    )
    for index, (theta, accuracies) in enumerate(
        [(0.1, (0.2, 0.97, 0.98)), (0.3, (0.2, 0.9701, 0.975)), (0.5, (0.2, 0.9702, 0.974))]
    )
]
CHOICE = Selection(0.98, 0.01, 9700, (0, 1, 2), 2, ("because",))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return run_folder(str(tmp_path), "run")


def tasks(number: int) -> list[TaskResult]:
    """Tasks that each take a tenth of 100 and a twentieth of 200 units, with accuracies that name row and column."""
    return [
        make_result(
            index,
            tuple(0.9 + task / 100 + index / 1000 for task in range(index + 1)),
            {
                "hidden0": Units(100, 10 * index + 10, 10, 90 - 10 * index),
                "hidden1": Units(200, 10 * index + 10, 10, 190 - 10 * index),
            },
        )
        for index in range(number)
    ]


def path_of(line: Line2D) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]


def points_drawn(axes: Axes, **properties: Any) -> list[tuple[float, float]]:
    """Where single markers with these properties stand."""
    lines = [line for line in axes.lines if len(path_of(line)) == 1]
    matching = [
        line for line in lines if all(getattr(line, f"get_{key}")() == each for key, each in properties.items())
    ]
    return [path_of(line)[0] for line in matching]


def limits_drawn(axes: Axes) -> list[float]:
    """Heights of the dashed lines across the axes."""
    return [path_of(line)[0][1] for line in axes.lines if line.is_dashed()]


def test_accuracy_matrix_shows_each_task_after_each_later_one_and_nothing_above_the_diagonal() -> None:
    axes = accuracy_matrix(tasks(3)).axes[0]
    shown = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in axes.texts}
    assert shown == {
        (0, 0): "90.0",
        (1, 0): "90.1",
        (1, 1): "91.1",
        (2, 0): "90.2",
        (2, 1): "91.2",
        (2, 2): "92.2",
    }


def test_accuracy_matrix_of_twenty_tasks_has_room_for_every_number() -> None:
    figure = accuracy_matrix(tasks(20))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = [text.get_window_extent() for text in axes.texts]
    cell = axes.get_window_extent().width / 20
    assert len(boxes) == 210
    assert max(box.width for box in boxes) < 0.9 * cell


def test_accuracy_matrix_never_stretches_its_colours_over_less_than_ten_points() -> None:
    results = [make_result(0, (0.991,), {"hidden0": Units(4, 1, 1, 3)})]
    assert accuracy_matrix(results).axes[0].images[0].get_clim() == (0.9, 1.0)


def test_units_grown_adds_up_to_each_layer_and_ends_with_what_is_free() -> None:
    axes = units_grown(tasks(3)).axes[0]
    for row, free in enumerate((0.7, 0.85)):
        bars = [bar for bar in axes.patches if isinstance(bar, Rectangle) and round(bar.get_center()[1]) == row]
        assert len(bars) == 4
        assert sum(bar.get_width() for bar in bars) == pytest.approx(1)
        assert bars[-1].get_width() == pytest.approx(free)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["hidden0\n70 of 100 free", "hidden1\n170 of 200 free"]


def test_units_grown_has_a_colour_of_its_own_for_each_task() -> None:
    [legend] = units_grown(tasks(10)).legends
    assert [text.get_text() for text in legend.get_texts()] == [*map(str, range(10)), "free"]
    assert len({patch.get_facecolor() for patch in legend.get_patches()}) == 11


def test_threshold_curves_show_every_candidate_the_limit_and_the_choice() -> None:
    whole, close = threshold_curves("Task 0", RECORDS, SCANS, CHOICE, ("hidden0", "hidden1")).axes
    for axes in (whole, close):
        curves = [line for line in axes.lines if len(path_of(line)) == 3]
        assert [path_of(line)[1] for line in curves] == [(0.1, 0.97), (0.3, 0.9701), (0.5, 0.9702)]
        assert [line.get_color() for line in curves].index(CHOSEN) == 2
        assert limits_drawn(axes) == [0.97]
    assert points_drawn(close, markerfacecolor=CHOSEN) == [(0.5, 0.9702)]
    assert points_drawn(close, markerfacecolor="white") == [(0.1, 0.97), (0.3, 0.9701), (0.5, 0.9702)]


def test_threshold_curves_name_the_layers_whose_thresholds_differ() -> None:
    scan = make_scan(2, 9702, (2, 2), theta=(0.5, 0.8), curve=SCANS[2].curve)
    close = threshold_curves("Task 0", RECORDS, [scan], CHOICE, ("hidden0", "hidden1")).axes[1]
    assert points_drawn(close, markerfacecolor=CHOSEN) == [(0.5, 0.9702), (0.8, 0.9702)]
    assert [text.get_text() for text in close.texts] == ["hidden0", "hidden1"]


def test_threshold_curves_look_closely_at_the_margin() -> None:
    close = threshold_curves("Task 0", RECORDS, SCANS, CHOICE, ("hidden0", "hidden1")).axes[1]
    low, high = close.get_ylim()
    assert 0.9 < low < 0.97
    assert 0.98 < high < 1


def test_a_choice_at_threshold_zero_and_no_margin_can_be_drawn() -> None:
    scan = make_scan(2, 9800, (4, 4), theta=(0.0, 0.0), curve=make_curve((1.0, 0.0), (0.1, 0.98)))
    choice = Selection(0.98, 0.0, 9800, (2,), 2, ())
    figure = threshold_curves("Task 0", RECORDS, [scan], choice, ("hidden0", "hidden1"))
    assert points_drawn(figure.axes[1], markerfacecolor=CHOSEN) == [(0, 0.98)]
    assert to_png(figure).startswith(PNG)
    assert to_png(accuracy_against_sparsity("Task 0", RECORDS, [scan], choice)).startswith(PNG)


def test_sparsity_figure_marks_candidates_the_choice_and_points_outside_the_margin() -> None:
    axes = accuracy_against_sparsity("Task 0", RECORDS, SCANS, CHOICE).axes[0]
    assert points_drawn(axes, color=CHOSEN) == [(SCANS[2].unit_sparsity, 0.9702)]
    ends = {(scan.unit_sparsity, scan.val_accuracy) for scan in SCANS}
    assert {point for marker in "os" for point in points_drawn(axes, marker=marker)} == ends
    assert points_drawn(axes, marker="_") == [(0, 0.96)]  # the point that failed has no accuracy to show
    assert limits_drawn(axes) == [0.97]


def test_sparsity_figure_tells_alphas_by_colour_and_learning_rates_by_marker() -> None:
    figure = accuracy_against_sparsity("Task 0", RECORDS, SCANS, CHOICE)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[:4] == ["α = 1e-6", "α = 1e-5", "α = 1e-4", "α = 1e-3"]
    assert texts[4:6] == ["lr = 0.001", "lr = 0.002"]
    assert texts[-1] == "chosen: p002\nα = 1e-4\nlr = 0.001"


def test_drawing_leaves_the_callers_style_alone() -> None:
    before = dict(matplotlib.rcParams)
    to_png(units_grown(tasks(2)))
    assert dict(matplotlib.rcParams) == before


def test_draw_run_records_two_figures_of_the_run_and_two_of_each_task(folder: RunFolder) -> None:
    for _ in write_run(folder, make_sweep()):
        pass
    summary = folder.read_summary()
    assert summary is not None
    draw_run(folder, summary)
    assert folder.figures() == ("figures/accuracy.png", "figures/units.png")
    for task in (0, 1):
        assert [path.rsplit("/", 1)[-1] for path in folder.figures(task)] == ["sparsity.png", "thresholds.png"]
    assert all(folder.read(path).startswith(PNG) for path in (*folder.figures(), *folder.figures(1)))


def test_draw_run_keeps_a_tasks_figures_and_renews_the_runs(folder: RunFolder) -> None:
    for _ in write_run(folder, make_sweep(), num_tasks=1):
        pass
    summary = folder.read_summary()
    assert summary is not None
    folder.write_figure("sparsity.png", b"kept", task=0)
    folder.write_figure("units.png", b"stale")
    draw_run(folder, summary)
    assert folder.read(folder.figures(0)[0]) == b"kept"
    assert folder.read(folder.figures()[1]).startswith(PNG)


def test_draw_run_skips_a_task_that_was_chosen_by_another_rule(folder: RunFolder) -> None:
    for _ in write_run(folder, make_sweep(), num_tasks=1):
        pass
    folder.write_sweep(make_sweep(forgetting={"theta": "per_layer"}).to_yaml())
    summary = folder.read_summary()
    assert summary is not None
    draw_run(folder, summary)
    assert folder.figures(0) == ()
    assert len(folder.figures()) == 2
