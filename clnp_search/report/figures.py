"""Figures of a run, from its records. Pure functions to matplotlib figures; only `draw_run` touches the run folder.

One style for all: colours that colour-blind readers can tell apart and that survive greyscale, accuracies in percent.
Matplotlib's object interface only, so that no backend or global state of the caller is touched.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.typing import ColorType
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, SymmetricalLogLocator

from clnp_search.config import sweep_of
from clnp_search.records import CurveStep, Point, PointRecord, ScanRecord, Selection, Summary, TaskResult
from clnp_search.storage import RunFolder

P = ParamSpec("P")

INK, MUTED, PALE, FREE = "#222222", "#767676", "#ececec", "#e4e4e4"
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.6g}")
CHOSEN = "#d55e00"  # Okabe and Ito's vermillion; nothing else is of that colour
COLOURS = matplotlib.colormaps["viridis"]
MARKERS = "osD^vP*X"
ABOVE = {"textcoords": "offset points", "ha": "center", "va": "bottom"}
LEFT_OF = {"textcoords": "offset points", "ha": "right", "va": "bottom"}
DPI = 160
STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "legend.title_fontsize": 8.0,
    "lines.linewidth": 1.3,
    "lines.markersize": 5.0,
    "figure.labelsize": 9.0,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.08,
    "savefig.facecolor": "white",
}


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


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
        records = [record for point in plan.points if (record := folder.read_point(task, point.name)) is not None]
        fingerprint = f"{rule}-{selection.min_correct}"
        scans = [scan for each in selection.candidates if (scan := folder.read_scan(task, each, fingerprint)) is not None]
        title = f"Task {task}: {result.name}"
        folder.write_figure("thresholds.png", to_png(threshold_curves(title, records, scans, selection)), task)
        folder.write_figure("sparsity.png", to_png(accuracy_against_sparsity(title, records, scans, selection)), task)


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)  # type: ignore[no-untyped-call]
    return stream.getvalue()


@_styled
def accuracy_matrix(tasks: Sequence[TaskResult]) -> Figure:
    """Test accuracy of every task (columns) after every task (rows), in percent."""
    number = len(tasks)
    values = np.full((number, number), np.nan)
    for row, result in enumerate(tasks):
        values[row, : row + 1] = result.test_accuracies
    side = max(1.4, 0.4 * number)
    figure = Figure(figsize=(side + 1.6, side + 0.9), dpi=DPI)
    axes = figure.add_subplot()
    # Never a narrower range than ten points: tenths of a percent shall not look like a cliff.
    norm = Normalize(min(0.9, math.floor(np.nanmin(values) * 20) / 20), 1.0)
    image = axes.imshow(values, "Blues", norm)
    for row, column in zip(*np.tril_indices(number), strict=True):
        value = values[row, column]
        ink = _ink_on(image.cmap(norm(value)))
        axes.text(column, row, f"{100 * value:.1f}", ha="center", va="center", size=7.5, color=ink)
    axes.set(title="Test accuracy (%)", xlabel="evaluated on task", ylabel="after training task")
    axes.set_xticks(range(number))
    axes.set_yticks(range(number))
    # White lines between the cells.
    axes.set_xticks(np.arange(number + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(number + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, format=PERCENT, shrink=0.7, aspect=18, ticks=MaxNLocator(5))
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    return figure


@_styled
def units_grown(tasks: Sequence[TaskResult]) -> Figure:
    """Which share of each layer's units every task has grown, and what is still free (paper, figure 3b)."""
    last = tasks[-1].units
    figure = Figure(figsize=(6.8, 1.0 + 0.55 * len(last)), dpi=DPI)
    axes = figure.add_subplot()
    colours = [COLOURS(0.05 + 0.9 * index / max(1, len(tasks) - 1)) for index in range(len(tasks))]
    for row, (layer, units) in enumerate(last.items()):
        left = 0.0
        parts = [(result.units[layer].new, colour) for result, colour in zip(tasks, colours, strict=True)]
        for number, colour in (*parts, (units.free, FREE)):
            width = number / units.total
            axes.barh(row, width, 0.66, left, color=colour, edgecolor="white", linewidth=0.5)
            if width > 0.011 * len(str(number)) + 0.006:
                place = {"ha": "center", "va": "center", "size": 7.5, "color": _ink_on(colour)}
                axes.text(left + width / 2, row, str(number), **place)
            left += width
    axes.set_yticks(range(len(last)), [f"{layer}\n{units.total:,} units" for layer, units in last.items()])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(PERCENT)
    axes.set(title="Units grown by each task", xlabel="share of the layer's units (%)", xlim=(0, 1))
    patches = [Patch(color=colour, label=str(result.index)) for result, colour in zip(tasks, colours, strict=True)]
    figure.legend(
        handles=[*patches, Patch(color=FREE, label="free")], title="task", loc="outside right center",
        ncols=1 + len(tasks) // 8, handlelength=1.0, handleheight=1.0, columnspacing=1.0,
    )
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
    task = _Task(records, scans, selection)
    figure = Figure(figsize=(7.2, 4.6), dpi=DPI)
    whole, close = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    ends = []
    for scan in scans:
        chosen, colour = scan.point == selection.chosen, task.colour(scan.point)
        thetas, accuracies = [step.theta[0] for step in scan.curve], [step.val_accuracy for step in scan.curve]
        for axes in (whole, close):
            axes.plot(thetas, accuracies, color=colour, linewidth=2 if chosen else 1, zorder=4 if chosen else 3)
        end = max((pair for pair in zip(thetas, accuracies, strict=True) if pair[1] > task.limit - 1e-9), default=None)
        if end is not None:
            ends.append(end[0])
            close.plot(*end, "o", color="white", markeredgecolor=colour, zorder=4)
        if chosen and scan.theta is not None:
            for theta in sorted(set(scan.theta)):
                ends.append(theta)
                close.plot(theta, scan.val_accuracy, "o", color=CHOSEN, markersize=7, zorder=5)
                if len(set(scan.theta)) > 1:
                    names = "\n".join(name for name, each in zip(layers, scan.theta, strict=True) if each == theta)
                    close.annotate(names, (theta, scan.val_accuracy), (0, 7), **ABOVE, color=CHOSEN, size=7.5)
    top = max([*ends, *(step.theta[0] for scan in scans for step in scan.curve if step.val_accuracy > task.limit / 2)])
    linear = min((end for end in ends if end > 0), default=top or 1.0)
    subs = (1.0, 2.0, 5.0) if top < 300 * linear else (1.0,)
    close.set_xscale("symlog", linthresh=linear, linscale=0.7)
    close.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear, subs=subs))
    close.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    close.xaxis.set_minor_locator(NullLocator())
    close.set_xlim(0, 1.4 * top or 1.0)
    for axes in (whole, close):
        task.draw_margin(axes, labelled=axes is close)
    close.set_ylim(task.window)
    whole.set(title=title, ylim=(0, 1.02))
    close.set_xlabel("threshold θ (mean activation of a unit)")
    figure.supylabel("validation accuracy (%)")
    lines = [Line2D([], [], color=colour, label=_alpha(alpha)) for alpha, colour in task.colours.items()]
    chosen_line = Line2D([], [], color=CHOSEN, linewidth=2, marker="o", markersize=7, label=f"chosen: {task.chosen.name}")
    figure.legend(handles=[*lines, chosen_line], title="α", loc="outside right upper", alignment="left")
    return figure


