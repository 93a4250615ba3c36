"""Reads documents, images with labels, and arrays from spans of files or from code. Every fault names the file and the row or byte."""

from __future__ import annotations

import json
import math
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from perceiver.config import UserError
from perceiver.data.examples import ExamplePart
from perceiver.data.images import BadImage, decode_image, parse_idx
from perceiver.data.rows import ArrayRows, BadExample
from perceiver.data.sources import InputFile
from perceiver.data.spans import (
    SLAB,
    Problems,
    Span,
    Unreadable,
    article_borders,
    byte_runs,
    chunks,
    line_borders,
    line_number,
    section_borders,
)
from perceiver.data.storage import open_folder

MAX_ROWS = 4096
"""Rows of parquet taken at once, at most; fewer where they are large."""
MOST_NAMED = 20
"""Fields of a row that a message names, at most."""
LINES_BEFORE = 16
"""Lines before a part of WikiText in rows, which tell whether its first line is a title: a blank one after another, and some to spare."""


@dataclass(frozen=True)
class Documents:
    """Some documents, or parts of them, in order."""

    texts: list[str]
    labels: np.ndarray | None
    """int64 (n,), where asked for."""
    begins: np.ndarray
    """bool (n,): the document begins with this part."""
    complete: np.ndarray
    """bool (n,): the document ends with this part."""


@dataclass(frozen=True)
class Images:
    """Some images, in order."""

    pixels: np.ndarray
    """uint8 (n, height, width, channels)."""
    labels: np.ndarray
    """int64 (n,)."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns to read and what they may hold."""

    text: str
    label: str | None
    """None: labels are not needed."""
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    image_shape: tuple[int, int, int] | None = None


def read_documents(span: Span, columns: Columns, problems: Problems) -> Iterator[Documents]:
    """The documents of a span. Faulty rows and files go to `problems`.

    Raises:
        UserError: a fault, where faults are not skipped.
    """
    readers = {
        "text": _read_text,
        "wikitext": _read_text,
        "jsonl": _read_jsonl,
        "parquet": _read_parquet,
        "wikitext-rows": _read_wikitext_rows,
        "examples": _read_examples,
    }
    try:
        yield from readers[span.file.format](span, columns, problems)
    except Unreadable as error:
        problems.report(*error.args)


def read_images(span: Span, columns: Columns, problems: Problems) -> Iterator[Images]:
    """The images of a span. Faulty rows and files go to `problems`. Raises UserError like `read_documents`."""
    try:
        if span.file.format == "idx":
            yield from _read_idx(span, columns, problems)
        else:
            yield from _read_parquet_images(span, columns, problems)
    except Unreadable as error:
        problems.report(*error.args)


def parquet_rows(file: InputFile) -> tuple[int, int]:
    """Rows of a parquet file, and their bytes unpacked.

    Raises:
        Unreadable: it is damaged, or no parquet file.
    """
    with _open_parquet(file) as parquet:
        metadata = parquet.metadata
        size = sum(metadata.row_group(g).total_byte_size for g in range(metadata.num_row_groups))
        return metadata.num_rows, size


# ----------------------------------------------------------------------------------------------------------------- text


def _read_text(span: Span, columns: Columns, problems: Problems) -> Iterator[Documents]:
    """Text files, byte for byte. A .txt file is one document (in sections), an article of WikiText is one."""
    file = span.file
    articles = file.format == "wikitext"
    texts: list[str] = []
    begins: list[bool] = []
    complete: list[bool] = []
    size, any_text = 0, False
    for start, run, last in byte_runs(span, problems, article_borders if articles else section_borders):
        any_text = True
        try:
            texts.append(run.decode())
            begins.append(articles or start == 0)
            complete.append(articles or last)
        except UnicodeDecodeError as error:
            place = start + error.start
            problems.report("not UTF-8", f"{file.name} is not UTF-8: byte {run[error.start]:#04x} at byte {place:,}")
        size += len(run)
        if size >= SLAB:
            yield Documents(texts, None, np.array(begins), np.array(complete))
            texts, begins, complete, size = [], [], [], 0
    if texts:
        yield Documents(texts, None, np.array(begins), np.array(complete))
    if not any_text and span.start == 0:
        raise Unreadable("empty file", f"{file.name} is empty")


