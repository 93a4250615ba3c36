"""The HTML report of runs: curves, results, classes, samples, throughput, events, configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perceiver.comparison import AXES, LABELS, ComparedRun, different_fields
from perceiver.disk import read_json
from perceiver.evaluations import Evaluation
from perceiver.pages import Page, color, heatmap
from ray_jobs.compare import compare
from ray_jobs.runs import in_lineage

_SHOWN = 12
"""Steps of which samples are shown, at most: the first, the last, and others evenly between."""
_EVENTS = 200
"""Lines of a run's log that are shown, at most."""
_MOST_CLASSES = 200
_SAMPLE_BYTES = 5 * 2**20
"""Of a sample that is put into the page, at most."""
_RATES = {
    "throughput": "examples or tokens per second",
    "goodput": "share of the time in steps",
    "data_wait": "share of the time waiting for data",
}


def page_of_runs(runs: Sequence[ComparedRun], metric: str, title: str) -> Page:
    """The report of one run or of several beside each other."""
    page = Page(title)
    result = compare(runs, metric)
    _results(page, runs, result)
    if any(run.run.parent() for run in runs):
        page.heading("Lineage")
        rows = in_lineage([{"name": run.name, "parent": None if (p := run.run.parent()) is None else str(p)} for run in runs])
        page.text("\n".join(f"{row['branch']}{row['name']}" + (f"   from {row['parent']}" if row["parent"] else "") for row in rows))
    page.heading("Curves")
    page.controls([LABELS[axis] for axis in AXES])
    names = dict.fromkeys(name for run in runs for record in run.records for name in record if name == "loss" or name.startswith("val_"))
    for name in [metric, *(name for name in names if name != metric)]:
        if lines := _lines(runs, name):
            page.chart(lines, title=name, hovermode="x unified")
    for run in runs:
        _classes(page, run)
    for run in runs:
        _samples(page, run)
    page.heading("Speed")
    for name, meaning in _RATES.items():
        if lines := _lines(runs, name):
            page.chart(lines, title=f"{name}: {meaning}", height=300)
    _events(page, runs)
    _configuration(page, runs)
    return page


def _results(page: Page, runs: Sequence[ComparedRun], result: Mapping[str, Any]) -> None:
    direction = "higher" if result["higher_is_better"] else "lower"
    page.paragraph(f"{result['metric']}: {direction} is better. Examples, FLOPs and hours are those until the best value.")
    keys = ("best", "at_step", "last", "last_step", "examples", "flops", "hours", "device_hours_in_all")
    header = ["run", "status", "best", "at step", "last", "last step", "examples", "FLOPs", "hours", "device-hours in all", "began from"]
    page.table(
        header,
        [
            [each["run"], run.run.status(), *(each[key] for key in keys), _start(run)]
            for run, each in zip(runs, result["runs"], strict=True)
        ],
    )
    paired = [run for run in result["paired"]["runs"] if run["difference"] is not None]
    if paired:
        page.heading(f"{result['paired']['metric']} against {result['paired']['with']} on the same examples", 3)
        page.table(
            ["run", "difference", "95% from", "to", "p", "examples"],
            [[run["run"], run["difference"], run["low"], run["high"], run["p"], run["note"]] for run in paired],
        )
    if result["groups"]:
        page.heading("Over seeds", 3)
        page.table(
            ["group", "runs", "mean", "deviation", "95% margin", "difference", "p"],
            [
                [g["group"], len(g["runs"]), g["mean"], g["deviation"], g["margin"], g.get("difference"), g.get("p")]
                for g in result["groups"]
            ],
        )


def _start(run: ComparedRun) -> str:
    """What a run began from, as its folder says."""
    if (parent := run.run.parent()) is not None:
        return str(parent)
    if not run.run.start_file.exists():
        return ""
    content = read_json(run.run.start_file)
    return ", ".join(f"{name} {value}" for name, value in content.items() if isinstance(value, (str, int)))


def _lines(runs: Sequence[ComparedRun], name: str) -> list[dict[str, Any]]:
    """A trace of each run that has a metric, over all axes."""
    traces = []
    for place, run in enumerate(runs):
        points = run.curve(name)
        if not points:
            continue
        over = {LABELS[axis]: [getattr(point, axis) for point in points] for axis in AXES}
        traces.append({
            "type": "scatter", "mode": "lines+markers" if len(points) <= 60 else "lines", "name": run.name, "y": [p.value for p in points],
            "over": {label: values for label, values in over.items() if None not in values}, "smooth": True,
            "line": {"color": color(place), "width": 1.6}, "marker": {"size": 4}, "connectgaps": True,
        })  # fmt: skip
    return traces


