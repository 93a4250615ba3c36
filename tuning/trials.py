"""The trials of a sweep as its folder has them: how far each came, what it reached, which checkpoints are kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perceiver.checkpoints import best_of
from perceiver.disk import read_json
from perceiver.run_files import SWEEP
from perceiver.runs import Run
from tuning.constraints import REFUSED
from tuning.population import exchanges
from tuning.replicates import ranked
from tuning.trial import COSTS, VALUES, earlier_names

Trial = dict[str, Any]

SETTINGS = SWEEP
"""File that makes a folder a sweep: what makes it the same sweep, and the version that began it."""
TRIALS = "trials"
"""In a sweep's folder: the runs of its trials."""
EVENTS = "events.jsonl"
"""In a sweep's folder: a line for every start, report and end of a trial, with its time."""
DIVERGED = 3.0
"""A trial whose training loss is this multiple of that of its first report has diverged."""


def read_settings(folder: Path) -> dict[str, Any]:
    return read_json(folder / SETTINGS)


def data_of_trials(folder: Path) -> str | None:
    """The digest of the data that a sweep's trials are trained on; None: none has begun."""
    runs = (Run(path.parent) for path in sorted((folder / TRIALS).glob(f"*/{VALUES}")))
    return next((run.load(install_code=False)[1] for run in runs if run.exists), None)


def read_trials(folder: Path, place: str = TRIALS) -> list[Trial]:
    """All trials of a sweep, best first: those with the metric by its best value, then the others; with seeds by the mean over them.

    Args:
        folder: of the sweep.
        place: of the runs in it.

    Returns:
        Each has trial, status (finished, stopped, diverged, failed, refused, unfinished), reason, metric, value (its best), step and
        examples reached, loss (the last), seconds (of running), spans (start and end times), values (of the fields that are varied).
    """
    settings = read_settings(folder)
    metric, sign = settings["metric"], -1 if settings["mode"] == "max" else 1
    events: dict[str, list[dict[str, Any]]] = {}
    for event in read_events(folder):
        events.setdefault(event["trial"], []).append(event)
    trials = []
    for path in sorted((folder / place).glob(f"*/{VALUES}")):
        run = path.parent
        own = [event for name in (*earlier_names(run), run.name) for event in events.get(name, [])]
        metrics = Run(run).metrics()
        values = [(r[metric], r["step"]) for r in metrics if metric in r and np.isfinite(r[metric])]
        best = min(values, key=lambda v: sign * v[0], default=(None, None))
        reports = [e for e in own if e["event"] == "report"]
        status, reason = _status(run, own, reports)
        spans = _spans(own)
        trials.append(
            {
                "trial": run.name, "status": status, "reason": reason, "metric": metric, "value": best[0], "best_step": best[1],
                "last_value": values[-1][0] if values else None,
                "step": reports[-1]["step"] if reports else 0, "examples": reports[-1]["examples"] if reports else 0,
                "loss": next((r["loss"] for r in reversed(metrics) if "loss" in r), None),
                "seconds": sum(end - start for start, end in spans),
                "spans": spans, "values": json.loads(path.read_text()), "run": str(run), "exchanges": exchanges(run),
                "costs": json.loads((run / COSTS).read_text()) if (run / COSTS).exists() else {},
            }
        )  # fmt: skip
    trials.sort(key=lambda t: (t["value"] is None, sign * (t["value"] or 0), t["trial"]))
    return ranked(trials, settings) if settings.get("seeds") else trials


def _status(run: Path, events: Sequence[dict], reports: Sequence[dict]) -> tuple[str, str]:
    if not events or events[-1]["event"] != "end":
        return "unfinished", ""
    if events[-1]["failed"]:
        reason = events[-1]["failed"]
        return ("refused", reason.removeprefix(REFUSED)) if reason.startswith(REFUSED) else ("failed", reason)
    if Run(run).status() == "finished":
        return "finished", ""
    losses = [report["loss"] for report in reports if report["loss"] is not None]
    if losses and diverged(losses[0], losses[-1]):
        return "diverged", f"the loss grew from {losses[0]:.4g} to {losses[-1]:.4g}"
    return "stopped", "by the scheduler"


def _spans(events: Sequence[dict]) -> list[tuple[float, float]]:
    """When a trial ran: from each start to the last event before the next start."""
    spans: list[tuple[float, float]] = []
    for event in events:
        if event["event"] == "start":
            spans.append((event["time"], event["time"]))
        elif spans:
            spans[-1] = (spans[-1][0], event["time"])
    return spans


def diverged(first: float, loss: float) -> bool:
    return loss > DIVERGED * first > 0


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events of a sweep; a last line cut off by a crash is left out."""
    path = folder / EVENTS
    events = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


def prune(folder: Path, trials: Sequence[dict[str, Any]], keep: int) -> None:
    """Throws away checkpoints of trials that are over: all of those that are not among the best `keep`, and of the best
    all but the last and the best one.
    """
    for place, trial in enumerate(trials):
        run = Run(folder / TRIALS / trial["trial"])
        checkpoints = run.checkpoints()
        wanted = {checkpoints[-1].step} if checkpoints and place < keep else set()
        if wanted and (best := best_of(checkpoints, trial["metric"])):
            wanted.add(best.step)
        if not wanted:  # also what was being written when the trial was stopped
            shutil.rmtree(run.checkpoints_folder, ignore_errors=True)
            continue
        for checkpoint in checkpoints:
            if checkpoint.step not in wanted:
                shutil.rmtree(checkpoint.path)
