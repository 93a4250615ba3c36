"""`python -m tests.faults.goodput --minutes 8`: how much of the time a run trains that loses a worker once a minute.

Goodput is the time that the new steps would have taken without faults, as a part of the time that passed. How long a step takes is
measured in the same run: where it was fastest between two faults, so that no slow begin makes the part look larger.
"""

from __future__ import annotations

import argparse
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import tests.conftest  # noqa: F401  # settings of Ray, before it is imported
from perceiver.runs import Run
from tests.faults.causes import WORKER, send
from tests.support.jobs import Job

COMMAND = [
    "quickstart", "--training.max-epochs", "None", "--training.max-steps", "1000000", "--run.checkpoint-every", "25",
    "--run.val-every", "100000", "--run.log-every", "1", "--workers", "2", "--run.max-failures", "-1", "--name", "goodput",
]  # fmt: skip
PATIENCE = 240.0
"""Seconds within which a new step must come after a fault."""
PHASES = ("the run restarts from its last checkpoint", "continuing from step", "a new step")
"""What follows a fault: lines of the command, that the loss was noticed and that the workers have the checkpoint; and a new step."""


def goodput(home: Path, minutes: float, every: float, seed: int, words: Sequence[str] = ()) -> float:
    """The part of the time in which new steps were taken; says what each fault cost.

    Args:
        minutes: no fault is caused after this time.
        every: seconds of training from a new step after a fault to the next fault.
        words: of the command line, besides.
    """
    rng, job, run = random.Random(seed), Job("ray_jobs.train", *COMMAND, *words, home=home), Run(home / "runs" / "goodput")
    costs: list[list[float]] = []
    redone = []
    try:
        job.wait_for_step(run.folder, 20)
        begin, first = time.monotonic(), run.last_step()
        rates = [_train_on(job, run, every)]
        while time.monotonic() - begin < 60 * minutes:
            said, fault = len(job.output), time.monotonic()
            send(rng.sample(job.pids(WORKER), 1), signal.SIGKILL)
            last, seconds = run.last_step(), []
            while run.last_step() <= last:
                assert time.monotonic() - fault < PATIENCE, job.output[-300:]
                _train(job, 0.1)
                if len(seconds) < len(PHASES) - 1 and PHASES[len(seconds)] in job.output[said:]:
                    seconds.append(time.monotonic() - fault)
            costs.append([*seconds, time.monotonic() - fault])
            redone.append(max(0, last - int(re.findall(r"^continuing from step ([\d,]+)", job.output, re.M)[-1].replace(",", ""))))
            print(f"fault {len(costs)}: {_listed(costs[-1])}, {redone[-1]} steps taken again", flush=True)
            rates.append(_train_on(job, run, every))
        steps, passed = run.last_step() - first, time.monotonic() - begin
    finally:
        job.process.send_signal(signal.SIGINT)
        job.wait(PATIENCE)
    part = steps / max(rates) / passed
    print(f"steps a second between the faults: {', '.join(f'{rate:.2f}' for rate in rates)}")
    last = [cost[-1] for cost in costs]
    print(
        f"{len(costs)} faults in {passed / 60:.1f} minutes, {every:.0f} s of training between two: goodput {part:.1%}; a new step after "
        f"{median(last):.1f} s (median), {max(last):.1f} s (max); {sum(redone)} of {steps + sum(redone)} steps were taken again"
    )
    print("medians: " + _listed([median(column) for column in zip(*costs, strict=True)]))
    return part


def _listed(seconds: Sequence[float]) -> str:
    return ", ".join(f"{phase} after {second:.1f} s" for phase, second in zip(PHASES, seconds, strict=True))


def _train_on(job: Job, run: Run, seconds: float) -> float:
    """Lets a run train; its steps a second."""
    begin, first = time.monotonic(), run.last_step()
    _train(job, seconds)
    return (run.last_step() - first) / (time.monotonic() - begin)


def _train(job: Job, seconds: float) -> None:
    """Lets a run train."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert job.process.poll() is None, job.output
        time.sleep(min(0.1, seconds))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.goodput", description=__doc__, epilog="Other options are those of the training."
    )
    parser.add_argument("--minutes", type=float, default=8, help="no fault is caused after this time (%(default)g)")
    parser.add_argument("--every", type=float, default=60, help="seconds of training between two faults (%(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="of the workers that are killed")
    args, words = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="goodput-") as home:
        goodput(Path(home), args.minutes, args.every, args.seed, words)
    return 0


if __name__ == "__main__":
    sys.exit(main())
