"""`python -m ray_jobs.runs [FOLDER]`: the runs in a folder: what they are, how far they are, and the command that goes on."""

from __future__ import annotations

import argparse
import fcntl
import json
import shlex
from pathlib import Path
from typing import Any

from perceiver.config import Experiment, UserError, flatten, from_dict, home, to_dict
from perceiver.data.shards import load_prepared
from perceiver.presets import PRESETS
from perceiver.training.checkpoint import EXPERIMENT, best_of, list_checkpoints
from perceiver.training.mirror import CHECKPOINTS
from perceiver.training.record import read_metrics
from perceiver.training.run import RESULT, total_steps
from ray_jobs.cli import main_entry, refuse_empty

COLUMNS = ("name", "preset", "status", "step", "of", "best", "checkpoint", "MiB")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m ray_jobs.runs", description=__doc__)
    parser.add_argument("folder", nargs="?", help="folder of runs; default: $PERCEIVER_HOME/runs")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    refuse_empty(args, ("folder",))
    folder = Path(args.folder).expanduser() if args.folder else home() / "runs"
    if not folder.is_dir():
        raise UserError(f"there is no folder of runs {folder}")
    runs = list_runs(folder)
    if args.json:
        for run in runs:
            print(json.dumps(run))
        return 0
    rows = [COLUMNS, *(tuple(_cell(run[column]) for column in COLUMNS) for run in runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for run in runs:
        if run["continue"]:
            print(f"continue {run['name']}: {run['continue']}")
    return 0


def list_runs(folder: str | Path) -> list[dict[str, Any]]:
    """The runs in a folder, by name.

    Each has name, preset, task, status (running, finished, failed, stopped), step (of the last record), of (steps in all, None
    where the prepared data is not there to tell), best (metric and value), checkpoint (last step), MiB, and continue (command).
    """
    return [describe(path.parent) for path in sorted(Path(folder).glob(f"*/{EXPERIMENT}"))]


def describe(run: Path) -> dict[str, Any]:
    """One run; see `list_runs`."""
    experiment = from_dict(json.loads((run / EXPERIMENT).read_text())["experiment"])
    checkpoints, records = list_checkpoints(run / CHECKPOINTS), read_metrics(run)
    status, metric = _status(run), experiment.run.best_metric
    best = best_of(checkpoints, metric)
    return {
        "name": run.name,
        "preset": experiment.preset,
        "task": type(experiment.task).__name__.removesuffix("Config"),
        "status": status,
        "step": records[-1]["step"] if records else 0,
        "of": _total(experiment),
        "best": f"{metric} {best.metrics[metric]:.4f}" if best else None,
        "checkpoint": checkpoints[-1].step if checkpoints else None,
        "MiB": round(sum(file.stat().st_size for file in run.rglob("*") if file.is_file()) / 2**20, 1),
        "continue": None if status in ("running", "finished") else continue_command(experiment, run),
    }


def continue_command(experiment: Experiment, run: Path) -> str:
    """The command that continues a run: its preset, and the fields that differ from it."""
    words = ["python", "-m", "ray_jobs.train", experiment.preset, "--run.storage", str(run.parent), "--run.name", run.name]
    preset = flatten(to_dict(PRESETS[experiment.preset]())) if experiment.preset in PRESETS else {}
    for name, value in flatten(to_dict(experiment)).items():
        told = name in ("preset", "run.name", "run.storage") or name.rpartition(".")[2] == "type"
        if not told and value != preset.get(name, value if not preset else ...):
            words += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return shlex.join(words)


def _status(run: Path) -> str:
    if (run / RESULT).exists():
        return "finished"
    if _held(run):
        return "running"
    return "failed" if (run / "failure.json").exists() else "stopped"


def _held(run: Path) -> bool:
    """Whether a driver holds the run's lock (as far as this machine can tell)."""
    try:
        with open(run / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _total(experiment: Experiment) -> int | None:
    if experiment.training.max_epochs is None:
        return experiment.training.max_steps
    try:
        return total_steps(experiment, load_prepared(experiment)[1].splits["train"].rows)
    except UserError:
        return None


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, (int, float)) else str(value)


if __name__ == "__main__":
    main_entry(main)
