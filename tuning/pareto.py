"""The trials of a sweep that no other one beats in the metric and in what it costs, both (--against)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from perceiver.pages import far_apart
from perceiver.plots import GREY, color, frame, log_scale
from tuning.trials import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {"parameters": "parameters", "flops": "FLOPs of a whole training", "memory": "GiB of a worker's device", "seconds": "seconds"}


def cost(trial: Trial, against: str) -> float | None:
    """What a trial costs; None: not known."""
    return trial["seconds"] if against == "seconds" else trial["costs"].get(against)


def front(trials: Sequence[Trial], settings: Mapping[str, Any]) -> list[Trial]:
    """The finished trials that no other finished one beats: none is better in the metric at no more cost, or as good at less. By cost.

    Trials that were stopped do not take part: they have seen less, and would have come further.
    """
    sign = -1 if settings["mode"] == "max" else 1
    able = [t for t in trials if t["status"] == "finished" and t["value"] is not None and cost(t, settings["against"]) is not None]
    found: list[Trial] = []
    for trial in sorted(able, key=lambda t: (cost(t, settings["against"]), sign * t["value"])):
        if not found or sign * trial["value"] < sign * found[-1]["value"]:
            found.append(trial)
    return found


def draw_front(axes: Axes, trials: Sequence[Trial], settings: Mapping[str, Any]) -> None:
    """The metric over the cost, a point for each trial, and the front as a line."""
    against, metric = settings["against"], settings["metric"]
    known = [(cost(t, against), t["value"], t["status"]) for t in trials if t["value"] is not None and cost(t, against) is not None]
    for status, look in (("finished", {"color": color(0)}), ("", {"color": GREY, "marker": "x"})):
        points = [(x, y) for x, y, s in known if (s == "finished") == (status == "finished")]
        if points:
            axes.scatter(*zip(*points, strict=True), label=status or "stopped before their end", zorder=3, **look)
    best = front(trials, settings)
    if best:
        axes.plot(
            [cost(t, against) for t in best], [t["value"] for t in best], color="C3", linewidth=1.2, drawstyle="steps-post", label="front",
            marker="o", markersize=10, markerfacecolor="none",
        )  # fmt: skip
    frame(axes, f"{metric} against {LABELS[against]}", x=LABELS[against], y=metric)
    if far_apart([x for x, *_ in known]):
        log_scale(axes, "x")
    if known:
        axes.legend(fontsize="small", frameon=False)


def front_charts(trials: Sequence[Trial], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same for a page, as plotly's traces."""
    against = settings["against"]
    known = [t for t in trials if t["value"] is not None and cost(t, against) is not None]
    best = front(trials, settings)
    points = {
        "type": "scatter", "mode": "markers", "name": "trials", "x": [cost(t, against) for t in known], "y": [t["value"] for t in known],
        "text": [f"{t['trial']} ({t['status']})" for t in known],
        "marker": {"size": 9, "symbol": ["circle" if t["status"] == "finished" else "x" for t in known]},
    }  # fmt: skip
    line = {
        "type": "scatter", "mode": "lines+markers", "name": "front", "x": [cost(t, against) for t in best], "y": [t["value"] for t in best],
        "line": {"shape": "hv"}, "marker": {"size": 15, "symbol": "circle-open", "line": {"width": 2}},
    }  # fmt: skip
    return [points, line]


def front_lines(trials: Sequence[Trial], settings: Mapping[str, Any]) -> list[str]:
    """Lines for a person."""
    against, best = settings["against"], front(trials, settings)
    if not best:
        return [f"no finished trial to set {settings['metric']} against {against}"]
    shown = "; ".join(f"{t['trial']} {t['value']:.4f} at {cost(t, against):.4g}" for t in best)
    return [f"not beaten in {settings['metric']} against {LABELS[against]}: {shown}"]
