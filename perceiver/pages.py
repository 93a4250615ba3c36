"""Pages to look at: one HTML file with charts by plotly, tables that sort, pictures and texts; it loads nothing from anywhere.

Charts are plain data as plotly.js reads them, so that to make a page takes no more of plotly than its script.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf")
GREY = "#999999"
_STYLE = """
body { font-family: system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; line-height: 1.45 }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd; padding-bottom: .2em } h3 { font-size: 1em }
table { border-collapse: collapse; font-size: .87em; margin: .8em 0 } .wide { overflow-x: auto }
th, td { padding: .25em .7em; text-align: left; border-bottom: 1px solid #eee; vertical-align: top; white-space: nowrap }
th { cursor: pointer; background: #f5f5f5; user-select: none } th.up::after { content: " \\25b2" } th.down::after { content: " \\25bc" }
td.number { text-align: right; font-variant-numeric: tabular-nums } pre { white-space: pre-wrap; font-size: .85em; margin: .2em 0 }
.strip { display: flex; gap: 1em; overflow-x: auto; padding-bottom: .5em } .strip figure { margin: 0; flex: 0 0 auto; max-width: 420px }
.strip img { max-width: 420px; image-rendering: auto; border: 1px solid #ddd } figcaption { font-size: .8em; color: #666 }
.strip figure:only-child, .strip figure:only-child img { max-width: 100% }
.sheet { display: flex; flex-wrap: wrap; gap: .7em } .sheet figure { margin: 0; width: 116px }
.sheet figcaption { overflow-wrap: anywhere } .sheet img { border: 1px solid #ddd; max-width: 112px }
.controls { font-size: .9em; margin: .5em 0; display: flex; gap: 2em } .chart { min-height: 120px }
"""
_SCRIPT = """
const charts = JSON.parse(document.getElementById("charts").textContent), config = {responsive: true, displaylogo: false};
function smoothed(values, weight) {
  let mean = 0, sum = 0;
  return values.map(value => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value; sum = weight * sum + (1 - weight); return mean / sum;
  });
}
function traces(chart, weight, axis) {
  return chart.data.map(trace => {
    const {over, smooth, ...shown} = trace;
    if (over) shown.x = over[axis] || [];
    if (smooth && weight > 0) shown.y = smoothed(trace.y, weight);
    return shown;
  });
}
function draw() {
  const weight = Number((document.getElementById("smoothing") || {value: 0}).value);
  const axis = (document.getElementById("axis") || {value: "optimizer step"}).value;
  charts.forEach((chart, number) => {
    const layout = {...chart.layout, margin: chart.layout.margin || {l: 60, r: 20, t: 40, b: 50}};
    if (chart.data.some(trace => trace.over)) layout.xaxis = {...layout.xaxis, title: {text: axis}};
    Plotly.react("chart-" + number, traces(chart, weight, axis), layout, config);
  });
}
for (const control of document.querySelectorAll(".controls input, .controls select")) control.addEventListener("input", draw);
for (const head of document.querySelectorAll("table.sorts th")) head.addEventListener("click", () => {
  const table = head.closest("table"), place = [...head.parentNode.children].indexOf(head), up = !head.classList.contains("up");
  for (const other of table.querySelectorAll("th")) other.className = "";
  head.className = up ? "up" : "down";
  const key = row => row.children[place].dataset.value ?? row.children[place].textContent;
  const rows = [...table.tBodies[0].rows].sort((one, other) => {
    const [a, b] = [key(one), key(other)];
    if (a === "" || b === "") return a === b ? 0 : a === "" ? 1 : -1;
    const order = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
    return up ? order : -order;
  });
  table.tBodies[0].append(...rows);
});
draw();
// The newest of what stands side by side over time is what is looked for first.
window.addEventListener("load", () => { for (const strip of document.querySelectorAll(".strip")) strip.scrollLeft = strip.scrollWidth; });
"""


def color(number: int) -> str:
    """The colour of the n-th of several lines (from 0); those after the first ones are grey."""
    return COLORS[number] if number < len(COLORS) else GREY


class Page:
    """A page that is put together from its top to its end.

    Args:
        title: its heading.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.charts: list[dict[str, Any]] = []
        self._parts: list[str] = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str, level: int = 2) -> None:
        self._parts.append(f"<h{level}>{html.escape(text)}</h{level}>")

    def paragraph(self, text: str) -> None:
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def text(self, text: str) -> None:
        """A text as it stands, line by line."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def controls(self, axes: Sequence[str]) -> None:
        """What changes all curves of the page: smoothing, and what they are drawn over."""
        options = "".join(f"<option>{html.escape(axis)}</option>" for axis in axes)
        self._parts.append(
            '<div class="controls"><label>smoothing <input id="smoothing" type="range" min="0" max="0.98" step="0.02" value="0"></label>'
            f'<label>over <select id="axis">{options}</select></label></div>'
        )

    def chart(self, data: Sequence[Mapping[str, Any]], title: str = "", height: int = 380, **layout: Any) -> None:
        """A chart of plotly.

        Args:
            data: its traces. Besides plotly's own keys a trace may have "over", its x by the names of `controls`, and "smooth".
            title: above it.
            height: pixels.
            layout: more of plotly's layout.
        """
        self._parts.append(f'<div class="chart" id="chart-{len(self.charts)}"></div>')
        self.charts.append(
            {"data": list(data), "layout": {"title": {"text": html.escape(title), "x": 0, "xanchor": "left"}, "height": height, **layout}}
        )

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table that sorts by the column whose head is clicked."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
        self._parts.append(f'<div class="wide"><table class="sorts"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')

    def strip(self, items: Sequence[tuple[str, str | bytes]]) -> None:
        """Texts and PNG pictures side by side, each with a line below it."""
        figures = []
        for caption, content in items:
            if isinstance(content, bytes):
                shown = f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
            else:
                shown = f"<pre>{html.escape(content)}</pre>"
            figures.append(f"<figure>{shown}<figcaption>{html.escape(caption)}</figcaption></figure>")
        self._parts.append(f'<div class="strip">{"".join(figures)}</div>')

    def sounds(self, items: Sequence[tuple[str, bytes]]) -> None:
        """WAV files as players side by side, each with a line below it."""
        players = "".join(
            f'<figure><audio controls preload="metadata" src="data:audio/wav;base64,{base64.b64encode(content).decode()}"></audio>'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            for caption, content in items
        )
        self._parts.append(f'<div class="strip">{players}</div>')

    def sheet(self, items: Sequence[tuple[str, bytes]]) -> None:
        """Small PNG pictures in rows, each with a line below it."""
        figures = "".join(
            f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            for caption, content in items
        )
        self._parts.append(f'<div class="sheet">{figures}</div>')

    def render(self) -> str:
        """The whole file."""
        # Here and not above: to put a page together takes nothing of it.
        from plotly.offline import get_plotlyjs

        # A text in a script ends at the first "</", wherever that stands.
        charts = json.dumps(_plain(self.charts), allow_nan=False).replace("</", "<\\/")
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
            f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>{"".join(self._parts)}'
            f'<script type="application/json" id="charts">{charts}</script><script>{get_plotlyjs()}</script>'
            f"<script>{_SCRIPT}</script></body></html>\n"
        )


def heatmap(counts: Sequence[Sequence[float]], names: Sequence[str]) -> dict[str, Any]:
    """A trace of a confusion matrix: rows are true classes; the colour is a cell's share of its row, the text its count."""
    shares = [[count / max(sum(row), 1) for count in row] for row in counts]
    return {
        "type": "heatmap",
        "z": shares,
        "x": list(names),
        "y": list(names),
        "text": [[f"{count:g}" if count else "" for count in row] for row in counts],
        "texttemplate": "%{text}" if len(names) <= 30 else "",
        "hovertemplate": "true %{y}, predicted %{x}: %{text} (%{z:.1%})<extra></extra>",
        "colorscale": [[0, "#f7fbff"], [0.5, "#6baed6"], [1, "#08306b"]],
        "zmin": 0,
        "zmax": 1,
    }


def parallel_coordinates(columns: Mapping[str, Sequence[Any]], values: Sequence[float], metric: str, lower: bool) -> dict[str, Any]:
    """A trace with a line per trial over its fields and its result.

    Args:
        columns: the value of each trial, by field; logarithmic where all are above 0 and far apart, by name where they are no numbers.
        values: what the trials reached.
        metric: what that is.
        lower: whether lower ones are better.
    """
    dimensions = [_dimension(name, column) for name, column in columns.items()] + [_dimension(metric, values)]
    return {
        "type": "parcoords",
        "dimensions": dimensions,
        "line": {"color": list(values), "colorscale": "Viridis", "reversescale": lower, "showscale": True},
    }


def are_numbers(column: Sequence[Any]) -> bool:
    """Whether all values can stand on an axis of numbers."""
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in column)


def far_apart(column: Sequence[Any]) -> bool:
    """Whether a logarithmic axis shows more: numbers above 0, the largest more than twenty times the least."""
    return are_numbers(column) and min(column) > 0 and max(column) > 20 * min(column)


def _dimension(name: str, column: Sequence[Any]) -> dict[str, Any]:
    if are_numbers(column):
        low, high = min(column), max(column)
        if far_apart(column):
            marks = sorted(set(column)) if len(set(column)) <= 8 else [low, math.sqrt(low * high), high]
            return {
                "label": name, "values": [math.log10(v) for v in column], "tickvals": [math.log10(v) for v in marks],
                "ticktext": [f"{v:.3g}" for v in marks],
            }  # fmt: skip
        return {"label": name, "values": list(column)}
    names = sorted({str(value) for value in column})
    places = list(range(len(names)))
    return {"label": name, "values": [names.index(str(value)) for value in column], "tickvals": places, "ticktext": names}


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"<td>{html.escape('' if value is None else str(value))}</td>"
    if math.isnan(value):
        return "<td></td>"
    shown = f"{value:,}" if isinstance(value, int) else f"{value:,.5g}"
    return f'<td class="number" data-value="{value!r}">{shown}</td>'


def _plain(content: Any) -> Any:
    """Plain data with None in place of what is no finite number."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_plain(value) for value in content]
    return content
