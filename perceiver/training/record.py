"""What a run leaves behind for people and programs: metrics.jsonl, TensorBoard events, samples, lines of progress."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorboardX import SummaryWriter

from perceiver.training.meters import duration

if TYPE_CHECKING:
    from perceiver.tasks.base import Sample

METRICS = "metrics.jsonl"


class Recorder:
    """Writes a run's records; on all workers but the first it writes nothing.

    A run that continues from step n drops the records of later steps first: they are of steps that will be taken again.
    """

    def __init__(self, folder: Path, step: int, total_steps: int, unit: str, active: bool, say: Callable[[str], None]):
        self.folder = folder
        self.total_steps = total_steps
        self.unit = unit
        self.active = active
        self._say = say
        if not active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        keep = [record for record in read_metrics(folder) if record["step"] <= step]
        temporary = folder / f".{METRICS}.tmp"
        temporary.write_text("".join(json.dumps(record) + "\n" for record in keep))
        os.replace(temporary, folder / METRICS)
        self._file = open(folder / METRICS, "a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def say(self, text: str) -> None:
        if self.active:
            self._say(text)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Adds a record. Names with val_ go under val/ in TensorBoard, the others under train/."""
        if not self.active:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            tag = f"val/{name.removeprefix('val_')}" if name.startswith("val_") else f"train/{name}"
            self._board.add_scalar(tag, value, step)

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
        """Texts and pictures: to TensorBoard and to the folder `samples`."""
        if not self.active:
            return
        target = self.folder / "samples"
        target.mkdir(exist_ok=True)
        for sample in samples:
            if sample.text is not None:
                (target / f"{sample.name}-{step:08d}.txt").write_text(sample.text)
                self._board.add_text(sample.name, f"```\n{sample.text}\n```", step)
            if sample.image is not None:
                from PIL import Image

                Image.fromarray(sample.image).save(target / f"{sample.name}-{step:08d}.png")
                self._board.add_image(sample.name, sample.image, step, dataformats="HWC")

    def close(self) -> None:
        if self.active:
            self._file.close()
            self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run so far; a last line cut off by a crash is left out."""
    path = folder / METRICS
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
