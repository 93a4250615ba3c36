"""`python -m tests.doors --minutes 5 --seed 0`: tries every door of the package with damaged things, and shows what came of it.

A try is refused clearly (one sentence), or it worked; anything else has failed and is shown with what was tried. It writes to a temporary
folder alone, starts no cluster, and needs no network.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tests.conftest  # noqa: F401  # settings of Ray, before it is imported
from tests.doors.tries import DOORS, REFUSALS, Attempt

SECONDS = 60
"""A try that takes longer hangs."""


class Hangs(BaseException):
    """A try took too long."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.doors", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5, help="time for all doors together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(DOORS), default=list(DOORS), help="these doors alone")
    parser.add_argument("--out", type=Path, default=Path("doors.json"), help="what came of it, as JSON")
    args = parser.parse_args(argv)
    out = args.out.absolute()  # the working folder is a temporary one meanwhile
    found: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory(prefix="doors-") as temporary:
        os.environ["PERCEIVER_HOME"] = str(Path(temporary) / "home")
        os.chdir(temporary)
        for number, name in enumerate(args.only):
            folder = Path(temporary) / f"door-{number}"
            folder.mkdir()
            until = time.monotonic() + 60 * args.minutes / len(args.only)
            found[name] = go_through(DOORS[name], folder, until, args.seed, name)
            print(f"{name}: {dict(found[name])}", flush=True)
    out.write_text(json.dumps(found, indent=1))
    print(table(found))
    return 1 if any(counts["failed"] for counts in found.values()) else 0


def go_through(make: Callable[[Path], Attempt], folder: Path, until: float, seed: int, name: str) -> Counter[str]:
    """Tries a door until a time; how many tries were refused, worked or failed. What is not damaged must work."""
    attempt, counts, number = make(folder), Counter[str](), 0
    attempt(None)
    while time.monotonic() < until or not number:
        rng = random.Random(zlib.crc32(f"{name} {seed} {number}".encode()))
        counts[outcome(attempt, rng, f"{name}, seed {seed}, try {number}")] += 1
        number += 1
    return counts


def outcome(attempt: Attempt, rng: random.Random, where: str) -> str:
    """refused, worked or failed, which is shown."""
    before = signal.signal(signal.SIGALRM, _hang)
    signal.alarm(SECONDS)
    try:
        attempt(rng)
    except REFUSALS as error:
        if str(error).strip() and "Traceback" not in str(error):
            return "refused"
        _show(where, error)
    except SystemExit as stop:
        if stop.code in (0, None):
            return "worked"
        if stop.code == 2:
            return "refused"
        _show(where, stop)
    except (Exception, Hangs) as error:
        _show(where, error)
    else:
        return "worked"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return "failed"


def _hang(*ignored: Any) -> None:
    raise Hangs(f"took more than {SECONDS} seconds")


def _show(where: str, error: BaseException) -> None:
    last = "".join(traceback.format_tb(error.__traceback__)[-2:]).rstrip()
    print(f"FAILED {where}: {type(error).__name__}: {error}\n  tried: {'; '.join(getattr(error, '__notes__', []))}\n{last}", flush=True)


def table(found: dict[str, Counter[str]]) -> str:
    """Tries by door and outcome, in Markdown."""
    lines = ["| door | tried | refused clearly | worked | failed |", "|---|---|---|---|---|"]
    for name, counts in {**found, "all": sum(found.values(), Counter())}.items():
        lines.append(f"| {name} | {sum(counts.values()):,} | {counts['refused']:,} | {counts['worked']:,} | {counts['failed']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
