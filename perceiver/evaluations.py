"""Evaluations of a run, as they lie in its folder: metrics, and what each example adds to them. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile, ZipFile

from perceiver.checkpoints import checkpoint_step
from perceiver.config import UserError
from perceiver.disk import read_json, whole_file
from perceiver.runs import Run

if TYPE_CHECKING:
    import numpy as np

MOST_BYTES = 8 << 30
"""Of the examples of an evaluation: more than that is no such file, but made to fill the memory."""


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint of a run, measured on a data set."""

    path: Path
    """Of its metrics; what each example adds lies beside them."""
    step: int
    """Of the checkpoint."""
    digest: str
    """Of the data."""
    averaged: bool
    """Whether its averaged weights were measured."""
    metrics: dict[str, float]
    """As it names them: val_loss, ..."""

    @property
    def has_examples(self) -> bool:
        """Whether what each example adds was kept: versions before 0.2.0 did not."""
        return examples_file(self.path).exists()

    def examples(self) -> dict[str, np.ndarray]:
        """What each example adds to the sums, in the order of the rows: "loss", "targets", "acc" where there is one; of a mixture's data
        sets one after the other.

        Raises:
            UserError: the file is damaged, or missing.
        """
        import numpy as np

        path = examples_file(self.path)

        try:
            with ZipFile(path) as archive:
                size = sum(member.file_size for member in archive.infolist())
            if size > MOST_BYTES:
                raise ValueError(f"it unpacks to {size:,} bytes")
            with np.load(path, allow_pickle=False) as arrays:
                parts: dict[str, list[np.ndarray]] = {}
                for name in sorted(arrays.files):
                    parts.setdefault(name.partition("/")[0], []).append(arrays[name].astype(np.float64))
        except (OSError, ValueError, EOFError, KeyError, MemoryError, BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}): evaluate the run again") from None
        found = {name: np.concatenate(values) for name, values in parts.items()}
        if not {"loss", "targets"} <= found.keys() or len({value.shape for value in found.values()}) > 1:
            raise UserError(f"{path} is damaged (it does not hold losses and targets of examples): evaluate the run again")
        return found


def examples_file(path: Path) -> Path:
    """Where what each example adds lies, for an evaluation's file."""
    return path.with_suffix(".npz")


def save_examples(path: Path, examples: Mapping[str, Mapping[str, np.ndarray]]) -> Path:
    """Writes what each example adds beside an evaluation's file.

    Args:
        path: of the evaluation's metrics.
        examples: arrays in the order of the rows by name, by the names of data sets ("" where there is but one).
    """
    import numpy as np

    target = examples_file(path)
    arrays = {f"{name}/{part}" if part else name: array for part, values in examples.items() for name, array in values.items()}
    with whole_file(target) as file:
        np.savez_compressed(file, **arrays)
    return target


def evaluations(run: Run) -> list[Evaluation]:
    """The evaluations of a run that can be read, by step."""
    found = []
    for path in sorted(run.evaluations_folder.glob("*.json")):
        try:
            content: dict[str, Any] = read_json(path)
            metrics = {str(name): float(value) for name, value in content["metrics"].items() if value is not None}
            step, digest = checkpoint_step(str(content["checkpoint"])), str(content["data"]["digest"])
            averaged = path.name == run.evaluation_file(step, digest, averaged=True).name
            found.append(Evaluation(path, step, digest, averaged, metrics))
        except (UserError, KeyError, TypeError, ValueError, AttributeError):  # one that is damaged costs itself alone
            continue
    return found
