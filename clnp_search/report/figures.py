"""Figures of a run, from its records. Pure functions to matplotlib figures; only `draw_run` touches the run folder.

One style for all: colours that colour-blind readers can tell apart and that survive greyscale, accuracies in percent.
Matplotlib's object interface only, so that no backend or global state of the caller is touched.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from statistics import fmean
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, SymmetricalLogLocator
from matplotlib.typing import ColorType

from clnp_search.config import sweep_of
from clnp_search.records import PointRecord, ScanRecord, Selection, Summary, TaskResult
from clnp_search.storage import RunFolder

P = ParamSpec("P")

INK, MUTED, FREE = "#222222", "#767676", "#e4e4e4"
CHOSEN = "#d55e00"  # Okabe and Ito's vermillion; nothing else is of that colour
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
}
LIMIT: dict[str, Any] = {"color": INK, "linewidth": 0.9, "linestyle": (0, (5, 3)), "zorder": 2}
CENTRED: dict[str, Any] = {"ha": "center", "va": "center", "size": 7.5}
ABOVE: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom", "size": 7.5, "color": CHOSEN}
ABOVE |= {"zorder": 6, "bbox": {"color": "white", "alpha": 0.8, "pad": 0.8}}


def draw_run(folder: RunFolder, summary: Summary) -> None:
    """Records the run's figures, and those of each task that has none yet."""
    if not summary.tasks:
        return
    rule = sweep_of(folder).forgetting.theta
    folder.write_figure("accuracy.png", to_png(accuracy_matrix(summary.tasks)))
    folder.write_figure("units.png", to_png(units_grown(summary.tasks)))
    for result in summary.tasks:
        task = result.index
        plan, selection = folder.read_plan(task), folder.read_selection(task)
        if folder.figures(task) or plan is None or selection is None:
            continue
        fingerprint = f"{rule}-{selection.min_correct}"
        scans = [
            scan for each in selection.candidates if (scan := folder.read_scan(task, each, fingerprint)) is not None
        ]
        if all(scan.point != selection.chosen for scan in scans):
            continue  # chosen by another rule, before a fork
        records = [record for point in plan.points if (record := folder.read_point(task, point.name)) is not None]
        title = f"Task {task}: {result.name}"
        curves = threshold_curves(title, records, scans, selection, tuple(result.units))
        folder.write_figure("sparsity.png", to_png(accuracy_against_sparsity(title, records, scans, selection)), task)
        folder.write_figure("thresholds.png", to_png(curves), task)


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


