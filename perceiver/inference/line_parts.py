"""Parts of files of lines: text, JSON objects."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator
from typing import Any

from perceiver.data.files import PACKINGS
from perceiver.data.read_tables import array_rows
from perceiver.data.spans import Problems, Span, Unreadable, chunks
from perceiver.data.storage import open_folder
from perceiver.data.tables import NotJson, parse_json
from perceiver.inference.part import Part, as_input_file, named
from perceiver.inference.rows import WANTED, Row, Wanted, checked_row

_CHUNK = 8 << 20
LINES = (".txt", ".jsonl", ".json", ".ndjson")


def unpacked_chunks(path: str, start: int, encoding: str = "utf-8") -> Iterator[bytes]:
    """The bytes of a file of text from `start` on, unpacked and as UTF-8.

    Raises:
        Unreadable: it is damaged, or not of the encoding.
    """
    filesystem, inner = open_folder(path)
    name = path.rpartition("/")[2]
    if not path.lower().endswith(PACKINGS) and encoding == "utf-8":
        with filesystem.open_input_file(inner) as source:
            while chunk := source.read_at(_CHUNK, start):
                if not start and chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise Unreadable(
                        "other encoding", f"{name} is UTF-16 (it begins with its byte order mark): give --data.encoding utf-16"
                    )
                yield chunk
                start += len(chunk)
        return
    for chunk in chunks(Span(as_input_file(path, name, encoding), 0, 0), 0):
        if start < len(chunk):
            yield chunk[start:]
        start = max(0, start - len(chunk))


def line_cuts(path: str, name: str, rows_per_part: int, encoding: str = "utf-8") -> Iterator[dict[str, int]]:
    """Where every n-th line begins; a last line without line feed counts, an empty rest does not."""
    first, start, rows, position, last = 0, 0, 0, 0, b"\n"
    with named(name):
        for chunk in unpacked_chunks(path, 0, encoding):
            place = -1
            while (place := chunk.find(b"\n", place + 1)) >= 0:
                rows += 1
                if rows == rows_per_part:
                    stop = position + place + 1
                    yield {"first": first, "rows": rows, "start": start, "stop": stop}
                    first, start, rows = first + rows, stop, 0
            position += len(chunk)
            last = chunk[-1:]
    rows += last != b"\n"
    if rows:
        yield {"first": first, "rows": rows, "start": start, "stop": position}


def bytes_of(part: Part) -> bytes:
    """The part's bytes of its file, unpacked."""
    data, missing = b"", part.stop - part.start
    for chunk in unpacked_chunks(part.paths[0], part.start, part.encoding):
        data += chunk[: missing - len(data)]
        if len(data) == missing:
            break
    return data


def line_part(part: Part, wanted: Wanted, objects: bool) -> list[Row]:
    """The rows of a part of a file of lines: JSON objects, or text."""
    lines = bytes_of(part).removesuffix(b"\n").split(b"\n")
    read = _object_row if objects else _text_row
    return [read(line.removesuffix(b"\r"), f"{part.names[0]}:{number}", wanted) for number, line in enumerate(lines, part.first)]


def _text_row(line: bytes, place: str, wanted: Wanted) -> Row:
    if wanted.kind != "text":
        return Row(place, None, f"a line of text is no {WANTED[wanted.kind]}")
    try:
        return Row(place, line.decode())
    except UnicodeDecodeError as error:
        return Row(place, None, _not_utf_8(line[error.start]))


def _not_utf_8(byte: int) -> str:
    return f"not UTF-8: byte {byte:#04x} (--data.encoding names another encoding, such as latin-1)"


def _object_row(line: bytes, place: str, wanted: Wanted) -> Row:
    try:
        row = parse_json(line.decode())
    except UnicodeDecodeError as error:
        return Row(place, None, _not_utf_8(line[error.start]))
    except NotJson as error:
        return Row(place, None, f"not a JSON object: {error}")
    return json_row(row, place, wanted)


def json_row(row: Any, place: str, wanted: Wanted) -> Row:
    """What one value of JSON is as a row; an error where it is no object."""
    if not isinstance(row, dict):
        return Row(place, None, "not a JSON object")
    values = {name: row.get(name) for name in wanted.columns if wanted.arrays is None or name in row}
    return checked_row(values, row.get(wanted.id_column), place, wanted)


def array_values(path: str, name: str, encoding: str = "utf-8") -> Iterator[tuple[int, Any]]:
    """The elements of a .json file of one array, each with its number."""
    with named(name):
        yield from array_rows(Span(as_input_file(path, name, encoding), 0, sys.maxsize), Problems(skip=False))
