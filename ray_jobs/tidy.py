"""`perceiver rm|archive|prune RUN ...`: remove runs, pack them away, or remove the checkpoints of the worse ones.

Each lists what would go, with sizes, and asks; --yes answers. A run that is being trained is never touched, and files that are not the
run's stay where they are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from perceiver.config import UserError
from perceiver.housekeeping import (
    archive,
    foreign_files,
    losers,
    own_files,
    readable_size,
    remove,
    remove_checkpoints,
    size_of,
    superfluous,
    unused,
)
from perceiver.runs import Run
from perceiver.terminal import CommandParser, number_of
from ray_jobs.cli import main_entry, refuse_empty
from ray_jobs.runs import named_runs, print_table

ACTIONS = {
    "rm": "Removes runs with all their files.",
    "archive": "Packs each run into a file NAME.tar and removes its folder. tar -xf restores it.",
    "prune": "Removes all checkpoints of the worse runs, and all but the best and the last of the best runs. Metrics and settings stay.",
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in ACTIONS:
        raise UserError(f"say what to do: one of {', '.join(ACTIONS)}")
    action, *rest = argv
    parser = CommandParser(prog=f"perceiver {action}", description=ACTIONS[action])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="runs: folders, names among those of $PERCEIVER_HOME, or a folder of runs")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    if action == "archive":
        parser.add_argument("--to", metavar="FOLDER", help="folder for the files; default: archive/ next to the folder of runs")
    if action == "prune":
        parser.add_argument(
            "--keep", type=int, default=1, metavar="N", help="number of the best runs that keep their checkpoints (%(default)s)"
        )
        parser.add_argument(
            "--metric",
            help="metric by which runs are ranked (val_acc); default: the one by which the first run selects its best checkpoint",
        )
        parser.add_argument(
            "--unfinished", action="store_true", help="also remove checkpoints of unfinished runs, which then start from the beginning"
        )
    args = parser.parse_args(rest)
    refuse_empty(args, ("runs",))
    found = list(named_runs(args.runs))
    if action == "rm":
        return _rm(found, args.yes)
    if action == "archive":
        return _archive(found, args.yes, Path(args.to).expanduser() if args.to else None)
    if args.keep < 0:
        raise UserError(f"--keep is {args.keep} and must be at least 0")
    return _prune(found, args.yes, args.keep, args.metric, args.unfinished)


def _rm(runs: Sequence[Run], yes: bool) -> int:
    states = {run: run.status() for run in runs}
    with unused(runs):
        sizes = {run: size_of(own_files(run)) for run in runs}
        print_table(
            [["run", "status", "step", "size"], *([str(r.folder), states[r], f"{r.last_step():,}", readable_size(sizes[r])] for r in runs)]
        )
        for run in runs:
            if left := foreign_files(run):
                print(f"these are not the run's and stay: {', '.join(str(path) for path in left)}")
        if not _agreed(f"remove {_runs(runs)}, {readable_size(sum(sizes.values()))}?", yes):
            return 1
        for run in runs:
            remove(run)
    print(f"removed {_runs(runs)}: {readable_size(sum(sizes.values()))}")
    return 0


def _archive(runs: Sequence[Run], yes: bool, folder: Path | None) -> int:
    states = {run: run.status() for run in runs}
    with unused(runs):
        targets = {run: (folder or run.folder.parent.parent / "archive") / f"{run.name}.tar" for run in runs}
        if len(set(targets.values())) < len(runs):
            raise UserError("two of the runs have the same name: archive them with another --to each")
        if taken := [str(target) for target in targets.values() if target.exists()]:
            raise UserError(f"{taken[0]} exists already: name another folder by --to, or remove it")
        sizes = {run: size_of([run.folder]) for run in runs}
        print_table(
            [["run", "status", "size", "file"], *([str(r.folder), states[r], readable_size(sizes[r]), str(targets[r])] for r in runs)]
        )
        if not _agreed(f"pack {_runs(runs)}, {readable_size(sum(sizes.values()))}, and remove the folders?", yes):
            return 1
        for run, target in targets.items():
            archive(run, target)
            left = remove(run)
            print(f"packed {target}; back with: tar -xf {target} -C {run.folder.parent}")
            if left:
                print(f"these are in it, too, and stay: {', '.join(map(str, left))}")
    return 0


def _prune(runs: Sequence[Run], yes: bool, keep: int, metric: str | None, unfinished: bool) -> int:
    with unused(runs):
        pruned = [run for run in runs if unfinished or run.result() is not None]
        for run in runs:
            if run not in pruned:
                print(f"{run.name} is not finished and keeps its checkpoints, to be continued (--unfinished: it loses them)")
        if not pruned:
            return 0
        chosen = _metric(pruned, metric)
        winners, others = losers(pruned, chosen, keep)
        goes = {run: superfluous(run, chosen, run in winners) for run in [*winners, *others]}
        rows = [["run", f"by {chosen}", "checkpoints that go", "size"]]
        for run, paths in goes.items():
            rows.append(
                [
                    run.name,
                    "kept" if run in winners else "worse",
                    f"{len(paths)} of {len(run.checkpoints())}",
                    readable_size(size_of(paths)),
                ]
            )
        print_table(rows)
        size = sum(size_of(paths) for paths in goes.values())
        number = sum(map(len, goes.values()))
        if not number:
            print("nothing to remove")
            return 0
        if not _agreed(f"remove {number_of(number, 'checkpoint')}, {readable_size(size)}?", yes):
            return 1
        for paths in goes.values():
            remove_checkpoints(paths)
    print(f"removed {number_of(number, 'checkpoint')}: {readable_size(size)}")
    return 0


def _metric(runs: Sequence[Run], name: str | None) -> str:
    """The metric that checkpoints are ranked by.

    Raises:
        UserError: no checkpoint has it.
    """
    known = {metric for run in runs for checkpoint in run.checkpoints() for metric in checkpoint.metrics}
    wanted = name or str(runs[0].saved()["experiment"]["run"].get("best_metric", "val_loss"))
    for candidate in (wanted, f"val_{wanted}"):
        if candidate in known:
            return candidate
    if name is None:
        return wanted
    raise UserError(f"--metric {name}: no checkpoint has a metric of this name; there are {', '.join(sorted(known)) or 'none'}")


def _runs(runs: Sequence[Run]) -> str:
    return f"{len(runs)} runs" if len(runs) > 1 else f"run {runs[0].name}"


def _agreed(question: str, yes: bool) -> bool:
    """Whether the person agrees.

    Raises:
        UserError: there is nobody to ask.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError("nothing was removed: this is no terminal to ask on; give --yes")
    if input(f"{question} [y/N] ").strip().lower() in ("y", "yes"):
        return True
    print("nothing was removed")
    return False


if __name__ == "__main__":
    main_entry(main)
