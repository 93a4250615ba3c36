"""Runs that are disturbed: one after the other, each with faults at random steps, and what came of each fault."""

from __future__ import annotations

import random
import re
import shutil
import signal
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perceiver.runs import Run
from tests.faults.causes import FAULTS, WORKER, Fault, Place, send
from tests.faults.cluster import Cluster
from tests.faults.invariants import broken
from tests.faults.mounts import small
from tests.faults.outcome import Outcome
from tests.faults.preparations import PREPARATION, prepare_killed
from tests.support.jobs import Job

STEPS = 300
COMMAND = [
    "tests/faults/troubles.py:light", "--training.max-epochs", "None", "--training.max-steps", str(STEPS),
    "--training.global-batch-size", "8", "--run.checkpoint-every", "10", "--run.val-every", "100", "--run.log-every", "1",
    "--run.val-batches", "4", "--workers", "2", "--parallel.threads-per-worker", "1", "--run.max-failures", "-1",
    "--run.stall-minutes", "0.75",
]  # fmt: skip
PATIENCE = 240.0
"""Seconds within which a run must train again after a fault."""


def command(home: Path, name: str, stored: bool = False) -> list[str]:
    """The arguments of a run's command."""
    store = ["--run.storage", f"flaky://{home}/store"] if stored else []
    return [*COMMAND, "--callbacks.0.folder", str(home / "troubles"), "--name", name, *store]


class Disturbed:
    """One run in a folder, with faults."""

    def __init__(self, home: Path, name: str, plain: Path, cluster: Cluster, rng: random.Random, stored: bool = False) -> None:
        self.home, self.name, self.plain, self.cluster, self.rng, self.stored = home, name, plain, cluster, rng, stored
        self.run = home / "runs" / name
        self.jobs: list[Job] = []
        self.outcomes: list[Outcome] = []

    def go(self, faults: deque[Fault], end: float) -> None:
        """Trains to the end, with one fault after the other as long as there are steps and time; then looks whether all is well."""
        wrong = ["the harness ended before the run could be compared"]
        (self.home / "troubles" / "fast").unlink(missing_ok=True)
        try:
            place = self._start(bool(faults) and faults[0].own)
            self._reach(place, self.rng.randint(11, 30))
            while faults and time.monotonic() < end and self._last() < STEPS - 60:
                if faults[0].own and place.cluster is not None:
                    break  # it is the first of the next run
                place = self._cause(faults.popleft(), place)
                self._reach(place, min(self._last() + self.rng.randint(5, 20), STEPS - 40))
            (self.home / "troubles" / "fast").touch()
            if status := place.job.wait(PATIENCE):
                raise AssertionError(f"the run ended with status {status}: {place.job.output.strip()[-300:]}")
            self._nothing_runs(place)
            wrong = broken(self.run, self.plain, [job.output for job in self.jobs], self._left(place))
        except AssertionError as error:
            wrong = [str(error).strip().splitlines()[0]]
        finally:
            for outcome in self.outcomes:
                outcome.wrong += wrong
            self._clean()

    def _start(self, own: bool = False) -> Place:
        words = command(self.home, self.name, self.stored)
        self.jobs.append(Job("ray_jobs.train", *words, home=self.home) if own else self.cluster.train(self.home, *words))
        return Place(self.jobs[-1], None if own else self.cluster, self.run, self.home, self.rng)

    def _last(self) -> int:
        return Run(self.run).last_step()

    def _reach(self, place: Place, step: int) -> None:
        place.job.wait_for_step(self.run, step, PATIENCE)

    def _cause(self, fault: Fault, place: Place) -> Place:
        """Causes a fault and waits until the run trains again; where it then does."""
        outcome = Outcome(fault.name, fault.how, self.name, self._last(), self.cluster.place)
        starts, start = self._starts(place), time.monotonic()
        if fault.stopped:
            place.job.process.send_signal(signal.SIGTERM)
            place.job.wait(PATIENCE)
            self._nothing_runs(place)
            outcome.step, start = self._last(), time.monotonic()
        if not fault.cause(place):
            return self._start() if fault.stopped else place
        self.outcomes.append(outcome)
        try:
            if fault.status is not None:
                outcome.status = place.job.wait(PATIENCE)
                if outcome.status != fault.status:
                    outcome.wrong.append(f"exit status {outcome.status} instead of {fault.status}")
                outcome.step = self._last()
                self._look_for(fault, place, outcome)
                self._nothing_runs(place)
                outcome.wrong += [f"{what} is left" for what in self._left(place)]
                fault.undo(place)
            if fault.status is not None or fault.stopped:
                place, starts = self._start(), 0
            if fault.restarts or fault.status is not None or fault.stopped:
                while self._starts(place) <= starts:
                    self._alive(place, start)
                outcome.redone = max(0, outcome.step - self._resumed(place))
            while self._last() <= outcome.step:
                self._alive(place, start)
            outcome.seconds = time.monotonic() - start
            if fault.stopped or fault.restarts:
                self._look_for(fault, place, outcome)
        except AssertionError as error:
            outcome.wrong.append(str(error).strip().splitlines()[0])
            raise
        finally:
            fault.undo(place)
            print(outcome.line(), flush=True)
        return place

    def _look_for(self, fault: Fault, place: Place, outcome: Outcome) -> None:
        if fault.says not in place.job.output:
            outcome.wrong.append(f"the output does not say {fault.says!r} but {place.job.output.strip().splitlines()[-1:]}")

    def _alive(self, place: Place, since: float) -> None:
        job = place.job
        assert job.process.poll() is None, f"the command ended with status {job.process.returncode}: {job.output.strip()[-300:]}"
        assert time.monotonic() - since < PATIENCE, f"no step within {PATIENCE:.0f} s"
        time.sleep(0.1)

    def _starts(self, place: Place) -> int:
        return len(re.findall(r"^(?:starting|continuing from step [\d,]+):", place.job.output, re.M))

    def _resumed(self, place: Place) -> int:
        found = re.findall(r"^(?:starting|continuing from step ([\d,]+)):", place.job.output, re.M)
        return int(found[-1].replace(",", "") or 0)

    def _left(self, place: Place) -> list[str]:
        return [] if place.cluster is None else place.cluster.left()

    def _nothing_runs(self, place: Place) -> None:
        """Waits for the end of what a command that has ended has started."""
        end = time.monotonic() + 30
        while (place.job.pids("") or (place.cluster is not None and place.processes(WORKER))) and time.monotonic() < end:
            time.sleep(0.1)
        left = [name(pid) for pid in place.job.pids("")]
        assert not left, f"processes are left: {', '.join(left)}"

    def _clean(self) -> None:
        """Ends what is left of this run's own processes."""
        for job in self.jobs:
            if job.process.poll() is None:
                job.process.kill()
                job.process.wait()
            send(job.pids(""), signal.SIGKILL)
        shutil.rmtree(self.home / "store", ignore_errors=True)