def _read_wikitext_rows(span: Span, columns: Columns, problems: Problems) -> Iterator[Documents]:
    """WikiText as the hub has it: a row a line, with "" for a blank line, which the original file has as " \\n".

    A part of the file has the articles whose titles are in its rows.
    """
    carry, begun = b"", span.start == 0
    rows, ends = np.empty(0, np.int64), np.empty(0, np.int64)  # of each line that is in the buffer: its row, and where it ends
    for first, lines in _lines_from(span, columns, problems):
        there = [(first + i, (line or " \n").encode()) for i, line in enumerate(lines) if line is not None]
        buffer = carry + b"".join(line for _, line in there)
        rows = np.append(rows, [row for row, _ in there])
        ends = np.append(ends, len(carry) + np.cumsum([len(line) for _, line in there]))
        found, previous = [], 0
        for cut in article_borders(buffer, 0):
            row = rows[np.searchsorted(ends, cut, side="right")]
            if row >= span.start:
                if begun:
                    found.append(buffer[previous:cut].decode())
                begun = row < span.stop
            previous = cut
            if row >= span.stop:
                break
        if found:
            yield _whole(found)
        if not begun and len(rows) and rows[-1] >= span.stop:
            return
        carry, left = buffer[previous:], ends > previous
        rows, ends = rows[left], ends[left] - previous
    if begun and carry:
        yield _whole([carry.decode()])


def _lines_from(span: Span, columns: Columns, problems: Problems) -> Iterator[tuple[int, list[str | None]]]:
    """The lines of a file of rows from a little before a span on, some at once, with the number of the first; None: faulty."""
    others = Problems(skip=True)  # whoever reads the other rows reports their faults
    before = max(0, span.start - LINES_BEFORE)
    for start, stop, sink in ((before, span.start, others), (span.start, span.stop, problems), (span.stop, sys.maxsize, others)):
        for first, table in _parquet_tables(replace(span, start=start, stop=stop), [columns.text]):
            yield first, _strings(span, table, first, sink)


def _whole(texts: list[str], labels: np.ndarray | None = None) -> Documents:
    return Documents(texts, labels, np.ones(len(texts), bool), np.ones(len(texts), bool))


# -------------------------------------------------------------------------------------------------------- JSON, parquet


def _read_jsonl(span: Span, columns: Columns, problems: Problems) -> Iterator[Documents]:
    """A JSON object a line."""
    any_row = False
    for base, run, _ in byte_runs(span, problems, line_borders(span)):
        texts, labels = [], []
        position = base
        for line in run.split(b"\n"):
            if line.strip():
                any_row = True
                row = _parse_line(line, span, position, columns, problems)
                if row is not None:
                    texts.append(row[0])
                    labels.append(row[1])
            position += len(line) + 1
        if texts:
            yield _whole(texts, np.array(labels, np.int64) if columns.label else None)
    if not any_row and span.start == 0:
        raise Unreadable("empty file", f"{span.file.name} is empty")


def _parse_line(line: bytes, span: Span, position: int, columns: Columns, problems: Problems) -> tuple[str, int] | None:
    """Text and label of a line, or None where it is faulty and faults are skipped."""
    fault = _line_fault(span, position, problems)
    try:
        row = parse_json(line.decode())
    except UnicodeDecodeError as error:
        return fault("not UTF-8", f"is not UTF-8: byte {line[error.start]:#04x} at byte {position + error.start:,} of the file")
    except NotJson as error:
        return fault("not JSON", f"is not one JSON object a line ({error})")
    return _text_of(row, columns, fault) if isinstance(row, dict) else fault("wrong type", "is not one JSON object a line")


def _line_fault(span: Span, position: int, problems: Problems) -> Callable[[str, str], None]:
    """Reports a fault of the line at a byte of a file."""

    def fault(reason: str, what: str) -> None:
        place = "" if problems.skip else f"line {line_number(span, position):,}: "
        problems.report(reason, f"{span.file.name} {place}{what}")

    return fault


def _text_of(row: Mapping[str, Any], columns: Columns, fault: Callable[[str, str], None]) -> tuple[str, int] | None:
    """Text and label of a row, or None where it is faulty and faults are skipped."""
    try:
        text = row[columns.text]
        text.encode()
        return text, _label(row[columns.label], columns) if columns.label else 0
    except UnicodeEncodeError:
        fault("not UTF-8", f"field {columns.text!r} has a lone surrogate, which no UTF-8 text can hold")
    except KeyError as error:
        more = ", ..." if len(row) > MOST_NAMED else ""
        fault("missing field", f"has no field {error.args[0]!r} (it has: {', '.join(map(str, list(row)[:MOST_NAMED]))}{more})")
    except (TypeError, AttributeError):
        fault("wrong type", f"field {columns.text!r} is no text")
    except _BadLabel as error:
        fault("bad label", str(error))
    return None


