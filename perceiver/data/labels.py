"""Labels and pictures' sizes as a source has them, looked up before anything is prepared."""

from __future__ import annotations

import io
import math
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from perceiver.config import UserError
from perceiver.data.examples import ExamplePart
from perceiver.data.files import InputFile
from perceiver.data.images import BadImage, check_image, parse_idx
from perceiver.data.read_documents import parsed_lines
from perceiver.data.read_images import image_shape
from perceiver.data.read_tables import array_rows, column_tables, csv_rows, is_json_array
from perceiver.data.read_tars import tar_pictures
from perceiver.data.sources import Source
from perceiver.data.spans import Problems, Span, Unreadable, whole
from perceiver.data.storage import open_folder
from perceiver.data.tables import BadLabel, label_text, tag_values

MOST_CLASSES = 10_000
"""Different labels that are taken for classes at most."""
MOST_LOOKED_AT = 2000
"""Pictures whose sizes are looked up, evenly drawn from all."""
MOST_BYTES = 64 << 20
"""Bytes of picture files that are decoded to find those that cannot be read: a few seconds."""


def label_counts(source: Source, label_column: str, split: str | None = None, several: bool = False, skip: bool = False) -> Counter[str]:
    """How often each label occurs, by its text (`label_text`), in the files of a split (None: of all).

    Args:
        several: each row has any number of them.
        skip: leave out files that cannot be read, and rows without a label, as the preparation then does.

    Raises:
        UserError: a file that cannot be read, labels that are no classes.
    """
    counts: Counter[str] = Counter()
    for file in source.inputs:
        if split is not None and file.split not in (split, "hash"):
            continue
        if isinstance(file, ExamplePart):
            raise UserError("--model.output.num-classes is 0, and classes are looked up in files, not in what code yields: give the number")
        own: Counter[str] = Counter()
        try:
            for value in _each(file, label_column, several, skip):
                if isinstance(value, float) and math.isfinite(value) and not value.is_integer():
                    raise UserError(_no_class(file, value, label_column))
                if isinstance(value, (list, dict)):
                    raise UserError(
                        f"{file.name} has a {type(value).__name__} as a label, and each row has one class: the presets img-tags and "
                        "txt-tags take lists of labels"
                    )
                if value is not None:
                    own[label_text(value)] += 1
        except Unreadable as error:
            if not skip:
                raise UserError(f"{error.args[-1]} (--data.on-error skip leaves out and counts such rows and files)") from None
            continue
        if (real := _real_number(own)) is not None and not several:
            raise UserError(_no_class(file, real, label_column))
        counts += own
        if len(counts) > MOST_CLASSES:
            raise UserError(
                f"{file.name} has more than {MOST_CLASSES:,} different labels in --data.label-column {label_column}, such as "
                f"{next(iter(counts))!r}: name the column with the class"
            )
    return counts


def _no_class(file: InputFile, value: float, label_column: str) -> str:
    return (
        f"{file.name} has label {value!r} in --data.label-column {label_column}, and classes are whole numbers or names: for quantities "
        f"train the preset tables, --task.targets {label_column}"
    )


def _real_number(labels: Counter[str]) -> float | None:
    """The first label that is no whole number, where all are numbers, as those of a .csv file are texts; else None."""
    try:
        numbers = [float(text) for text in labels]
    except ValueError:
        return None
    return next((number for number in numbers if math.isfinite(number) and not number.is_integer()), None)


def _each(file: InputFile, column: str, several: bool, skip: bool) -> Iterator[Any]:
    """The labels of a file, one by one; those that are none are left to the preparation, which names their rows."""
    for value in _labels(file, column, skip):
        if not several:
            yield value
            continue
        try:
            yield from tag_values(value)
        except BadLabel:
            continue


def class_order(labels: Counter[str]) -> tuple[str, ...]:
    """Names of the classes in their order: whole numbers by their size, else by the alphabet."""
    if all(text.removeprefix("-").isdecimal() for text in labels):
        return tuple(sorted(labels, key=int))
    return tuple(sorted(labels))


def _labels(file: InputFile, column: str, skip: bool) -> Iterator[Any]:
    span, nothing = Span(file, 0, sys.maxsize if file.format in ("parquet", "arrow") else file.size), Problems(skip=True)
    if file.format in ("picture", "sound"):
        yield file.label
    elif file.format == "tar":
        yield from (label for _, _, label in tar_pictures(file, column))
    elif file.format == "idx":
        assert file.labels_path is not None
        beside = InputFile(path=file.labels_path, name=file.name, format="idx", size=0)
        yield from parse_idx(whole(Span(beside, 0, 0)), 1, file.name).tolist()
    elif file.format == "csv":
        yield from (row[column] for _, row in csv_rows(span, [column], nothing))
    elif file.format in ("parquet", "arrow"):
        for _, table in column_tables(span, [column]):
            yield from _values(table)
    else:
        rows = (row for _, row in array_rows(span, nothing)) if is_json_array(file) else parsed_lines(span)
        for row in rows:
            if isinstance(row, dict):
                if column not in row:
                    if skip:
                        continue
                    raise Unreadable("missing field", f"{file.name} has no field {column!r} (it has: {', '.join(map(str, row))})")
                yield row[column]


def _values(table: pa.Table) -> list[Any]:
    return table.column(0).to_pylist()


def picture_sizes(source: Source, skip: bool = False) -> Counter[tuple[int, int, int]]:
    """How many pictures have which height, width and channels; of pictures in tables and idx files the first of each file alone."""
    counts: Counter[tuple[int, int, int]] = Counter()
    pictures = [file for file in source.files if file.format == "picture"]
    for file in pictures[:: max(1, -(-len(pictures) // MOST_LOOKED_AT))]:
        if (shape := _size_of(file)) is not None:
            counts[shape] += 1
    for file in source.files:
        if file.format == "tar":
            for number, (_, data, _) in enumerate(tar_pictures(file, "")):
                if (shape := _size_in(data)) is not None:
                    counts[shape] += 1
                if number == MOST_LOOKED_AT:
                    break
        elif file.format != "picture":
            counts[image_shape(file, skip)] += 1
    if not counts:
        raise UserError(f"none of the {len(source.files):,} files has a picture that can be read, such as {source.files[0].name}")
    return counts


def unreadable_pictures(source: Source) -> list[tuple[str, str]]:
    """Names of picture files that cannot be read, each with the reason: the first `MOST_BYTES` are decoded, of the others the heads."""
    found, read = [], 0
    pictures = [file for file in source.files if file.format == "picture"]
    for file in pictures[:: max(1, -(-len(pictures) // MOST_LOOKED_AT))]:
        filesystem, path = open_folder(file.path)
        with filesystem.open_input_file(path) as stream:
            data = stream.read()
        try:
            read += len(data)
            if read <= MOST_BYTES:
                check_image(data)
            elif _size_in(data) is None:
                raise BadImage("it is no picture, or damaged")
        except BadImage as error:
            found.append((file.name, str(error)))
    return found


def _size_of(file: InputFile) -> tuple[int, int, int] | None:
    filesystem, path = open_folder(file.path)
    with filesystem.open_input_file(path) as stream:
        return _size_in(stream.read())


def _size_in(data: bytes) -> tuple[int, int, int] | None:
    """Height, width, channels of a picture from its head, turned as its EXIF data say; None of one that cannot be read."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) >= 5
            grey = image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;")
    except Exception:  # Pillow's readers meet damage with errors of every kind; the preparation names it
        return None
    return (width, height, 1 if grey else 3) if turned else (height, width, 1 if grey else 3)
