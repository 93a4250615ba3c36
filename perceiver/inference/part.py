"""A part of the input of a job of predictions: rows of one file, and how they are named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from perceiver.config import UserError
from perceiver.data.files import InputFile
from perceiver.data.spans import Unreadable


@dataclass(frozen=True, kw_only=True)
class Part:
    """Neighbouring rows that one task reads and one output file holds."""

    number: int
    paths: tuple[str, ...]
    """The file, or the image files."""
    names: tuple[str, ...]
    """What ids call them: the path inside the input."""
    first: int = 0
    """Number of the first row in its file."""
    rows: int
    start: int = 0
    """First byte of a file of lines or of a .csv file (unpacked)."""
    stop: int = 0
    """Byte after the last."""
    encoding: str = "utf-8"
    """Of text."""


def as_input_file(path: str, name: str, encoding: str = "utf-8") -> InputFile:
    """A file, as the readers of training data take it."""
    return InputFile(path=path, name=name, format="jsonl", size=0, encoding=encoding)


@contextmanager
def named(name: str) -> Iterator[None]:
    """A file that cannot be read is named."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error})") from None
    except Unreadable as error:
        raise UserError(error.args[-1]) from None