@_styled
def accuracy_matrix(tasks: Sequence[TaskResult]) -> Figure:
    """Test accuracy of every task (columns) after every task (rows), in percent."""
    number = len(tasks)
    values = np.full((number, number), np.nan)
    for row, result in enumerate(tasks):
        values[row, : row + 1] = result.test_accuracies
    side = max(2.0, 0.4 * number)
    figure = Figure(figsize=(side + 1.6, side + 0.9), dpi=DPI)
    axes = figure.add_subplot()
    # Never a narrower range than ten points: tenths of a percent shall not look like a cliff.
    norm = Normalize(min(0.9, math.floor(np.nanmin(values) * 20) / 20), 1.0)
    image = axes.imshow(values, "Blues", norm)
    for column, row in itertools.combinations_with_replacement(range(number), 2):
        value = values[row, column]
        axes.text(column, row, f"{100 * value:.1f}", **CENTRED, color=_ink_on(image.cmap(norm(value))))
    axes.set_title(f"Test accuracy (%): {100 * np.mean(values[-1]):.1f} on average")
    axes.set(xlabel="evaluated on task", ylabel="after training task")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(range(number))
        axis.set_ticks(np.arange(number + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, format=PERCENT, shrink=0.7, aspect=18, ticks=MaxNLocator(5), drawedges=False)
    return figure


@_styled
def units_grown(tasks: Sequence[TaskResult]) -> Figure:
    """Which share of each layer's units every task has grown, and what is still free (paper, figure 3b)."""
    last = tasks[-1].units
    figure = Figure(figsize=(7.2, 1.1 + 0.55 * len(last)), dpi=DPI)
    axes = figure.add_subplot()
    colours = [*_shades(len(tasks)), FREE]
    for row, (layer, units) in enumerate(last.items()):
        left = 0.0
        for number, colour in zip([*(result.units[layer].new for result in tasks), units.free], colours, strict=True):
            width, text = number / units.total, f"{number:,}"
            axes.barh(row, width, 0.66, left, color=colour, edgecolor="white", linewidth=0.5)
            if width > 0.015 * len(text) + 0.01:  # as wide as its number
                axes.text(left + width / 2, row, text, **CENTRED, color=_ink_on(colour))
            left += width
    names = [f"{layer}\n{units.free:,} of {units.total:,} free" for layer, units in last.items()]
    axes.set_yticks(range(len(last)), names)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(PERCENT)
    axes.set(title="Units grown by each task", xlabel="share of the layer's units (%)", xlim=(0, 1))
    labels = [*(str(result.index) for result in tasks), "free"]
    patches = [Patch(color=colour, label=label) for colour, label in zip(colours, labels, strict=True)]
    columns = 1 + len(tasks) // 8
    figure.legend(handles=patches, title="task", loc="outside right center", ncols=columns, handlelength=1.0)
    return figure


@_styled
def threshold_curves(
    title: str,
    records: Sequence[PointRecord],
    scans: Sequence[ScanRecord],
    selection: Selection,
    layers: Sequence[str],
) -> Figure:
    """Validation accuracy of every candidate while one threshold for all layers rises: all of it, and at the margin.

    Each candidate's circle is its highest common threshold inside the margin; the filled ones are what was chosen.

    Args:
        layers: Names of the hidden layers; shown where their chosen thresholds differ.
    """
    task = _Task(records, selection, scans[0].val_total)
    figure = Figure(figsize=(7.2, 4.6), dpi=DPI)
    whole, close = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    ends: list[float] = []
    for scan in scans:
        chosen, colour = scan.point == selection.chosen, task.colour(scan.point)
        steps = [(step.theta[0], step.val_accuracy) for step in scan.curve]
        for axes in (whole, close):
            axes.plot(*zip(*steps, strict=True), color=colour, linewidth=2 if chosen else 1, zorder=4 if chosen else 3)
        for end in sorted(step for step in steps if step[1] > task.limit - 1e-9)[-1:]:
            ends.append(end[0])
            close.plot(*end, "o", color="white", markeredgecolor=colour, zorder=4, clip_on=False)
        if chosen and scan.theta is not None:
            ends.extend(scan.theta)
            for theta, group in itertools.groupby(sorted(zip(scan.theta, layers, strict=True)), lambda pair: pair[0]):
                close.plot(theta, scan.val_accuracy, "o", color=CHOSEN, markersize=7, zorder=5, clip_on=False)
                if len(set(scan.theta)) > 1:
                    names = "\n".join(layer for _, layer in group)
                    close.annotate(names, (theta, scan.val_accuracy), (0, 7), **ABOVE)
    task.draw_margin(whole)
    task.draw_margin(close)
    whole.set(title=title, ylim=(0, 1.02))
    _scale_theta(close, ends, max(step.theta[0] for scan in scans for step in scan.curve))
    close.set(xlabel="threshold θ (mean activation of a unit)", ylim=task.window)
    figure.supylabel("validation accuracy (%)")
    task.draw_legend(figure, [scan.point for scan in scans])
    return figure


@_styled
def accuracy_against_sparsity(
    title: str, records: Sequence[PointRecord], scans: Sequence[ScanRecord], selection: Selection
) -> Figure:
    """Accuracy and sparsity of every candidate, pruned as far as the margin allows, on the curve of its scan.

    Points that were outside the margin before pruning were not scanned: their accuracies are ticks at the left edge.
    """
    task = _Task(records, selection, scans[0].val_total)
    rates = sorted({record.point.learning_rate for record in records})
    markers = dict(zip(rates, itertools.cycle(MARKERS), strict=False))
    figure = Figure(figsize=(7.2, 3.8), dpi=DPI)
    axes = figure.add_subplot()
    for scan in scans:
        colour, size = task.colour(scan.point), 9.0 if scan.point == selection.chosen else 5.5
        steps = [(1 - sum(step.active) / sum(scan.totals), step.val_accuracy) for step in scan.curve]
        axes.plot(*zip(*steps, strict=True), color=colour, linewidth=0.8, alpha=0.7)
        if scan.theta is not None:
            end, marker = (scan.unit_sparsity, scan.val_accuracy), markers[task.points[scan.point].learning_rate]
            axes.plot(*end, marker, color=colour, markersize=size, zorder=4, clip_on=False)
    done = [record for record in records if record.status == "done"]
    outside = [record for record in done if record.point.index not in selection.candidates]
    for record in outside:
        colour, edge = task.colour(record.point.index), axes.get_yaxis_transform()
        axes.plot(0.0, record.val_accuracy, "_", color=colour, markersize=14, transform=edge)
    task.draw_margin(axes)
    axes.xaxis.set_major_formatter(PERCENT)
    axes.set(title=title, ylim=task.window, xlim=(0, min(1.0, 1.25 * max(scan.unit_sparsity for scan in scans) + 0.01)))
    axes.set(xlabel="unit sparsity: free units of all hidden units (%)", ylabel="validation accuracy (%)")
    extra = [_dot(markers[rate], MUTED, f"lr = {rate:g}") for rate in rates]
    extra += [_dot("_", MUTED, f"outside the margin: {len(outside)}", markersize=9)] if outside else []
    task.draw_legend(figure, [record.point.index for record in done], extra, markers)
    return figure


@_styled
def comparison(summaries: Mapping[str, Summary]) -> Figure:
    """Accuracy of every task and on average so far, and the share of units still free, task after task."""
    figure = Figure(figsize=(7.2, 6.0), dpi=DPI)
    each, average, free = figure.subplots(3, 1, sharex=True)
    for index, ((run, summary), colour) in enumerate(zip(summaries.items(), _shades(len(summaries)), strict=True)):
        tasks = [result.index for result in summary.tasks]
        line: dict[str, Any] = {"color": colour, "marker": MARKERS[index % len(MARKERS)], "linewidth": 1.2}
        each.plot(tasks, [result.test_accuracy for result in summary.tasks], label=run, **line)
        average.plot(tasks, [fmean(result.test_accuracies) for result in summary.tasks], **line)
        free.plot(tasks, [_free_share(result) for result in summary.tasks], **line)
    for axes, title in (
        (each, "Test accuracy of each task, right after it (%)"),
        (average, "Average test accuracy of all tasks so far (%)"),
        (free, "Units still free (%)"),
    ):
        axes.set_title(title)
        axes.yaxis.set_major_formatter(PERCENT)
        axes.grid(axis="y")
    free.set_ylim(0, 1)
    free.set_xlabel("task")
    free.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=min(3, len(summaries)))
    return figure


