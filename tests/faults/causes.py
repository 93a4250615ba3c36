"""The faults: each is caused in a real run, by what it does to processes and files of that run alone."""

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.mounts import read_only
from tests.support.jobs import Job

WORKER, CONTROLLER, MAILBOX = "ray::RayTrainWorker", "ray::TrainController", "ray::_Mailbox"


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
    """

    name: str
    how: str
    cause: Callable[[Job, Path, random.Random], bool]
    status: int | None = None
    says: str = ""
    restarts: bool = False
    stopped: bool = False


def processes(job: Job, part: str) -> list[int]:
    """Processes of a job with a word in their command line."""
    found = []
    for pid in job.pids(""):
        try:
            if part in (Path("/proc") / str(pid) / "cmdline").read_text().partition("\0")[0]:
                found.append(pid)
        except OSError:
            continue  # it ended meanwhile
    return sorted(found)


def send(pids: list[int], number: int) -> bool:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
    return bool(pids)


def kill_one(part: str) -> Callable[[Job, Path, random.Random], bool]:
    return lambda job, run, rng: send(rng.sample(found, 1) if (found := processes(job, part)) else [], signal.SIGKILL)


def kill_all(part: str) -> Callable[[Job, Path, random.Random], bool]:
    return lambda job, run, rng: send(processes(job, part), signal.SIGKILL)


def stop_a_worker(job: Job, run: Path, rng: random.Random) -> bool:
    return send(rng.sample(found, 1) if (found := processes(job, WORKER)) else [], signal.SIGSTOP)


def kill_data_tasks(job: Job, run: Path, rng: random.Random) -> bool:
    """Whatever process reads data, or waits to do so: those of Ray's workers that are no actor."""
    return send([pid for pid in processes(job, "ray::") if _is_data(pid)], signal.SIGKILL)


def _is_data(pid: int) -> bool:
    try:
        title = (Path("/proc") / str(pid) / "cmdline").read_text()
    except OSError:
        return False
    return title.startswith(("ray::IDLE", "ray::Map", "ray::_map", "ray::reduce"))


def to_driver(number: int) -> Callable[[Job, Path, random.Random], bool]:
    return lambda job, run, rng: send([job.process.pid], number)


def fill_the_disk(job: Job, run: Path, rng: random.Random) -> bool:
    """Lets the workers write no file beyond 4 KiB, until one has met it: what a full disk or a quota does to a checkpoint."""
    workers = processes(job, WORKER)
    for pid in workers:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    end = time.monotonic() + 20
    while processes(job, WORKER) == workers and time.monotonic() < end:
        time.sleep(0.1)
    for pid in processes(job, WORKER):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return bool(workers)


def fill_the_memory(job: Job, run: Path, rng: random.Random) -> bool:
    """Lets one worker have no more memory than it has: what a full machine does to its next step."""
    workers = processes(job, WORKER)
    for pid in workers[:1]:
        size = int((Path("/proc") / str(pid) / "statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    return bool(workers)


def while_it_saves(job: Job, run: Path, rng: random.Random) -> bool:
    """Ends a worker when a checkpoint's folder is there and its marker is not yet."""
    end = time.monotonic() + 60
    while time.monotonic() < end and job.process.poll() is None:
        if any(not (path / "checkpoint.json").exists() for path in run.glob("checkpoints/step-*")):
            return kill_one(WORKER)(job, run, rng)
        time.sleep(0.005)
    return False


def make_read_only(job: Job, run: Path, rng: random.Random) -> bool:
    """Mounts the folder of checkpoints read-only until a worker has met it."""
    workers = processes(job, WORKER)
    with read_only(run / "checkpoints") as there:
        end = time.monotonic() + 60
        while there and processes(job, WORKER) == workers and time.monotonic() < end:
            time.sleep(0.1)
    return there and bool(workers)


def newest(run: Path) -> Path | None:
    found = sorted(run.glob("checkpoints/step-*/checkpoint.json"))
    return found[-1].parent if len(found) > 1 else None


def damaged(change: Callable[[Path, random.Random], None]) -> Callable[[Job, Path, random.Random], bool]:
    """Changes a file of the newest checkpoint, of several."""

    def cause(job: Job, run: Path, rng: random.Random) -> bool:
        checkpoint = newest(run)
        if checkpoint is None:
            return False
        change(rng.choice(sorted(checkpoint.glob("*.safetensors"))), rng)
        return True

    return cause


def cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def flip_a_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def forget_the_marker(job: Job, run: Path, rng: random.Random) -> bool:
    checkpoint = newest(run)
    if checkpoint is not None:
        (checkpoint / "checkpoint.json").write_text("{")
    return checkpoint is not None


def cut_the_records(job: Job, run: Path, rng: random.Random) -> bool:
    """The last line half written, as a power cut leaves it."""
    path = run / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - 7)
    return True


def remove_rays_files(job: Job, run: Path, rng: random.Random) -> bool:
    shutil.rmtree(run / "ray", ignore_errors=True)
    return True


LOST = "the same command continues"
FAULTS = [
    Fault("a worker killed", "SIGKILL", kill_one(WORKER), restarts=True),
    Fault("all workers killed", "SIGKILL", kill_all(WORKER), restarts=True),
    Fault("a worker killed while it saves", "SIGKILL, a checkpoint half written", while_it_saves, restarts=True),
    Fault("memory of a worker full", "RLIMIT_AS", fill_the_memory, 2, "memory is full"),
    Fault("checkpoints read-only", "folder mounted read-only", make_read_only, restarts=True),
    Fault("data tasks killed", "SIGKILL to every process that reads", kill_data_tasks),
    Fault("message actor killed", "SIGKILL", kill_all(MAILBOX)),
    Fault("a worker stopped", "SIGSTOP", stop_a_worker, says="has not answered for", restarts=True),
    Fault("disk full", "no file beyond 4 KiB in the workers (RLIMIT_FSIZE)", fill_the_disk, restarts=True),
    Fault("controller killed", "SIGKILL", kill_all(CONTROLLER), 1, LOST),
    Fault("driver killed", "SIGKILL", to_driver(signal.SIGKILL), -signal.SIGKILL),
    Fault("driver asked to end", "SIGTERM", to_driver(signal.SIGTERM), 130, "checkpoint saved; the same command continues"),
    Fault("Ctrl-C", "SIGINT", to_driver(signal.SIGINT), 130, "checkpoint saved; the same command continues"),
    Fault("raylet killed", "SIGKILL", kill_all("raylet"), 1, LOST),
    Fault("gcs killed", "SIGKILL", kill_all("gcs_server"), 1, LOST),
    Fault("checkpoint cut", "newest one, between two starts", damaged(cut), says="is damaged and set aside", stopped=True),
    Fault(
        "checkpoint with a flipped bit",
        "newest one, between two starts",
        damaged(flip_a_bit),
        says="is damaged and set aside",
        stopped=True,
    ),
    Fault("marker damaged", "newest checkpoint, between two starts", forget_the_marker, says="is damaged and set aside", stopped=True),
    Fault("last record cut", "metrics.jsonl, between two starts", cut_the_records, stopped=True),
    Fault("Ray's files of the run removed", "between two starts", remove_rays_files, stopped=True),
]
