"""`python -m tuning.report SWEEP` or `RUN ...`: reports on a sweep, at any time, or on runs, as one HTML file.

The file is self-contained. For a sweep, the command prints the table and writes report.html, report.png, results.csv and
results.parquet into its folder. For runs, it writes a page with curves, classes, samples over steps, speed, events and configuration.
"""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from perceiver.comparison import chosen_metric, read_runs
from perceiver.config import UserError, home
from perceiver.data.storage import write_file
from perceiver.disk import local_file
from perceiver.plots import GREY, NUM_COLORS, color, far_apart, frame, log_scale, new_figure, plain, png, step_axis
from perceiver.runs import Run
from perceiver.terminal import CommandParser, number_of, summary
from ray_jobs.cli import main_entry, refuse_empty
from ray_jobs.program import program
from ray_jobs.run_pages import page_of_runs
from ray_jobs.runs import named_runs
from tuning import replicates
from tuning.constraints import COSTS
from tuning.page import page_of_sweep, rank_correlations
from tuning.pareto import draw_front, front_lines
from tuning.sweeps import arguments
from tuning.trials import SETTINGS, Trial, read_settings, read_trials

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE = "report.html"
STATUSES = ("finished", "stopped", "diverged", "failed", "refused", "unfinished")


def main(argv: list[str]) -> int:
    parser = CommandParser(prog=program("tuning.report"), description=summary(__doc__))
    parser.add_argument("names", nargs="+", metavar="RUN", help="a sweep, or runs: folders, names in $PERCEIVER_HOME, or a folder of runs")
    parser.add_argument("--out", metavar="FILE", help="for runs: the page to write; default: report.html in the current folder")
    parser.add_argument("--metric", help="for runs: metric to compare by (val_acc); default: the one that selects the best checkpoint")
    args = parser.parse_args(argv)
    refuse_empty(args, ("names",))
    folder = _sweep_of(args.names[0])
    if folder is None or len(args.names) > 1:
        return _report_runs(args.names, args.out, args.metric)
    if args.out or args.metric:
        raise UserError(f"--{'out' if args.out else 'metric'} is for runs: the report of a sweep lies in its folder, {folder}")
    for line in table(write(folder), read_settings(folder)):
        print(line)
    print(f"page: {folder / PAGE}")
    return 0


def _sweep_of(name: str) -> Path | None:
    """The folder of a sweep; None: the name is of none."""
    candidates = (Path(name).expanduser(), home() / "sweeps" / name)
    return next((folder for folder in candidates if (folder / SETTINGS).exists()), None)


def _report_runs(names: Sequence[str], out: str | None, metric: str | None) -> int:
    path = local_file("out", out or PAGE, ".html")
    try:
        found = read_runs(named_runs(names))
    except UserError as error:
        if len(names) > 1 or Run.find(names[0]) is not None:
            raise
        raise UserError(f"{names[0]!r} is neither a sweep nor a run ({error}); sweeps are looked for in {home() / 'sweeps'}, too") from None
    title = found[0].name if len(found) == 1 else f"{len(found)} runs: {', '.join(run.name for run in found[:6])}"
    page = page_of_runs(found, chosen_metric(found, metric), title)
    path.write_text(page.render(), encoding="utf-8")
    print(f"page: {path.absolute()}")
    return 0


def command(settings: dict[str, Any], trial: Trial, name: str, full_length: bool = False) -> str:
    """The command that trains with a trial's values, as long as in the sweep or as long as the preset says."""
    overrides = shlex.split(settings["overrides"])
    if full_length:
        overrides = without_length(overrides)
    values = trial["values"]
    if full_length and settings.get("seeds"):
        values, overrides = replicates.sample_of(trial), [*overrides, "--seeds", _listed(settings["seeds"])]
    words = [settings["preset"], *overrides, *arguments(values), "--name", name]
    return f"{program('ray_jobs.train')} {shlex.join(words)}"


