"""`perceiver show RUN`: shows all that is known about a run: its progress, metrics, checkpoints, evaluations, tags and note."""

from __future__ import annotations

import json
from typing import Any

from perceiver.comparison import ComparedRun
from perceiver.disk import finite
from perceiver.evaluations import evaluations
from perceiver.housekeeping import readable_size, size_of
from perceiver.runs import Run
from perceiver.terminal import CommandParser, number_of, summary
from ray_jobs.cli import main_entry, refuse_empty
from ray_jobs.program import program
from ray_jobs.runs import describe, print_table, sparkline


def main(argv: list[str]) -> int:
    parser = CommandParser(prog=program("ray_jobs.show"), description=summary(__doc__))
    parser.add_argument("run", help="folder of a run, or its name among those of $PERCEIVER_HOME")
    parser.add_argument("--fields", action="store_true", help="also show all fields of its configuration")
    parser.add_argument("--json", action="store_true", help="print all of it as one JSON object")
    args = parser.parse_args(argv)
    refuse_empty(args, ("run",))
    run = Run.open(args.run)
    found = everything(run)
    if args.json:
        print(json.dumps(finite(found), indent=1))
    else:
        _print(found, args.fields)
    return 0


def everything(run: Run) -> dict[str, Any]:
    """All that is known of a run, as plain data; what `list_runs` says of it, and more."""
    row = describe(run)
    if row["status"] == "damaged":
        return row
    read = ComparedRun(run)
    names = dict.fromkeys(name for record in read.records for name in record if name.startswith("val_"))
    curves = {name: read.curve(name) for name in ("loss", *names)}
    return row | {
        "folder": str(run.folder),
        "version": read.version,
        "data": read.digest,
        "hours": read.hours(),
        "flops_per_example": read.flops_per_example,
        "curves": {
            name: {"values": [p.value for p in points], "best": best.value, "at_step": best.step, "last": points[-1].value}
            for name, points in curves.items()
            if (best := read.best(name)) is not None
        },
        "checkpoints": [
            {"step": each.step, "bytes": size_of([each.path]), "metrics": each.metrics} for each in read.checkpoints
        ],
        "evaluations": [
            {"step": each.step, "averaged": each.averaged, "data": each.digest, "metrics": each.metrics} for each in evaluations(run)
        ],
        "code": sorted(run.code().files),
        "failure": (run.failure() or {}).get("reason"),
        "stopped": run.stopped(),
    }  # fmt: skip


def _print(found: dict[str, Any], fields: bool) -> None:
    if found["status"] == "damaged":
        print(f"{found['name']}: damaged: {found['reason']}")
        return
    of = "" if found["of"] is None else f" of {found['of']:,}"
    hours = "" if found["hours"] is None else f", {number_of(float(format(found['hours'], '.3g')), 'hour')} of training"
    print(f"{found['name']}: {found['task']} ({found['preset']}), {found['status']}, step {found['step']:,}{of}{hours}")
    print(f"folder {found['folder']}, {found['MiB']:,} MiB; version {found['version'] or 'unknown'}; data {found['data']}")
    for name in ("note", "stopped", "failure"):
        if found[name]:
            print(f"{name}: {found[name]}")
    if found["tags"]:
        print(f"tags: {', '.join(found['tags'])}")
    if found["code"]:
        print(f"code of its own: {', '.join(found['code'])}")
    if found["curves"]:
        print()
        rows = [["metric", "best", "at step", "last", "curve"]]
        rows += [
            [name, f"{curve['best']:.4g}", f"{curve['at_step']:,}", f"{curve['last']:.4g}", sparkline(curve["values"])]
            for name, curve in found["curves"].items()
        ]
        print_table(rows)
    if found["checkpoints"]:
        print()
        rows = [["checkpoint", "size", "metrics"]]
        rows += [[f"{each['step']:,}", readable_size(each["bytes"]), _metrics(each["metrics"])] for each in found["checkpoints"]]
        print_table(rows)
    if found["evaluations"]:
        print()
        rows = [["evaluated", "data", "metrics"]]
        rows += [
            [f"step {each['step']:,}{' averaged' if each['averaged'] else ''}", each["data"], _metrics(each["metrics"])]
            for each in found["evaluations"]
        ]
        print_table(rows)
    if fields:
        print()
        print_table([["field", "value"], *([name.replace("_", "-"), str(value)] for name, value in found["fields"].items())])
    if found["failure"]:
        print(f"\nfailed: {found['failure']}")
    if found["continue"]:
        print(f"\ncontinue: {found['continue']}")


def _metrics(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())


if __name__ == "__main__":
    main_entry(main)
