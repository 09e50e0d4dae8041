"""Figures of a run, from its records. Pure functions to matplotlib figures; only `draw_run` touches the run folder.

One style for all: colours that colour-blind readers can tell apart and that survive greyscale, accuracies in percent.
Matplotlib's object interface only, so that no backend or global state of the caller is touched.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from textwrap import fill
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import Normalize, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, SymmetricalLogLocator
from matplotlib.typing import ColorType

from clnp_search.config import sweep_at, sweep_of
from clnp_search.pareto import pareto_front
from clnp_search.records import PointRecord, ScanRecord, Selection, Summary, TaskResult
from clnp_search.storage import RunFolder

P = ParamSpec("P")

INK, MUTED, FREE = "#222222", "#767676", "#e4e4e4"
CHOSEN = "#d55e00"  # Okabe and Ito's vermillion; nothing else is of that colour
RUNS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#222222")  # Okabe and Ito's other colours
MARKERS = "osD^vP*X"
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.6g}")
DPI = 160
STYLE: Any = {
    "font.size": 9,
    "figure.labelsize": 9,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.08,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#ececec",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.markersize": 5,
    "text.parse_math": False,  # names are text
}
LIMIT: dict[str, Any] = {"color": INK, "linewidth": 0.9, "linestyle": (0, (5, 3)), "zorder": 2}
CENTRED: dict[str, Any] = {"ha": "center", "va": "center", "size": 7.5}
OWN: dict[str, Any] = {"color": CHOSEN, "linewidth": 1, "linestyle": (0, (1, 1)), "zorder": 3}
FRONT: dict[str, Any] = {"color": INK, "linewidth": 1.4, "drawstyle": "steps-post", "zorder": 3.5}
MAX_ALPHAS = 10  # in a legend; of more, some that are evenly spaced
MAX_TASKS = 32  # that are named one by one; of more, some are
MANY = 6  # layers from which on each has a narrow row


def draw_run(folder: RunFolder, summary: Summary, whole: bool = True) -> None:
    """Records the run's figures, and those of each task that has none yet, as PNG and as SVG.

    Args:
        whole: Whether also those of the whole run, which show every task so far.
    """
    if not summary.tasks:
        return
    if whole:
        _record(folder, "accuracy", accuracy_matrix(summary.name, summary.tasks))
        _record(folder, "units", units_grown(summary.name, summary.tasks))
    # Tasks are drawn in order: those before the last one that has figures are not asked again.
    new = list(itertools.takewhile(lambda result: not _is_drawn(folder, result.index), reversed(summary.tasks)))
    for result in reversed(new):
        for name, figure in draw_task(folder, summary.name, result).items():
            _record(folder, name, figure, result.index)


def draw_task(folder: RunFolder, run: str, result: TaskResult) -> dict[str, Figure]:
    """The figures of a committed task, by name; none of a baseline's."""
    task = result.index
    plan, selection = folder.read_plan(task), folder.read_selection(task)
    scans = scans_of(folder, task)
    if plan is None or selection is None or not scans:
        return {}
    records = [record for point in plan.points if (record := folder.read_point(task, point.name)) is not None]
    title = f"Task {task}: {result.name}"
    return {
        "sparsity": accuracy_against_sparsity(run, title, records, scans, selection),
        "thresholds": threshold_curves(run, title, records, scans, selection, tuple(result.units)),
    }


def _is_drawn(folder: RunFolder, task: int) -> bool:
    """Whether a task's figures are all there; the last one that is written says so."""
    return any(path.endswith("/thresholds.png") for path in folder.figures(task))


def scans_of(folder: RunFolder, task: int) -> list[ScanRecord]:
    """The scans that a task has chosen by; none of a baseline."""
    plan, selection = folder.read_plan(task), folder.read_selection(task)
    if plan is None or selection is None:
        return []
    asked = sweep_at(folder, sweep_of(folder), plan).forgetting.rule, selection.min_correct
    return [scan for each in selection.candidates if (scan := folder.read_scan(task, each, *asked)) is not None]


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


