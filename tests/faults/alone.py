"""Faults of one process: trainings, preparations and exports without Ray, killed and damaged at random moments.

The code is the one that workers run. Each start is a fork, so that the same fault is caused many times.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

import perceiver
from perceiver.inference.export import export
from ray_jobs import preprocess
from tests.faults.alone_causes import CAUSES, STEPS, AloneFault, Trained
from tests.faults.forks import Child
from tests.faults.invariants import differing
from tests.faults.mounts import small
from tests.faults.outcome import ALONE, Outcome
from tests.support import preparing

PREPARATION, EXPORT = "preparation killed", "export killed"


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
