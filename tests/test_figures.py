"""Figures, by what is drawn and where; not by their pixels."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from builders import make_curve, make_point, make_record, make_result, make_scan, make_sweep, write_run
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from clnp_search.pareto import pareto_front
from clnp_search.records import CurveStep, Selection, TaskResult, Units, summarise
from clnp_search.report.figures import (
    CHOSEN,
    MAX_ALPHAS,
    MAX_TASKS,
    accuracy_against_sparsity,
    accuracy_matrix,
    draw_run,
    runs_compared,
    threshold_curves,
    to_png,
    to_svg,
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
    axes = accuracy_matrix("run", tasks(3)).axes[0]
    shown = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in axes.texts}
    assert shown == {
        (0, 0): "90.00",
        (1, 0): "90.10",
        (1, 1): "91.10",
        (2, 0): "90.20",
        (2, 1): "91.20",
        (2, 2): "92.20",
    }


def test_accuracy_matrix_of_twenty_tasks_has_room_for_every_number() -> None:
    figure = accuracy_matrix("run", tasks(20))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = [text.get_window_extent() for text in axes.texts]
    cell = axes.get_window_extent().width / 20
    assert len(boxes) == 210
    assert max(box.width for box in boxes) < 0.9 * cell


def test_accuracy_matrix_never_stretches_its_colours_over_less_than_ten_points() -> None:
    results = [make_result(0, (0.991,), {"hidden0": Units(4, 1, 1, 3)})]
    assert accuracy_matrix("run", results).axes[0].images[0].get_clim() == (0.9, 1.0)


def test_units_grown_adds_up_to_each_layer_and_ends_with_what_is_free() -> None:
    axes = units_grown("run", tasks(3)).axes[0]
    for row, free in enumerate((0.7, 0.85)):
        bars = [bar for bar in axes.patches if isinstance(bar, Rectangle) and round(bar.get_center()[1]) == row]
        assert len(bars) == 4
        assert sum(bar.get_width() for bar in bars) == pytest.approx(1)
        assert bars[-1].get_width() == pytest.approx(free)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["hidden0\n70 of 100 free", "hidden1\n170 of 200 free"]


def test_units_grown_has_a_colour_of_its_own_for_each_task() -> None:
    [legend] = units_grown("run", tasks(10)).legends
    assert [text.get_text() for text in legend.get_texts()] == [*map(str, range(10)), "free"]
    assert len({patch.get_facecolor() for patch in legend.get_patches()}) == 11


def test_threshold_curves_show_every_candidate_the_limit_and_the_choice() -> None:
    whole, close = threshold_curves("run", "Task 0", RECORDS, SCANS, CHOICE, ("hidden0", "hidden1")).axes
    for axes in (whole, close):
        curves = [line for line in axes.lines if len(path_of(line)) == 3]
        assert [path_of(line)[1] for line in curves] == [(0.1, 0.97), (0.3, 0.9701), (0.5, 0.9702)]
        assert [line.get_color() for line in curves].index(CHOSEN) == 2
        assert limits_drawn(axes) == [0.97]
    assert points_drawn(close, markerfacecolor=CHOSEN) == [(0.5, 0.9702)]
    assert points_drawn(close, markerfacecolor="white") == [(0.1, 0.97), (0.3, 0.9701), (0.5, 0.9702)]


def test_thresholds_that_differ_are_drawn_on_the_path_that_led_to_them_and_named_below() -> None:
    raised = (
        CurveStep((0.5, 0.9), 0.96, (2, 1)),
        CurveStep((0.5, 0.8), 0.9704, (2, 2)),
    )
    scan = make_scan(2, 9702, (2, 2), theta=(0.5, 0.8), curve=SCANS[2].curve, layer_curves=((), raised))
    _, close, rows = threshold_curves("run", "Task 0", RECORDS, [scan], CHOICE, ("hidden0", "hidden1")).axes
    assert [(0.9, 0.96), (0.8, 0.9704)] in [path_of(line) for line in close.lines]
    assert points_drawn(close, markerfacecolor=CHOSEN) == [(0.5, 0.9702), (0.8, 0.9704)]
    assert points_drawn(rows) == [(0.5, 0), (0.8, 1)]
    assert [label.get_text() for label in rows.get_yticklabels()] == ["hidden0", "hidden1"]


def test_a_layer_without_a_free_unit_has_no_threshold() -> None:
    curve = tuple(CurveStep((theta, theta), 0.9702, (4, active)) for theta, active in ((0.8, 1), (0.0, 4)))
    scan = make_scan(2, 9702, (4, 1), theta=(0.0, 0.8), curve=curve)
    rows = threshold_curves("run", "Task 0", RECORDS, [scan], CHOICE, ("hidden0", "hidden1")).axes[2]
    assert points_drawn(rows) == [(0.8, 1)]
    assert [(text.get_text(), text.get_position()[1]) for text in rows.texts] == [("full", 0)]


def test_the_thresholds_of_a_full_network_are_said_to_be_nothing() -> None:
    scan = make_scan(2, 9702, (4, 4), theta=(0.0, 0.0), curve=(CurveStep((0.0, 0.0), 0.9702, (4, 4)),))
    whole = threshold_curves("run", "Task 0", RECORDS, [scan], CHOICE, ("hidden0", "hidden1")).axes[0]
    assert whole.get_title(loc="left") == "Task 0: no unit is free and active, so there is nothing to prune"


def test_names_of_many_layers_do_not_touch() -> None:
    layers = [f"layer{index // 6}.{index % 6}.conv1" for index in range(24)]
    theta = tuple(0.5 + index / 100 for index in range(24))
    curve = (CurveStep((0.5,) * 24, 0.9702, (1,) * 24),)
    scan = make_scan(2, 9702, (2,) * 24, theta=theta, totals=(4,) * 24, curve=curve)
    figures = {
        "thresholds": threshold_curves("run", "Task 0", RECORDS, [scan], CHOICE, layers),
        "units": units_grown("run", [make_result(0, (0.9,), {layer: Units(10, 5, 5, 5) for layer in layers})]),
    }
    for figure in figures.values():
        figure.draw_without_rendering()
        labels = [label.get_window_extent() for label in figure.axes[-1].get_yticklabels()]
        assert len(labels) == 24
        assert not any(above.overlaps(below) for above, below in itertools.pairwise(labels))


def test_the_legend_names_every_colour_that_is_drawn_and_no_other() -> None:
    figure = threshold_curves("run", "Task 0", RECORDS, SCANS, CHOICE, ("hidden0", "hidden1"))
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[:2] == ["α = 1e-6", "α = 1e-5"]
    assert texts[2:4] == ["highest common θ inside", "best − margin = 97.00"]
    named = {line.get_color() for line in figure.legends[0].get_lines()}
    assert {line.get_color() for line in figure.axes[0].lines} <= named


def test_the_legend_of_many_alphas_names_some() -> None:
    points = [make_point(index, alpha=1e-6 * (1 + index)) for index in range(60)]
    records = [make_record(index, 9750, point=point) for index, point in enumerate(points)]
    figure = accuracy_against_sparsity("run", "Task 0", records, SCANS, CHOICE)
    texts = [text.get_text() for text in figure.legends[0].get_texts() if text.get_text().startswith("α")]
    assert len(texts) == MAX_ALPHAS
    assert (texts[0], texts[-1]) == ("α = 1e-6", "α = 6e-5")


def test_every_figure_names_its_run() -> None:
    layers = ("hidden0", "hidden1")
    for figure in (
        accuracy_matrix("my-run", tasks(2)),
        units_grown("my-run", tasks(2)),
        threshold_curves("my-run", "Task 0", RECORDS, SCANS, CHOICE, layers),
        accuracy_against_sparsity("my-run", "Task 0", RECORDS, SCANS, CHOICE),
    ):
        assert figure.get_suptitle() == "my-run"
    figure = accuracy_matrix("a-name-of-a-hundred-characters-" * 4, tasks(2))
    figure.draw_without_rendering()
    [name] = [text for text in figure.texts if text.get_text().startswith("a-name")]
    assert name.get_window_extent().x1 < figure.bbox.x1


def test_threshold_curves_look_closely_at_the_margin() -> None:
    close = threshold_curves("run", "Task 0", RECORDS, SCANS, CHOICE, ("hidden0", "hidden1")).axes[1]
    low, high = close.get_ylim()
    assert 0.9 < low < 0.97
    assert 0.98 < high < 1


def test_a_choice_at_threshold_zero_and_no_margin_can_be_drawn() -> None:
    scan = make_scan(2, 9800, (4, 4), theta=(0.0, 0.0), curve=make_curve((1.0, 0.0), (0.1, 0.98)))
    choice = Selection(0.98, 0.0, 9800, (2,), 2, ())
    figure = threshold_curves("run", "Task 0", RECORDS, [scan], choice, ("hidden0", "hidden1"))
    assert points_drawn(figure.axes[1], markerfacecolor=CHOSEN) == [(0, 0.98)]
    assert to_png(figure).startswith(PNG)
    assert to_png(accuracy_against_sparsity("run", "Task 0", RECORDS, [scan], choice)).startswith(PNG)


def test_sparsity_figure_marks_candidates_the_choice_and_points_outside_the_margin() -> None:
    axes = accuracy_against_sparsity("run", "Task 0", RECORDS, SCANS, CHOICE).axes[0]
    assert points_drawn(axes, color=CHOSEN) == [(SCANS[2].unit_sparsity, 0.9702)]
    ends = {(scan.unit_sparsity, scan.val_accuracy) for scan in SCANS}
    assert {point for marker in "os" for point in points_drawn(axes, marker=marker)} == ends
    assert points_drawn(axes, marker="_") == [(0, 0.96)]  # the point that failed has no accuracy to show
    assert limits_drawn(axes) == [0.97]


def test_sparsity_figure_tells_alphas_by_colour_and_learning_rates_by_marker() -> None:
    figure = accuracy_against_sparsity("run", "Task 0", RECORDS, SCANS, CHOICE)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[:3] == ["α = 1e-6", "α = 1e-5", "α = 1e-3"]  # 1e-4 is the chosen one's, which has a colour of its own
    assert texts[3:6] == ["Pareto front", "lr = 0.001", "lr = 0.002"]
    assert texts[-1] == "chosen: p002\nα = 1e-4\nlr = 0.001"


def test_learning_rates_that_were_drawn_are_not_told_apart() -> None:
    drawn = [make_record(5 + index, 9000, point=make_point(5 + index, learning_rate=0.1 * index)) for index in range(9)]
    records = [*RECORDS, *drawn]
    figure = accuracy_against_sparsity("run", "Task 0", records, SCANS, CHOICE)
    assert not any("lr" in text.get_text().split("\n")[0] for text in figure.legends[0].get_texts())


def test_the_pareto_front_is_drawn_as_steps_from_the_sparsest_model_on() -> None:
    (axes,) = accuracy_against_sparsity("run", "Task 0", RECORDS, SCANS, CHOICE).axes
    (steps,) = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    assert path_of(steps) == [(model.unit_sparsity, model.val_accuracy) for model in pareto_front(SCANS)]


def test_runs_are_compared_by_their_last_accuracies_and_by_what_they_leave_free() -> None:
    runs = [summarise(name, "complete", 0, "", tuple(tasks(number))) for name, number in (("long", 3), ("short", 1))]
    figure = runs_compared(runs)
    accuracy, free = figure.axes
    assert [list(np.asarray(line.get_ydata())) for line in accuracy.lines] == [[0.902, 0.912, 0.922], [0.9]]
    assert [path_of(line)[-1] for line in free.lines] == [(2, pytest.approx(0.8)), (0, pytest.approx(280 / 300))]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["long: 91.20", "short: 90.00"]
    assert len({(line.get_color(), line.get_marker()) for line in accuracy.lines}) == 2


def test_drawing_leaves_the_callers_style_alone() -> None:
    before = dict(matplotlib.rcParams)
    figure = units_grown("run", tasks(2))
    to_png(figure)
    to_svg(figure)
    assert dict(matplotlib.rcParams) == before


def test_an_svg_has_its_text_as_text_and_is_the_same_each_time() -> None:
    first, second = (to_svg(units_grown("my-run", tasks(2))) for _ in range(2))
    assert b">my-run</text>" in first
    assert first == second


def test_draw_run_records_two_figures_of_the_run_and_two_of_each_task(folder: RunFolder) -> None:
    for _ in write_run(folder, make_sweep()):
        pass
    summary = folder.read_summary()
    assert summary is not None
    draw_run(folder, summary)
    names = [f"figures/{name}.{kind}" for name in ("accuracy", "units") for kind in ("png", "svg")]
    assert list(folder.figures()) == names
    for task in (0, 1):
        found = [path.rsplit("/", 1)[-1] for path in folder.figures(task)]
        assert found == ["sparsity.png", "sparsity.svg", "thresholds.png", "thresholds.svg"]
    for path in (*folder.figures(), *folder.figures(1)):
        assert folder.read(path).startswith(PNG if path.endswith(".png") else b"<?xml")


def test_draw_run_completes_figures_that_were_cut_short(folder: RunFolder) -> None:
    summary = summarise("run", "complete", 0, "", tasks(2))
    list(write_run(folder, make_sweep()))
    draw_run(folder, summary)
    whole = folder.figures(1)
    folder.delete(next(path for path in whole if path.endswith("thresholds.png")))
    draw_run(folder, summary)
    assert folder.figures(1) == whole


def test_names_are_drawn_as_they_are() -> None:
    assert to_png(accuracy_matrix("A$#-B$", tasks(2)))


def test_draw_run_keeps_a_tasks_figures_and_renews_the_runs(folder: RunFolder) -> None:
    for _ in write_run(folder, make_sweep(), num_tasks=1):
        pass
    summary = folder.read_summary()
    assert summary is not None
    for name in ("sparsity.png", "thresholds.png"):
        folder.write_figure(name, b"kept", task=0)
    folder.write_figure("units.png", b"stale")
    draw_run(folder, summary)
    assert folder.read(folder.figures(0)[0]) == b"kept"
    assert folder.read("figures/units.png").startswith(PNG)


def test_draw_run_skips_a_task_that_was_chosen_by_another_rule(folder: RunFolder) -> None:
    for _ in write_run(folder, make_sweep(), num_tasks=1):
        pass
    folder.write_sweep(make_sweep(forgetting={"theta": "per_layer"}).to_yaml())
    summary = folder.read_summary()
    assert summary is not None
    draw_run(folder, summary)
    assert folder.figures(0) == ()
    assert len(folder.figures()) == 4


def test_figures_of_a_hundred_tasks_stay_as_large_as_those_of_some() -> None:
    units = {"hidden0": Units(400, 300, 3, 100)}
    results = [make_result(index, (0.95,) * (index + 1), units) for index in range(100)]
    for draw in (accuracy_matrix, units_grown):
        many, some = draw("run", results), draw("run", results[:MAX_TASKS])
        assert to_png(many)
        assert tuple(many.get_size_inches()) == tuple(some.get_size_inches())
    names = [text.get_text() for text in many.legends[0].get_texts()]
    assert (names[0], names[-2:], len(names)) == ("0", ["99", "free"], MAX_TASKS + 1)