@_styled
def accuracy_against_sparsity(
    title: str, records: Sequence[PointRecord], scans: Sequence[ScanRecord], selection: Selection
) -> Figure:
    """Accuracy and sparsity of every point, pruned as far as the margin allows, on its way from theta = 0.

    Points that were outside the margin before pruning have no known sparsity: they are ticks at the left edge.
    """
    task = _Task(records, scans, selection)
    rates = sorted({record.point.learning_rate for record in records})
    markers = {rate: MARKERS[index % len(MARKERS)] for index, rate in enumerate(rates)}
    figure = Figure(figsize=(7.2, 3.8), dpi=DPI)
    axes = figure.add_subplot()
    for scan in scans:
        chosen, colour = scan.point == selection.chosen, task.colour(scan.point)
        sparsities = [1 - sum(step.active) / sum(scan.totals) for step in scan.curve]
        axes.plot(sparsities, [step.val_accuracy for step in scan.curve], color=colour, linewidth=0.8, alpha=0.7)
        if scan.theta is not None:
            marker = markers[task.points[scan.point].learning_rate]
            size = 9 if chosen else 5.5
            axes.plot(scan.unit_sparsity, scan.val_accuracy, marker, color=colour, markersize=size, zorder=4, clip_on=False)
    scanned = {scan.point for scan in scans}
    for record in records:
        if record.status == "done" and record.point.index not in scanned:
            edge = axes.get_yaxis_transform()
            axes.plot(0.0, record.val_accuracy, "_", transform=edge, color=task.colour(record.point.index), markersize=12)
    task.draw_margin(axes, labelled=True)
    axes.xaxis.set_major_formatter(PERCENT)
    axes.set(title=title, ylim=task.window, xlim=(0, None))
    axes.set(xlabel="unit sparsity: free units of all hidden units (%)", ylabel="validation accuracy (%)")
    lines = [Line2D([], [], color=colour, linewidth=2, label=_alpha(alpha)) for alpha, colour in task.colours.items()]
    dots = [Line2D([], [], color=MUTED, linestyle="", marker=markers[rate], label=f"{rate:g}") for rate in rates]
    chosen_dot = Line2D([], [], color=CHOSEN, linestyle="", marker="o", markersize=8, label=f"chosen: {task.chosen.name}")
    heading = [Line2D([], [], linestyle="", label=text) for text in ("α", "learning rate")]
    figure.legend(handles=[heading[0], *lines, heading[1], *dots, chosen_dot], loc="outside right upper")
    return figure


