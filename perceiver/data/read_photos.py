"""Reads pictures with labels from spans of files, as the encoded bytes that they are. Every fault names the file and the row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from perceiver.data.images import BadImage, check_image
from perceiver.data.read_images import pictures_of
from perceiver.data.read_tables import column_tables
from perceiver.data.spans import Problems, Span, Unreadable
from perceiver.data.tables import BadLabel, Columns, NoGroup, group_of, label_of


@dataclass(frozen=True)
class Photo:
    """A picture as it is stored."""

    content: bytes
    label: int
    group: bytes | None = None


def read_photos(span: Span, columns: Columns, problems: Problems) -> Iterator[Photo]:
    """The pictures of a span that can be decoded. Faulty ones and faulty files go to `problems`.

    Raises:
        UserError: a fault, where faults are not skipped.
    """
    try:
        for place, content, label, group in _given(span, columns):
            try:
                check_image(content)
                key = group_of(group, columns.group) if columns.group else None
                yield Photo(content, label_of(label, columns), key)
            except (BadImage, BadLabel, NoGroup) as error:
                problems.report(error.reason, f"{place}: {error}")
    except Unreadable as error:
        problems.report(*error.args)


def _given(span: Span, columns: Columns) -> Iterator[tuple[str, Any, Any, Any]]:
    """What messages call each picture, its bytes, its label and its group."""
    file, label = span.file, columns.label or ""
    if file.format in ("picture", "tar"):
        group = span.input_file.group
        yield from ((place, content, given, group) for place, content, given in pictures_of(span.input_file, label))
        return
    names = list(dict.fromkeys(["image", label, *([columns.group] if columns.group else [])]))
    for first, table in column_tables(span, names):
        for number, row in enumerate(table.to_pylist(), first):
            value = row["image"]
            content = value.get("bytes") if isinstance(value, dict) else value
            yield f"{file.name} row {number:,}", content, row[label], row[columns.group] if columns.group else None
