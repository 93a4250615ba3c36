"""`perceiver runs [FOLDER]`: lists the runs in a folder: what they are, their progress, and the command that continues each.

It reads only the JSON files in the runs' folders, so it is fast and needs no PyTorch.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from perceiver.checkpoints import best_of
from perceiver.config import UserError, flatten, home, nearest
from perceiver.housekeeping import read_labels
from perceiver.runs import DamagedRun, Run, runs
from perceiver.terminal import CommandParser, summary
from ray_jobs.cli import main_entry, refuse_empty
from ray_jobs.program import program
from ray_jobs.where import Condition

COLUMNS = ("name", "parent", "preset", "task", "status", "step", "of", "best", "checkpoint", "MiB")
MORE_COLUMNS = ("tags", "note", "curve")
"""Columns that are shown when they are asked for, or have anything to show."""
_BARS = "▁▂▃▄▅▆▇█"


def main(argv: list[str]) -> int:
    parser = CommandParser(prog=program("ray_jobs.runs"), description=summary(__doc__))
    parser.add_argument("folder", nargs="?", help="folder of runs; default: $PERCEIVER_HOME/runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument("--where", metavar="CONDITION", help='show only runs that satisfy this: "optim.lr>1e-3 and val_acc>0.9"')
    parser.add_argument("--sort", metavar="NAME", help="sort by a column, field or metric, lowest first")
    parser.add_argument("--reverse", action="store_true", help="with --sort, highest first")
    parser.add_argument("--columns", metavar="NAME,NAME", help=f"columns, fields and metrics to show; default: {','.join(COLUMNS)}")
    parser.add_argument(
        "--tag",
        metavar="TAG",
        action="append",
        default=[],
        help="show only runs with this tag (perceiver tag); may be repeated: runs with all of them",
    )
    parser.add_argument(
        "--watch", metavar="SECONDS", nargs="?", type=float, const=2.0, help="show the list again every SECONDS (%(const)s) until Ctrl-C"
    )
    args = parser.parse_args(argv)
    refuse_empty(args, ("folder", "where", "sort", "columns", "tag"))
    condition = Condition(args.where) if args.where else None
    folder = Path(args.folder).expanduser() if args.folder else home() / "runs"
    if args.folder and not folder.is_dir():
        raise UserError(f"there is no folder of runs {folder}")
    if args.watch is None:
        return _list(args, folder, condition)
    if args.json:
        raise UserError("--watch shows a table: leave --json out")
    if not args.watch > 0:
        raise UserError(f"--watch is {args.watch:g} and must be above 0")
    while True:
        if sys.stdout.isatty():
            print("\x1b[H\x1b[2J", end="")
        print(f"{folder}, {time.strftime('%H:%M:%S')} (Ctrl-C ends)")
        try:
            _list(args, folder, condition)
            sys.stdout.flush()
            time.sleep(args.watch)
        except KeyboardInterrupt:
            print()
            return 0


def _list(args: argparse.Namespace, folder: Path, condition: Condition | None) -> int:
    """Prints the list once."""
    columns = tuple(name.strip() for name in args.columns.split(",")) if args.columns else COLUMNS
    runs = [run for run in list_runs(folder) if set(args.tag) <= set(run["tags"])]
    if not args.columns and any(run["tags"] for run in runs):
        columns = (*columns, "tags")
    if args.watch is not None:
        columns = (*columns, "curve")
        for run in runs:
            run["curve"] = _curve(Run(folder / run["name"]), run)
    asked = {"--where": condition.names if condition else (), "--sort": [args.sort] if args.sort else (), "--columns": columns}
    _check_names(runs, asked)
    if condition:
        runs = [run for run in runs if condition.matches(values(run))]
    if args.sort:
        runs = _sorted(runs, args.sort, args.reverse)
    if not args.sort and not args.json:
        runs = in_lineage(runs)
    if args.json:
        for run in runs:
            print(json.dumps(run))
        return 0
    if not args.columns and not any(run["parent"] for run in runs):
        columns = tuple(name for name in columns if name != "parent")
    if not runs:
        print(
            f"there are no runs in {folder}"
            + (f" with {args.where}" if args.where else "")
            + "".join(f" with tag {tag}" for tag in args.tag)
        )
        return 0
    rows = [tuple(_cell(values(run).get(column)) for column in columns) for run in runs]
    if "name" in columns:
        place = columns.index("name")
        rows = [(*row[:place], run.get("branch", "") + row[place], *row[place + 1 :]) for run, row in zip(runs, rows, strict=True)]
    print_table([columns, *rows])
    for run in runs:
        if run["reason"]:
            print(f"damaged {run['name']}: {run['reason']}")
        if run["failure"]:
            print(f"failed {run['name']}: {run['failure']}")
        if run["continue"] and args.watch is None:
            print(f"continue {run['name']}: {run['continue']}")
    if args.watch is None and any(Run(folder / run["name"]).is_trial for run in runs):
        print("these are trials of a sweep: the command of the sweep continues those that it did not stop")
    return 0


def in_lineage(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs in the order of their names, those that began from another one of them below it, with the lines of the tree as "branch"."""
    names = {run["name"] for run in runs}
    children: dict[str | None, list[dict[str, Any]]] = {}
    for run in runs:
        parent = str(run["parent"] or "").rpartition("@")[0]
        children.setdefault(parent if parent in names and parent != run["name"] else None, []).append(run)
    found: list[dict[str, Any]] = []

    def add(parent: str | None, before: str) -> None:
        own = children.pop(parent, [])
        for place, run in enumerate(own):
            last = place == len(own) - 1
            found.append({**run, "branch": "" if parent is None else f"{before}{'└─ ' if last else '├─ '}"})
            add(run["name"], "" if parent is None else f"{before}{'   ' if last else '│  '}")

    add(None, "")
    while children:  # names of runs that were removed and made anew may go round in a circle
        add(next(iter(children)), "")
    return found


