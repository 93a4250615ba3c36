"""`perceiver compare RUN RUN ... [--by FIELD] [--metric M]`: shows what differs between runs, and whether it is due to chance.

It shows the settings in which they differ and what each reached. It only reads the runs' folders and loads no PyTorch. All runs are
compared with the first run or group. Runs that differ only in their seeds form a group; two runs that were evaluated on the same data are
compared example by example.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perceiver import provenance
from perceiver.comparison import (
    AXES,
    LABELS,
    SEED,
    ComparedRun,
    chosen_metric,
    different_code,
    different_fields,
    grouped,
    paired_differences,
    read_runs,
)
from perceiver.config import UserError
from perceiver.disk import finite
from perceiver.significance import Difference, Group, welch
from perceiver.terminal import CommandParser, summary
from ray_jobs.cli import main_entry, refuse_empty
from ray_jobs.program import program
from ray_jobs.runs import named_runs, print_table

_SIDE_BY_SIDE = 5
"""Runs up to which each is a column of the table of fields; more of them are rows."""


def main(argv: list[str]) -> int:
    parser = CommandParser(prog=program("ray_jobs.compare"), description=summary(__doc__))
    parser.add_argument("runs", nargs="+", metavar="RUN", help="runs: folders, names among those of $PERCEIVER_HOME, or a folder of runs")
    parser.add_argument(
        "--metric", help="metric to compare by (val_acc); default: the one by which the first run selects its best checkpoint"
    )
    parser.add_argument("--by", metavar="FIELD", help="group runs by the value of a field (optim.lr); default: by all fields except seeds")
    parser.add_argument("--price-per-hour", type=float, metavar="P", help="price of one device (worker) per hour, to show the cost")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves over steps, examples, FLOPs and hours (.png, .pdf or .svg)")
    parser.add_argument("--json", action="store_true", help="print all of it as one JSON object")
    args = parser.parse_args(argv)
    refuse_empty(args, ("runs",))
    if args.price_per_hour is not None and not args.price_per_hour >= 0:
        raise UserError(f"--price-per-hour is {args.price_per_hour} and must be at least 0")
    plot = _picture(args.plot) if args.plot else None
    found = read_runs(named_runs(args.runs))
    if len(found) < 2:
        raise UserError("a comparison needs two runs: perceiver compare RUN RUN")
    metric = chosen_metric(found, args.metric)
    result = compare(found, metric, args.by, args.price_per_hour)
    if args.json:
        print(json.dumps(finite(result), indent=1))
    else:
        _print(result)
    if plot is not None:
        draw(found, metric, plot)
        if not args.json:
            print(f"\ncurves: {plot}")
    return 0


def compare(compared: Sequence[ComparedRun], metric: str, by: str | None = None, price: float | None = None) -> dict[str, Any]:
    """All of a comparison, as plain data.

    Args:
        compared: the runs; the first one is what the others are compared with.
        metric: what they are compared by.
        by: a field to group them by; None: runs that differ in their seeds alone are a group.
        price: of a device for an hour.
    """
    groups = grouped(compared, metric, by)
    pairs, paired_metric = paired_differences(compared, metric)
    replicated = by is not None or any(len(group.runs) > 1 for group in groups)
    return {
        "metric": metric,
        "by": by,
        "higher_is_better": any(metric in run.higher_is_better for run in compared),
        "runs": [_result(run, metric, price) for run in compared],
        "fields": different_fields(compared),
        "code": different_code(compared),
        "provenance": provenance.between([run.run for run in compared]),
        "data": {run.name: run.digest for run in compared} if len({run.digest for run in compared}) > 1 else {},
        "versions": {run.name: run.version for run in compared} if len({run.version for run in compared}) > 1 else {},
        "paired": {
            "metric": paired_metric,
            "with": compared[0].name,
            "runs": [
                {"run": run.name, **_difference(difference), "note": note}
                for run, (difference, note) in zip(compared[1:], pairs, strict=True)
            ],
        },
        "groups": [
            {**_group(group), **({} if group is groups[0] else _difference(welch(group, groups[0])))} for group in groups if replicated
        ],
    }


def draw(compared: Sequence[ComparedRun], metric: str, path: Path) -> None:
    """Writes the picture of the runs' curves."""
    from perceiver.plots import compared_curves

    curves = {run.name: run.curve(metric) for run in compared}
    panels = {
        LABELS[axis]: {
            name: [(getattr(p, axis), p.value) for p in points if getattr(p, axis) is not None] for name, points in curves.items()
        }
        for axis in AXES
    }
    compared_curves({label: lines for label, lines in panels.items() if any(lines.values())}, metric).savefig(path)


def _picture(name: str) -> Path:
    path = Path(name).expanduser()
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot is {name} and must end in .png, .pdf or .svg")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--plot is {name}, and there is no folder {path.parent}")
    return path


def _result(run: ComparedRun, metric: str, price: float | None) -> dict[str, Any]:
    curve, best, hours = run.curve(metric), run.best(metric), run.hours()
    device_hours = None if hours is None else hours * run.workers
    return {
        "run": run.name,
        "folder": str(run.run.folder),
        "best": best and best.value,
        "at_step": best and best.step,
        "last": curve[-1].value if curve else None,
        "last_step": curve[-1].step if curve else None,
        "examples": best and best.examples,
        "flops": best and best.flops,
        "hours": best and best.hours,
        "hours_in_all": hours,
        "device_hours_in_all": device_hours,
        "cost": None if price is None or device_hours is None else price * device_hours,
    }


