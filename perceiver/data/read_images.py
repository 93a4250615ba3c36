"""Reads images with labels from spans of files. Every fault names the file and the row."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from perceiver.config import UserError
from perceiver.data.files import InputFile
from perceiver.data.images import BadImage, decode_image, parse_idx
from perceiver.data.spans import (
    Problems,
    Span,
    Unreadable,
    chunks,
)
from perceiver.data.tables import (
    Columns,
    labels_of,
    parquet_tables,
)


@dataclass(frozen=True)
class Images:
    """Some images, in order."""

    pixels: np.ndarray
    """uint8 (n, height, width, channels)."""
    labels: np.ndarray
    """int64 (n,)."""


def read_images(span: Span, columns: Columns, problems: Problems) -> Iterator[Images]:
    """The images of a span. Faulty rows and files go to `problems`. Raises UserError like `read_documents`."""
    try:
        if span.file.format == "idx":
            yield from _read_idx(span, columns, problems)
        else:
            yield from _read_parquet_images(span, columns, problems)
    except Unreadable as error:
        problems.report(*error.args)


def _read_idx(span: Span, columns: Columns, problems: Problems) -> Iterator[Images]:
    """A pair of idx files: images (n, height, width) and labels (n,)."""
    file = span.input_file
    assert file.labels_path is not None
    parts = []
    for path, ndim in ((file.path, 3), (file.labels_path, 1)):
        name = file.name if path == file.path else f"{file.name.rpartition('/')[0]}/{path.rpartition('/')[2]}".lstrip("/")
        one = InputFile(path=path, name=name, format="idx", size=0)
        data = b"".join(chunks(Span(one, 0, 0), 0))
        try:
            parts.append(parse_idx(data, ndim, name))
        except UserError as error:
            raise Unreadable("bad idx file", str(error)) from None
    images, labels = parts
    if len(images) != len(labels):
        raise Unreadable("bad idx file", f"{file.name} has {len(images):,} images, but its labels file has {len(labels):,} labels")
    if not len(images):
        raise Unreadable("empty file", f"{file.name} has no images")
    if (*images.shape[1:], 1) != columns.image_shape:
        raise Unreadable("bad image", f"{file.name} has images of shape {(*images.shape[1:], 1)}, not {columns.image_shape}")
    good = labels < columns.num_classes
    for i in np.flatnonzero(~good):
        problems.report("bad label", f"{file.name} image {i:,}: label {labels[i]} must be 0 .. {columns.num_classes - 1}")
    yield Images(images[good][..., None], labels[good].astype(np.int64))


def _read_parquet_images(span: Span, columns: Columns, problems: Problems) -> Iterator[Images]:
    """Rows as the hub has them: an "image" column with PNG or JPEG files, and a label column."""
    assert columns.label is not None
    for first, table in parquet_tables(span, ["image", columns.label]):
        pixels: list[np.ndarray | None] = []
        for i, value in enumerate(table.column("image").to_pylist()):
            try:
                image = _decoded(value)
            except BadImage as error:
                problems.report("bad image", f"{span.file.name} row {first + i:,}: no readable image ({error})")
                pixels.append(None)
                continue
            fits = image.shape == columns.image_shape
            if not fits:
                what = f"image of shape {image.shape}, not {columns.image_shape} as the first one"
                problems.report("bad image", f"{span.file.name} row {first + i:,}: {what}")
            pixels.append(image if fits else None)
        keep = [image is not None for image in pixels]
        labels = labels_of(span, table, first, keep, columns, problems)
        if any(keep):
            yield Images(np.stack([p for p, k in zip(pixels, keep, strict=True) if k]), labels[np.array(keep)])


def _decoded(value: Any) -> np.ndarray:
    """The pixels of a value of an "image" column. Raises BadImage."""
    return decode_image(value.get("bytes") if isinstance(value, dict) else value)


def image_shape(file: InputFile, skip: bool = False) -> tuple[int, int, int]:
    """Height, width and channels of a file's images, from its head alone; with `skip` of its first readable one.

    Raises:
        UserError: the file is damaged or has none.
    """
    problems = Problems(skip)
    try:
        if file.format == "idx":
            head = next(chunks(Span(file, 0, 0), 0), b"")
            height, width = parse_idx(head, 3, file.name, head_only=True)
            return height, width, 1
        for first, table in parquet_tables(Span(file, 0, sys.maxsize), ["image"]):
            for i, value in enumerate(table.column("image")):
                try:
                    return _decoded(value.as_py()).shape
                except BadImage as error:
                    problems.report("bad image", f"{file.name} row {first + i:,}: no readable image ({error})")
    except Unreadable as error:
        raise UserError(error.args[1]) from None
    raise UserError(f"{file.name} has no image that can be read")
