"""A training step on all cores while another process takes one of them, by how threads wait for each other.

    python -m benchmarks.busy_neighbour [--workload img-clf-mnist] [--threads 2] [--out results.json]

Each line is a process of its own: the median of nine steps with the machine at rest, then beside a process that computes all the time.
GOMP_SPINCOUNT is how often a thread looks for the others in a loop before it sleeps (GNU's OpenMP, which PyTorch brings).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.step_time import WORKLOADS, build_side, timed_step

WAYS: dict[str, dict[str, str]] = {
    "as by default": {},
    "GOMP_SPINCOUNT=30000": {"GOMP_SPINCOUNT": "30000"},
    "GOMP_SPINCOUNT=3000": {"GOMP_SPINCOUNT": "3000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}


def steps(workload: str, threads: int) -> float:
    """Median milliseconds of a step."""
    side = build_side(workload, "ours", threads)
    assert side is not None
    _, loss, optimizer = side
    return 1e3 * statistics.median([timed_step(optimizer, loss)[0] for _ in range(11)][2:])


def measured(workload: str, threads: int, variables: dict[str, str]) -> float:
    """The same in a process with the given environment."""
    command = [sys.executable, "-m", "benchmarks.busy_neighbour", "--workload", workload, "--threads", str(threads), "--here"]
    environment = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    return float(subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="img-clf-mnist")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--here", action="store_true", help="measure in this process alone")
    args = parser.parse_args()
    if args.here:
        print(steps(args.workload, args.threads))
        return
    ways = {f"{args.threads} threads, {name}": (args.threads, variables) for name, variables in WAYS.items()} | {"1 thread": (1, {})}
    alone = {name: measured(args.workload, *way) for name, way in ways.items()}
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        beside = {name: measured(args.workload, *way) for name, way in ways.items()}
    finally:
        neighbour.kill()
    if args.out:
        found = {"workload": args.workload, "unit": "ms", "ways": list(ways)}
        found |= {"at_rest": list(alone.values()), "beside_a_busy_process": list(beside.values())}
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    for name in ways:
        print(f"{name:40} at rest {alone[name]:6.0f} ms   beside a busy process {beside[name]:6.0f} ms")


if __name__ == "__main__":
    main()
