"""What a run leaves behind for people and programs: metrics.jsonl, TensorBoard events, samples, lines of progress."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import image, scalar, text

from perceiver.data.storage import write_file
from perceiver.disk import finite, to_disk
from perceiver.run_files import METRICS
from perceiver.runs import Run
from perceiver.training.meters import duration

if TYPE_CHECKING:
    from tensorboardX.proto.summary_pb2 import Summary

    from perceiver.tasks.base import Sample

logger = logging.getLogger(__name__)


class Recorder:
    """Writes a run's records; on all workers but the first it writes nothing.

    A run that continues from step n drops the records of later steps first: they are of steps that will be taken again. While it
    trains, a record that cannot be written (the disk is full, say) is a warning, given once, and no error: training continues, and
    the next record is tried again.
    """

    def __init__(self, folder: Path, step: int, total_steps: int, unit: str, active: bool):
        self.folder = folder
        self.total_steps = total_steps
        self.unit = unit
        self.active = active
        if not active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        keep = [record for record in Run(folder).metrics() if record["step"] <= step]
        write_file(folder, METRICS, "".join(map(_line, keep)).encode())
        board = Run(folder).tensorboard_folder
        self._board = Board(board, step + 1 if step or (board.is_dir() and any(board.iterdir())) else None)
        self._cut = False
        self._warned = False

    def say(self, line: str) -> None:
        """A line for people, of the first worker."""
        if self.active:
            logger.info("%s", line)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Adds a record (null for what is no finite number). Names with val_ go under val/ in TensorBoard, the others under train/."""
        self._record(lambda: self._append(_line({"step": step, **values}).encode()))
        tags = {f"val/{name.removeprefix('val_')}" if name.startswith("val_") else f"train/{name}": value for name, value in values.items()}
        self._record(lambda: self._board.add(step, [scalar(tag, value) for tag, value in tags.items()]))

    def progress(self, step: int, values: dict[str, float]) -> None:
        """One line for a person."""
        sources = [f"{name.removeprefix('loss/')} {value:.4f}" for name, value in values.items() if name.startswith("loss/")]
        parts = [
            f"step {step:,}/{self.total_steps:,}",
            f"loss {values['loss']:.4f}" + (f" ({', '.join(sources)})" if sources else ""),
            f"lr {values['lr']:.2e}",
            f"{values['throughput']:,.0f} {self.unit}/s",
        ]
        if "mfu" in values:
            parts.append(f"MFU {values['mfu']:.1%}")
        parts += [f"data wait {values['data_wait']:.1%}", f"{duration(values['seconds_left'])} left"]
        self.say("  ".join(parts))

    def samples(self, step: int, samples: list[Sample]) -> None:
        """Texts and pictures, to TensorBoard and to the folder `samples`; other files to the folder alone."""
        for sample in samples:
            self._record(partial(self._sample, step, sample))

    def _sample(self, step: int, sample: Sample) -> None:
        target = Run(self.folder).samples_folder
        target.mkdir(exist_ok=True)
        if sample.text is not None:
            (target / f"{sample.name}-{step:08d}.txt").write_text(sample.text)
            self._board.add(step, [text(sample.name, f"```\n{sample.text}\n```")])
        if sample.image is not None:
            from PIL import Image

            Image.fromarray(sample.image).save(target / f"{sample.name}-{step:08d}.png")
            self._board.add(step, [image(sample.name, sample.image, dataformats="HWC")])
        if sample.file is not None:
            (target / f"{sample.name}-{step:08d}{sample.suffix}").write_bytes(sample.file)

    def to_disk(self) -> None:
        """Puts what was written on disk. A run that continues from a checkpoint takes none of its steps again, so their records must
        survive whatever the checkpoint survives.
        """
        self._record(lambda: to_disk(self.folder / METRICS))
        self._record(lambda: self._board.to_disk())

    def close(self) -> None:
        self._record(lambda: self._board.close())

    def _append(self, line: bytes) -> None:
        """Adds a line to the metrics, or raises OSError. A line that was cut off before is ended first."""
        content = b"\n" + line if self._cut else line
        with open(self.folder / METRICS, "ab", buffering=0) as file:
            written = file.write(content)
        self._cut = written != len(content)
        if self._cut:
            raise OSError(f"only {written} of {len(content)} bytes could be written")

    def _record(self, write: Callable[[], None]) -> None:
        if not self.active:
            return
        try:
            write()
        except Exception as error:  # whatever a record meets, it is no reason to stop a step
            if not self._warned:
                logger.warning("records of this run are incomplete, training continues: %s: %s", type(error).__name__, error)
            self._warned = True


class Board:
    """TensorBoard's event files.

    They are written in the thread that calls. The writer of tensorboardX has a thread of its own, which ends at its first error,
    and then its queue is full for ever and blocks who adds to it.
    """

    def __init__(self, folder: Path, first_step: int | None) -> None:
        self._folder = folder
        self._first_step = first_step
        self._file: EventsWriter | None = None
        self._files = 0

    def add(self, step: int, summaries: list[Summary]) -> None:
        """Writes summaries of a step. After an error, which is raised, the next ones go to a new file: a cut one is read no further."""
        try:
            if self._file is None:
                self._open()
            assert self._file is not None
            for summary in summaries:
                self._file.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            self._file.flush()
        except Exception:
            self._file = None
            raise

    def to_disk(self) -> None:
        if self._file is not None:
            to_disk(self._path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        # A name has the second that the file is made in; after an error another file may be made in the same one.
        suffix = f".{os.getpid()}.{self._files}"
        try:
            self._file = EventsWriter(str(self._folder / "events"), suffix)
        except Exception:
            for path in self._folder.glob(f"*{suffix}"):
                if path.stat().st_size == 0:
                    path.unlink()
            raise
        (self._path,) = self._folder.glob(f"*{suffix}")
        self._files += 1
        if self._first_step is not None:  # readers drop what an earlier start wrote of these steps
            self._file.write_event(Event(step=self._first_step, file_version="brain.Event:2"))
            self._file.write_event(Event(step=self._first_step, session_log=SessionLog(status=SessionLog.START)))
            self._first_step = None


def _line(record: dict[str, Any]) -> str:
    return json.dumps(finite(record), allow_nan=False) + "\n"
