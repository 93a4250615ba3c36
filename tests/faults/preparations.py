"""Preparations on Ray that are killed again and again until one is over: the shards must be those of an undisturbed one."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.causes import is_data, send
from tests.faults.cluster import Cluster
from tests.faults.outcome import Outcome
from tests.support import preparing
from tests.support.jobs import Job

PREPARATION = "preparation on Ray killed"
PATIENCE = 240.0


def prepare_killed(home: Path, name: str, cluster: Cluster, rng: random.Random) -> Outcome:
    """A preparation of which first the tasks are killed and then, while it writes, the driver; started again it ends well."""
    source = home / "texts"
    if not source.exists():
        source.mkdir()
        rows = [{"text": text, "label": i % 2} for i, text in enumerate(preparing.texts(2000))]
        for part in range(8):
            preparing.write_jsonl(source / f"train-{part}.jsonl", rows[part::8])
        preparing.write_jsonl(source / "test.jsonl", [{"text": f"other {row['text']}", "label": row["label"]} for row in rows[:40]])

    def start(root: Path) -> Job:
        words = ["txt-clf-imdb-all", "--data.source", str(source), "--data.root", str(root), "--data.rows-per-block", "4"]
        return Job("ray_jobs.preprocess", *words, "--data.blocks-per-shard", "3", home=home, RAY_ADDRESS=cluster.address)

    plain, root = home / "prepared-undisturbed", home / name
    if not plain.exists():
        start(plain).finish(PATIENCE)
    outcome = Outcome(PREPARATION, "SIGKILL to its tasks, then to the driver while it writes", name, 0)
    jobs = [start(root)]
    _until(jobs[-1], lambda: len(_files(root)) > rng.randrange(4))
    send([pid for pid in cluster.pids() if is_data(pid)], signal.SIGKILL)
    _until(jobs[-1], lambda: len(_files(root)) > 4 + rng.randrange(20))
    jobs[-1].process.kill()
    outcome.status = jobs[-1].wait(30)
    begin = time.monotonic()
    jobs.append(start(root))
    if status := jobs[-1].wait(PATIENCE):
        outcome.wrong.append(f"the last start ended with status {status}: {jobs[-1].output.splitlines()[-1:]}")
    outcome.seconds = time.monotonic() - begin
    if _shards(root) != _shards(plain):
        outcome.wrong.append("the prepared shards are not those of the undisturbed preparation")
    if left := [path.name for path in _files(root) if path.name.startswith(".staging") or path.suffix in (".tmp", ".lock")]:
        outcome.wrong.append(f"files are left: {', '.join(left)}")
    if any("Traceback" in job.output for job in jobs):
        outcome.wrong.append("a traceback was printed")
    outcome.wrong += [f"{what} is left" for what in cluster.left()]
    return outcome


def _files(root: Path) -> list[Path]:
    return list(root.rglob("*")) if root.exists() else []


def _shards(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.parquet"))}


def _until(job: Job, condition: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end and job.process.poll() is None:
        time.sleep(0.005)
