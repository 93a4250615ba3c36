"""`python -m tuning.report SWEEP`: table, results.csv, results.parquet and report.html of a sweep, at any time."""

from __future__ import annotations

import argparse
import base64
import html
import io
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from PIL import Image

from perceiver.config import UserError, home
from perceiver.training.record import read_metrics
from ray_jobs.cli import main_entry, program
from tuning.figures import GREY, PALETTE, Panel, save, stack
from tuning.sweeps import arguments
from tuning.trials import Trial, read_settings, read_trials


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=program("tuning.report"), description=__doc__)
    parser.add_argument("sweep", help="a sweep's folder, or its name in $PERCEIVER_HOME/sweeps")
    folder = Path(parser.parse_args(argv).sweep).expanduser()
    if not (folder / "sweep.json").exists():
        folder = home() / "sweeps" / folder
    if not (folder / "sweep.json").exists():
        raise UserError(f"sweep {argv[0]!r} does not exist: give its folder, or the name of one in {home() / 'sweeps'}")
    for line in table(write(folder), read_settings(folder)):
        print(line)
    return 0


def command(settings: dict[str, Any], trial: Trial, name: str, full_length: bool = False) -> str:
    """The command that trains with a trial's values, as long as in the sweep or as long as the preset says."""
    overrides = shlex.split(settings["overrides"])
    if full_length:
        overrides = without_length(overrides)
    words = [settings["preset"], *overrides, *arguments(trial["values"]), "--name", name]
    return f"python -m ray_jobs.train {shlex.join(words)}"


def without_length(words: Sequence[str]) -> list[str]:
    """Words of a command line without the fields that shorten a training for a sweep."""
    kept, dropped = [], False
    for word in words:
        if word.startswith("--"):
            dropped = word.partition("=")[0].replace("_", "-") in ("--training.max-steps", "--training.max-epochs")
        if not dropped:
            kept.append(word)
    return kept


def table(trials: Sequence[Trial], settings: dict[str, Any]) -> list[str]:
    """Lines for a person: the trials, best first; what the sweep gained; how to train the winner."""
    fields = sorted({field for trial in trials for field in trial["values"]})
    header = ["", "trial", settings["metric"], "step", "status", *fields]
    rows = [header]
    for place, trial in enumerate(trials, 1):
        value = "" if trial["value"] is None else f"{trial['value']:.4f}"
        shown = [_short(trial["values"].get(field)) for field in fields]
        status = trial["status"] + (f" ({trial['reason'][:60]})" if trial["status"] == "failed" else "")
        rows.append([str(place), trial["trial"], value, f"{trial['step']:,}", status, *shown])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if not trials or trials[0]["value"] is None:
        return [*lines, "no trial has a result"]
    lines.append(gain(trials, settings))
    name = f"{Path(trials[0]['run']).parents[1].name}-winner"
    lines.append(f"the winner at full length: {command(settings, trials[0], name, full_length=True)}")
    return lines


def gain(trials: Sequence[Trial], settings: dict[str, Any]) -> str:
    """The winner against the preset's own values, at the last step that both have reached."""
    default = next((t for t in trials if t["values"] == settings["default"] and settings["default"]), None)
    if default is None:
        return "the preset's own values were not among the trials"
    if default is trials[0]:
        return f"no trial is better than the preset's own values ({default['trial']})"
    curves = [_curve(trial) for trial in (trials[0], default)]
    common = max(set(curves[0]) & set(curves[1]), default=None)
    if common is None:
        return f"the preset's own values ({default['trial']}) share no step with the winner"
    winner, own = (curve[common] for curve in curves)
    better = winner > own if settings["mode"] == "max" else winner < own
    return (
        f"at step {common:,} the winner ({trials[0]['trial']}) has {settings['metric']} {winner:.4f}, the preset's own values "
        f"({default['trial']}) {own:.4f}: {'better' if better else 'not better'}"
    )


def write(folder: Path) -> list[Trial]:
    """Writes results.csv, results.parquet, report.html and report.png; returns the trials, best first."""
    trials, settings = read_trials(folder), read_settings(folder)
    if not trials:
        return trials
    fields = sorted({field for trial in trials for field in trial["values"]})
    columns = ("trial", "status", "reason", "metric", "value", "best_step", "step", "examples", "loss", "seconds", "run")
    rows = [
        {name: trial[name] for name in columns}
        | {field: trial["values"].get(field) for field in fields}
        | {"command": command(settings, trial, trial["trial"])}
        for trial in trials
    ]
    results = pa.table({name: _column([row[name] for row in rows]) for name in rows[0]})
    _whole(folder / "results.parquet", lambda path: pq.write_table(results, path))
    _whole(folder / "results.csv", lambda path: pa.csv.write_csv(results, path))
    picture = stack([panel.draw() for panel in (learning_curves(trials), parallel(trials, settings), schedule(trials))])
    save(picture, folder / "report.png")
    _whole(folder / "report.html", lambda path: path.write_text(_page(folder, trials, settings, picture)))
    return trials


def learning_curves(trials: Sequence[Trial]) -> Panel:
    panel = Panel(f"{trials[0]['metric']} over steps", "step", trials[0]["metric"], size=(960, 440))
    for place, trial in reversed(list(enumerate(trials))):
        colour = _colour(place)
        panel.line(_curve(trial).items(), colour, 3 if place == 0 else 2)
        panel.dots(list(_curve(trial).items())[-1:], colour)
    for place, trial in enumerate(trials[: len(PALETTE)]):
        value = "" if trial["value"] is None else f"{trial['value']:.4f}  "
        panel.label(f"{trial['trial']}  {value}{trial['status']}", _colour(place))
    if len(trials) > len(PALETTE):
        panel.label(f"{len(trials) - len(PALETTE)} others", GREY)
    return panel


