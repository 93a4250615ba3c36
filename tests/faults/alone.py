"""Faults of one process: trainings, preparations and exports without Ray, killed and damaged at random moments.

The code is the one that workers run. Each start is a fork, which costs a moment, so that the same fault is caused many times.
"""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import perceiver
from perceiver.config import Experiment
from perceiver.data.manifest import DamagedData, Manifest
from perceiver.inference.export import export
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.training.batches import read_here
from perceiver.training.not_finite import NotFinite
from perceiver.training.parallel import join_world
from perceiver.training.run import Training, save_experiment
from ray_jobs import preprocess
from tests.faults.invariants import differing
from tests.faults.mounts import fill, read_only, small
from tests.faults.outcome import ALONE, Outcome
from tests.support import preparing
from tests.support.small import Call, image_experiment, write_images

STEPS, EVERY = 120, 5
PATIENCE = 180.0
STATUS = {NotFinite: 3, DamagedData: 4, OSError: 5}
"""Exit status of a process by what ended it."""


class Child:
    """A function in a forked process. Its lines come through a pipe: full disks and limits of files do not stop them."""

    def __init__(self, function: Callable[[], object], before: str = "") -> None:
        self.status: int | None = None
        self._output = before
        sys.stdout.flush()
        sys.stderr.flush()
        self._pipe, written = os.pipe()
        os.set_blocking(self._pipe, False)
        self.pid = os.fork()
        if self.pid == 0:
            self._be(function, written)
        os.close(written)

    def _be(self, function: Callable[[], object], written: int) -> None:
        status = 1
        try:
            os.dup2(written, 1)
            os.dup2(written, 2)
            logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
            function()
            status = 0
        except BaseException as error:
            status = next((number for kind, number in STATUS.items() if isinstance(error, kind)), 1)
            logging.error("%s: %s", type(error).__name__, error, exc_info=error if status == 1 else None)
        finally:
            sys.stdout.flush()
            os._exit(status)

    @property
    def output(self) -> str:
        """What it has written, after what those before it have."""
        while self._pipe is not None:
            try:
                new = os.read(self._pipe, 2**16)
            except BlockingIOError:
                break
            if not new:
                os.close(self._pipe)
                self._pipe = None
            self._output += new.decode(errors="replace")
        return self._output

    def ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            _ = self.output  # or it would wait for room in the pipe
        return self.status is not None

    def until(self, condition: Callable[[], bool], every: float = 0.03) -> bool:
        """Waits for a condition; whether it came before the process ended."""
        end = time.monotonic() + PATIENCE
        while not condition():
            if self.ended():
                return condition()
            assert time.monotonic() < end, f"nothing within {PATIENCE:.0f} s: {self.output[-300:]}"
            time.sleep(every)
        return True

    def wait(self) -> int:
        self.until(self.ended)
        assert self.status is not None
        return self.status

    def kill(self) -> None:
        if not self.ended():
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


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


def cut_the_last_record(run: Trained) -> None:
    path = run.run / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - run.rng.randint(1, 60))


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
    AloneFault("last record cut", "metrics.jsonl", between(cut_the_last_record)),
    AloneFault("shard cut", "then put right", shard(cut), (4,), ".parquet"),
    AloneFault("bit of a shard flipped", "then put right", shard(flip), (4, 0), ".parquet"),
    AloneFault("shard gone", "then put right", shard(remove), (4,), ".parquet"),
    AloneFault("manifest of another shape", "then put right", manifest, (4,), "manifest.json"),
]


def disturb_alone(home: Path, seconds: float, seed: int, only: list[str], outcomes: list[Outcome]) -> None:
    """Adds outcomes of faults in a random order, as many as there is time for, each kind at least once where there is."""
    rng, end = random.Random(seed), time.monotonic() + seconds
    number = 0
    with small(home, "64m") as there:
        if not there:
            home.mkdir(parents=True, exist_ok=True)
        plain = Trained(home, "undisturbed", rng)
        assert plain.start().wait() == 0, plain.child.output
        while time.monotonic() < end:
            faults = [fault for fault in CAUSES if not only or fault.name in only]
            rng.shuffle(faults)
            for stored in (False, True):
                waiting = [fault for fault in faults if fault.stored == stored]
                while waiting and time.monotonic() < end:
                    number += 1
                    found = _one_run(Trained(home, f"alone-{seed}-{number}", rng, stored), plain, waiting, end)
                    outcomes += found
                    for outcome in found:
                        print(outcome.line(), flush=True)
            if not only or PREPARATION in only:
                outcomes += (found := [prepare_killed(home, f"prepared-{seed}-{number}", rng)])
                print(found[0].line(), flush=True)
            if not only or EXPORT in only:
                outcomes += (found := [export_killed(home, plain, rng, f"export-{seed}-{number}")])
                print(found[0].line(), flush=True)


def _one_run(run: Trained, plain: Trained, waiting: list[AloneFault], end: float) -> list[Outcome]:
    """A run with faults as long as it has steps and there is time, and what came of each."""
    outcomes: list[Outcome] = []
    wrong: list[str] = []
    run.start()
    try:
        while waiting and run.last() < STEPS - 40 and time.monotonic() < end:
            if outcome := _cause(run, waiting.pop(0)):
                outcomes.append(outcome)
        if status := run.child.wait():
            wrong.append(f"the run ended with status {status}")
        wrong += _differing(run.run, plain.run)
        if "Traceback" in run.child.output:
            wrong.append("a traceback was printed")
    except AssertionError as error:
        wrong.append(str(error).splitlines()[0])
    finally:
        run.child.kill()
    for outcome in outcomes:
        outcome.wrong += wrong
    if not wrong:
        shutil.rmtree(run.run)
    return outcomes


