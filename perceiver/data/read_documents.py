"""Reads documents from spans of files or from code. Every fault names the file and the row or byte."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from perceiver.data.examples import ExamplePart
from perceiver.data.read_tables import array_rows, column_tables, csv_rows, is_json_array
from perceiver.data.spans import (
    SLAB,
    Problems,
    Span,
    Unreadable,
    article_borders,
    byte_runs,
    line_borders,
    section_borders,
)
from perceiver.data.tables import (
    BadLabel,
    Columns,
    NoGroup,
    NotJson,
    group_of,
    groups_of,
    label_of,
    labels_of,
    line_fault,
    parquet_tables,
    parse_json,
)

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
    groups: list[bytes] | None = None
    """The group that each belongs to, where asked for."""


def read_documents(span: Span, columns: Columns, problems: Problems) -> Iterator[Documents]:
    """The documents of a span. Faulty rows and files go to `problems`.

    Raises:
        UserError: a fault, where faults are not skipped.
    """
    readers = {
        "text": _read_text,
        "wikitext": _read_text,
        "jsonl": _read_jsonl,
        "csv": _read_csv,
        "arrow": _read_columns,
        "parquet": _read_columns,
        "wikitext-rows": _read_wikitext_rows,
        "examples": _read_examples,
    }
    try:
        yield from readers[span.file.format](span, columns, problems)
    except Unreadable as error:
        problems.report(*error.args)


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
            texts.append((run.removeprefix(codecs.BOM_UTF8) if start == 0 else run).decode())
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
        for first, table in parquet_tables(replace(span, start=start, stop=stop), [columns.text]):
            yield first, _strings(span, table, first, sink)


def _whole(texts: list[str], labels: np.ndarray | None = None, groups: list[bytes] | None = None) -> Documents:
    return Documents(texts, labels, np.ones(len(texts), bool), np.ones(len(texts), bool), groups)


def _read_jsonl(span: Span, columns: Columns, problems: Problems) -> Iterator[Documents]:
    """A JSON object a line, or one array of objects."""
    if is_json_array(span.input_file):
        if span.start == 0:
            yield from _read_json_array(span, columns, problems)
        return
    any_row = False
    for base, run, _ in byte_runs(span, problems, line_borders(span)):
        rows = []
        position = base
        for line in run.split(b"\n"):
            if line.strip():
                any_row = True
                bare = line.removeprefix(codecs.BOM_UTF8) if position == 0 else line
                row = _parse_line(bare, span, position, columns, problems)
                if row is not None:
                    rows.append(row)
            position += len(line) + 1
        if rows:
            yield _labelled(rows, columns)
    if not any_row and span.start == 0:
        raise Unreadable("empty file", f"{span.file.name} is empty")


def parsed_lines(span: Span, problems: Problems | None = None) -> Iterator[Any]:
    """The values of lines of JSON; what is none is left out, and reported if `problems` are given."""
    for base, run, _ in byte_runs(span, Problems(skip=True), line_borders(span)):
        data, position = run.removeprefix(codecs.BOM_UTF8) if base == 0 else run, base
        for line in data.split(b"\n"):
            if line.strip():
                try:
                    yield parse_json(line.decode())
                except (UnicodeDecodeError, NotJson) as error:
                    if problems is not None:
                        line_fault(span, position, problems)("not JSON", f"is no JSON ({error})")
            position += len(line) + 1


def _read_json_array(span: Span, columns: Columns, problems: Problems) -> Iterator[Documents]:
    """A JSON file of one array. Faults name the element, from 0 on."""
    yield from _rows_with_places(((f"element {number:,}", row) for number, row in array_rows(span, problems)), span, columns, problems)


def _read_csv(span: Span, columns: Columns, problems: Problems) -> Iterator[Documents]:
    """A .csv or .tsv file. Faults name the line."""
    yield from _rows_with_places(
        ((f"line {line:,}", row) for line, row in csv_rows(span, _wanted(columns), problems)), span, columns, problems
    )


def _rows_with_places(rows: Iterator[tuple[str, Any]], span: Span, columns: Columns, problems: Problems) -> Iterator[Documents]:
    placed = ((f"{span.file.name} {place}", row) for place, row in rows)
    yield from _in_slabs(_texts(placed, columns, problems, ("wrong type", "is no JSON object")), columns)


_Read = tuple[str, int, bytes]
"""Text, label and group of a row; 0 and nothing where not asked for."""


def _wanted(columns: Columns) -> list[str]:
    return list(dict.fromkeys(name for name in (columns.text, columns.label, columns.group) if name))


def _texts(rows: Iterable[tuple[str, Any]], columns: Columns, problems: Problems, no_mapping: tuple[str, str]) -> Iterator[_Read]:
    """What is read of rows, each after its place; `no_mapping` is the fault of one that is no mapping."""
    for place, row in rows:

        def fault(reason: str, what: str, place: str = place) -> None:
            problems.report(reason, f"{place}: {what}")

        if not isinstance(row, Mapping):
            fault(*no_mapping)
        elif (made := _text_of(row, columns, fault)) is not None:
            yield made


def _in_slabs(rows: Iterator[_Read], columns: Columns) -> Iterator[Documents]:
    """Texts with their labels, read together until they have SLAB letters."""
    found: list[_Read] = []
    size = 0
    for row in rows:
        found.append(row)
        size += len(row[0])
        if size >= SLAB:
            yield _labelled(found, columns)
            found, size = [], 0
    if found:
        yield _labelled(found, columns)


def _parse_line(line: bytes, span: Span, position: int, columns: Columns, problems: Problems) -> _Read | None:
    """What is read of a line, or None where it is faulty and faults are skipped."""
    fault = line_fault(span, position, problems)
    try:
        row = parse_json(line.decode())
    except UnicodeDecodeError as error:
        return fault("not UTF-8", f"is not UTF-8: byte {line[error.start]:#04x} at byte {position + error.start:,} of the file")
    except NotJson as error:
        return fault("not JSON", f"is not one JSON object a line ({error})")
    return _text_of(row, columns, fault) if isinstance(row, dict) else fault("wrong type", "is not one JSON object a line")


def _text_of(row: Mapping[str, Any], columns: Columns, fault: Callable[[str, str], None]) -> _Read | None:
    """What is read of a row, or None where it is faulty and faults are skipped."""
    try:
        text = row[columns.text]
        text.encode()
        label = label_of(row[columns.label], columns) if columns.label else 0
        return text, label, group_of(row[columns.group], columns.group) if columns.group else b""
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # a byte that could not be read
            fault("not UTF-8", f"field {columns.text!r} is not UTF-8: byte {code - 0xDC00:#04x} (--data.encoding latin-1, say)")
        else:
            fault("not UTF-8", f"field {columns.text!r} has a lone surrogate, which no UTF-8 text can hold")
    except KeyError as error:
        more = ", ..." if len(row) > MOST_NAMED else ""
        fault("missing field", f"has no field {error.args[0]!r} (it has: {', '.join(map(str, list(row)[:MOST_NAMED]))}{more})")
    except (TypeError, AttributeError):
        fault("wrong type", f"field {columns.text!r} is no text")
    except BadLabel as error:
        fault(error.reason, str(error))
    except NoGroup as error:
        fault("no group", str(error))
    return None


def _read_examples(span: Span, columns: Columns, problems: Problems) -> Iterator[Documents]:
    """What code yields: mappings with a text, and a label where asked for."""
    part = span.file
    assert isinstance(part, ExamplePart)
    any_row = False

    def rows() -> Iterator[tuple[str, Any]]:
        nonlocal any_row
        for number, example in enumerate(part.examples()):
            any_row = True
            yield f"{part.place}, example {number:,}", example

    yield from _in_slabs(_texts(rows(), columns, problems, ("no mapping", "is no mapping")), columns)
    if not any_row:
        raise Unreadable("empty part", f"{part.place} yields no example")


def _labelled(rows: list[_Read], columns: Columns) -> Documents:
    texts, labels, groups = map(list, zip(*rows, strict=True))
    return _whole(texts, np.array(labels, np.int64) if columns.label else None, groups if columns.group else None)


def _read_columns(span: Span, columns: Columns, problems: Problems) -> Iterator[Documents]:
    """Rows of Parquet and Arrow files."""
    for first, table in column_tables(span, _wanted(columns)):
        texts = _strings(span, table, first, problems)
        keep = [text is not None for text in texts]
        labels = labels_of(span, table, first, keep, columns, problems) if columns.label else None
        groups = groups_of(span, table, first, keep, columns, problems) if columns.group else None
        kept = [text for text, k in zip(texts, keep, strict=True) if k and text is not None]
        if kept:
            yield _whole(kept, None if labels is None else labels[np.array(keep)], groups)


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