def _classes(page: Page, run: ComparedRun) -> None:
    """The confusion matrix and the table of classes of the last evaluation that has them."""
    for evaluation in reversed(run.evaluations):
        counts = _confusion(evaluation)
        if counts is None:
            continue
        given = run.fields.get("task.class_names")
        names = [str(name) for name in given] if given and len(given) == len(counts) else [str(i) for i in range(len(counts))]
        page.heading(f"{run.name}: classes, step {evaluation.step:,}")
        if len(names) <= _MOST_CLASSES:
            side = max(420, min(1000, 34 * len(names) + 160))
            page.chart(
                [heatmap(counts, names)], title="true classes (rows) and predicted ones (columns)", height=side, width=side + 120,
                yaxis={"autorange": "reversed", "type": "category", "title": {"text": "true"}},
                xaxis={"type": "category", "title": {"text": "predicted"}}, margin={"l": 110, "r": 20, "t": 50, "b": 90},
            )  # fmt: skip
        page.table(["class", "examples", "precision", "recall", "F1"], class_rows(counts, names))
        return


def _confusion(evaluation: Evaluation) -> list[list[float]] | None:
    sums = read_json(evaluation.path).get("sums")
    counts = sums.get("confusion") if isinstance(sums, dict) else None
    if not isinstance(counts, list) or not all(isinstance(row, list) and len(row) == len(counts) for row in counts):
        return None
    return counts


def class_rows(counts: Sequence[Sequence[float]], names: Sequence[str]) -> list[list[Any]]:
    """Of each class its name, examples, precision, recall and F1; None where there is nothing to divide by."""
    rows: list[list[Any]] = []
    for place, name in enumerate(names):
        right, there, said = counts[place][place], sum(counts[place]), sum(row[place] for row in counts)
        shares = [right / said if said else None, right / there if there else None, 2 * right / (said + there) if said + there else None]
        rows.append([name, int(there), *shares])
    return rows


def _samples(page: Page, run: ComparedRun) -> None:
    """Samples of validations, each kind side by side over the steps."""
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(run.run.samples_folder.glob("*")):
        if match := re.fullmatch(r"(.+)-(\d{8})\.(txt|png|wav)", path.name):
            found.setdefault(f"{match[1]} ({match[3]})", {})[int(match[2])] = path
    if not found:
        return
    page.heading(f"{run.name}: samples over steps")
    for name, paths in found.items():
        steps = sorted(step for step, path in paths.items() if path.stat().st_size <= _SAMPLE_BYTES)
        if len(steps) > _SHOWN:
            steps = sorted({steps[round(i * (len(steps) - 1) / (_SHOWN - 1))] for i in range(_SHOWN)})
        page.heading(name.partition(" (")[0], 3)
        if name.endswith(" (wav)"):
            page.sounds([(f"step {step:,}", paths[step].read_bytes()) for step in steps])
        else:
            page.strip([(f"step {step:,}", _content(paths[step])) for step in steps])


def _content(path: Path) -> str | bytes:
    return path.read_bytes() if path.suffix == ".png" else path.read_text(errors="replace")


def _events(page: Page, runs: Sequence[ComparedRun]) -> None:
    """What the logs say besides progress, newest last."""
    page.heading("Events")
    for run in runs:
        try:
            lines = run.run.log_file.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            lines = []
        shown_lines = [line for line in lines if not re.search(r"step [\d,]+/[\d,]+  loss", line)]
        reason = (run.run.failure() or {}).get("reason") or run.run.stopped()
        page.heading(run.name, 3)
        page.text("\n".join([*shown_lines[-_EVENTS:], *([f"ended: {reason}"] if reason else [])]) or "its log is empty")


def _configuration(page: Page, runs: Sequence[ComparedRun]) -> None:
    """All fields, those that differ first."""
    page.heading("Configuration")
    different = different_fields(runs)
    names = list(dict.fromkeys([*different, *(name for run in runs for name in run.fields)]))
    header = ["field", *(run.name for run in runs), *(["differs"] if len(runs) > 1 else [])]
    rows = []
    for name in names:
        values = [_value(run.fields.get(name)) for run in runs]
        rows.append([name.replace("_", "-"), *values, *(["yes" if name in different else ""] if len(runs) > 1 else [])])
    page.table(header, rows)


def _value(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (list, dict)) else "" if value is None else str(value)
