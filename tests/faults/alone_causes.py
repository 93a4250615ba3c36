"""A training in one process, and the faults that are caused in it, by what they do to its process and files."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from perceiver.config import Experiment
from perceiver.data.manifest import Manifest
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.training.batches import read_here
from perceiver.training.parallel import join_world
from perceiver.training.run import Training, save_experiment
from tests.faults.forks import Child
from tests.faults.mounts import fill, read_only
from tests.support.small import Call, image_experiment, write_images

STEPS, EVERY = 120, 5


class Trained:
    """A run of one process, as often as it is started."""

    rows = 240

    def __init__(self, home: Path, name: str, rng: random.Random, stored: bool = False, steps: int = STEPS) -> None:
        self.home, self.rng, self.steps = home, rng, steps
        self.run, self.data = home / "runs" / name, home / "data"
        self.store = home / "store" if stored else None
        self.child: Child | None = None
        self.poisoned: int | None = None
        self.seen = 0
        """The last step on record before its records were changed."""
        if not self.data.exists():
            write_images(self.data, self.rows, 24)

    def experiment(self) -> Experiment:
        base = image_experiment(max_steps=self.steps, global_batch_size=4)
        encoder = replace(base.model.encoder, num_cross_attention_layers=1, num_self_attention_blocks=1)
        base = replace(base, model=replace(base.model, encoder=encoder))
        run = replace(base.run, name=self.run.name, log_every=1, val_every=40, checkpoint_every=EVERY, keep_checkpoints=3)
        return replace(base, run=replace(run, storage=f"file://{self.store}") if self.store else run)

    def start(self) -> Child:
        self.child = Child(self._train, self.child.output if self.child else "")
        return self.child

    def _train(self) -> None:
        torch.set_num_threads(1)
        experiment, manifest = self.experiment(), Manifest.load(self.data)
        if not self.run.exists() or not Run(self.run).exists:
            self.run.mkdir(parents=True, exist_ok=True)
            save_experiment(Run(self.run), experiment, manifest, str(self.data))
        callbacks = [Call(after_step=self._poison)] if self.poisoned is not None else []
        world = join_world(torch.device("cpu"))
        training = Training(experiment, build_task(experiment), str(self.data), manifest, world, self.run, read_here, callbacks)
        if callbacks:
            self._model = training.state.model
        training.run()

    def _poison(self, step: int, result: object) -> None:
        if step == self.poisoned:
            parameter = next(self._model.parameters())
            parameter.data.fill_(float("nan"))

    def last(self) -> int:
        return Run(self.run).last_step()

    def reach(self, step: int) -> bool:
        assert self.child is not None
        return self.child.until(lambda: self.last() >= step)

    def checkpoints(self) -> list[Path]:
        return sorted(path.parent for path in self.run.glob("checkpoints/step-*/checkpoint.json"))


Cause = Callable[[Trained], int | None]
"""Causes a fault in a run that trains, and returns the status that its process ended with (None: there was nothing to do it to)."""


def killed_at_any_step(run: Trained) -> int:
    run.reach(run.last() + run.rng.randint(1, 20))
    time.sleep(run.rng.random() * 0.02)
    run.child.kill()
    return run.child.status


def killed_while_writing(run: Trained) -> int | None:
    """When a checkpoint's folder is there and its marker is not yet."""
    run.reach(run.last() + run.rng.randint(1, 10))

    def writing() -> bool:
        return any(not (path / "checkpoint.json").exists() for path in run.run.glob("checkpoints/step-*"))

    found = run.child.until(writing, every=0.001)
    time.sleep(run.rng.random() * 0.003)
    run.child.kill()
    return run.child.status if found else None


def killed_while_starting(run: Trained) -> int:
    run.reach(run.last() + 5)
    run.child.kill()
    run.start()
    time.sleep(run.rng.random() * 0.4)
    run.child.kill()
    return run.child.status


def disk_full(run: Trained) -> int | None:
    """The run's folder lies on a file system of a few MiB, which something else fills; it is freed when the process has ended."""
    if not os.path.ismount(run.home):
        return None
    run.reach(run.last() + run.rng.randint(1, 10))
    path = fill(run.home)
    try:
        return run.child.wait()
    finally:
        path.unlink()


