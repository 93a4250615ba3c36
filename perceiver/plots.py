"""Pictures of a training's course and results, drawn with matplotlib: loss curves, confusion matrices, and what others are made of.

Each picture is a `Figure` of its own, without pyplot: pyplot keeps all figures in one state of the process, which threads would share.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "0.6"
"""Colour of what stands in the background."""
_COLORS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")  # C7 is grey, too
NUM_COLORS = len(_COLORS)
_DPI = 100
_MAX_CELL_TEXTS = 30
"""Classes up to which the cells of a confusion matrix carry their counts."""


def color(number: int) -> str:
    """The colour of the n-th of several lines (from 0); those after the first `NUM_COLORS` are grey."""
    return _COLORS[number] if number < NUM_COLORS else GREY


def new_figure(width: int, height: int, title: str = "") -> Figure:
    """An empty figure of width x height pixels.

    Args:
        width: pixels.
        height: pixels.
        title: stands above all of the figure's axes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, layout="constrained")
    if title:
        figure.suptitle(plain(title), fontsize="medium")
    return figure


def plain(text: str) -> str:
    """A text that matplotlib shows as it is: between two dollar signs it would read a formula."""
    return text.replace("$", r"\$")


def frame(axes: Axes, title: str = "", x: str = "", y: str = "") -> None:
    """Gives axes a title, labels and a light grid."""
    axes.set_title(plain(title), fontsize="medium", loc="left")
    axes.set_xlabel(plain(x))
    axes.set_ylabel(plain(y))
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def log_scale(axes: Axes, *which: Literal["x", "y"]) -> None:
    """Makes axes logarithmic, with plain numbers at 1, 2 and 5 of each power of ten, or at the powers alone where there are many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for name in which:
        axes.set(**{f"{name}scale": "log"})
        axis = {"x": axes.xaxis, "y": axes.yaxis}[name]
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 2000 * low else (1,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axis.set_minor_formatter(NullFormatter())


def number(value: float) -> str:
    """A number short enough for an axis."""
    return f"{value:.3g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def pixels(figure: Figure) -> np.ndarray:
    """The figure as an image: uint8 (height, width, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def far_apart(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis shows more: all above 0, and the largest more than ten times the least."""
    finite = [value for value in values if math.isfinite(value)]
    return len(finite) > 0 and min(finite) > 0 and max(finite) > 10 * min(finite)


def step_axis(axes: Axes) -> None:
    """Makes the x axis one of steps: whole numbers, from 0 to what has been drawn."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel("optimizer step")
    axes.set_xlim(0, max(1, axes.dataLim.x1) * 1.03)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def training_curves(records: Sequence[Mapping[str, Any]], title: str, metric: str = "val_loss", best_step: int | None = None) -> Figure:
    """Training and validation loss over steps; beside them the metric that chooses the best checkpoint, where it is another one.

    Args:
        records: of a run, as `metrics.jsonl` has them: each with "step" and any of the metrics.
        title: of the picture.
        metric: by which the best checkpoint is chosen.
        best_step: of the best checkpoint, which is marked; None: there is none.
    """
    curves = [{"loss": "training", "val_loss": "validation"}]
    if metric not in curves[0]:
        curves.append({metric: "validation" if metric.startswith("val_") else "training"})
    figure = new_figure(720, 400 if len(curves) == 1 else 640, title)
    panels = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    for axes, lines in zip(panels, curves, strict=True):
        drawn = {kind: _finite([(r["step"], r[name]) for r in records if name in r]) for name, kind in lines.items()}
        for kind, points in drawn.items():
            if not points:
                continue
            validation = kind == "validation"
            # A few validations are points of their own; many training steps are a line.
            marker = "o" if validation and len(points) <= 100 or len(points) == 1 else None
            look = {"color": color(int(validation)), "linewidth": 1.8 if validation else 1.0, "marker": marker, "markersize": 4}
            axes.plot(*zip(*points, strict=True), label=kind, zorder=2 + validation, **look)
        if best_step is not None:
            axes.axvline(
                best_step, color="C3", linewidth=1, linestyle="--", label=f"best checkpoint: step {best_step:,}, by {plain(metric)}"
            )
            values = dict(drawn.get("validation") or drawn["training"])
            if best_step in values:
                axes.plot(best_step, values[best_step], "*", color="C3", markersize=13, zorder=5)
        name = "loss" if "loss" in lines else metric.removeprefix("val_").replace("_", " ")
        values_drawn = [y for points in drawn.values() for _, y in points]
        # Shares (accuracy, F1) are read as such: a logarithmic axis would hide what happens near 1.
        if far_apart(values_drawn) and ("loss" in lines or max(values_drawn) > 1):
            log_scale(axes, "y")
            name += " (log scale)"
        frame(axes, y=name)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small", frameon=False)
    step_axis(panels[-1])
    return figure


def compared_curves(curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], metric: str) -> Figure:
    """A metric of several runs, over each of several axes.

    Args:
        curves: by the label of an axis, and then the name of a run: points (spent, value).
        metric: what the values are.
    """
    rows = -(-len(curves) // 2)
    names = list(dict.fromkeys(name for lines in curves.values() for name in lines))
    figure = new_figure(1000, 360 * rows + 30 * -(-min(len(names), NUM_COLORS + 1) // 3))
    panels = figure.subplots(rows, min(2, len(curves)), squeeze=False).ravel()
    for axes, (label, lines) in zip(panels, curves.items(), strict=False):
        for place, name in enumerate(names):
            if points := _finite(lines.get(name, [])):
                marker = "o" if len(points) <= 40 else None
                axes.plot(*zip(*points, strict=True), color=color(place), marker=marker, markersize=3, linewidth=1.3)
        values = [y for points in lines.values() for _, y in points]
        frame(axes, x=label, y=metric)
        if far_apart(values) and max(values) > 1:
            log_scale(axes, "y")
    for axes in panels[len(curves) :]:
        axes.remove()
    shown = names[:NUM_COLORS]
    for place, name in enumerate(shown):
        panels[0].plot([], [], color=color(place), label=plain(name))
    if len(names) > len(shown):
        panels[0].plot([], [], color=GREY, label=f"{len(names) - len(shown)} others")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    return figure


def range_curve(rates: np.ndarray, losses: np.ndarray, smoothed: np.ndarray, lowest: float, suggestion: float | None, title: str) -> Figure:
    """Losses of a learning-rate range test over the rate, with the rate that is suggested.

    Args:
        rates: of each step, (steps,).
        losses: of each step, (steps,).
        smoothed: the same without noise, (steps,).
        lowest: the rate at which the smoothed loss is lowest.
        suggestion: a rate; None: there is none.
        title: of the picture.
    """
    figure = new_figure(720, 400, title)
    axes = figure.subplots()
    axes.plot(rates, losses, color=GREY, linewidth=1, label="loss of a step")
    axes.plot(rates, smoothed, color=color(0), linewidth=1.8, label="smoothed")
    axes.axvline(lowest, color=GREY, linewidth=1, linestyle=":", label=f"lowest: {lowest:.2e}")
    if suggestion is not None:
        axes.axvline(suggestion, color="C3", linewidth=1, linestyle="--", label=f"to begin with: {suggestion:.2e}")
    frame(axes, x="learning rate (log scale)", y="loss")
    log_scale(axes, "x")
    # A loss that runs away would flatten all that comes before.
    low, first = float(np.min(smoothed)), float(smoothed[0])
    span = max(first - low, 0.05 * abs(first))
    axes.set_ylim(low - 0.3 * span, first + 1.5 * span)
    axes.legend(fontsize="small", frameon=False)
    return figure


def confusion_matrix(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """A confusion matrix: rows are true classes, columns predicted ones; the colour is a cell's share of its row, the text its count.

    Args:
        counts: (classes, classes), counts[i, j] examples of class i predicted as j.
        names: of the classes.
    """
    from matplotlib.colors import PowerNorm

    num = len(names)
    labels = [plain(name if len(name) <= 24 else f"{name[:23]}…") for name in names]
    longest = max(map(len, labels))
    text_width = max((len(f"{int(count)}") for count in counts.flat), default=1)
    few = num <= _MAX_CELL_TEXTS
    cell = max(32, 14 + 8 * text_width, 180 // num) if few else 14
    figure = new_figure(num * cell + 160 + 7 * longest, num * cell + 90 + 7 * longest)
    figure.set_layout_engine("compressed")  # what is made for axes of a fixed shape: the other cuts the labels on the left
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    # Of many classes the few that are taken for another one should be seen without their counts.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(1 if few else 0.4, 0, 1))
    axes.set_xticks(range(num), labels, rotation=90 if longest * 8 > cell else 0)
    axes.set_yticks(range(num), labels)
    if not few:
        axes.tick_params(labelsize="x-small")
    else:
        for i, j in np.ndindex(num, num):
            if counts[i, j]:
                shade = "white" if shares[i, j] > 0.5 else "black"
                axes.text(j, i, f"{int(counts[i, j])}", ha="center", va="center", color=shade, fontsize="small")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(f"accuracy {np.trace(counts) / max(counts.sum(), 1):.1%} of {int(counts.sum()):,}", fontsize="medium")
    figure.colorbar(image, ax=axes, label="share of the true class", format=lambda share, _: f"{share:.0%}", fraction=0.046)
    return figure


def captioned(images: Sequence[np.ndarray], captions: Sequence[str], title: str) -> Figure:
    """Small pictures in rows, each with a caption of one line.

    Args:
        images: uint8 (height, width, 1 or 3).
        captions: one for each.
        title: of the whole.
    """
    columns = max(1, min(6, len(images)))
    rows = max(1, -(-len(images) // columns))
    width = max(130, 30 + 6 * max(map(len, captions), default=0))
    figure = new_figure(max(420, width * columns), 140 * rows + 40, title)
    for axes in (grid := figure.subplots(rows, columns, squeeze=False)).flat:
        axes.axis("off")
    for axes, image, caption in zip(grid.flat, images, captions, strict=False):
        grey = image.shape[-1] == 1
        axes.imshow(image[..., 0] if grey else image, cmap="gray" if grey else None, vmin=0, vmax=255)
        axes.set_title(plain(caption), fontsize="small")
    return figure


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [point for point in points if math.isfinite(point[1])]


def forecasts(*, past: np.ndarray, future: np.ndarray, center: np.ndarray, spread: np.ndarray, naive: np.ndarray) -> Figure:
    """Windows of a series with what came and what was said, one below the other.

    Args:
        past: what was known, (windows, steps); drawn are at most its last steps, three times as many as come.
        future: what came, (windows, steps to come).
        center: the means that were said.
        spread: the standard deviations that were said; the band of 80% is drawn.
        naive: what the baseline said.
    """
    figure = new_figure(720, 220 * len(past) + 30)
    past = past[:, -3 * future.shape[1] :]
    before, after = np.arange(-past.shape[1], 0), np.arange(future.shape[1])
    rows = figure.subplots(len(past), 1, squeeze=False)[:, 0]
    for row, axes in enumerate(rows):
        axes.plot(before, past[row], color=GREY, linewidth=1)
        axes.plot(after, future[row], color="black", linewidth=1.2, label="truth")
        axes.plot(after, naive[row], color=color(1), linewidth=1, linestyle=":", label="last season")
        axes.plot(after, center[row], color=color(0), label="forecast")
        band = 1.2816 * spread[row]
        axes.fill_between(after, center[row] - band, center[row] + band, color=color(0), alpha=0.2, linewidth=0, label="80%")
        frame(axes, x="steps from now" if row == len(past) - 1 else "")
    figure.legend(*rows[0].get_legend_handles_labels(), loc="outside upper left", fontsize="small", ncols=4, frameon=False)
    return figure
