"""`python -m tests.faults.soak --minutes 30`: a long training, whose processes must not grow; with `--alone` in one process without Ray.

Memory, open files and threads of every process of the run are looked at every few seconds; the slope over the second half of the time,
when all that is made once is made, must be about nothing.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

import tests.conftest  # noqa: F401  # settings of Ray, before it is imported
from perceiver.plots import color, frame, new_figure, plain, png
from perceiver.runs import Run
from tests.faults.alone_causes import Trained
from tests.support.jobs import Job

COMMAND = [
    "quickstart", "--training.max-epochs", "None", "--training.max-steps", "1000000", "--training.global-batch-size", "32",
    "--workers", "2", "--run.checkpoint-every", "50", "--run.val-every", "100", "--run.val-batches", "4", "--name", "soak",
]  # fmt: skip
NAMED = 5
"""Processes with a name and a colour of their own in the plot: those with most memory."""
EVERY = 5.0
"""Seconds between two looks."""
GROWTH = {"memory": 0.10, "files": 0.05, "threads": 0.05}
"""How much a process may grow over the second half, as a part of what it has."""
QUANTITIES = tuple(GROWTH)
LOGS = 250
"""Ray's reader of log files keeps up to 200 of them open, one or two of each process that was ever started, and some of its own."""


@dataclass(frozen=True)
class Look:
    seconds: float
    memory: float
    """MiB that are resident and its own: what it has read of the object store or of a library is there once for all."""
    files: float
    threads: float


def look(pid: int, seconds: float) -> Look | None:
    """What a process holds; None: it has ended."""
    folder = Path("/proc") / str(pid)
    try:
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line)
        return Look(seconds, int(status["RssAnon"].split()[0]) / 1024, len(list((folder / "fd").iterdir())), int(status["Threads"]))
    except (OSError, KeyError):
        return None


def soak(minutes: float, home: Path) -> dict[str, list[Look]]:
    """Trains for so long; what each process held, by its name and id. The training is then interrupted, as by Ctrl-C."""
    job = Job("ray_jobs.train", *COMMAND, home=home)
    looks: dict[int, list[Look]] = defaultdict(list)
    names: dict[int, str] = {}  # Ray's processes have their names later than they begin
    start = time.monotonic()
    try:
        while time.monotonic() - start < 60 * minutes:
            assert job.process.poll() is None, job.output
            for pid in job.pids(""):
                seen = look(pid, time.monotonic() - start)
                if seen is not None:
                    looks[pid].append(seen)
                    names[pid] = _name(pid)
            time.sleep(EVERY)
    finally:
        job.process.send_signal(signal.SIGINT)
        status = job.wait(240)
    assert status == 130, job.output
    print(f"{Run(home / 'runs' / 'soak').last_step():,} steps")
    return {names[pid]: seen for pid, seen in looks.items()}


def soak_alone(minutes: float, home: Path) -> dict[str, list[Look]]:
    """The same of a training in one process: epochs, validations, checkpoints and records without end."""
    run = Trained(home, "soak", random.Random(0), steps=10_000_000)
    child, start = run.start(), time.monotonic()
    looks: list[Look] = []
    try:
        while time.monotonic() - start < 60 * minutes:
            assert not child.ended(), child.output
            if seen := look(child.pid, time.monotonic() - start):
                looks.append(seen)
            time.sleep(EVERY)
    finally:
        child.kill()
    print(f"{run.last():,} steps, {run.last() * run.experiment().training.global_batch_size / run.rows:,.0f} epochs")
    return {"training": looks}


def _name(pid: int) -> str:
    """Ray's own title of a process, or the program that it runs, with its id."""
    try:
        words = (Path("/proc") / str(pid) / "cmdline").read_text().split("\0")
    except OSError:
        words = ["ended"]
    scripts = [Path(word).stem for word in words[1:] if word.endswith(".py")]
    modules = [after for word, after in pairwise(words) if word == "-m"]
    title = words[0] if words[0].startswith("ray::") else (scripts + modules + [Path(words[0]).name])[0]
    return f"{title} {pid}"


def growth(looks: list[Look], quantity: str) -> float:
    """Growth over the second half by the line through it, as a part of the mean."""
    half = looks[len(looks) // 2 :]
    seconds, values = np.array([entry.seconds for entry in half]), np.array([getattr(entry, quantity) for entry in half])
    slope = np.polyfit(seconds, values, 1)[0]
    return float(slope * (seconds[-1] - seconds[0]) / max(values.mean(), 1))


def growing(looks: dict[str, list[Look]], minutes: float) -> list[str]:
    """Processes that were there all the time and grew, each in a sentence."""
    found = []
    for name, seen in looks.items():
        if len(seen) < 10 or seen[-1].seconds - seen[0].seconds < 0.7 * 60 * minutes:
            continue
        for quantity, limit in GROWTH.items():
            if quantity == "files" and name.startswith("log_monitor") and seen[-1].files <= LOGS:
                continue
            if (rate := growth(seen, quantity)) > limit:
                found.append(f"{name}: {quantity} grew by {rate:.0%} in the second half, to {getattr(seen[-1], quantity):.0f}")
    return found


def plot(looks: dict[str, list[Look]], path: Path) -> None:
    figure = new_figure(1000, 1000, "What processes of a long training hold")
    largest = sorted((item for item in looks.items() if len(item[1]) >= 10), key=lambda item: -max(look.memory for look in item[1]))
    for axes, quantity in zip(figure.subplots(len(QUANTITIES), sharex=True), QUANTITIES, strict=True):
        for n, (name, seen) in enumerate(largest):
            minutes, values = [entry.seconds / 60 for entry in seen], [getattr(entry, quantity) for entry in seen]
            axes.plot(minutes, values, color=color(n), label=plain(name) if n < NAMED else None, zorder=3 - n / 100)
        frame(
            axes,
            x="minutes" if quantity == QUANTITIES[-1] else "",
            y={"memory": "memory (MiB)", "files": "open files"}.get(quantity, quantity),
        )
        axes.set_ylim(bottom=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    path.write_bytes(png(figure))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--alone", action="store_true", help="one process without Ray")
    parser.add_argument("--out", type=Path, default=Path("soak"), help="path of the plot (.png) and the numbers (.json), without suffix")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as home:
        looks = (soak_alone if args.alone else soak)(args.minutes, Path(home))
    plot(looks, args.out.with_suffix(".png"))
    args.out.with_suffix(".json").write_text(json.dumps({name: [vars(entry) for entry in seen] for name, seen in looks.items()}))
    found = growing(looks, args.minutes)
    print("\n".join(found) or f"{len(looks)} processes, none of which grew")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