def named_runs(names: Iterable[str]) -> Iterator[Run]:
    """The runs of some names, each once; a folder that is no run stands for those in it.

    Raises:
        UserError: a name of none.
    """
    seen = set()
    for name in names:
        found = Run.find(name)
        inside = runs(Path(name).expanduser().absolute()) if found is None else [found]
        if not inside:
            raise Run.missing(name)
        for run in inside:
            if run.folder not in seen:
                seen.add(run.folder)
                yield run


def list_runs(folder: str | Path) -> list[dict[str, Any]]:
    """The runs in a folder, by name.

    Each has name, preset, task, status (running, finished, failed, stopped, damaged), step (of the last record), of (steps in all,
    None where the run does not say), best (metric and value), checkpoint (last step), MiB, tags, note, continue (command; None where
    that would only fail again), failure (why it failed), reason (what is wrong with its files), fields (its configuration, with dotted
    names) and metrics (the best value of each among its checkpoints). A damaged run costs its own line alone.
    """
    return [describe(run) for run in runs(folder)]


def describe(run: Run) -> dict[str, Any]:
    """One run; see `list_runs`."""
    row: dict[str, Any] = dict.fromkeys((*COLUMNS, "continue", "failure", "reason")) | {"name": run.name, "MiB": _mebibytes(run.folder)}
    labels = read_labels(run)
    row |= {"fields": {}, "metrics": {}, "tags": list(labels.tags), "note": labels.note}
    try:
        content = run.saved()
        experiment = content["experiment"]
        metric = experiment["run"].get("best_metric", "val_loss")
        checkpoints, state = run.checkpoints(), run.status()
        # After a loss that was not finite the next start would take the same steps to the same loss.
        ended = state in ("running", "finished") or (state == "failed" and run.not_finite_file.exists())
        names = dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.metrics)
        metrics = {name: best.metrics[name] for name in names if (best := best_of(checkpoints, name)) is not None}
        return row | {
            "parent": None if (parent := run.parent()) is None else str(parent),
            "preset": experiment.get("preset"),
            "task": str(experiment["task"].get("type", "")).rpartition(":")[2].removesuffix("Config"),
            "status": state,
            "step": run.last_step(),
            "of": content.get("steps") or (None if experiment["training"].get("max_epochs") else experiment["training"].get("max_steps")),
            "best": f"{metric} {metrics[metric]:.4f}" if metric in metrics else None,
            "checkpoint": checkpoints[-1].step if checkpoints else None,
            "fields": flatten(experiment),
            "metrics": metrics,
            "continue": None if ended or run.is_trial else continue_command(run.folder),
            "failure": _failure(run) if state == "failed" else None,
        }
    except DamagedRun as error:
        return row | {"status": "damaged", "reason": str(error)}
    except Exception as error:  # whatever else stands in files that anybody may have written
        return row | {"status": "damaged", "reason": f"its files are not those of a run ({type(error).__name__}: {error})"}


def _failure(run: Run) -> str | None:
    """Why a run failed, in a line."""
    lines = str((run.failure() or {}).get("reason", "")).splitlines()
    return lines[-1] if lines else None


def values(run: dict[str, Any]) -> dict[str, Any]:
    """All that a run of `list_runs` can be sorted and chosen by: fields, metrics and columns."""
    return {**run["fields"], **run["metrics"], **{name: run.get(name) for name in (*COLUMNS, *MORE_COLUMNS)}}


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """Numbers as bars from the least to the largest; of more than `width` numbers the last of each part."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) > width:
        finite = [finite[(i + 1) * len(finite) // width - 1] for i in range(width)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    return "".join(_BARS[min(int((value - low) / (high - low) * len(_BARS)), len(_BARS) - 1) if high > low else 0] for value in finite)


def _curve(run: Run, row: dict[str, Any]) -> str:
    """The metric by which the best checkpoint is chosen, and the training loss where that has not been measured yet."""
    records = run.metrics()
    for name in (str(row["fields"].get("run.best_metric", "val_loss")), "loss"):
        if values := [record[name] for record in records if isinstance(record.get(name), (int, float))]:
            return f"{sparkline(values)} {name} {values[-1]:.4g}"
    return ""


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows of cells, the first one the header, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _check_names(runs: list[dict[str, Any]], asked: Mapping[str, Iterable[str]]) -> None:
    """Refuses a name that no run knows."""
    known = {name for run in runs for name in values(run)}
    for option, names in asked.items():
        for name in names:
            if known and name not in known:
                raise UserError(f"{option} {name}: no run has a column, field or metric of this name{nearest(name, known)}")


def _sorted(runs: list[dict[str, Any]], name: str, reverse: bool) -> list[dict[str, Any]]:
    """Runs by a value: numbers before texts, runs without a value at the end."""
    having = [run for run in runs if values(run).get(name) is not None]

    def key(run: dict[str, Any]) -> tuple[bool, Any]:
        value = values(run)[name]
        return (False, value) if isinstance(value, (int, float)) else (True, str(value))

    return sorted(having, key=key, reverse=reverse) + [run for run in runs if values(run).get(name) is None]


def continue_command(run: Path) -> str:
    """The command that continues a run, with the code that it brings, wherever the file that it came from may be by now."""
    return shlex.join(["python", "-m", "ray_jobs.train", str(run.absolute())])


def _mebibytes(run: Path) -> float:
    return round(sum(file.stat().st_size for file in run.rglob("*") if file.is_file()) / 2**20, 1)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else f"{value:,}" if type(value) is int else str(value)


if __name__ == "__main__":
    main_entry(main)