def _differing(run: Path, plain: Path) -> list[str]:
    """In a process of its own: a fork of one that has read tensors may wait for threads that it does not have."""
    child = Child(lambda: print(json.dumps(differing(run, plain))))
    child.wait()
    return json.loads(child.output.strip().splitlines()[-1])


def _cause(run: Trained, fault: AloneFault) -> Outcome | None:
    outcome = Outcome(fault.name, fault.how, run.run.name, 0, ALONE)
    said = len(run.child.output)
    outcome.status = fault.cause(run)
    outcome.step, run.seen = max(run.last(), run.seen), 0
    if outcome.status is None:
        if run.child.ended():
            run.start()
        return None
    if outcome.status not in fault.statuses:
        outcome.wrong.append(f"status {outcome.status} instead of {fault.statuses}: {run.child.output.strip().splitlines()[-1:]}")
    begin, before = time.monotonic(), len(run.child.output)
    run.start()
    run.child.until(lambda: _resumed(run.child.output[before:]) is not None)
    outcome.redone = max(0, outcome.step - (_resumed(run.child.output[before:]) or 0))
    run.reach(min(outcome.step + 1, STEPS))
    outcome.seconds = time.monotonic() - begin
    if outcome.status and fault.says not in run.child.output[said:]:
        outcome.wrong.append(f"the output does not say {fault.says!r}")
    return outcome


def _resumed(output: str) -> int | None:
    """The step that the last start in an output continued from."""
    lines = [line for line in output.splitlines() if line.startswith(("starting:", "continuing from step "))]
    if not lines or not lines[-1].endswith(")"):
        return None
    return 0 if lines[-1].startswith("starting") else int(lines[-1].split()[3].rstrip(":").replace(",", ""))


PREPARATION, EXPORT = "preparation killed", "export killed"


def prepare_killed(home: Path, name: str, rng: random.Random) -> Outcome:
    """A preparation that is killed again and again until it is over: the data is that of an undisturbed one."""
    source = home / "texts"
    if not source.exists():
        source.mkdir()
        rows = [{"text": text, "label": i % 2} for i, text in enumerate(preparing.texts(400))]
        for part in range(6):
            preparing.write_jsonl(source / f"train-{part}.jsonl", rows[part::6])
        preparing.write_jsonl(source / "test.jsonl", [{"text": f"other {row['text']}", "label": row["label"]} for row in rows[:40]])

    def prepare(root: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            preparing.serially(patch)
            preprocess.prepare(preparing.experiment("txt-clf-imdb-all", root, source, length=40), piece_bytes=4000)

    def content(root: Path) -> dict[str, bytes]:
        return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.parquet"))}

    plain, root = home / "prepared", home / name
    if not plain.exists():
        assert Child(lambda: prepare(plain)).wait() == 0
    outcome = Outcome(PREPARATION, "SIGKILL, three times", name, 0, ALONE)
    begin = time.monotonic()
    for _ in range(3):
        child = Child(lambda: prepare(root))
        files = rng.randrange(20)
        child.until(lambda: len(list(root.rglob("*"))) > files if root.exists() else False, every=0.001)  # noqa: B023
        outcome.status = -signal.SIGKILL
        child.kill()
    child = Child(lambda: prepare(root))
    if status := child.wait():
        outcome.wrong.append(f"the last start ended with status {status}: {child.output.splitlines()[-1:]}")
    outcome.seconds = time.monotonic() - begin
    if content(root) != content(plain):
        outcome.wrong.append("the prepared shards are not those of the undisturbed preparation")
    left = [path.name for path in root.rglob("*") if path.name.startswith(".staging") or path.suffix in (".tmp", ".lock")]
    if left:
        outcome.wrong.append(f"files are left: {', '.join(left)}")
    return outcome


def export_killed(home: Path, plain: Trained, rng: random.Random, name: str) -> Outcome:
    """An export over an earlier one that is killed: the folder holds one of both, whole."""
    outcome = Outcome(EXPORT, "SIGKILL at a random moment", name, 0, ALONE)
    target = home / name
    paths = [f"step-{step:08d}" for step in sorted(int(p.name.removeprefix("step-")) for p in plain.checkpoints())]

    def write(checkpoint: str) -> None:
        export(perceiver.load(plain.run, checkpoint=str(int(checkpoint.removeprefix("step-")))), target)

    assert Child(lambda: write(paths[0])).wait() == 0
    first = (target / "model.safetensors").read_bytes()
    inode = target.stat().st_ino
    child = Child(lambda: write(paths[-1]))
    child.until(lambda: any(home.glob(".export*")), every=0.001)
    time.sleep(rng.random() * 0.01)
    child.kill()
    outcome.status = child.status
    listing = json.loads((target / "export.json").read_text())["files"]
    weights = (target / "model.safetensors").read_bytes()
    if set(os.listdir(target)) != {*listing, "export.json"} or len(weights) != listing["model.safetensors"]["bytes"]:
        outcome.wrong.append("the folder is neither export")
    if target.stat().st_ino == inode and weights != first:
        outcome.wrong.append("the earlier export was changed")
    begin = time.monotonic()
    if status := Child(lambda: write(paths[-1])).wait():
        outcome.wrong.append(f"the next export ended with status {status}")
    outcome.seconds = time.monotonic() - begin
    if left := [path.name for path in home.glob(".export*")]:
        outcome.wrong.append(f"files are left: {', '.join(left)}")
    return outcome