def _read_examples(span: Span, columns: Columns, problems: Problems) -> Iterator[Documents]:
    """What code yields: mappings with a text, and a label where asked for."""
    part = span.file
    assert isinstance(part, ExamplePart)
    rows: list[tuple[str, int]] = []
    size, any_row = 0, False
    for number, example in enumerate(part.examples()):
        any_row = True

        def fault(reason: str, what: str, number: int = number) -> None:
            problems.report(reason, f"{part.place}, example {number:,}: {what}")

        row = _text_of(example, columns, fault) if isinstance(example, Mapping) else fault("no mapping", "is no mapping")
        if row is None:
            continue
        rows.append(row)
        size += len(row[0])
        if size >= SLAB:
            yield _labelled(rows, columns)
            rows, size = [], 0
    if rows:
        yield _labelled(rows, columns)
    if not any_row:
        raise Unreadable("empty part", f"{part.place} yields no example")


def _labelled(rows: list[tuple[str, int]], columns: Columns) -> Documents:
    return _whole([text for text, _ in rows], np.array([label for _, label in rows], np.int64) if columns.label else None)


class NotJson(Exception):
    """Text that is not JSON, or JSON that Python does not read: the message is the reason."""


def parse_json(text: str) -> Any:
    """The value of a text of JSON.

    Raises:
        NotJson: it is none, is nested too deep, or has a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise NotJson(f"{error.msg} at column {error.colno}") from None
    except RecursionError:
        raise NotJson("it is nested too deep") from None
    except ValueError:
        raise NotJson("it has a number of too many digits") from None


class _BadLabel(Exception):
    pass


def _label(value: Any, columns: Columns) -> int:
    """A label as a class number: a number, or the name of a class.

    Raises:
        _BadLabel: neither.
    """
    if isinstance(value, str) and value in columns.class_names:
        return columns.class_names.index(value)
    whole = isinstance(value, (int, np.integer)) or (isinstance(value, float) and value.is_integer())
    if whole and 0 <= value < columns.num_classes:
        return int(value)
    names = f" or {', '.join(columns.class_names)}" if columns.class_names else ""
    raise _BadLabel(f"label {reprlib.repr(value)} must be 0 .. {columns.num_classes - 1}{names}")


def _read_parquet(span: Span, columns: Columns, problems: Problems) -> Iterator[Documents]:
    wanted = [columns.text, *([columns.label] if columns.label else [])]
    for first, table in _parquet_tables(span, wanted):
        texts = _strings(span, table, first, problems)
        keep = [text is not None for text in texts]
        labels = _labels(span, table, first, keep, columns, problems) if columns.label else None
        kept = [text for text, k in zip(texts, keep, strict=True) if k and text is not None]
        if kept:
            yield _whole(kept, None if labels is None else labels[np.array(keep)])


def _labels(span: Span, table: pa.Table, first: int, keep: list[bool], columns: Columns, problems: Problems) -> np.ndarray:
    """The label column as class numbers; rows with a faulty label are taken out of `keep`."""
    result = np.zeros(table.num_rows, np.int64)
    for i, value in enumerate(table.column(columns.label).to_pylist()):
        if keep[i]:
            try:
                result[i] = _label(value, columns)
            except _BadLabel as error:
                problems.report("bad label", f"{span.file.name} row {first + i:,}: {error}")
                keep[i] = False
    return result


def _strings(span: Span, table: pa.Table, first: int, problems: Problems) -> list[str | None]:
    """A table's first column as texts, None where faulty. `first`: the number of its first row in the file."""
    column, name = table.column(0), table.column_names[0]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        raise Unreadable("wrong type", f"{span.file.name} column {name!r} holds {column.type}, not text")
    try:
        texts = column.to_pylist()
    except UnicodeDecodeError:
        texts = [_text_or_none(value) for value in column.cast(kind).cast(pa.large_binary()).to_pylist()]
    for i, text in enumerate(texts):
        if text is None:
            missing = not column[i].is_valid
            reason = "missing text" if missing else "not UTF-8"
            problems.report(
                reason,
                f"{span.file.name} row {first + i:,}: column {name!r} {'is null' if missing else 'is not UTF-8'}",
            )
    return texts