def parallel(trials: Sequence[Trial], settings: dict[str, Any]) -> Panel:
    """Parallel coordinates: a line per trial over the fields that are varied, each from its least to its largest value."""
    fields = sorted({field for trial in trials for field in trial["values"]})
    correlations = importance(trials)
    values = [t["value"] for t in trials if t["value"] is not None]
    names = []
    for field in fields:
        section, _, name = field.rpartition(".")
        rank = f"{correlations[field]:+.2f}" if field in correlations else ""
        names.append(f"{section}.\n{name}\n{_range([t['values'].get(field) for t in trials])}\n{rank}")
    names.append(f"\n{settings['metric']}\n{_range(values)}\n")
    title = f"values of the trials: least and largest, rank correlation with {settings['metric']}"
    panel = Panel(title, size=(960, 410), x_names=names, y_names=["least", "largest"])
    scales = {field: _scale([t["values"].get(field) for t in trials]) for field in fields}
    scales["="] = _scale(values)
    for place, trial in reversed(list(enumerate(trials))):
        points = [(i, scales[field](trial["values"].get(field))) for i, field in enumerate(fields)]
        if trial["value"] is not None:
            points.append((len(fields), scales["="](trial["value"])))
        panel.line(points, _colour(place), 3 if place == 0 else 1)
        panel.dots(points, _colour(place))
    return panel


def schedule(trials: Sequence[Trial]) -> Panel:
    """When each trial ran; the first one that started is on top."""
    start = min((s for t in trials for s, _ in t["spans"]), default=0.0)
    rows = sorted(range(len(trials)), key=lambda i: (min(trials[i]["spans"], default=(start, start)), trials[i]["trial"]), reverse=True)
    panel = Panel("trials over time", "seconds", size=(960, 100 + 24 * max(4, len(trials))), y_names=[trials[i]["trial"] for i in rows])
    for row, place in enumerate(rows):
        for begin, end in trials[place]["spans"]:
            panel.bar(row, begin - start, end - start, _colour(place))
    return panel


def importance(trials: Sequence[Trial]) -> dict[str, float]:
    """Spearman's rank correlation with the metric of each field whose values are numbers, over trials that have the metric; 0 where
    undefined."""
    done = [t for t in trials if t["value"] is not None]
    ranks = _ranks([t["value"] for t in done])
    found = {}
    for field in sorted({field for trial in trials for field in trial["values"]}):
        values = [t["values"].get(field) for t in done]
        if all(isinstance(v, (int, float)) for v in values):
            own = _ranks(values)
            varied = len(done) > 2 and own.std() > 0 and ranks.std() > 0
            found[field] = float(np.corrcoef(own, ranks)[0, 1]) if varied else 0.0
    return found


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 0; equal values share their mean rank."""
    array = np.array(values, dtype=float)
    return np.array([(array < v).sum() + ((array == v).sum() - 1) / 2 for v in array])


def _column(values: Sequence[Any]) -> list[Any]:
    """Numbers, or truth values, or texts, as they are; lists and values of several kinds as text: what CSV and Parquet both can hold."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or kinds in ({bool}, {str}):
        return list(values)
    return [None if value is None else str(value) for value in values]


def _scale(values: Sequence[Any]) -> Callable[[Any], float]:
    """Values to 0..1: by logarithm where all are above 0 and far apart; what is no number by its place among the values."""
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values) and values:
        log = min(values) > 0 and max(values) / min(values) > 20
        transform = np.log if log else float
        low, high = transform(min(values)), transform(max(values))
        return lambda value: float((transform(value) - low) / (high - low)) if high > low else 0.5
    names = sorted({str(v) for v in values})
    return lambda value: names.index(str(value)) / max(1, len(names) - 1)


def _range(values: Sequence[Any]) -> str:
    """The least and the largest of some numbers, or what else there is."""
    if values and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return f"{_short(min(values))} to {_short(max(values))}"
    return ", ".join(sorted({str(v) for v in values}))[:40]


def _curve(trial: Trial) -> dict[int, float]:
    return {r["step"]: r[trial["metric"]] for r in read_metrics(Path(trial["run"])) if trial["metric"] in r}


def _colour(place: int) -> tuple[int, int, int]:
    return PALETTE[place] if place < len(PALETTE) else GREY


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _page(folder: Path, trials: Sequence[Trial], settings: dict[str, Any], picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.save(data, format="PNG")
    text = html.escape("\n".join(table(trials, settings)))
    changes = [f"{t['trial']}: at step {e['step']:,} from {e['from']}, then {e['values']}" for t in trials for e in t["exchanges"]]
    exchanged = f"<h2>Exchanges</h2><pre>{html.escape(chr(10).join(changes))}</pre>" if changes else ""
    failed = [f"{t['trial']}: {t['reason']}" for t in trials if t["status"] in ("failed", "diverged")]
    failures = f"<h2>Failed</h2><pre>{html.escape(chr(10).join(failed))}</pre>" if failed else ""
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(folder.name)}</title>"
        "<style>body{font-family:sans-serif;max-width:1000px;margin:2em auto}pre{overflow-x:auto}</style>"
        f"<h1>{html.escape(folder.name)}</h1><p>{html.escape(settings['preset'])}, {settings['scheduler']}, "
        f"{len(trials)} trials</p><pre>{text}</pre>{failures}{exchanged}"
        f'<img alt="curves, values, schedule" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">\n'
    )


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


if __name__ == "__main__":
    main_entry(main)
