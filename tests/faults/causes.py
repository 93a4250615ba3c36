"""The faults: each is caused in a real run, by what it does to processes and files of that run alone."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from perceiver.runs import Run
from tests.faults.cluster import Cluster
from tests.faults.mounts import fill, read_only
from tests.support.jobs import Job

WORKER, CONTROLLER, MAILBOX = "ray::RayTrainWorker", "ray::TrainController", "ray::Mailbox"


@dataclass
class Place:
    """Where a fault is caused: a command that trains, and the folder of its run."""

    job: Job
    cluster: Cluster | None
    """The cluster that it has joined; None: it runs one of its own."""
    run: Path
    home: Path
    rng: random.Random

    def processes(self, part: str) -> list[int]:
        """Processes of the run with a word in their command line, and those of its cluster."""
        found = []
        for pid in self.cluster.pids() if self.cluster else self.job.pids(""):
            try:
                if part in (Path("/proc") / str(pid) / "cmdline").read_text().partition("\0")[0]:
                    found.append(pid)
            except OSError:
                continue  # it ended meanwhile
        return sorted(found)

    def trouble(self, name: str) -> Path:
        """A file that asks for trouble in a worker; see `troubles.py`."""
        return self.home / "troubles" / name

    def until(self, condition: Callable[[], bool], seconds: float, every: float = 0.1) -> bool:
        """Waits for a condition, not longer than this; whether it came."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end or self.job.process.poll() is not None:
                return False
            time.sleep(every)
        return True


Cause = Callable[[Place], bool]
"""Causes a fault; whether there was anything to do it to."""


@dataclass(frozen=True)
class Fault:
    """A fault, and what a run must answer.

    Args:
        how: what is done, in a few words.
        cause: does it; whether there was anything to do it to.
        status: exit status of the command; None: the command continues by itself.
        says: what the command's output must hold then.
        restarts: whether its workers are started again meanwhile.
        stopped: whether it is caused while the run is stopped, between two starts.
        own: whether the command runs a cluster of its own, which is lost by it.
        stored: whether the run is kept in an object store.
        undo: puts right what was wrong when the command has ended.
    """

    name: str
    how: str
    cause: Cause
    status: int | None = None
    says: str = ""
    restarts: bool = False
    stopped: bool = False
    own: bool = False
    stored: bool = False
    undo: Callable[[Place], None] = lambda place: None


def send(pids: list[int], number: int) -> bool:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
    return bool(pids)


def kill_one(part: str) -> Cause:
    return lambda place: send(place.rng.sample(found, 1) if (found := place.processes(part)) else [], signal.SIGKILL)


def kill_all(part: str) -> Cause:
    return lambda place: send(place.processes(part), signal.SIGKILL)


def stop_a_worker(place: Place) -> bool:
    return send(place.rng.sample(found, 1) if (found := place.processes(WORKER)) else [], signal.SIGSTOP)


def kill_data_tasks(place: Place) -> bool:
    """Whatever process reads data, or waits to do so: those of Ray's workers that are no actor."""
    return send([pid for pid in place.processes("ray::") if is_data(pid)], signal.SIGKILL)


def is_data(pid: int) -> bool:
    try:
        title = (Path("/proc") / str(pid) / "cmdline").read_text()
    except OSError:
        return False
    return title.startswith(("ray::IDLE", "ray::Map", "ray::_map", "ray::reduce"))


def to_driver(number: int) -> Cause:
    return lambda place: send([place.job.process.pid], number)


def fill_the_disk(place: Place) -> bool:
    """The run's file system is full until a worker has met it: it then has no room for checkpoints, records and lines of progress."""
    workers = place.processes(WORKER)
    if not os.path.ismount(place.home) or not workers:
        return False

    def met() -> bool:
        fill(place.home)  # an old checkpoint's end makes room for the next one
        return place.processes(WORKER) != workers

    place.until(met, 60)
    fill(place.home).unlink()
    return True


def order(name: str) -> Cause:
    """Asks for trouble in one of the two workers."""

    def cause(place: Place) -> bool:
        place.trouble(f"{name}-{place.rng.randrange(2)}").touch()
        return True

    return cause


def no_more(name: str) -> Callable[[Place], None]:
    def undo(place: Place) -> None:
        for path in place.trouble(name).parent.glob(f"{name}*"):
            path.unlink()

    return undo


def while_it_saves(place: Place) -> bool:
    """Ends a worker when a checkpoint's folder is there and its marker is not yet."""
    return place.until(lambda: half_written(place.run), 60, every=0.003) and kill_one(WORKER)(place)


def half_written(run: Path) -> bool:
    return any(not (path / "checkpoint.json").exists() for path in run.glob("checkpoints/step-*"))


def while_it_copies(place: Place) -> bool:
    """Ends a worker when the store has a checkpoint's files and not yet its marker."""
    return place.until(lambda: half_written(place.home / "store" / place.run.name), 60, every=0.003) and kill_one(WORKER)(place)


