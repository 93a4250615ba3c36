"""A few examples of a source to show a person: pictures as small PNG files, and texts, of every class some."""

from __future__ import annotations

import codecs
import io
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np

from perceiver.config import UserError
from perceiver.data.files import InputFile
from perceiver.data.images import decode_image, parse_idx
from perceiver.data.read_tars import tar_pictures
from perceiver.data.sources import Source
from perceiver.data.spans import Span, Unreadable, chunks
from perceiver.data.storage import open_folder
from perceiver.data.survey import table_rows
from perceiver.data.tables import label_text

SIDE = 112
"""Pixels of the longer side of a picture that is shown, at most."""
_LOOKED_THROUGH = 5000
"""Pictures of a table, an archive or an idx file that are looked through, at most."""


class Chosen:
    """The first examples of each class, together at most `most`; classes have about as many each.

    Args:
        most: examples that are kept in the end.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._found: dict[str, list[Any]] = defaultdict(list)

    def wants(self, label: Any) -> bool:
        """Whether another example of a class is of use."""
        return len(self._found[str(label)]) < self._most

    def add(self, label: Any, example: Any) -> None:
        self._found[str(label)].append(example)

    def take(self) -> list[tuple[str, Any]]:
        """(label, example), those of a class side by side."""
        left = self._most
        shares: dict[str, int] = defaultdict(int)
        while left and any(shares[label] < len(found) for label, found in self._found.items()):
            for label, found in self._found.items():
                if left and shares[label] < len(found):
                    shares[label] += 1
                    left -= 1
        return [(label, example) for label, found in self._found.items() for example in found[: shares[label]]]


def pictures(source: Source, label_column: str, most: int = 36) -> list[tuple[str, bytes]]:
    """Captions (class and file) and PNG files of some pictures; those that cannot be read are left out."""
    chosen = Chosen(most)
    for file in _spread(source.files, most):
        with suppress(Exception):  # whatever damage a file has, the page shows the others and the preparation names it
            for name, data, label in _pictures(file, label_column):
                if chosen.wants(label) and (shown := thumbnail(data)) is not None:
                    chosen.add(label, (name, shown))
    return [(f"{label}: {name.rpartition('/')[2]}", shown) for label, (name, shown) in chosen.take()]


def _spread(files: tuple[InputFile, ...] | list[InputFile], most: int) -> list[InputFile]:
    """The files to look into: of single pictures some of each class, of all others the first few."""
    chosen, others = Chosen(most), [file for file in files if file.format != "picture"][:4]
    for file in files:
        if file.format == "picture" and chosen.wants(file.label):
            chosen.add(file.label, file)
    return [file for _, file in chosen.take()] + others


def _pictures(file: InputFile, label_column: str) -> Iterator[tuple[str, Any, Any]]:
    """Name, content (bytes, or pixels) and label of each picture of a file."""
    if file.format == "picture":
        filesystem, path = open_folder(file.path)
        with filesystem.open_input_file(path) as stream:
            yield file.name, stream.read(), file.label
        return
    if file.format == "tar":
        found: Iterator[tuple[str, Any, Any]] = tar_pictures(file, label_column)
    elif file.format == "idx":
        found = _of_idx(file)
    else:
        found = _of_table(file, label_column)
    for number, picture in enumerate(found):
        yield picture
        if number == _LOOKED_THROUGH:
            break


def _of_idx(file: InputFile) -> Iterator[tuple[str, Any, Any]]:
    assert file.labels_path is not None
    beside = InputFile(path=file.labels_path, name=file.name, format="idx", size=0)
    images = parse_idx(b"".join(chunks(Span(file, 0, 0), 0)), 3, file.name)
    labels = parse_idx(b"".join(chunks(Span(beside, 0, 0), 0)), 1, file.name)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield f"image {number:,}", image, int(label)


def _of_table(file: InputFile, label_column: str) -> Iterator[tuple[str, Any, Any]]:
    for number, row in enumerate(table_rows(file)):
        image = row.get("image")
        yield f"row {number:,}", image.get("bytes") if isinstance(image, dict) else image, row.get(label_column)


def thumbnail(data: Any) -> bytes | None:
    """A small PNG file of a picture; None of what is none."""
    from PIL import Image

    try:
        pixels = data if isinstance(data, np.ndarray) else decode_image(data)  # as the preparation sees it
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)
        if max(image.size) <= SIDE // 2:
            factor = SIDE // max(image.size)
            image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        image.thumbnail((SIDE, SIDE))
    except Exception:  # Pillow's readers meet damage with errors of every kind
        return None
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def text_begin(file: InputFile, longest: int = 600) -> str:
    """The first characters of a file of text.

    Raises:
        UserError: it cannot be read.
    """
    try:
        data = next(iter(chunks(Span(file, 0, file.size), 0)), b"")[: 4 * longest]
    except Unreadable as error:
        raise UserError(str(error.args[-1])) from None
    return data.removeprefix(codecs.BOM_UTF8).decode(errors="replace")[:longest]


def texts(files: list[InputFile], text: str, label: str | None, most: int = 12, longest: int = 600) -> list[tuple[str, str]]:
    """Captions (class and file) and the begins of some texts of tables."""
    chosen = Chosen(most)
    for file in files:
        for number, row in enumerate(table_rows(file)):
            value, name = row.get(text), label_text(row[label]) if label and row.get(label) is not None else ""
            if isinstance(value, str) and chosen.wants(name):
                shown = value if len(value) <= longest else f"{value[:longest]} ... ({len(value):,} characters)"
                chosen.add(name, (f"{file.name} row {number:,}", shown))
    return [(f"{name}: {place}" if name else place, shown) for name, (place, shown) in chosen.take()]
