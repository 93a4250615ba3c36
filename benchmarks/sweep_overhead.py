"""What a sweep costs: n trainings as trials of Ray Tune, against the same n one after another without it.

    python -m benchmarks.sweep_overhead [--trials 3] [--steps 60] [--out results.json]

Trainings of the quickstart model that differ in the learning rate, each on one worker with one thread, never two at a time:
- sweep: `python -m tuning.sweep` with scheduler fifo and one trial at once;
- one session: `ray_jobs.train` n times in one process with one Ray cluster;
- commands: `python -m ray_jobs.train` n times, each with a Ray cluster of its own.
All make the same validations and checkpoints. Prints seconds in all and per training, and whether the last losses are the same.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPORTS = 3
RATES = (1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3, 7e-3, 8e-3)
SWEEP = """
from tuning.sweeps import Sweep

def rates():
    points = tuple({{"optim.lr": rate}} for rate in {rates})
    return Sweep(preset="quickstart", points=points, scheduler="fifo", reports={reports}, overrides={overrides})
"""


def session(overrides: list[str], rates: list[float]) -> None:
    """Runs the trainings in this process on one Ray cluster."""
    from ray_jobs import train
    from ray_jobs.cli import parse_experiment
    from ray_jobs.ray_env import connect

    experiments = [parse_experiment(["quickstart", *one_training(overrides, rate, "session")], "session") for rate in rates]
    with connect(experiments[0].parallel, dashboard=True):
        for experiment in experiments:
            train.run(experiment)


def one_training(overrides: list[str], rate: float, prefix: str) -> list[str]:
    return [*overrides, "--optim.lr", str(rate), "--name", f"{prefix}-{rate}"]


def timed(*commands: list[str], home: Path) -> float:
    """Seconds that commands take one after another."""
    environment = {**os.environ, "PERCEIVER_HOME": str(home)}
    started = time.perf_counter()
    for command in commands:
        subprocess.run([sys.executable, *command], env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def last_losses(runs: Path, pattern: str) -> list[float]:
    return sorted(json.loads(path.read_text())["val_loss"] for path in runs.glob(f"{pattern}/result.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=3, choices=range(1, len(RATES) + 1))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--session", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    rates, every = list(RATES[: args.trials]), -(-args.steps // REPORTS)
    overrides = ["--workers", "1", "--parallel.threads-per-worker", "1", "--training.max-epochs", "None",
                 "--training.max-steps", str(args.steps), "--run.val-batches", "5"]  # fmt: skip
    apart = [*overrides, "--run.val-every", str(every), "--run.checkpoint-every", str(every)]
    if args.session:
        session(apart, rates)
        return
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "mine.py").write_text(SWEEP.format(rates=rates, reports=REPORTS, overrides=tuple(overrides)))
        timed(["-m", "ray_jobs.preprocess", "quickstart"], home=home)
        own = ["-m", "benchmarks.sweep_overhead", "--session", "--trials", str(args.trials), "--steps", str(args.steps)]
        seconds = {
            "sweep": timed(["-m", "tuning.sweep", f"{home / 'mine.py'}:rates", "--concurrent", "1"], home=home),
            "one session": timed(own, home=home),
            "commands": timed(
                *(["-m", "ray_jobs.train", "quickstart", *one_training(apart, rate, "command")] for rate in rates), home=home
            ),
        }
        losses = [
            last_losses(home / "sweeps" / "rates" / "trials", "*"),
            last_losses(home / "runs", "session-*"),
            last_losses(home / "runs", "command-*"),
        ]
    for name, value in seconds.items():
        print(f"{name:<12} {value:7.1f} s   {value / args.trials:6.1f} s a training")
    print(f"the same losses at the end: {losses[0] == losses[1] == losses[2] and len(losses[0]) == args.trials}")
    if args.out:
        command = f"python -m benchmarks.sweep_overhead --trials {args.trials} --steps {args.steps}"
        results = {"command": command, "trials": args.trials, "steps": args.steps, "seconds": seconds, "losses": losses}
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