def _difference(difference: Difference | None) -> dict[str, Any]:
    if difference is None:
        return {"difference": None}
    return {
        "difference": difference.value, "low": difference.low, "high": difference.high, "p": difference.p, "real": difference.is_real,
    }  # fmt: skip


def _group(group: Group) -> dict[str, Any]:
    return {
        "group": group.name,
        "runs": [run.name for run in group.runs],
        "seeds": [run.fields.get(SEED) for run in group.runs],
        "values": list(group.values),
        "mean": group.mean,
        "deviation": group.deviation,
        "margin": group.margin,
    }


# ----------------------------------------------------------------------------------------------------------- for a person


def _print(result: dict[str, Any]) -> None:
    names = [run["run"] for run in result["runs"]]
    _print_different(result, names)
    direction = "higher" if result["higher_is_better"] else "lower"
    print(f"\n{result['metric']} ({direction} is better); examples, FLOPs and hours until the best value")
    header = ["run", "best", "at step", "last", "last step", "examples", "FLOPs", "hours", "device-hours in all", "cost"]
    keys = ("best", "at_step", "last", "last_step", "examples", "flops", "hours", "device_hours_in_all", "cost")
    rows = [header, *([run["run"], *(_cell(run[key]) for key in keys)] for run in result["runs"])]
    print_table([row if any(run["cost"] is not None for run in result["runs"]) else row[:-1] for row in rows])
    _print_groups(result)
    _print_paired(result)


def _print_different(result: dict[str, Any], names: Sequence[str]) -> None:
    fields = {_short_name(name): [_value(value) for value in values] for name, values in result["fields"].items()}
    if not fields:
        print("the runs have the same configuration")
    elif len(names) <= _SIDE_BY_SIDE:
        print_table([["field", *names], *([name, *values] for name, values in fields.items())])
    else:
        print_table([["run", *fields], *([name, *(values[i] for values in fields.values())] for i, name in enumerate(names))])
    for run, files in result["code"].items():
        print(f"code of {run} differs from {names[0]}'s: {', '.join(files)}")
    for run, lines in result["provenance"].items():
        print(f"{run} was begun with {'; '.join(lines)} (that of {names[0]})")
    if result["data"]:
        print("data differs: " + ", ".join(f"{run} {found}" for run, found in result["data"].items()))
    if result["versions"]:
        print("versions of the package differ: " + ", ".join(f"{run} {found}" for run, found in result["versions"].items()))


def _print_groups(result: dict[str, Any]) -> None:
    groups = result["groups"]
    if not groups:
        return
    what = "runs that differ in their seeds alone" if result["by"] is None else f"runs by their {result['by']}"
    print(f"\nbest {result['metric']} of {what}, with 95% t-intervals")
    rows = [["group", "runs", "mean", "deviation", "95% interval", f"against {groups[0]['group']}", "p"]]
    for group in groups:
        interval = _interval(group["mean"] - group["margin"], group["mean"] + group["margin"])
        against = "" if group is groups[0] else _against(group) or "needs two runs of each"
        rows.append([
            group["group"], str(len(group["runs"])), _cell(group["mean"]), _cell(group["deviation"]), interval, against, _p(group.get("p")),
        ])  # fmt: skip
    print_table(rows)
    for group in groups[1:]:
        if group["difference"] is not None:
            print(f"{group['group']}: {_verdict(group, result['higher_is_better'])} than {groups[0]['group']}, over seeds")


def _print_paired(result: dict[str, Any]) -> None:
    paired = result["paired"]
    metric = paired["metric"]
    print(f"\n{metric} against {paired['with']} on the same examples (paired bootstrap, of what `perceiver evaluate` wrote)")
    rows = [["run", "difference and 95% interval", "p", ""]]
    rows += [[run["run"], _against(run), _p(run.get("p")), run["note"]] for run in paired["runs"]]
    print_table(rows)
    higher = metric == "val_acc"
    for run in paired["runs"]:
        if run["difference"] is not None:
            print(f"{run['run']}: {_verdict(run, higher)} than {paired['with']}, on these examples")


def _verdict(difference: dict[str, Any], higher: bool) -> str:
    if not difference["real"]:
        return "not shown to be better or worse"
    return "better" if (difference["difference"] > 0) == higher else "worse"


def _against(difference: dict[str, Any]) -> str:
    if difference.get("difference") is None:
        return ""
    return f"{difference['difference']:+.4g} {_interval(difference['low'], difference['high'])}"


def _interval(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"[{low:.4g}, {high:.4g}]"


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _cell(value: Any) -> str:
    if value is None or isinstance(value, float) and math.isnan(value):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _short_name(name: str) -> str:
    return name.removesuffix(".type").replace("_", "-")


def _value(value: Any) -> str:
    if isinstance(value, str) and value.startswith("perceiver.") and ":" in value:
        return value.partition(":")[2]
    return "-" if value is None else str(value)


if __name__ == "__main__":
    main_entry(main)
