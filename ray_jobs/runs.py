"""`perceiver runs [FOLDER]`: the runs in a folder: what they are, how far they are, and the command that continues each.

Reads the JSON files of the runs' folders and nothing else, so that it is quick and needs no PyTorch.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from perceiver.config import UserError, home
from perceiver.runs import EXPERIMENT, DamagedRun, best_value, last_step, read_markers, read_saved, status
from ray_jobs.cli import main_entry, program, refuse_empty

COLUMNS = ("name", "preset", "task", "status", "step", "of", "best", "checkpoint", "MiB")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=program("ray_jobs.runs"), description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("folder", nargs="?", help="folder of runs; default: $PERCEIVER_HOME/runs")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    refuse_empty(args, ("folder",))
    folder = Path(args.folder).expanduser() if args.folder else home() / "runs"
    if args.folder and not folder.is_dir():
        raise UserError(f"there is no folder of runs {folder}")
    runs = list_runs(folder)
    if args.json:
        for run in runs:
            print(json.dumps(run))
        return 0
    if not runs:
        print(f"there are no runs in {folder}")
        return 0
    rows = [COLUMNS, *(tuple(_cell(run[column]) for column in COLUMNS) for run in runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for run in runs:
        if run["reason"]:
            print(f"damaged {run['name']}: {run['reason']}")
        if run["continue"]:
            print(f"continue {run['name']}: {run['continue']}")
    return 0


def list_runs(folder: str | Path) -> list[dict[str, Any]]:
    """The runs in a folder, by name.

    Each has name, preset, task, status (running, finished, failed, stopped, damaged), step (of the last record), of (steps in all,
    None where the run does not say), best (metric and value), checkpoint (last step), MiB, continue (command), and reason (what is
    wrong with its files). A damaged run costs its own line alone.
    """
    return [describe(path.parent) for path in sorted(Path(folder).glob(f"*/{EXPERIMENT}"))]


def describe(run: Path) -> dict[str, Any]:
    """One run; see `list_runs`."""
    row: dict[str, Any] = dict.fromkeys((*COLUMNS, "continue", "reason")) | {"name": run.name, "MiB": _mebibytes(run)}
    try:
        content = read_saved(run)
        experiment = content["experiment"]
        metric = experiment["run"].get("best_metric", "val_loss")
        markers, state = read_markers(run), status(run)
        best = best_value(markers, metric)
        return row | {
            "preset": experiment.get("preset"),
            "task": str(experiment["task"].get("type", "")).rpartition(":")[2].removesuffix("Config"),
            "status": state,
            "step": last_step(run),
            "of": content.get("steps") or (None if experiment["training"].get("max_epochs") else experiment["training"].get("max_steps")),
            "best": f"{metric} {best:.4f}" if best is not None else None,
            "checkpoint": markers[-1]["step"] if markers else None,
            "continue": None if state in ("running", "finished") else continue_command(run),
        }
    except DamagedRun as error:
        return row | {"status": "damaged", "reason": str(error)}
    except Exception as error:  # whatever else stands in files that anybody may have written
        return row | {"status": "damaged", "reason": f"its files are not those of a run ({type(error).__name__}: {error})"}


def continue_command(run: Path) -> str:
    """The command that continues a run, with the code that it brings, wherever the file that it came from may be by now."""
    return shlex.join(["python", "-m", "ray_jobs.train", str(run.absolute())])


def _mebibytes(run: Path) -> float:
    return round(sum(file.stat().st_size for file in run.rglob("*") if file.is_file()) / 2**20, 1)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, (int, float)) else str(value)


if __name__ == "__main__":
    main_entry(main)
