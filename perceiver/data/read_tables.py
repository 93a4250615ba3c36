"""Rows of files that are read from their beginning: .csv and .tsv, JSON files of one array, Arrow files."""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from perceiver.data.files import PACKINGS, InputFile
from perceiver.data.read_excel import excel_rows, is_excel
from perceiver.data.spans import Problems, Span, Unreadable, check_record, chunks
from perceiver.data.storage import open_folder
from perceiver.data.tables import MAX_ROWS, NotJson, check_once, parquet_tables, parse_json

_SEPARATORS = ",;\t|"


def csv_separator(path: str, first_line: str) -> str:
    """What separates the fields of a file: a tab in a .tsv file, else the first line's commonest of , ; tab and |."""
    tabs = ".tsv" in path.lower().rpartition("/")[2]
    return "\t" if tabs else max(_SEPARATORS, key=first_line.count)


def csv_rows(span: Span, wanted: list[str], problems: Problems) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a .csv or .tsv file by the names of its first line, each with the number of the line that it ends in.

    Blank lines are left out.

    Raises:
        Unreadable: no rows, a missing column, quotes that cannot be right.
    """
    if is_excel(span.input_file.path):
        yield from _with_names(span, excel_rows(span.input_file), wanted, problems)
        return
    # Python's reader and not pyarrow's: that has no line numbers, and fails where a quoted text is longer than one of its blocks.
    name = span.file.name
    csv.field_size_limit(sys.maxsize)
    lines = _lines(span, problems)
    first = next(lines, "")
    separator = csv_separator(span.input_file.path, first)
    yield from _with_names(span, _records(name, _chain(first, lines), separator, problems), wanted, problems)


def _records(name: str, lines: Iterator[str], separator: str, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    """The records that are not blank, each with the number of the line that it ends in."""
    reader = csv.reader(lines, delimiter=separator, strict=True)
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problems.report("bad quotes", f"{name} line {reader.line_num:,}: quotes that cannot be right ({error})")
            continue
        if fields:
            yield reader.line_num, fields


def _with_names(
    span: Span, records: Iterator[tuple[int, list[str]]], wanted: list[str], problems: Problems
) -> Iterator[tuple[int, dict[str, str]]]:
    """Records after the first one by the names that it has."""
    name = span.file.name
    header: list[str] = []
    any_row = False
    for number, fields in records:
        if not header:
            header = fields
            check_once(name, header)
            if missing := [column for column in wanted if column not in header]:
                raise Unreadable("wrong schema", f"{name} has no column {missing[0]!r} (it has: {', '.join(header)})")
            continue
        any_row = True
        if len(fields) != len(header):
            what = f"has {len(fields)} fields, and the first line names {len(header)}"
            problems.report("wrong number of fields", f"{name} line {number:,}: {what}")
            continue
        yield number, dict(zip(header, fields, strict=True))
    if not any_row:
        raise Unreadable("empty file", f"{name} has no rows")


def _chain(first: str, lines: Iterator[str]) -> Iterator[str]:
    if first:
        yield first
    yield from lines


def _lines(span: Span, problems: Problems) -> Iterator[str]:
    """Lines with their ends. A byte that is not UTF-8 becomes a lone surrogate, so that its row alone is faulty."""
    carry = b""
    for number, chunk in enumerate(_whole(span, problems)):
        data = chunk.removeprefix(codecs.BOM_UTF8) if number == 0 else chunk
        *full, rest = data.split(b"\n")
        if not full:
            carry += rest
            check_record(span.file.name, len(carry))
            continue
        yield (carry + full[0] + b"\n").decode(errors="surrogateescape")
        for line in full[1:]:
            yield (line + b"\n").decode(errors="surrogateescape")
        carry = rest
    if carry:
        yield carry.decode(errors="surrogateescape")


def _whole(span: Span, problems: Problems) -> Iterator[bytes]:
    """All text of a file; where faults are skipped, of a packed one only after a first pass has found it whole."""
    if problems.skip and span.file.compressed:
        for _ in chunks(span, 0):
            pass
    yield from chunks(span, 0)


def is_json_array(file: InputFile) -> bool:
    """Whether a file is a .json file of one array of objects, and not of an object a line."""
    if not file.path.lower().endswith((".json", *(f".json{packing}" for packing in PACKINGS))):
        return False
    for chunk in chunks(Span(file, 0, 0), 0):
        if text := chunk.removeprefix(codecs.BOM_UTF8).lstrip():
            return text.startswith(b"[")
    return False


def array_rows(span: Span, problems: Problems) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON file that is one array, each with its number.

    Raises:
        Unreadable: it is not JSON.
    """
    name, decoder = span.file.name, json.JSONDecoder()
    texts = codecs.iterdecode(_whole(span, problems), "utf-8-sig")
    buffer, number, ended = "", 0, False
    expected = "["
    wanted = 0
    try:
        for text in _then_end(texts):
            ended = text is None
            buffer += text or ""
            if len(buffer) < wanted and not ended:
                continue  # twice as much each time, so that one huge element is not parsed again for every block
            position = 0
            while True:
                while position < len(buffer) and buffer[position].isspace():
                    position += 1
                if position == len(buffer):
                    break
                if expected == "end":
                    raise NotJson(f"something follows the array after element {number - 1:,}")
                if expected == "[":
                    expected, position = "first", position + 1
                    continue
                if expected in ("first", ", or ]") and buffer[position] == "]":
                    expected, position = "end", position + 1
                    continue
                if expected == ", or ]":
                    if buffer[position] != ",":
                        raise NotJson(f"a comma is missing after element {number - 1:,}")
                    expected, position = "value", position + 1
                    continue
                try:
                    value, stop = decoder.raw_decode(buffer, position)
                except (json.JSONDecodeError, RecursionError, ValueError):
                    if ended:
                        parse_json(buffer[position:])
                        raise
                    break
                if stop == len(buffer) and not ended:
                    break  # a number may go on
                yield number, value
                number, expected, position = number + 1, ", or ]", stop
            buffer = buffer[position:]
            check_record(name, len(buffer))
            wanted = 2 * len(buffer)
        if expected != "end":
            raise NotJson("the array does not end")
    except UnicodeDecodeError as error:
        raise Unreadable("not UTF-8", f"{name} is not UTF-8: byte {error.object[error.start]:#04x} in element {number:,}") from None
    except NotJson as error:
        raise Unreadable("not JSON", f"{name} is no array of JSON: element {number:,}: {error}") from None
    if not number:
        raise Unreadable("empty file", f"{name} has no rows")