def to_svg(figure: Figure) -> bytes:
    """The figure as an SVG file, the same bytes for the same figure; its text is text."""
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "clnp-search"}):
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None})
    return stream.getvalue()


def _record(folder: RunFolder, name: str, figure: Figure, task: int | None = None) -> None:
    folder.write_figure(f"{name}.svg", to_svg(figure), task)
    folder.write_figure(f"{name}.png", to_png(figure), task)


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


@_styled
def accuracy_matrix(run: str, tasks: Sequence[TaskResult]) -> Figure:
    """Test accuracy of every task (columns) after every task (rows), in percent."""
    number = len(tasks)
    values = np.full((number, number), np.nan)
    for row, result in enumerate(tasks):
        values[row, : row + 1] = result.test_accuracies
    side = max(2.0, 0.46 * min(number, MAX_TASKS))
    figure = _figure(run, side + 1.6, side + 1.1)
    axes = figure.add_subplot()
    # Never a narrower range than ten points: tenths of a percent shall not look like a cliff.
    norm = Normalize(min(0.9, math.floor(np.nanmin(values) * 20) / 20), 1.0)
    image = axes.imshow(values, "Blues", norm)
    if number <= MAX_TASKS:
        for column, row in itertools.combinations_with_replacement(range(number), 2):
            value = values[row, column]
            axes.text(column, row, f"{100 * value:.2f}", **CENTRED, color=_ink_on(image.cmap(norm(value))))
    axes.set_title(f"Test accuracy (%): {100 * np.mean(values[-1]):.2f} on average")
    axes.set(xlabel="evaluated on task", ylabel="after training task")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(_some(number, MAX_TASKS))
        axis.set_ticks(np.arange(number + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, format=PERCENT, shrink=0.7, aspect=18, ticks=MaxNLocator(5, steps=[1, 2, 5, 10]))
    return figure


@_styled
def units_grown(run: str, tasks: Sequence[TaskResult]) -> Figure:
    """Which share of each layer's units every task has grown, and what is still free (paper, figure 3b)."""
    last = tasks[-1].units
    narrow = len(last) > MANY
    named = _some(len(tasks), MAX_TASKS)
    columns = 1 + len(named) // 8
    rows = max(len(last) * (0.25 if narrow else 0.55), 0.18 * (3 + len(named) / columns) - 0.5)
    figure = _figure(run, 9.0 if narrow else 7.2, 1.3 + rows)
    axes = figure.add_subplot()
    colours = [*_shades(len(tasks)), FREE]
    for row, (layer, units) in enumerate(last.items()):
        left = 0.0
        for number, colour in zip([*(result.units[layer].new for result in tasks), units.free], colours, strict=True):
            width, text = number / units.total, f"{number:,}"
            axes.barh(row, width, 0.66, left, color=colour, edgecolor="white", linewidth=0.5)
            if width > (0.018 if narrow else 0.015) * len(text) + 0.01:  # as wide as its number
                axes.text(left + width / 2, row, text, **CENTRED, color=_ink_on(colour))
            left += width
    gap = ", " if narrow else "\n"
    names = [f"{layer}{gap}{units.free:,} of {units.total:,} free" for layer, units in last.items()]
    axes.set_yticks(range(len(last)), names, size=7.5 if narrow else None)
    axes.set_ylim(len(last) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(PERCENT)
    axes.set(title="Units grown by each task", xlabel="share of the layer's units (%)", xlim=(0, 1))
    patches = [Patch(color=colours[each], label=str(tasks[each].index)) for each in named]
    patches.append(Patch(color=FREE, label="free"))
    figure.legend(handles=patches, title="task", loc="outside right center", ncols=columns, handlelength=1.0)
    return figure


@_styled
def runs_compared(runs: Sequence[Summary]) -> Figure:
    """Test accuracy of every task after the last one, for each run (paper, figure 3a), and units that stay free."""
    figure = Figure(figsize=(7.2, 4.8 if len(runs) < 12 else 0.4 * len(runs)), dpi=DPI)
    accuracy, free = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for index, run in enumerate(runs):
        style: dict[str, Any] = {"color": RUNS[index % len(RUNS)], "marker": MARKERS[index % len(MARKERS)]}
        label = fill(f"{run.name}: {100 * run.average_test_accuracy:.2f}", 24)
        accuracy.plot(run.tasks[-1].test_accuracies, **style, label=label, clip_on=False)
        shares = [1 - sum(each.active for each in result.units.values()) / _total(result) for result in run.tasks]
        free.plot(shares, **style, clip_on=False)
    accuracy.set(title="Test accuracy (%) of each task after the last one")
    free.set(title="Free units (%) after each task", xlabel="task", ylim=(0, 1))
    free.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (accuracy, free):
        axes.yaxis.set_major_formatter(PERCENT)
        axes.grid(axis="y")
    figure.legend(loc="outside right upper", title="run: average")
    return figure


def _total(result: TaskResult) -> int:
    return sum(units.total for units in result.units.values())


@_styled
def threshold_curves(
    run: str,
    title: str,
    records: Sequence[PointRecord],
    scans: Sequence[ScanRecord],
    selection: Selection,
    layers: Sequence[str],
) -> Figure:
    """Validation accuracy of every candidate while one threshold for all layers rises: all of it, and at the margin.

    Each candidate's circle is its highest common threshold inside the margin; the filled ones are what was chosen.
    Where the chosen thresholds differ, dotted lines are the chosen point while the threshold of one layer rises alone,
    and the rows below say which threshold is whose.
    """
    task = _Task(records, selection, scans[0].val_total)
    chosen = next(scan for scan in scans if scan.point == selection.chosen)
    apart = chosen.theta is not None and len(set(chosen.theta)) > 1
    heights = [1.6, 2.5] + ([0.35 + (0.14 if len(layers) > MANY else 0.2) * len(layers)] if apart else [])
    figure = _figure(run, 7.2, 0.7 + sum(heights))
    whole, close, *below = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    ends: list[float] = [*(chosen.theta or ())]
    top = max(step.theta[0] for scan in scans for step in scan.curve)
    for scan in scans:
        is_chosen, colour = scan is chosen, task.colour(scan.point)
        steps = [(step.theta[0], step.val_accuracy) for step in scan.curve]
        for axes in (whole, close):
            axes.plot(
                *zip(*steps, strict=True), color=colour, linewidth=2 if is_chosen else 1, zorder=4 if is_chosen else 3
            )
        for common in sorted(step for step in steps if step[1] > task.limit - 1e-9)[-1:]:
            ends.append(common[0])
            close.plot(*common, "o", color="white", markeredgecolor=colour, zorder=4, clip_on=False)
    kept = dict.fromkeys(chosen.theta or (), chosen.val_accuracy)
    for layer, curve in enumerate(chosen.layer_curves if apart else ()):
        own = [(step.theta[layer], step.val_accuracy) for step in curve]
        close.plot([theta for theta, _ in own], [accuracy for _, accuracy in own], **OWN)
        kept |= {theta: accuracy for theta, accuracy in own if chosen.theta and theta == chosen.theta[layer]}
    for end in kept.items():
        close.plot(*end, "o", color=CHOSEN, markersize=7, zorder=5, clip_on=False)
    for rows in below:
        _draw_thresholds(rows, chosen, layers)
    task.draw_margin(whole)
    task.draw_margin(close)
    whole.set(title=title, ylim=(0, 1.02))
    _scale_theta(close, ends, top)
    if not top:
        whole.set_title(f"{title.partition(':')[0]}: no unit is free and active, so there is nothing to prune")
    close.set(ylim=task.window, ylabel="validation accuracy (%)")
    (below or [close])[-1].set_xlabel("threshold θ (mean activation of a unit)")
    extra = [
        Line2D([], [], linestyle="", marker="o", color="white", markeredgecolor=INK, label="highest common θ inside")
    ]
    extra += [Line2D([], [], **OWN, label="one layer's θ raised alone")] if apart else []
    task.draw_legend(figure, [scan.point for scan in scans if scan is not chosen], extra)
    return figure


def _draw_thresholds(axes: Axes, scan: ScanRecord, layers: Sequence[str]) -> None:
    """Draws a scan's thresholds, one row a layer; layers without a free unit have none."""
    assert scan.theta is not None
    frozen = scan.curve[0].active  # at the highest threshold nothing joins
    for row, (theta, before, total) in enumerate(zip(scan.theta, frozen, scan.totals, strict=True)):
        if before == total:
            axes.text(0.01, row, "full", transform=axes.get_yaxis_transform(), va="center", size=7, color=MUTED)
        else:
            axes.plot(theta, row, "o", color=CHOSEN, clip_on=False)
    axes.set_yticks(range(len(layers)), layers, size=6.5 if len(layers) > MANY else 8)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y")


@_styled
def accuracy_against_sparsity(
    run: str, title: str, records: Sequence[PointRecord], scans: Sequence[ScanRecord], selection: Selection
) -> Figure:
    """Accuracy and sparsity of every candidate, pruned as far as the margin allows, on the curves of its scan.

    Points that were outside the margin before pruning were not scanned: their accuracies are ticks at the left edge.
    The black steps are the Pareto front: no model that was evaluated beats those on it in both.
    """
    task = _Task(records, selection, scans[0].val_total)
    rates = sorted({record.point.learning_rate for record in records})
    told_apart = len(rates) <= len(MARKERS)  # more are draws from a range, of which each has its own
    markers = dict(zip(rates, MARKERS if told_apart else itertools.repeat("o"), strict=False))
    figure = _figure(run, 7.2, 4.0)
    axes = figure.add_subplot()
    for scan in scans:
        colour, (size, order) = task.colour(scan.point), (9.0, 5) if scan.point == selection.chosen else (5.5, 4)
        for curve, style in ((scan.curve, "-"), *((each, OWN["linestyle"]) for each in scan.layer_curves if each)):
            steps = [(1 - sum(step.active) / sum(scan.totals), step.val_accuracy) for step in curve]
            axes.plot(*zip(*steps, strict=True), color=colour, linewidth=0.8, linestyle=style, alpha=0.7)
        if scan.theta is not None:
            end, marker = (scan.unit_sparsity, scan.val_accuracy), markers[task.points[scan.point].learning_rate]
            axes.plot(*end, marker, color=colour, markersize=size, zorder=order, clip_on=False)
    front = [(model.unit_sparsity, model.val_accuracy) for model in pareto_front(scans)]
    axes.plot(*zip(*front, strict=True), **FRONT)
    done = [record for record in records if record.status == "done"]
    outside = [record for record in done if record.point.index not in selection.candidates]
    for record in outside:
        colour, edge = task.colour(record.point.index), axes.get_yaxis_transform()
        axes.plot(0.0, record.val_accuracy, "_", color=colour, markersize=14, transform=edge)
    task.draw_margin(axes)
    axes.xaxis.set_major_formatter(PERCENT)
    axes.set(title=title, ylim=task.window, xlim=(0, min(1.0, 1.25 * max(scan.unit_sparsity for scan in scans) + 0.01)))
    axes.set(xlabel="unit sparsity: free units of all hidden units (%)", ylabel="validation accuracy (%)")
    extra = [Line2D([], [], **FRONT, label="Pareto front")]
    extra += [_dot(markers[rate], MUTED, f"lr = {rate:g}") for rate in rates if told_apart]
    extra += [_dot("_", MUTED, f"outside the margin: {len(outside)}", markersize=9)] if outside else []
    if any(any(scan.layer_curves) for scan in scans):
        extra.append(Line2D([], [], **(OWN | {"color": MUTED}), label="one layer's θ raised alone"))
    shown = [record.point.index for record in done if record.point.index != selection.chosen]
    task.draw_legend(figure, shown, extra, markers)
    return figure


class _Task:
    """What both figures of a task share: colours by alpha, the margin, the legend."""

    def __init__(self, records: Sequence[PointRecord], selection: Selection, val_total: int) -> None:
        self.points = {record.point.index: record.point for record in records}
        self._chosen = self.points[selection.chosen]
        alphas = sorted({point.alpha for point in self.points.values()}, key=lambda alpha: (sum(alpha), alpha))
        self._colours = dict(zip(alphas, _shades(len(alphas)), strict=True))
        self.limit = selection.min_correct / val_total
        span = max(selection.best_val_accuracy - self.limit, 4 / val_total)
        self.window = self.limit - 4 * span, selection.best_val_accuracy + span

    def colour(self, point: int) -> str:
        """A point's colour: the chosen one's own, or its alpha's."""
        return CHOSEN if point == self._chosen.index else self._colours[self.points[point].alpha]

    def draw_margin(self, axes: Axes) -> None:
        """Draws the lowest accuracy that is inside the margin, on an axis of percentages."""
        axes.axhline(self.limit, **LIMIT)
        axes.yaxis.set_major_formatter(PERCENT)
        axes.grid(axis="y")

    def draw_legend(
        self,
        figure: Figure,
        shown: Iterable[int],
        extra: Sequence[Line2D] = (),
        markers: dict[float, str] | None = None,
    ) -> None:
        """Draws the legend: the alphas of the shown points, what is extra, the margin, and the chosen point.

        Args:
            shown: Points that are drawn in the colours of their alphas.
        """
        alphas, chosen = {self.points[index].alpha for index in shown}, self._chosen
        drawn = [(alpha, colour) for alpha, colour in self._colours.items() if alpha in alphas]
        drawn = [drawn[each] for each in _some(len(drawn), MAX_ALPHAS)]
        lines = [Line2D([], [], color=colour, label=f"α = {_alpha(alpha)}") for alpha, colour in drawn]
        limit = Line2D([], [], **LIMIT, label=f"best − margin = {100 * self.limit:.2f}")
        label = f"chosen: {chosen.name}\nα = {_alpha(chosen.alpha)}\nlr = {chosen.learning_rate:g}"
        dot = _dot((markers or {}).get(chosen.learning_rate, "o"), CHOSEN, label, markersize=7)
        figure.legend(handles=[*lines, *extra, limit, dot], loc="outside right upper")


def _figure(run: str, width: float, height: float) -> Figure:
    """An empty figure that says of which run it is."""
    figure = Figure(figsize=(width, height), dpi=DPI)
    room = int(13 * width)  # characters of that size
    figure.suptitle(run if len(run) <= room else f"{run[: room - 1]}…", x=0.02, ha="left", size=8, color=MUTED)
    return figure


def _scale_theta(axes: Axes, ends: Iterable[float], top: float) -> None:
    """Makes the x axis logarithmic, but for what is below the smallest of `ends`, which may be zero."""
    linear = min((end for end in ends if end > 0), default=top or 1.0)
    subs = (1.0, 2.0, 5.0) if top < 300 * linear else (1.0,)
    axes.set_xscale("symlog", linthresh=linear, linscale=0.7)
    axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear, subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(0, 1.05 * top or 1.0)


def _some(number: int, most: int) -> list[int]:
    """The indices of all, or of so many that are evenly spaced, with the first and the last."""
    return [round(each) for each in np.linspace(0, number - 1, min(number, most))]


def _shades(number: int) -> list[str]:
    """Colours in a visible order, from dark to bright."""
    return [to_hex(colour) for colour in matplotlib.colormaps["viridis"](np.linspace(0.05, 0.92, number))]


def _dot(marker: str, colour: str, label: str, markersize: float = 5.0) -> Line2D:
    return Line2D([], [], linestyle="", marker=marker, color=colour, label=label, markersize=markersize)


def _alpha(alpha: Sequence[float]) -> str:
    """An alpha for a legend, such as 1e-5."""
    values = alpha[:1] if len(set(alpha)) == 1 else alpha
    texts = [np.format_float_scientific(value, 2, trim="-", exp_digits=1) if value else "0" for value in values]
    return ", ".join(texts) if len(texts) < 4 else f"{texts[np.argmin(values)]} to {texts[np.argmax(values)]}"


def _ink_on(colour: ColorType) -> str:
    """Black or white, whichever is readable on a colour."""
    red, green, blue = to_rgb(colour)
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.58 else INK