def to_bytes(figure: Figure, suffix: str) -> bytes:
    """The figure as a file of the kind that its name's end says: .png, .svg, .pdf."""
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(stream, format=suffix.removeprefix("."))
    return stream.getvalue()


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
        """Draws the legend: the alphas of the shown points, what is extra, the margin, and the chosen point."""
        alphas, chosen = {self.points[index].alpha for index in shown}, self._chosen
        colours = {alpha: colour for alpha, colour in self._colours.items() if alpha in alphas}
        lines = [Line2D([], [], color=colour, label=f"α = {_alpha(alpha)}") for alpha, colour in colours.items()]
        limit = Line2D([], [], **LIMIT, label=f"best − margin = {100 * self.limit:.2f}")
        label = f"chosen: {chosen.name}\nα = {_alpha(chosen.alpha)}\nlr = {chosen.learning_rate:g}"
        dot = _dot((markers or {}).get(chosen.learning_rate, "o"), CHOSEN, label, markersize=7)
        figure.legend(handles=[*lines, *extra, limit, dot], loc="outside right upper")


def _scale_theta(axes: Axes, ends: Iterable[float], top: float) -> None:
    """Makes the x axis logarithmic, but for what is below the smallest of `ends`, which may be zero."""
    linear = min((end for end in ends if end > 0), default=top or 1.0)
    subs = (1.0, 2.0, 5.0) if top < 300 * linear else (1.0,)
    axes.set_xscale("symlog", linthresh=linear, linscale=0.7)
    axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear, subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(0, 1.05 * top or 1.0)


def _shades(number: int) -> list[str]:
    """Colours in a visible order, from dark to bright."""
    return [to_hex(colour) for colour in matplotlib.colormaps["viridis"](np.linspace(0.05, 0.92, number))]


def _dot(marker: str, colour: str, label: str, markersize: float = 5.0) -> Line2D:
    return Line2D([], [], linestyle="", marker=marker, color=colour, label=label, markersize=markersize)


def _free_share(result: TaskResult) -> float:
    units = result.units.values()
    return sum(each.free for each in units) / sum(each.total for each in units)


def _alpha(alpha: Sequence[float]) -> str:
    """An alpha for a legend, such as 1e-5."""
    values = alpha[:1] if len(set(alpha)) == 1 else alpha
    return ", ".join(np.format_float_scientific(value, 3, trim="-", exp_digits=1) if value else "0" for value in values)


def _ink_on(colour: ColorType) -> str:
    """Black or white, whichever is readable on a colour."""
    red, green, blue = to_rgb(colour)
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.58 else INK
