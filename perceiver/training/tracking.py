"""Sends what a run measures to a tracker (MLflow, Weights & Biases), in a thread: a tracker that fails or is slow stops no step.

A tracker's run is the same one after a restart. Points that it has already are not sent again: steps that are taken once more, since
the last checkpoint, have the values that they had. Points that it lacks, as the process that measured them was killed before it had
sent them, are sent from the run's records.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import queue
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from perceiver.config import Experiment, UserError, flatten, to_dict
from perceiver.config.core import is_builtin
from perceiver.disk import write_json
from perceiver.runs import Parent, Run
from perceiver.terminal import number_of
from perceiver.training.callbacks import Callback, TrainingView

if TYPE_CHECKING:
    from perceiver.tasks.base import Sample

logger = logging.getLogger(__name__)

MOST_WAITING = 1000
"""Records that may wait to be sent; those that come while the queue is full are dropped and counted."""
FINISH_SECONDS = 60.0
"""How long the end of a training waits for records that are still to be sent."""
RETRY_SECONDS = (0.5, 2.0)
"""Pauses before a record is tried again."""
REOPEN_SECONDS = 30.0
"""Pause before a tracker that could not be opened is tried again."""
SAMPLES = (".txt", ".png")
"""Endings of the files of samples that trackers take."""
_NOTES = threading.Lock()


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker receives about a run when it begins or continues."""

    run: Run
    name: str
    preset: str
    parameters: dict[str, Any]
    """The configuration, flat, by dotted names."""
    tags: dict[str, str]
    """Where it lies and came from: "folder", "data", "commit", "command", "parent", "sweep", as far as there are such."""
    parent: Parent | None
    """The run that it began from."""
    labels: tuple[str, ...] = ()
    """Tags that a person gave it."""

    def note(self, key: str) -> dict[str, Any]:
        """What `save_note` kept under a key; empty without."""
        return note_of(self.run, key)

    def save_note(self, key: str, content: dict[str, Any]) -> None:
        """Keeps a tracker's name of the run, and how far it is, in the run's folder."""
        with _NOTES:
            write_json(self.run.trackers_file, {**_notes(self.run), key: content})