def failing_store(place: Place) -> bool:
    """The store is slow, and every third request fails, over two checkpoints."""
    last = Run(place.run).last_step()
    place.trouble("store").touch()
    place.until(lambda: Run(place.run).last_step() >= last + 20, 120)
    place.trouble("store").unlink()
    return True


def make_read_only(place: Place) -> bool:
    """Mounts the folder of checkpoints read-only until a worker has met it."""
    workers = place.processes(WORKER)
    with read_only(place.run / "checkpoints") as there:
        if there and workers:
            place.until(lambda: place.processes(WORKER) != workers, 60)
    return there and bool(workers)


def newest(run: Path) -> Path | None:
    found = sorted(run.glob("checkpoints/step-*/checkpoint.json"))
    return found[-1].parent if len(found) > 1 else None


def damaged(change: Callable[[Path, random.Random], None]) -> Cause:
    """Changes a file of the newest checkpoint, of several."""

    def cause(place: Place) -> bool:
        checkpoint = newest(place.run)
        if checkpoint is None:
            return False
        change(place.rng.choice(sorted(checkpoint.glob("*.safetensors"))), place.rng)
        return True

    return cause


def cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def flip_a_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def forget_the_marker(place: Place) -> bool:
    checkpoint = newest(place.run)
    if checkpoint is not None:
        (checkpoint / "checkpoint.json").write_text("{")
    return checkpoint is not None


def half_a_record(place: Place) -> bool:
    """A line half written, as a power cut leaves the one of a step after the last checkpoint: those before it are on disk."""
    with open(place.run / "metrics.jsonl", "a") as file:
        file.write(f'{{"step": {Run(place.run).last_step() + 1}, "lo')
    return True


def remove_rays_files(place: Place) -> bool:
    shutil.rmtree(place.run / "ray", ignore_errors=True)
    return True


def lose_the_machine(place: Place) -> bool:
    shutil.rmtree(place.run)
    return True


LOST, SAVED, ASIDE = "the same command continues", "checkpoint saved; the same command continues", "is damaged and set aside"
BETWEEN = "newest one, between two starts"
FAULTS = [
    Fault("a worker killed", "SIGKILL", kill_one(WORKER), restarts=True),
    Fault("all workers killed", "SIGKILL", kill_all(WORKER), restarts=True),
    Fault("a worker killed while it saves", "SIGKILL, a checkpoint half written", while_it_saves, restarts=True),
    Fault("a worker stopped", "SIGSTOP", stop_a_worker, says="has not answered for", restarts=True),
    Fault("a worker stands", "sleeps in a step, --run.stall-minutes 0.75", order("stand"), says="has stood for", restarts=True),
    Fault("loss of a worker NaN", "its model's output, until the run has ended", order("nan"), 2, "not-finite.json", undo=no_more("nan")),
    Fault("memory of a worker full", "an allocation in its step", order("memory"), 2, "memory is full", undo=no_more("memory")),
    Fault("data tasks killed", "SIGKILL to every process that reads", kill_data_tasks),
    Fault("message actor killed", "SIGKILL", kill_all(MAILBOX)),
    Fault("disk full", "tmpfs of the run's folder full", fill_the_disk, restarts=True),
    Fault("checkpoints read-only", "folder mounted read-only", make_read_only, restarts=True),
    Fault("controller killed", "SIGKILL", kill_all(CONTROLLER), 1, LOST),
    Fault("driver killed", "SIGKILL", to_driver(signal.SIGKILL), -signal.SIGKILL),
    Fault("driver asked to end", "SIGTERM", to_driver(signal.SIGTERM), 130, SAVED),
    Fault("Ctrl-C", "SIGINT", to_driver(signal.SIGINT), 130, SAVED),
    Fault("raylet killed", "SIGKILL", kill_all("raylet"), 1, LOST, own=True),
    Fault("gcs killed", "SIGKILL", kill_all("gcs_server"), 1, LOST, own=True),
    Fault("checkpoint cut", BETWEEN, damaged(cut), says=ASIDE, stopped=True),
    Fault("checkpoint with a flipped bit", BETWEEN, damaged(flip_a_bit), says=ASIDE, stopped=True),
    Fault("marker damaged", BETWEEN, forget_the_marker, says=ASIDE, stopped=True),
    Fault("a record half written", "metrics.jsonl, between two starts", half_a_record, stopped=True),
    Fault("Ray's files of the run removed", "between two starts", remove_rays_files, stopped=True),
    Fault("a worker killed while it copies to a store", "SIGKILL, checkpoint half there", while_it_copies, restarts=True, stored=True),
    Fault("store slow and failing", "50 ms more, every third request fails", failing_store, stored=True),
    Fault("machine lost, run in a store", "local folder removed between two starts", lose_the_machine, stopped=True, stored=True),
]
