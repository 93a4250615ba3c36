"""Reads images with labels from spans of files. Every fault names the file and the row."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from perceiver.config import UserError
from perceiver.data.files import InputFile
from perceiver.data.images import BadImage, decode_image, fitted, parse_idx
from perceiver.data.read_tables import column_tables
from perceiver.data.read_tars import tar_pictures
from perceiver.data.spans import (
    Problems,
    Span,
    Unreadable,
    chunks,
    whole,
)
from perceiver.data.storage import open_folder
from perceiver.data.tables import BadLabel, Columns, NoGroup, group_of, groups_of, label_of, labels_of

_MOST_PICTURES = 256
"""Pictures of a .tar file that are held at once."""


@dataclass(frozen=True)
class Images:
    """Some images, in order."""

    pixels: np.ndarray
    """uint8 (n, height, width, channels)."""
    labels: np.ndarray
    """int64 (n,)."""
    groups: list[bytes] | None = None
    """The group that each belongs to, where asked for."""


def read_images(span: Span, columns: Columns, problems: Problems) -> Iterator[Images]:
    """The images of a span. Faulty rows and files go to `problems`. Raises UserError like `read_documents`."""
    try:
        if span.file.format == "idx":
            yield from _read_idx(span, columns, problems)
        elif span.file.format in ("picture", "tar"):
            yield from _read_pictures(span, columns, problems)
        else:
            yield from _read_column(span, columns, problems)
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
        data = whole(Span(one, 0, 0))
        try:
            parts.append(parse_idx(data, ndim, name))
        except UserError as error:
            raise Unreadable("bad idx file", str(error)) from None
    images, labels = parts
    if len(images) != len(labels):
        raise Unreadable("bad idx file", f"{file.name} has {len(images):,} images, but its labels file has {len(labels):,} labels")
    if not len(images):
        raise Unreadable("empty file", f"{file.name} has no images")
    if columns.fit_images:
        assert columns.image_shape is not None
        images = np.stack([fitted(image[..., None], columns.image_shape[0], columns.image_shape[2]) for image in images])
    else:
        images = images[..., None]
    if images.shape[1:] != columns.image_shape:
        raise Unreadable("bad image", f"{file.name} has images of shape {images.shape[1:]}, not {columns.image_shape}")
    numbers, good = labels.astype(np.int64), np.ones(len(labels), bool)
    for label in np.unique(labels):
        chosen = labels == label
        try:
            numbers[chosen] = label_of(int(label), columns)
        except BadLabel as error:
            good[chosen] = False
            for i in np.flatnonzero(chosen):
                problems.report(error.reason, f"{file.name} image {i:,}: {error}")
    yield Images(images[good], numbers[good])


def _read_pictures(span: Span, columns: Columns, problems: Problems) -> Iterator[Images]:
    """A picture whose class is known, or those of a .tar file, each with its class."""
    file = span.input_file
    pixels: list[np.ndarray] = []
    labels: list[int] = []
    groups: list[bytes] | None = [] if columns.group else None
    for place, data, label in pictures_of(file, columns.label or ""):
        try:
            image = _with_shape(decode_image(data), columns)
            number = label_of(label, columns)
            if groups is not None:
                groups.append(group_of(file.group, columns.group or ""))
            labels.append(number)
            pixels.append(image)
        except (BadImage, BadLabel, NoGroup) as error:
            problems.report(error.reason, f"{place}: {error}")
        if len(pixels) == _MOST_PICTURES:
            yield Images(np.stack(pixels), np.array(labels, np.int64), groups)
            pixels, labels, groups = [], [], None if groups is None else []
    if pixels:
        yield Images(np.stack(pixels), np.array(labels, np.int64), groups)


def pictures_of(file: InputFile, label_column: str) -> Iterator[tuple[str, bytes, Any]]:
    """What messages call each picture, its bytes, its label."""
    if file.format == "tar":
        yield from tar_pictures(file, label_column)
        return
    filesystem, path = open_folder(file.path)
    try:
        with filesystem.open_input_file(path) as source:
            yield file.name, source.read(), file.label
    except OSError as error:
        raise Unreadable("missing file", f"{file.name} cannot be read ({str(error).splitlines()[0]})") from None


def _with_shape(image: np.ndarray, columns: Columns) -> np.ndarray:
    """An image as it is stored: scaled and cut, or as it is, grey repeated where the others have colours. Raises BadImage."""
    shape = columns.image_shape
    assert shape is not None
    if columns.fit_images:
        return fitted(image, shape[0], shape[2])
    if image.shape[-1] == 1 and shape[-1] == 3:
        image = np.repeat(image, 3, -1)
    if image.shape != shape:
        raise BadImage(f"image of shape {image.shape}, not {shape} as the model takes: --data.image-size N scales and cuts all alike")
    return image


def _read_column(span: Span, columns: Columns, problems: Problems) -> Iterator[Images]:
    """Rows as the hub has them: an "image" column with PNG or JPEG files, and a label column."""
    assert columns.label is not None
    for first, table in column_tables(span, list(dict.fromkeys(["image", columns.label, *([columns.group] if columns.group else [])]))):
        pixels: list[np.ndarray | None] = []
        for i, value in enumerate(table.column("image").to_pylist()):
            try:
                image = _decoded(value)
            except BadImage as error:
                problems.report("bad image", f"{span.file.name} row {first + i:,}: no readable image ({error})")
                pixels.append(None)
                continue
            if columns.fit_images:
                assert columns.image_shape is not None
                image = fitted(image, columns.image_shape[0], columns.image_shape[2])
            fits = image.shape == columns.image_shape
            if not fits:
                what = f"image of shape {image.shape}, not {columns.image_shape} as the first one"
                problems.report("bad image", f"{span.file.name} row {first + i:,}: {what}")
            pixels.append(image if fits else None)
        keep = [image is not None for image in pixels]
        labels = labels_of(span, table, first, keep, columns, problems)
        groups = groups_of(span, table, first, keep, columns, problems) if columns.group else None
        if any(keep):
            yield Images(np.stack([p for p, k in zip(pixels, keep, strict=True) if k]), labels[np.array(keep)], groups)


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
        if file.format in ("picture", "tar"):
            for place, data, _ in pictures_of(file, ""):
                try:
                    return decode_image(data).shape
                except BadImage as error:
                    problems.report("bad image", f"{place}: {error}")
            raise UserError(f"{file.name} has no image that can be read")
        for first, table in column_tables(Span(file, 0, sys.maxsize), ["image"]):
            for i, value in enumerate(table.column("image")):
                try:
                    return _decoded(value.as_py()).shape
                except BadImage as error:
                    problems.report("bad image", f"{file.name} row {first + i:,}: no readable image ({error})")
    except Unreadable as error:
        raise UserError(error.args[1]) from None
    raise UserError(f"{file.name} has no image that can be read")