def _text_or_none(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


@contextmanager
def _open_parquet(file: InputFile) -> Iterator[pq.ParquetFile]:
    filesystem, path = open_folder(file.path)
    try:
        with filesystem.open_input_file(path) as source, pq.ParquetFile(source) as parquet:
            yield parquet
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise Unreadable("corrupt file", f"{file.name} is no readable parquet file ({reason})") from None


def _parquet_tables(span: Span, wanted: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """The rows of a span, some at once, with the number of the first.

    Raises:
        Unreadable: damaged file, missing column, no rows.
    """
    with _open_parquet(span.input_file) as parquet:
        there = parquet.schema_arrow.names
        if missing := [name for name in wanted if name not in there]:
            raise Unreadable("wrong schema", f"{span.file.name} has no column {missing[0]!r} (it has: {', '.join(there)})")
        if parquet.metadata.num_rows == 0:
            raise Unreadable("empty file", f"{span.file.name} has no rows")
        first = 0
        for group in range(parquet.metadata.num_row_groups):
            stop = first + parquet.metadata.row_group(group).num_rows
            if first < span.stop and stop > span.start:
                position = first
                size = parquet.metadata.row_group(group).total_byte_size // max(stop - first, 1)
                rows = min(max(SLAB // max(size, 1), 1), MAX_ROWS)
                for batch in parquet.iter_batches(rows, row_groups=[group], columns=wanted, use_threads=False):
                    low, high = max(position, span.start), min(position + batch.num_rows, span.stop)
                    if low < high:
                        table = pa.Table.from_batches([batch.slice(low - position, high - low)])
                        yield low, table.select(wanted)
                    position += batch.num_rows
            first = stop


# --------------------------------------------------------------------------------------------------------------- arrays


def read_arrays(span: Span, rows: ArrayRows, problems: Problems) -> Iterator[dict[str, Any]]:
    """The examples of a span, as the rows' columns hold them. Faulty ones and faulty files go to `problems`.

    Raises:
        UserError: a fault, where faults are not skipped.
    """
    readers = {"examples": _code_arrays, "jsonl": _jsonl_arrays, "parquet": _parquet_arrays}
    try:
        for where, example in readers[span.file.format](span, rows, problems):
            try:
                yield rows.values(example)
            except BadExample as error:
                problems.report(error.reason, f"{where()}: {error}")
    except Unreadable as error:
        problems.report(*error.args)


_Found = Iterator[tuple[Callable[[], str], Any]]
"""Examples, each after what messages call it."""


def _code_arrays(span: Span, rows: ArrayRows, problems: Problems) -> _Found:
    part = span.file
    assert isinstance(part, ExamplePart)
    for number, example in enumerate(part.examples()):
        yield partial("{}, example {:,}".format, part.place, number), example


def _jsonl_arrays(span: Span, rows: ArrayRows, problems: Problems) -> _Found:
    """A JSON object a line, of (nested) lists."""
    any_row = False
    for base, run, _ in byte_runs(span, problems, line_borders(span)):
        position = base
        for line in run.split(b"\n"):
            if line.strip():
                any_row = True
                try:
                    yield partial(_line_place, span, position, problems), parse_json(line.decode())
                except (UnicodeDecodeError, NotJson) as error:
                    _line_fault(span, position, problems)("not JSON", f"is not one JSON object a line ({error})")
            position += len(line) + 1
    if not any_row and span.start == 0:
        raise Unreadable("empty file", f"{span.file.name} is empty")


def _line_place(span: Span, position: int, problems: Problems) -> str:
    return span.file.name if problems.skip else f"{span.file.name} line {line_number(span, position):,}"


def _parquet_arrays(span: Span, rows: ArrayRows, problems: Problems) -> _Found:
    """Columns of numbers, or of lists of them: nested as the rows' shapes are, or all numbers of a row in one list."""
    for first, table in _parquet_tables(span, list(rows.columns)):
        values = {name: _unpacked(table[name].combine_chunks(), rows.columns[name].shape) for name in rows.columns}
        for i in range(table.num_rows):
            example = {name: column[i] for name, column in values.items()}
            yield partial("{} row {:,}".format, span.file.name, first + i), example


def _unpacked(column: pa.Array, shape: tuple[int, ...]) -> Any:
    """A column's values, row by row."""
    flat, sizes = column, []
    while pa.types.is_list(flat.type) or pa.types.is_large_list(flat.type) or pa.types.is_fixed_size_list(flat.type):
        lengths = pc.list_value_length(flat)
        if flat.null_count or not len(flat) or pc.min(lengths) != pc.max(lengths):
            return column.to_pylist()  # one row at least is no array, and is named by whoever looks at them one by one
        sizes.append(lengths[0].as_py())
        flat = flat.flatten()
    numbers = pa.types.is_integer(flat.type) or pa.types.is_floating(flat.type) or pa.types.is_boolean(flat.type)
    if flat.null_count or not numbers:
        return column.to_pylist()
    if sizes == [math.prod(shape)]:
        sizes = list(shape)
    return flat.to_numpy(zero_copy_only=False).reshape(len(column), *sizes)


# --------------------------------------------------------------------------------------------------------------- images


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
    for first, table in _parquet_tables(span, ["image", columns.label]):
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
        labels = _labels(span, table, first, keep, columns, problems)
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
        for first, table in _parquet_tables(Span(file, 0, sys.maxsize), ["image"]):
            for i, value in enumerate(table.column("image")):
                try:
                    return _decoded(value.as_py()).shape
                except BadImage as error:
                    problems.report("bad image", f"{file.name} row {first + i:,}: no readable image ({error})")
    except Unreadable as error:
        raise UserError(error.args[1]) from None
    raise UserError(f"{file.name} has no image that can be read")
