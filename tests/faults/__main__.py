"""`python -m tests.faults --minutes 10 --seed 0`: disturbs real runs on this machine and shows what came of it.

It starts runs of its own in a temporary folder and ends processes of those alone.
"""

import argparse
import json
import signal
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import tests.conftest  # noqa: F401  # settings of Ray, before it is imported
from tests.faults.alone import EXPORT, PREPARATION, disturb_alone
from tests.faults.alone_causes import CAUSES
from tests.faults.causes import FAULTS
from tests.faults.disturb import disturb
from tests.faults.nodes import NODE_FAULTS, disturb_nodes
from tests.faults.outcome import ALONE, HOSTS, RAY, Outcome
from tests.faults.preparations import PREPARATION as PREPARATION_ON_RAY


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="no further fault is caused after this time")
    parser.add_argument("--seed", type=int, default=0, help="of the order of faults and the steps they are caused at")
    names = [fault.name for fault in (*FAULTS, *NODE_FAULTS, *CAUSES)] + [PREPARATION, EXPORT, PREPARATION_ON_RAY]
    parser.add_argument("--only", nargs="*", default=[], choices=names, help="these faults alone; on Ray in this order")
    parser.add_argument("--alone", action="store_true", help="faults of one process without Ray, many a minute, in place of runs on Ray")
    parser.add_argument(
        "--hosts", action="store_true", help="faults of whole machines, on a cluster of hosts that are namespaces of this one"
    )
    parser.add_argument("--home", type=Path, help="where the runs are; default: a temporary folder, removed in the end")
    parser.add_argument("--out", type=Path, default=Path("faults.json"), help="the outcomes, as JSON")
    parser.add_argument("--table", type=Path, nargs="+", help="cause nothing, show the table of outcomes of before")
    args = parser.parse_args()
    if args.table:
        print(table([Outcome(**entry) for path in args.table for entry in json.loads(path.read_text())]))
        return 0
    outcomes: list[Outcome] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # its runs end with it
    try:
        with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
            home = args.home or Path(temporary)
            if args.alone:
                disturb_alone(home / "alone", 60 * args.minutes, args.seed, args.only, outcomes)
            elif args.hosts:
                disturb_nodes(home, args.minutes, args.seed, args.only, outcomes)
            else:
                disturb(home, args.minutes, args.seed, args.only, outcomes)
    finally:
        args.out.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    print(table(outcomes))
    return 1 if any(outcome.wrong for outcome in outcomes) else 0


def table(outcomes: list[Outcome]) -> str:
    """Outcomes by place and fault, in Markdown."""
    lines = [
        "| fault | how | where | times | survived | seconds to train again: median, max | steps redone: median, max |",
        "|---|---|---|---|---|---|---|",
    ]
    kinds = dict.fromkeys(
        (place, outcome.fault, outcome.how) for place in (RAY, HOSTS, ALONE) for outcome in outcomes if outcome.place == place
    )
    for place, name, how in kinds:
        ours = [outcome for outcome in outcomes if (outcome.place, outcome.fault) == (place, name)]
        well = [outcome for outcome in ours if not outcome.wrong and outcome.seconds is not None]
        seconds, redone = [o.seconds for o in well], [o.redone for o in well if o.redone is not None]
        took = f"{statistics.median(seconds):.1f}, {max(seconds):.1f}" if well else "-"
        again = f"{statistics.median(redone):.0f}, {max(redone)}" if redone else "-"
        lines.append(f"| {name} | {how} | {place} | {len(ours)} | {len(well)} | {took} | {again} |")
    well = sum(not outcome.wrong and outcome.seconds is not None for outcome in outcomes)
    return "\n".join([*lines, f"| all | | | {len(outcomes)} | {well} | | |"])


if __name__ == "__main__":
    sys.exit(main())