def _then_end(texts: Iterator[str]) -> Iterator[str | None]:
    yield from texts
    yield None


def column_tables(span: Span, wanted: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """`parquet_tables`, also of Arrow files, as `datasets.save_to_disk` and Feather write them."""
    if span.file.format != "arrow":
        yield from parquet_tables(span, wanted)
        return
    first = 0
    with open_arrow(span.input_file) as (schema, batches):
        if missing := [column for column in wanted if column not in schema.names]:
            raise Unreadable("wrong schema", f"{span.file.name} has no column {missing[0]!r} (it has: {', '.join(schema.names)})")
        for batch in batches:
            for start in range(0, batch.num_rows, MAX_ROWS):
                yield first + start, pa.Table.from_batches([batch.slice(start, MAX_ROWS)]).select(wanted)
            first += batch.num_rows
    if not first:
        raise Unreadable("empty file", f"{span.file.name} has no rows")


@contextmanager
def open_arrow(file: InputFile) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Schema and rows of an Arrow file; one that is damaged is `Unreadable`."""
    filesystem, path = open_folder(file.path)
    try:
        with filesystem.open_input_file(path) as source:
            stored = source.read(6) == b"ARROW1"  # else a stream of batches, as `datasets` writes it
            source.seek(0)
            if stored:
                reader = pa.ipc.open_file(source)
                check_once(file.name, reader.schema.names)
                yield reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                stream = pa.ipc.open_stream(source)
                check_once(file.name, stream.schema.names)
                yield stream.schema, iter(stream)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise Unreadable("corrupt file", f"{file.name} is no readable Arrow file ({reason})") from None