def name(pid: int) -> str:
    """What a process is, in a few words."""
    try:
        return " ".join((Path("/proc") / str(pid) / "cmdline").read_text().split("\0"))[:80]
    except OSError:
        return "ended"


@contextmanager
def stage(home: Path) -> Iterator[tuple[Cluster, Path]]:
    """A cluster, and the run that all others are compared with, in a folder on a small file system of its own where that can be had."""
    with tempfile.TemporaryDirectory(prefix="cluster-") as elsewhere, small(home, "512m"):
        (home / "troubles").mkdir(parents=True, exist_ok=True)
        (home / "troubles" / "fast").touch()
        cluster = Cluster(Path(elsewhere))  # which a full disk of the runs does not concern
        try:
            plain = home / "runs" / "undisturbed"
            if not (plain / "result.json").exists():
                cluster.train(home, *command(home, "undisturbed")).finish(600)
            yield cluster, plain
        finally:
            cluster.close()


def follow(run: Disturbed, faults: deque[Fault], end: float, outcomes: list[Outcome]) -> None:
    """Disturbs a run, adds what came of it, and shows the ends of its commands' outputs where something is wrong."""
    try:
        run.go(faults, end)
    finally:
        outcomes += run.outcomes
        if any(outcome.wrong for outcome in run.outcomes):
            print("\n".join(f"  | {line}" for job in run.jobs for line in job.output.splitlines()[-12:]), flush=True)
            print("\n".join(f"  {word}" for word in dict.fromkeys(w for o in run.outcomes for w in o.wrong)), flush=True)


def disturb(home: Path, minutes: float, seed: int, only: list[str], outcomes: list[Outcome]) -> None:
    """Adds the outcomes of faults in a random order, or in that of `only`, as many as there is time for."""
    rng, end = random.Random(seed), time.monotonic() + 60 * minutes
    with stage(home) as (cluster, plain):
        number = 0
        while time.monotonic() < end:
            chosen = [fault for name in only for fault in FAULTS if fault.name == name] if only else rng.sample(FAULTS, len(FAULTS))
            # Those that need a cluster of their own begin a run, which continues in the one that is shared.
            plain_ones = deque(sorted((fault for fault in chosen if not fault.stored), key=lambda fault: not fault.own))
            for waiting in (plain_ones, deque(fault for fault in chosen if fault.stored)):
                while waiting and time.monotonic() < end:
                    number += 1
                    run = Disturbed(home, f"seed-{seed}-{number}", plain, cluster, rng, waiting[0].stored)
                    follow(run, waiting, end, outcomes)
            if (not only or PREPARATION in only) and time.monotonic() < end:
                outcomes.append(prepare_killed(home, f"prepared-{seed}-{number}", cluster, rng))
                print(outcomes[-1].line(), flush=True)