class Tracker(ABC):
    """A tracker's library as one run uses it. All methods are called in one thread, and may raise anything."""

    name: str
    """As messages call it."""

    @abstractmethod
    def open(self, run: TrackedRun) -> str:
        """Begins the run or continues it; where it can be looked at."""

    @abstractmethod
    def has(self, name: str, step: int) -> bool:
        """Whether the tracker has this metric or sample of this step from an earlier start of the run. Asked after `open`."""

    @abstractmethod
    def metrics(self, step: int, values: dict[str, float], seconds: float) -> None:
        """Sends metrics that were measured at a time (seconds since 1970)."""

    @abstractmethod
    def text(self, step: int, name: str, text: str) -> None:
        """Sends a text sample."""

    @abstractmethod
    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Sends a picture, uint8 (height, width, 3)."""

    def checkpoint(self, step: int, path: Path) -> None:
        """Notes where the newest checkpoint lies."""

    @abstractmethod
    def close(self, status: str) -> None:
        """Ends the run with "finished", "failed" or "paused", when all else is sent."""


@dataclass
class Tracking(Callback):
    """The callback: passes records to a thread on the first worker, and does nothing on the others.

    Attributes:
        tracker: what they are sent to.
        lost: records that were dropped or could not be sent.
    """

    tracker: Tracker
    lost: int = 0
    _queue: queue.Queue[Callable[[], None] | None] = field(default_factory=lambda: queue.Queue(MOST_WAITING))
    _thread: threading.Thread | None = None
    _open: bool = False
    _opened_at: float = float("-inf")
    _warned: bool = False
    _begin: int = 0
    """The step from which this start continues."""
    _started: float = 0.0
    """When it did; when points that are sent later than they were measured are said to have been."""

    def on_start(self, training: TrainingView) -> None:
        if training.world.rank > 0:
            return
        self._described = describe_run(training.experiment, Run(training.run_folder))
        self._begin, self._started = training.step, time.time()
        self._thread = threading.Thread(target=self._send, name=f"{self.tracker.name} tracker", daemon=True)
        self._thread.start()
        self._put(lambda: None)  # the run appears before its first step is taken

    def after_log(self, step: int, metrics: dict[str, float]) -> None:
        values, now = dict(metrics), time.time()
        self._put(lambda: self._metrics(step, values, now))

    after_validation = after_log

    def after_samples(self, step: int, samples: list[Sample]) -> None:
        for sample in samples:
            self._put(lambda sample=sample: self._sample(step, sample))  # type: ignore[misc]

    def after_checkpoint(self, step: int, path: Path) -> None:
        self._put(lambda: self.tracker.checkpoint(step, path))

    def on_end(self, step: int, metrics: dict[str, float], error: BaseException | None) -> None:
        if self._thread is None:
            return
        finished = Run(self.training.run_folder).result() is not None
        status = "failed" if error is not None else "finished" if finished else "paused"
        deadline = time.monotonic() + FINISH_SECONDS
        try:
            self._queue.put(lambda: self.tracker.close(status), timeout=FINISH_SECONDS)
            self._queue.put(None, timeout=max(0.0, deadline - time.monotonic()))
            self._thread.join(max(0.0, deadline - time.monotonic()))
        except queue.Full:
            pass
        if self._thread.is_alive():
            self.lost += self._queue.qsize()
            logger.warning("%s did not take all records within %.0f s after the last step", self.tracker.name, FINISH_SECONDS)
        if self.lost:
            logger.warning("%s: %d records of this start were not sent; metrics.jsonl has all", self.tracker.name, self.lost)

    def _catch_up(self) -> None:
        """Sends what the run's records have up to the step from which it continues and the tracker has not, step by step."""
        missing = self._lacking(self._begin)
        if missing:
            steps = number_of(len({step for step, _ in missing}), "step")
            logger.info("%s: sends what it lacks of %s up to step %s", self.tracker.name, steps, f"{self._begin:,}")
        for _, send in missing:
            self._try(send)

    def _lacking(self, last: int) -> list[tuple[int, Callable[[], None]]]:
        """What is to be sent of steps up to the last, each with its step, in their order."""
        run, has = self._described.run, self.tracker.has
        found: list[tuple[int, Callable[[], None]]] = [
            (step, partial(self._saved_sample, step, name, path)) for name, step, path in saved_samples(run) if not has(name, step)
        ]
        for record in run.metrics():
            step = record["step"]
            values = {name: value for name, value in record.items() if name != "step" and value is not None and not has(name, step)}
            if values:
                found.append((step, partial(self.tracker.metrics, step, values, self._started)))
        return sorted(((step, send) for step, send in found if step <= last), key=lambda entry: entry[0])

    def _saved_sample(self, step: int, name: str, path: Path) -> None:
        if path.suffix == ".txt":
            self.tracker.text(step, name, path.read_text())
            return
        from PIL import Image

        with Image.open(path) as picture:
            self.tracker.image(step, name, np.asarray(picture.convert("RGB")))

    def _metrics(self, step: int, values: dict[str, float], seconds: float) -> None:
        values = {name: value for name, value in values.items() if not self.tracker.has(name, step)}
        if values:
            self.tracker.metrics(step, values, seconds)

    def _sample(self, step: int, sample: Sample) -> None:
        if self.tracker.has(sample.name, step):
            return
        if sample.text is not None:
            self.tracker.text(step, sample.name, sample.text)
        if sample.image is not None:
            self.tracker.image(step, sample.name, sample.image)

    def _put(self, send: Callable[[], None]) -> None:
        if self._thread is None:
            return
        try:
            self._queue.put_nowait(send)
        except queue.Full:
            self.lost += 1

    def _send(self) -> None:
        while (send := self._queue.get()) is not None:
            self._try(send)

    def _try(self, send: Callable[[], None]) -> None:
        """Sends something, with a tracker that is open; what fails is tried again, and then lost."""
        for pause in (*RETRY_SECONDS, None):
            try:
                self._ensure_open()
                send()
                break
            except Exception as error:  # whatever a tracker meets, it is no reason to stop a step
                if pause is None or not self._open:
                    self.lost += 1
                    self._warn(error)
                    break
                time.sleep(pause)

    def _ensure_open(self) -> None:
        if self._open:
            return
        if time.monotonic() < self._opened_at + REOPEN_SECONDS:
            raise ConnectionError(f"{self.tracker.name} could not be opened")
        self._opened_at = time.monotonic()
        place = self.tracker.open(self._described)
        self._open = True
        logger.info("%s: %s", self.tracker.name, place)
        self._catch_up()

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            first = next(iter(str(error).strip().splitlines()), "")
            logger.warning("%s fails, training continues without it: %s: %s", self.tracker.name, type(error).__name__, first)
        self._warned = True


def describe_run(experiment: Experiment, run: Run) -> TrackedRun:
    """What trackers receive about a run. Its callbacks are left out: a tracker's address may hold a password."""
    tree = to_dict(experiment)
    for section in ("callbacks", "preset"):
        del tree[section]
    parameters = {
        name.removesuffix(".type"): value.partition(":")[2] if name.endswith(".type") and is_builtin(value) else value
        for name, value in flatten(tree).items()
        if name != "type"
    }
    made, parent = _read(run.provenance_file), run.parent()
    code = made.get("code", {})
    tags = {
        "folder": str(run.folder),
        "data": made.get("data"),
        "commit": next((part["commit"] for part in code.values()), None),
        "command": " ".join(made.get("command", ())) or None,
        "parent": parent and str(parent),
        "sweep": run.folder.parent.parent.name if run.is_trial else None,
    }
    labels = _read(run.labels_file).get("tags", ())
    named = {name: value for name, value in tags.items() if value}
    return TrackedRun(run, run.name, experiment.preset, parameters, named, parent, tuple(labels))


def saved_samples(run: Run) -> list[tuple[str, int, Path]]:
    """Text and picture samples in a run's folder: name, step, file."""
    named = ((path, re.fullmatch(r"(.+)-(\d{8})", path.stem)) for path in sorted(run.samples_folder.glob("*")) if path.suffix in SAMPLES)
    return [(found[1], int(found[2]), path) for path, found in named if found is not None]


def note_of(run: Run, key: str) -> dict[str, Any]:
    """What a tracker has noted in a run's folder under a key; empty without."""
    found = _notes(run).get(key)
    return found if isinstance(found, dict) else {}


def check_installed(name: str, where: str) -> None:
    """Refuses a tracker whose package is not installed here.

    Raises:
        UserError: names the package.
    """
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"--{where.rstrip('.')} is {name}, which needs a package that is not installed: pip install 'perceiver-ray[{name}]'"
        )


def _notes(run: Run) -> dict[str, Any]:
    return _read(run.trackers_file)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing or damaged, which is no reason to stop a step."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
