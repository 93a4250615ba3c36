"""The HTML page of a scaling-law study: isoFLOP curves, best sizes and tokens over budgets, and what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from perceiver.pages import Page, color
from tuning.power_law import PowerLaw, Study


def page_of_study(study: Study, title: str, lines: Sequence[str]) -> Page:
    """The page.

    Args:
        study: measurements, parabolas and power laws.
        title: of the page.
        lines: the results in words (`tuning.scaling_laws.describe`).
    """
    page = Page(title)
    page.text("\n".join(lines))
    page.heading("Loss over size, at equal FLOPs")
    log = {"type": "log", "title": {"text": "parameters"}}
    page.chart(_isoflops(study), title="validation loss, a parabola for each budget; stars are minima inside it", height=480, xaxis=log)
    page.heading("Best size and tokens over the budget")
    for name, law, minima in (
        ("parameters", study.parameters, [p.parameters for p in study.parabolas]),
        ("tokens", study.tokens, [p.tokens for p in study.parabolas]),
    ):
        budgets = [p.budget for p in study.parabolas]
        page.chart(
            _law(law, budgets, minima), title=f"best {name} = {law.factor:.3g} x FLOPs^{law.exponent:.3f}", height=420,
            xaxis={"type": "log", "title": {"text": "training FLOPs"}, "exponentformat": "power"},
            yaxis={"type": "log", "title": {"text": name}, "exponentformat": "power"},
        )  # fmt: skip
    page.heading("Measured")
    measured = sorted(study.measurements, key=lambda m: (m.budget, m.parameters))
    page.table(["FLOPs", "parameters", "tokens", "validation loss"], [[m.budget, m.parameters, round(m.tokens), m.loss] for m in measured])
    return page


def _isoflops(study: Study) -> list[dict[str, Any]]:
    traces: list[dict[str, Any]] = []
    for number, parabola in enumerate(study.parabolas):
        own = sorted((m.parameters, m.loss) for m in study.measurements if m.budget == parabola.budget)
        x = np.linspace(np.log10(own[0][0]), np.log10(own[-1][0]), 60)
        look, name = color(number), f"{parabola.budget:.3g} FLOPs"
        sizes, losses = map(list, zip(*own, strict=True))
        traces.append({"type": "scatter", "mode": "markers", "name": name, "x": sizes, "y": losses, "marker": {"color": look, "size": 8}})
        traces.append({
            "type": "scatter", "mode": "lines", "name": name, "showlegend": False, "x": (10**x).tolist(),
            "y": np.polyval(parabola.coefficients, x).tolist(), "line": {"color": look},
        })  # fmt: skip
        if parabola.inside:
            traces.append({
                "type": "scatter", "mode": "markers", "name": f"minimum at {name}", "showlegend": False, "x": [parabola.parameters],
                "y": [parabola.loss], "marker": {"color": look, "size": 14, "symbol": "star"},
            })  # fmt: skip
    return traces


def _law(law: PowerLaw, budgets: Sequence[float], minima: Sequence[float]) -> list[dict[str, Any]]:
    grid = np.geomspace(min(budgets) / 2, max(budgets) * 4, 40)
    middle, low, high = np.array([law.predict(budget) for budget in grid]).T.tolist()
    x = grid.tolist()
    return [
        {"type": "scatter", "mode": "lines", "x": x, "y": low, "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"},
        {
            "type": "scatter", "mode": "lines", "x": x, "y": high, "line": {"width": 0}, "fill": "tonexty",
            "fillcolor": "rgba(128,128,128,0.25)", "name": f"{law.level:.0%} interval",
        },
        {"type": "scatter", "mode": "lines", "x": x, "y": middle, "line": {"color": color(0)}, "name": "power law"},
        {"type": "scatter", "mode": "markers", "x": list(budgets), "y": list(minima), "marker": {"color": color(0), "size": 9},
         "name": "minima of the budgets"},
    ]  # fmt: skip
