"""The HTML report of a sweep: a table that sorts, curves, parallel coordinates, importances, when each trial ran."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perceiver.pages import Page, are_numbers, color, far_apart, parallel_coordinates
from perceiver.runs import Run
from perceiver.terminal import number_of
from tuning import replicates
from tuning.pareto import LABELS, front_charts
from tuning.trials import Trial

STEPS = "optimizer step"


def page_of_sweep(folder: Path, trials: Sequence[Trial], settings: dict[str, Any], lines: Sequence[str], schedule: bytes) -> Page:
    """The page.

    Args:
        folder: of the sweep.
        trials: best first.
        settings: of the sweep.
        lines: of `tuning.report.table`, of which those below the table are shown.
        schedule: the picture of the sweep, as a PNG file.
    """
    page = Page(folder.name)
    metric, fields = settings["metric"], sorted({field for trial in trials for field in trial["values"]})
    page.paragraph(
        f"{settings['preset']}, {settings['scheduler']}, {number_of(len(trials), 'trial')}; {metric}: {_better(settings)} is better"
    )
    header = ["place", "trial", f"best {metric}", "at step", "last", "step", "examples", "seconds", "status", *fields]
    rows = []
    for place, trial in enumerate(trials, 1):
        results = [trial["value"], trial["best_step"], trial["last_value"], trial["step"], trial["examples"], round(trial["seconds"], 1)]
        rows.append([place, trial["trial"], *results, trial["status"], *(trial["values"].get(field) for field in fields)])
    page.table(header, rows)
    if settings.get("seeds"):
        page.heading("Samples, by the mean over their seeds")
        samples = replicates.rows(trials, settings)
        page.table(samples[0], samples[1:])
    page.text("\n".join(lines[1 + len(trials) :]))
    page.heading("Curves")
    page.controls([STEPS])
    for name in dict.fromkeys((metric, "loss")):
        if curves := _curves(trials, name):
            page.chart(curves, title=name, height=440)
    if settings.get("against"):
        label = LABELS[settings["against"]]
        page.heading(f"{metric} against {label}")
        page.chart(
            front_charts(trials, settings),
            title="circled: trials that no finished trial beats in both",
            height=420,
            xaxis={"title": {"text": label}},
        )
    done = [trial for trial in trials if trial["value"] is not None]
    if fields and done:
        page.heading("Fields and results")
        columns = {field: [trial["values"].get(field) for trial in done] for field in fields}
        values = [trial["value"] for trial in done]
        chart = parallel_coordinates(columns, values, metric, settings["mode"] == "min")
        page.chart(
            [chart], title="each line is a trial; drag along an axis to choose", height=440, margin={"l": 90, "r": 60, "t": 90, "b": 30}
        )
        found, how = importances(columns, values)
        if found:
            order = sorted(found, key=lambda field: abs(found[field]))
            bars = {"type": "bar", "orientation": "h", "x": [found[field] for field in order], "y": order}
            page.chart([bars], title=f"importance: {how}", height=120 + 34 * len(order), margin={"l": 220, "r": 20, "t": 40, "b": 40})
        for field in fields:
            axis = {"type": "log" if far_apart(columns[field]) else "-", "title": {"text": field}}
            page.chart([_slice(field, columns[field], values)], title=f"{metric} over {field}", height=320, xaxis=axis)
    changes = [f"{t['trial']}: at step {e['step']:,} from {e['from']}, then {e['values']}" for t in trials for e in t["exchanges"]]
    if changes:
        page.heading("Exchanges")
        page.text("\n".join(changes))
    page.heading("When each trial ran")
    page.strip([("curves, values, times", schedule)])
    return page


def importances(columns: Mapping[str, Sequence[Any]], values: Sequence[float]) -> tuple[dict[str, float], str]:
    """How much each field matters for the result, and how that was found: by optuna where it is installed and there are enough trials.

    Without, it is the rank correlation of each field whose values are numbers.
    """
    varied = {name: column for name, column in columns.items() if None not in column and len(set(map(str, column))) > 1}
    if len(values) >= 4 and varied and (found := _by_optuna(varied, values)) is not None:
        return found, "share of the result's variance among good trials, by PED-ANOVA (optuna)"
    return rank_correlations(columns, values), "rank correlation with the result"


def rank_correlations(columns: Mapping[str, Sequence[Any]], values: Sequence[float]) -> dict[str, float]:
    """Spearman's rank correlation of each column of numbers with the values; 0 where undefined."""
    ranks, found = _ranks(values), {}
    for name, column in columns.items():
        if all(isinstance(v, (int, float)) for v in column):
            own = _ranks(column)
            varied = len(values) > 2 and own.std() > 0 and ranks.std() > 0
            found[name] = float(np.corrcoef(own, ranks)[0, 1]) if varied else 0.0
    return found


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 0; equal values share their mean rank."""
    array = np.array(values, dtype=float)
    return np.array([(array < v).sum() + ((array == v).sum() - 1) / 2 for v in array])


def _by_optuna(columns: Mapping[str, Sequence[Any]], values: Sequence[float]) -> dict[str, float] | None:
    try:
        import optuna
    except ImportError:
        return None
    distributions: dict[str, Any] = {}
    for name, column in columns.items():
        if are_numbers(column):
            low, high = float(min(column)), float(max(column))
            distributions[name] = optuna.distributions.FloatDistribution(low, high, log=far_apart(column))
        else:
            distributions[name] = optuna.distributions.CategoricalDistribution(sorted({str(value) for value in column}))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    for place, value in enumerate(values):
        if not math.isfinite(value):
            continue
        drawn = {
            name: str(column[place])
            if isinstance(distributions[name], optuna.distributions.CategoricalDistribution)
            else float(column[place])
            for name, column in columns.items()
        }
        study.add_trial(optuna.trial.create_trial(params=drawn, distributions=distributions, value=value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the evaluator is called experimental
        found = optuna.importance.get_param_importances(study, evaluator=optuna.importance.PedAnovaImportanceEvaluator())
    return {name: float(value) for name, value in found.items()}


def _curves(trials: Sequence[Trial], name: str) -> list[dict[str, Any]]:
    traces = []
    for place, trial in enumerate(trials):
        points = [(r["step"], r[name]) for r in Run(Path(trial["run"])).metrics() if isinstance(r.get(name), (int, float))]
        if points:
            steps, values = zip(*points, strict=True)
            traces.append({
                "type": "scatter", "mode": "lines+markers", "name": f"{trial['trial']} ({trial['status']})", "y": values,
                "over": {STEPS: steps}, "smooth": True, "line": {"color": color(place), "width": 2.5 if place == 0 else 1.3},
                "marker": {"size": 4},
            })  # fmt: skip
    return traces


def _slice(field: str, column: Sequence[Any], values: Sequence[float]) -> dict[str, Any]:
    """Results over the values of one field."""
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in column)
    return {
        "type": "scatter",
        "mode": "markers",
        "x": list(column) if numbers else list(map(str, column)),
        "y": list(values),
        "name": field,
    }


def _better(settings: Mapping[str, Any]) -> str:
    return "higher" if settings["mode"] == "max" else "lower"
