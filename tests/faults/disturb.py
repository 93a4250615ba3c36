"""Runs that are disturbed: one after the other, each with faults at random steps, and what came of each fault."""

import random
import re
import signal
import time
from collections import deque
from pathlib import Path

from perceiver.runs import Run
from tests.faults.causes import FAULTS, Fault, send
from tests.faults.invariants import broken
from tests.faults.outcome import Outcome
from tests.support.jobs import Job

STEPS = 300
COMMAND = [
    "quickstart", "--training.max-epochs", "None", "--training.max-steps", str(STEPS), "--training.global-batch-size", "8",
    "--model.num-latents", "4", "--model.num-latent-channels", "32", "--model.input.num-frequency-bands", "4",
    "--run.checkpoint-every", "10", "--run.val-every", "100", "--run.log-every", "1", "--run.val-batches", "4", "--workers", "2",
    "--parallel.threads-per-worker", "1", "--run.max-failures", "-1",
]  # fmt: skip
"""A light model: what a fault costs is to be seen, not what a step does."""
PATIENCE = 240.0
"""Seconds within which a run must train again after a fault."""


class Disturbed:
    """One run in a folder, with faults."""

    def __init__(self, home: Path, name: str, plain: Path) -> None:
        self.home, self.name, self.plain = home, name, plain
        self.run = home / "runs" / name
        self.jobs: list[Job] = []
        self.outcomes: list[Outcome] = []

    def go(self, faults: deque[Fault], rng: random.Random, end: float) -> None:
        """Trains to the end, with one fault after the other as long as there are steps and time; then looks whether all is well."""
        wrong = ["the harness ended before the run could be compared"]
        try:
            job = self._start()
            self._reach(job, rng.randint(11, 30))
            while faults and time.monotonic() < end and self._last() < STEPS - 60:
                job = self._cause(faults.popleft(), job, rng)
                self._reach(job, min(self._last() + rng.randint(5, 20), STEPS - 40))
            if status := job.wait(PATIENCE):
                raise AssertionError(f"the run ended with status {status}")
            wrong = self._settled()
        except AssertionError as error:
            wrong = [str(error).strip().splitlines()[0]]
        finally:
            for outcome in self.outcomes:
                outcome.wrong += wrong
            self._clean()

    def _start(self) -> Job:
        self.jobs.append(Job("ray_jobs.train", *COMMAND, "--name", self.name, home=self.home))
        return self.jobs[-1]

    def _last(self) -> int:
        return Run(self.run).last_step()

    def _reach(self, job: Job, step: int) -> None:
        job.wait_for_step(self.run, step, PATIENCE)

    def _cause(self, fault: Fault, job: Job, rng: random.Random) -> Job:
        """Causes a fault and waits until the run trains again; the job that then does."""
        outcome = Outcome(fault.name, fault.how, self.name, self._last())
        starts, start = self._starts(job), time.monotonic()
        if fault.stopped:
            job.process.send_signal(signal.SIGTERM)
            job.wait(PATIENCE)
            self._no_processes()
            outcome.step, start = self._last(), time.monotonic()
        if not fault.cause(job, self.run, rng):
            return self._start() if fault.stopped else job
        self.outcomes.append(outcome)
        try:
            if fault.status is not None:
                outcome.status = job.wait(PATIENCE)
                if outcome.status != fault.status:
                    outcome.wrong.append(f"exit status {outcome.status} instead of {fault.status}")
                outcome.step = self._last()
                self._look_for(fault, job, outcome)
                self._no_processes()
            if fault.status is not None or fault.stopped:
                job, starts = self._start(), 0
            if fault.restarts or fault.status is not None or fault.stopped:
                while self._starts(job) <= starts:
                    self._alive(job, start)
                outcome.redone = max(0, outcome.step - self._resumed(job))
            while self._last() <= outcome.step:
                self._alive(job, start)
            outcome.seconds = time.monotonic() - start
            if fault.stopped or fault.restarts:
                self._look_for(fault, job, outcome)
        except AssertionError as error:
            outcome.wrong.append(str(error).strip().splitlines()[0])
            raise
        return job

    def _look_for(self, fault: Fault, job: Job, outcome: Outcome) -> None:
        if fault.says not in job.output:
            outcome.wrong.append(f"the output does not say {fault.says!r} but {job.output.strip().splitlines()[-1:]}")

    def _alive(self, job: Job, since: float) -> None:
        assert job.process.poll() is None, f"the command ended with status {job.process.returncode}: {job.output.strip()[-300:]}"
        assert time.monotonic() - since < PATIENCE, f"no step within {PATIENCE:.0f} s"
        time.sleep(0.25)

    def _starts(self, job: Job) -> int:
        return len(re.findall(r"^(?:starting|continuing from step [\d,]+):", job.output, re.M))

    def _resumed(self, job: Job) -> int:
        found = re.findall(r"^(?:starting|continuing from step ([\d,]+)):", job.output, re.M)
        return int(found[-1].replace(",", "") or 0)

    def _settled(self) -> list[str]:
        self._no_processes()
        return broken(self.run, self.plain, self.jobs, [job.output for job in self.jobs])

    def _no_processes(self) -> None:
        """Waits for the end of what the commands so far have started."""
        end = time.monotonic() + 30
        while any(job.pids("") for job in self.jobs) and time.monotonic() < end:
            time.sleep(0.2)

    def _clean(self) -> None:
        """Ends what is left of this run's own processes."""
        for job in self.jobs:
            if job.process.poll() is None:
                job.process.kill()
                job.process.wait()
        self._no_processes()
        for job in self.jobs:
            send(job.pids(""), signal.SIGKILL)


def undisturbed(home: Path) -> Path:
    """The run that all others are compared with; its seconds of training are in its log."""
    Job("ray_jobs.train", *COMMAND, "--name", "undisturbed", home=home).finish(600)
    return home / "runs" / "undisturbed"


def disturb(home: Path, minutes: float, seed: int, only: list[str], outcomes: list[Outcome]) -> None:
    """Adds the outcomes of faults in a random order, as many as there is time for."""
    rng, end = random.Random(seed), time.monotonic() + 60 * minutes
    plain = home / "runs" / "undisturbed"
    if not (plain / "result.json").exists():
        plain = undisturbed(home)
    number = 0
    while time.monotonic() < end:
        faults = [fault for fault in FAULTS if not only or fault.name in only]
        rng.shuffle(faults)
        waiting = deque(faults)
        while waiting and time.monotonic() < end:
            number += 1
            run = Disturbed(home, f"seed-{seed}-{number}", plain)
            try:
                run.go(waiting, rng, end)
            finally:
                outcomes += run.outcomes
            for outcome in run.outcomes:
                print(outcome.line(), flush=True)
