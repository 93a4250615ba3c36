"""What a sweep of many trials takes on the head node: memory of the command and of Ray's servers, and how long a report is on its way.

    python -m benchmarks.sweep_of_many [--trials 100] [--out benchmarks/results/sweep_of_many_2_cores.json]

Trainings of the quickstart model for ten steps each, with five reports, as many at once as there is room for. Memory is the resident set of
a process, read every two seconds. A report's time is that from its checkpoint, which is complete then, to the sweep's entry of the report:
through the trial to Ray Tune. Prints both for tenths of the trials: what grows with their number shows there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

EVERY = 2.0
"""Seconds between two looks."""
STEPS, REPORTS = 10, 5
SWEEP = """
from tuning.sweeps import Sweep

def many():
    points = tuple({{"optim.lr": 1e-3 + 1e-6 * number}} for number in range({trials}))
    return Sweep(preset="quickstart", points=points, scheduler="fifo", reports={reports}, overrides={overrides})
"""
OVERRIDES = (
    "--workers", "1", "--parallel.threads-per-worker", "1", "--training.max-epochs", "None", "--training.max-steps", str(STEPS),
    "--run.val-batches", "1",
)  # fmt: skip
ROLES = {"sweep": "tuning.sweep", "GCS": "gcs_server", "raylet": "raylet/raylet", "dashboard": "dashboard", "trials": "ray::ImplicitFunc"}
"""What is in the command line of a role's processes. The first that fits counts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "mine.py").write_text(SWEEP.format(trials=args.trials, reports=REPORTS, overrides=OVERRIDES))
        environment = {**os.environ, "PERCEIVER_HOME": folder}
        prepare = [sys.executable, "-m", "ray_jobs.preprocess", "quickstart"]
        subprocess.run(prepare, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        words = [sys.executable, "-m", "tuning.sweep", f"{home / 'mine.py'}:many", "--name", "many"]
        started = time.time()
        with open(home / "output", "w") as output:
            process = subprocess.Popen(words, env=environment, stdout=output, stderr=subprocess.STDOUT)
            memory, saved = watch(process, home / "sweeps" / "many")
        if process.returncode:
            raise SystemExit((home / "output").read_text()[-2000:])
        events = [json.loads(line) for line in (home / "sweeps" / "many" / "events.jsonl").read_text().splitlines()]
        parts = by_tenths(events, memory, saved, args.trials, started)
    head = ["trials over", "minutes", "report s", "longest", *(f"{role} MiB" for role in ROLES)]
    print("".join(f"{text:>14}" for text in head))
    for part in parts:
        print("".join(f"{part[name]:>14}" for name in head))
    if args.out:
        command = f"python -m benchmarks.sweep_of_many --trials {args.trials}"
        args.out.write_text(json.dumps({"command": command, "cpus": os.cpu_count(), "parts": parts}, indent=1) + "\n")


def watch(process: subprocess.Popen, folder: Path) -> tuple[list[dict[str, Any]], dict[tuple[str, int], float]]:
    """Looks at a sweep until it has ended.

    Returns:
        MiB by role at each look, with its time; and when each checkpoint of a trial was complete.
    """
    memory: list[dict[str, Any]] = []
    saved: dict[tuple[str, int], float] = {}
    while process.poll() is None:
        memory.append({"time": time.time(), **resident()})
        for marker in folder.glob("trials/*/checkpoints/step-*/checkpoint.json"):
            place = (marker.parts[-4], int(marker.parts[-2].rpartition("-")[2]))
            if place not in saved:
                try:
                    saved[place] = marker.stat().st_mtime
                except OSError:  # it was thrown away
                    continue
        time.sleep(EVERY)
    return memory, saved


def resident() -> dict[str, float]:
    """MiB of all processes of each role together."""
    found = dict.fromkeys(ROLES, 0.0)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            pages = int((folder / "statm").read_text().split()[1])
        except (OSError, IndexError):
            continue
        role = next((role for role, text in ROLES.items() if text in words), None)
        if role is not None and "benchmarks.sweep_of_many" not in words:
            found[role] += pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return found


def by_tenths(
    events: list[dict[str, Any]], memory: list[dict[str, Any]], saved: dict[tuple[str, int], float], trials: int, started: float
) -> list[dict[str, Any]]:
    """The median and the longest time of a report, and the most memory of each role, while a tenth of the trials ended."""
    ends = sorted(event["time"] for event in events if event["event"] == "end")
    reports = [
        (event["time"], event["time"] - saved[place])
        for event in events
        if event["event"] == "report" and (place := (event["trial"], event["step"])) in saved
    ]
    parts, since = [], started
    for number in range(1, 11):
        until = ends[number * trials // 10 - 1]
        times = [seconds for moment, seconds in reports if since < moment <= until]
        looks = [look for look in memory if since < look["time"] <= until]
        parts.append(
            {
                "trials over": number * trials // 10,
                "minutes": round((until - started) / 60, 1),
                "report s": round(statistics.median(times), 2),
                "longest": round(max(times), 2),
                **{f"{role} MiB": round(max(look[role] for look in looks)) for role in ROLES},
            }
        )
        since = until
    return parts


if __name__ == "__main__":
    main()