def no_large_files(run: Trained) -> int:
    run.reach(run.last() + run.rng.randint(1, 10))
    resource.prlimit(run.child.pid, resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
    return run.child.wait()


def checkpoints_read_only(run: Trained) -> int | None:
    run.reach(run.last() + run.rng.randint(EVERY + 1, 15))
    with read_only(run.run / "checkpoints") as there:
        return run.child.wait() if there else None


def weights_become_nan(run: Trained) -> int:
    run.child.kill()
    run.poisoned = run.last() + run.rng.randint(4, 20)
    try:
        return run.start().wait()
    finally:
        run.poisoned = None


def between(change: Callable[[Trained], None]) -> Cause:
    """A change of files between two starts."""

    def cause(run: Trained) -> int:
        run.reach(max(run.last(), 3 * EVERY) + run.rng.randint(1, 12))
        run.child.kill()
        run.seen = run.last()
        change(run)
        return run.child.status

    return cause


def damaged(pattern: str, how: Callable[[Path, random.Random], None], all_of_them: bool = False) -> Cause:
    """Damage to a file of the newest checkpoint, or of all."""

    def change(run: Trained) -> None:
        for checkpoint in run.checkpoints() if all_of_them else run.checkpoints()[-1:]:
            how(run.rng.choice(sorted(checkpoint.glob(pattern))), run.rng)

    return between(change)


def cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def foreign(path: Path, rng: random.Random) -> None:
    path.write_text(rng.choice(["", "{", "[]", "null", "{}", '{"step": "x"}', "[" * 5000]))


def half_a_record(run: Trained) -> None:
    """A line half written, as a power cut leaves the one of a step after the last checkpoint: those before it are on disk."""
    line = f'{{"step": {run.last() + 1}, "loss": 2.25, "lr": 0.001'
    with open(run.run / "metrics.jsonl", "a") as file:
        file.write(line[: run.rng.randint(1, len(line))])


def lost_machine(run: Trained) -> None:
    """The run's folder, which lies on the machine, is gone; the object store has the run."""
    shutil.rmtree(run.run)


def shard(how: Callable[[Path, random.Random], None]) -> Cause:
    """Damage to a shard of the training data between two starts; the next start ends, then the shard is as it was."""

    def cause(run: Trained) -> int:
        run.reach(run.last() + run.rng.randint(1, 12))
        run.child.kill()
        path = run.rng.choice(sorted(run.data.glob("train-*.parquet")))
        before = path.read_bytes()
        how(path, run.rng)
        try:
            return run.start().wait()
        finally:
            path.write_bytes(before)

    return cause


def manifest(run: Trained) -> int:
    run.child.kill()
    path = run.data / "manifest.json"
    before = path.read_bytes()
    foreign(path, run.rng)
    try:
        return run.start().wait()
    finally:
        path.write_bytes(before)


@dataclass(frozen=True)
class AloneFault:
    """A fault of one process.

    Args:
        cause: does it; the status that the process ended with.
        statuses: which are right.
        says: what the output of this start or the next must hold.
        stored: whether the run is kept in an object store.
    """

    name: str
    how: str
    cause: Cause
    statuses: tuple[int, ...] = (-signal.SIGKILL,)
    says: str = ""
    stored: bool = False


ASIDE = "is damaged and set aside"
CAUSES = [
    AloneFault("training killed", "SIGKILL at a random moment", killed_at_any_step),
    AloneFault("training killed while it saves", "SIGKILL, a checkpoint half written", killed_while_writing),
    AloneFault("training killed while it starts", "SIGKILL within 0.4 s", killed_while_starting),
    AloneFault("training killed while it copies to a store", "SIGKILL, file:// store", killed_while_writing, stored=True),
    AloneFault("machine lost, run in a store", "SIGKILL, local folder removed", between(lost_machine), stored=True),
    AloneFault("disk full", "full tmpfs", disk_full, (5,), "No space left on device"),
    AloneFault("files limited", "RLIMIT_FSIZE of 1 KiB", no_large_files, (5, 1), "File too large"),
    AloneFault("checkpoints read-only", "folder mounted read-only", checkpoints_read_only, (5,), "Read-only file system"),
    AloneFault("weights become NaN", "set in a step", weights_become_nan, (3,), "NotFinite"),
    AloneFault("tensors of newest checkpoint cut", "at a random byte", damaged("*.safetensors", cut), says=ASIDE),
    AloneFault("bit of newest checkpoint flipped", "a random one", damaged("*.safetensors", flip), says=ASIDE),
    AloneFault("tensors of newest checkpoint gone", "file removed", damaged("*.safetensors", remove), says=ASIDE),
    AloneFault("marker of newest checkpoint cut", "at a random byte", damaged("checkpoint.json", cut), says=ASIDE),
    AloneFault("marker of newest checkpoint of another shape", "JSON or none", damaged("checkpoint.json", foreign), says=ASIDE),
    AloneFault("all checkpoints damaged", "a flipped bit each", damaged("*.safetensors", flip, True), says=ASIDE),
    AloneFault("a record half written", "metrics.jsonl", between(half_a_record)),
    AloneFault("shard cut", "then put right", shard(cut), (4,), ".parquet"),
    AloneFault("bit of a shard flipped", "then put right", shard(flip), (4, 0), ".parquet"),
    AloneFault("shard gone", "then put right", shard(remove), (4,), ".parquet"),
    AloneFault("manifest of another shape", "then put right", manifest, (4,), "manifest.json"),
]