def _listed(seeds: Sequence[int]) -> str:
    """As `--seeds` takes them; one alone with a comma, which else would be their number."""
    return ",".join(map(str, seeds)) + ("," if len(seeds) == 1 else "")


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
    header = ["", "trial", f"best {settings['metric']}", "at step", "last", "step", "status", *fields]
    rows = [header]
    for place, trial in enumerate(trials, 1):
        measured = ["", "", ""]
        if trial["value"] is not None:
            measured = [f"{trial['value']:.4f}", f"{trial['best_step']:,}", f"{trial['last_value']:.4f}"]
        shown = [_short(trial["values"].get(field)) for field in fields]
        rows.append([str(place), trial["trial"], *measured, f"{trial['step']:,}", trial["status"], *shown])
    lines = _aligned(rows)
    lines.append(counts(trials))
    explained = ("failed", "diverged", "refused")
    lines += [f"{trial['trial']} {trial['status']}: {trial['reason']}" for trial in trials if trial["status"] in explained]
    if settings.get("against"):
        lines += front_lines(trials, settings)
    if not trials or trials[0]["value"] is None:
        return [*lines, "no trial has a result"]
    if settings.get("seeds"):
        lines += ["", *_aligned(replicates.rows(trials, settings))]
    text, better = replicates.gain(trials, settings) if settings.get("seeds") else gain(trials, settings)
    lines.append(text)
    if better is False:
        return [*lines, "so no other values are recommended than the preset's own"]
    name = f"{Path(trials[0]['run']).parents[1].name}-winner"
    lines.append(f"the winner at full length: {command(settings, trials[0], name, full_length=True)}")
    return lines


def _aligned(rows: Sequence[Sequence[Any]]) -> list[str]:
    texts = [[_short(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in texts]


def counts(trials: Sequence[Trial]) -> str:
    """How many trials there are of each status, and of the failed ones for which kind of reason."""
    found = Counter(trial["status"] for trial in trials)
    parts = [f"{found[status]} {status}" for status in STATUSES if found[status]]
    kinds = Counter(failure(trial["reason"]) for trial in trials if trial["status"] == "failed")
    del kinds[""]
    text = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return f"{number_of(len(trials), 'trial')}: {', '.join(parts)}" + (f" (of the failed ones {text})" if text else "")


def failure(reason: str) -> str:
    """The kind of a failure: "out of memory", "not finite", or "" for any other."""
    if any(mark in reason for mark in ("out of memory", "DefaultCPUAllocator", "MemoryError")):
        return "out of memory"
    return "not finite" if re.search(r"\b(nan|infinite|not finite)\b", reason, re.IGNORECASE) else ""


def gain(trials: Sequence[Trial], settings: dict[str, Any]) -> tuple[str, bool | None]:
    """The winner against the preset's own values, at the last step that both have reached; and whether it is better. None: not known."""
    default = next((trial for trial in trials if replicates.is_default(trial, settings)), None)
    if default is None:
        return "the preset's own values were not among the trials", None
    if default is trials[0]:
        return f"no trial is better than the preset's own values ({default['trial']})", False
    curves = [_curve(trial) for trial in (trials[0], default)]
    common = max(set(curves[0]) & set(curves[1]), default=None)
    if common is None:
        return f"the preset's own values ({default['trial']}) share no step with the winner", None
    winner, own = (curve[common] for curve in curves)
    better = winner > own if settings["mode"] == "max" else winner < own
    text = (
        f"at step {common:,} the winner ({trials[0]['trial']}) has {settings['metric']} {winner:.4f}, the preset's own values "
        f"({default['trial']}) {own:.4f}: {'better' if better else 'not better'}"
    )
    return text, better


def write(folder: Path) -> list[Trial]:
    """Writes results.csv, results.parquet, report.html and report.png; returns the trials, best first."""
    trials, settings = read_trials(folder), read_settings(folder)
    if not trials:
        return trials
    fields = sorted({field for trial in trials for field in trial["values"]})
    columns = ("trial", "status", "reason", "metric", "value", "best_step", "step", "examples", "loss", "seconds", "run")
    known = [name for name in COSTS if any(name in trial["costs"] for trial in trials)]
    rows = [
        {name: trial[name] for name in columns}
        | {name: trial["costs"].get(name) for name in known}
        | {field: trial["values"].get(field) for field in fields}
        | {"command": command(settings, trial, trial["trial"])}
        for trial in trials
    ]
    results = pa.table({name: _column([row[name] for row in rows]) for name in rows[0]})
    picture = png(draw(trials, settings))
    write_file(folder, "results.parquet", lambda file: pq.write_table(results, file))
    write_file(folder, "results.csv", lambda file: pa.csv.write_csv(results, file))
    write_file(folder, "report.png", picture)
    write_file(folder, PAGE, page_of_sweep(folder, trials, settings, table(trials, settings), picture).render().encode())
    return trials


def draw(trials: Sequence[Trial], settings: dict[str, Any]) -> Figure:
    """The sweep's picture: learning curves, values and times of its trials, each trial in one colour."""
    against = (420,) if settings.get("against") else ()
    heights = (500, 420, 110 + 24 * max(4, len(trials)), *against)
    figure = new_figure(960, sum(heights))
    curves, values, times, *rest = figure.subplots(len(heights), 1, height_ratios=heights)
    for axes in rest:
        draw_front(axes, trials, settings)
    learning_curves(curves, trials)
    parallel(values, trials, settings)
    schedule(times, trials)
    return figure


def learning_curves(axes: Axes, trials: Sequence[Trial]) -> None:
    """The metric over steps, a line per trial."""
    metric = trials[0]["metric"]
    for place, trial in enumerate(trials):
        curve = {step: value for step, value in _curve(trial).items() if math.isfinite(value)}
        value = "" if trial["value"] is None else f"{trial['value']:.4f}, "
        label = f"{trial['trial']}: {value}{trial['status']}" if place < NUM_COLORS else None
        axes.plot(list(curve), list(curve.values()), label=label, markevery=[-1] if curve else None, **_line(place))
    if len(trials) > NUM_COLORS:
        axes.plot([], [], color=GREY, label=f"{len(trials) - NUM_COLORS} others")
    frame(axes, f"{metric} over steps", y=metric)
    step_axis(axes)
    if far_apart([value for trial in trials for value in _curve(trial).values()]):
        log_scale(axes, "y")
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.16), ncols=3, fontsize="small", frameon=False)