class _Task:
    """What both figures of a task share: colours by alpha, and the margin."""

    def __init__(self, records: Sequence[PointRecord], scans: Sequence[ScanRecord], selection: Selection) -> None:
        self.points = {record.point.index: record.point for record in records}
        self.chosen = self.points[selection.chosen]
        alphas = sorted({point.alpha for point in self.points.values()}, key=lambda alpha: (sum(alpha), alpha))
        shades = np.linspace(0.05, 0.9, len(alphas))
        self.colours = {alpha: COLOURS(shade) for alpha, shade in zip(alphas, shades, strict=True)}
        total = scans[0].val_total
        self.best, self.limit = selection.best_val_accuracy, selection.min_correct / total
        span = max(self.best - self.limit, 4 / total)
        self.window = self.limit - 4 * span, self.best + span

    def colour(self, point: int) -> ColorType:
        """A point's colour: the chosen one's own, or its alpha's."""
        return CHOSEN if point == self.chosen.index else self.colours[self.points[point].alpha]

    def draw_margin(self, axes: Axes, labelled: bool) -> None:
        """Draws the lowest accuracy that is inside the margin."""
        axes.axhline(self.limit, color=INK, linewidth=0.9, linestyle=(0, (5, 3)), zorder=2)
        if labelled:
            text = f"best − margin = {100 * self.limit:.2f}"
            axes.annotate(text, (1, self.limit), (-2, 3), xycoords=axes.get_yaxis_transform(), **LEFT_OF, size=7.5)
        axes.yaxis.set_major_formatter(PERCENT)
        axes.grid(axis="y")


def _alpha(alpha: Sequence[float]) -> str:
    """An alpha as short as it can be read."""
    return ", ".join(f"{value:g}" for value in (alpha[:1] if len(set(alpha)) == 1 else alpha))


def _ink_on(colour: ColorType) -> str:
    """Black or white, whichever is readable on a colour."""
    red, green, blue = to_rgb(colour)
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.58 else INK