def parallel(axes: Axes, trials: Sequence[Trial], settings: dict[str, Any]) -> None:
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
    scales = {field: _scale([t["values"].get(field) for t in trials]) for field in fields}
    to_height = _scale(values)
    for place, trial in enumerate(trials):
        heights = [scales[field](trial["values"].get(field)) for field in fields]
        if trial["value"] is not None:
            heights.append(to_height(trial["value"]))
        axes.plot(range(len(heights)), heights, **_line(place))
    frame(axes, f"values of the trials: least and largest, rank correlation with {settings['metric']}")
    axes.set_xticks(range(len(names)), map(plain, names), fontsize="small")
    axes.set_yticks((0, 1), ("least", "largest"))


def schedule(axes: Axes, trials: Sequence[Trial]) -> None:
    """When each trial ran; the first one that started is on top."""
    start = min((s for t in trials for s, _ in t["spans"]), default=0.0)
    rows = sorted(range(len(trials)), key=lambda i: (min(trials[i]["spans"], default=(start, start)), trials[i]["trial"]), reverse=True)
    for row, place in enumerate(rows):
        spans = [(begin - start, end - begin) for begin, end in trials[place]["spans"]]
        axes.broken_barh(spans, (row - 0.35, 0.7), facecolors=color(place))
    frame(axes, "trials over time", "seconds since the first trial started")
    axes.set_yticks(range(len(rows)), [trials[i]["trial"] for i in rows])


def importance(trials: Sequence[Trial]) -> dict[str, float]:
    """Spearman's rank correlation with the metric of each field whose values are numbers, over trials that have the metric; 0 where
    undefined.
    """
    done = [t for t in trials if t["value"] is not None]
    fields = sorted({field for trial in trials for field in trial["values"]})
    return rank_correlations({field: [t["values"].get(field) for t in done] for field in fields}, [t["value"] for t in done])


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
    return {r["step"]: r[trial["metric"]] for r in Run(Path(trial["run"])).metrics() if trial["metric"] in r}


def _line(place: int) -> dict[str, Any]:
    """How the line of a trial looks; better ones lie on top."""
    return {"color": color(place), "linewidth": 2.5 if place == 0 else 1.2, "marker": "o", "markersize": 4.5, "zorder": 3 - 1e-3 * place}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main_entry(main)
