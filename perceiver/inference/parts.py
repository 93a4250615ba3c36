"""Input files of batch inference, of any size, cut into parts, the same parts at every call; their rows, each with an id.

Rows are the lines of .txt files, the objects of .jsonl (.json, .ndjson), the rows of .parquet, and image files (a file
a row).
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from perceiver.config import UserError
from perceiver.data.rows import ArrayRows
from perceiver.data.storage import open_folder
from perceiver.data.tables import NotJson, parse_json
from perceiver.inference.rows import Kind, Row, Wanted, checked_row

_CHUNK = 8 << 20
_LINES = (".txt", ".jsonl", ".json", ".ndjson")
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


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
    """First byte of a file of lines (unpacked)."""
    stop: int = 0
    """Byte after the last."""


def list_inputs(inputs: Sequence[str]) -> list[tuple[str, str, int]]:
    """(path, name, bytes) of all input files: of files as they are, of folders all readable files in them, sorted.

    Raises:
        UserError: a path that is not there, or nothing to read.
    """
    found = []
    for given in inputs:
        filesystem, path = open_folder(given)
        prefix = given.partition("://")[0] + "://" if "://" in given else ""
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.File:
            found.append((prefix + path, info.base_name, info.size))
        elif info.type == pafs.FileType.Directory:
            for file in filesystem.get_file_info(pafs.FileSelector(path, recursive=True)):
                name = file.path[len(path) :].strip("/")
                if file.type == pafs.FileType.File and not any(p.startswith((".", "_")) for p in name.split("/")):
                    found.append((prefix + file.path, name, file.size))
        else:
            raise UserError(f"--input {given} does not exist: give files or folders")
    readable = sorted({item for item in found if _suffix(item[0]) in (*_LINES, *_IMAGES, ".parquet")}, key=lambda i: (i[1], i[0]))
    if not readable:
        raise UserError(f"--input has no file that can be read: {', '.join((*_LINES, '.parquet', *_IMAGES))}")
    if len({name for _, name, _ in readable}) < len(readable):
        raise UserError("--input has two files of the same name: rows of both would have the same ids")
    return readable


def plan_parts(
    files: Sequence[tuple[str, str, int]], rows_per_part: int, column: str, id_column: str | None, arrays: ArrayRows | None = None
) -> list[Part]:
    """Cuts files into parts of at most `rows_per_part` rows. Reads files of lines once, of parquet files the footers.

    Args:
        column: with the text or image.
        arrays: what rows of arrays have instead.

    Raises:
        UserError: a file that is damaged or lacks the column.
    """
    cuts: list[dict[str, Any]] = []
    images = [(path, name) for path, name, _ in files if _suffix(path) in _IMAGES]
    for i in range(0, len(images), rows_per_part):
        paths, names = zip(*images[i : i + rows_per_part], strict=True)
        cuts.append({"paths": paths, "names": names, "rows": len(paths)})
    for path, name, _ in files:
        file = {"paths": (path,), "names": (name,)}
        if _suffix(path) == ".parquet":
            rows = _parquet_rows(path, name, (column,) if arrays is None else (), id_column, arrays)
            cuts += [file | {"first": first, "rows": min(rows_per_part, rows - first)} for first in range(0, rows, rows_per_part)]
        elif _suffix(path) in _LINES:
            cuts += [file | cut for cut in _line_cuts(path, name, rows_per_part)]
    return [Part(number=number, **cut) for number, cut in enumerate(cuts)]


def to_plain(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Parts as JSON-ready data."""
    return [asdict(part) for part in parts]


def from_plain(data: Sequence[dict[str, Any]]) -> list[Part]:
    """The inverse of `to_plain`."""
    return [Part(**{**part, "paths": tuple(part["paths"]), "names": tuple(part["names"])}) for part in data]


def read_part(part: Part, kind: Kind, column: str, id_column: str | None, arrays: ArrayRows | None = None) -> list[Row]:
    """The rows of a part, `part.rows` of them, in order; for the arguments see `plan_parts`.

    Raises:
        UserError: the file has changed since it was cut.
    """
    suffix, wanted = _suffix(part.paths[0]), Wanted(kind, column, id_column, arrays)
    if suffix in _IMAGES:
        rows = [_image_row(path, name, wanted) for path, name in zip(part.paths, part.names, strict=True)]
    elif suffix == ".parquet":
        rows = _parquet_part(part, wanted)
    else:
        rows = _line_part(part, wanted, objects=suffix != ".txt")
    if len(rows) != part.rows:
        raise UserError(f"{part.names[0]} has changed since this job began: choose another --output")
    return rows


def _suffix(path: str) -> str:
    return Path(path.lower().removesuffix(".gz")).suffix


# ---------------------------------------------------------------------------------------------------------------- lines


def _chunks(path: str, start: int) -> Iterator[bytes]:
    """The bytes of a file from `start` on, unpacked."""
    filesystem, inner = open_folder(path)
    if not path.lower().endswith(".gz"):
        with filesystem.open_input_file(inner) as source:
            while chunk := source.read_at(_CHUNK, start):
                yield chunk
                start += len(chunk)
        return
    with filesystem.open_input_stream(inner, compression=None) as source, gzip.GzipFile(fileobj=source) as unpacked:
        while chunk := unpacked.read(_CHUNK):
            if start < len(chunk):
                yield chunk[start:]
            start = max(0, start - len(chunk))


def _line_cuts(path: str, name: str, rows_per_part: int) -> Iterator[dict[str, int]]:
    """Where every n-th line begins; a last line without line feed counts, an empty rest does not."""
    first, start, rows, position, last = 0, 0, 0, 0, b"\n"
    try:
        for chunk in _chunks(path, 0):
            place = -1
            while (place := chunk.find(b"\n", place + 1)) >= 0:
                rows += 1
                if rows == rows_per_part:
                    stop = position + place + 1
                    yield {"first": first, "rows": rows, "start": start, "stop": stop}
                    first, start, rows = first + rows, stop, 0
            position += len(chunk)
            last = chunk[-1:]
    except (OSError, EOFError) as error:
        raise UserError(f"{name} cannot be read ({error})") from None
    rows += last != b"\n"
    if rows:
        yield {"first": first, "rows": rows, "start": start, "stop": position}


def _line_part(part: Part, wanted: Wanted, objects: bool) -> list[Row]:
    data, missing = b"", part.stop - part.start
    for chunk in _chunks(part.paths[0], part.start):
        data += chunk[: missing - len(data)]
        if len(data) == missing:
            break
    lines = data.removesuffix(b"\n").split(b"\n")
    read = _object_row if objects else _text_row
    return [read(line.removesuffix(b"\r"), f"{part.names[0]}:{number}", wanted) for number, line in enumerate(lines, part.first)]


def _text_row(line: bytes, place: str, wanted: Wanted) -> Row:
    if wanted.kind != "text":
        return Row(place, None, f"a line of text is no {'image' if wanted.kind == 'image' else 'row of arrays'}")
    try:
        return Row(place, line.decode())
    except UnicodeDecodeError as error:
        return Row(place, None, f"not UTF-8: byte {line[error.start]:#04x}")


def _object_row(line: bytes, place: str, wanted: Wanted) -> Row:
    try:
        row = parse_json(line.decode())
    except UnicodeDecodeError as error:
        return Row(place, None, f"not UTF-8: byte {line[error.start]:#04x}")
    except NotJson as error:
        return Row(place, None, f"not a JSON object: {error}")
    if not isinstance(row, dict):
        return Row(place, None, "not a JSON object")
    return checked_row({name: row.get(name) for name in wanted.columns}, row.get(wanted.id_column), place, wanted)


# ------------------------------------------------------------------------------------------------------ parquet, images


def _parquet_rows(path: str, name: str, columns: Sequence[str], id_column: str | None, arrays: ArrayRows | None) -> int:
    filesystem, inner = open_folder(path)
    try:
        with filesystem.open_input_file(inner) as source, pq.ParquetFile(source) as parquet:
            there = parquet.schema_arrow.names
            rows = parquet.metadata.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{name} is no readable parquet file ({str(error).splitlines()[0]})") from None
    for wanted in (*columns, *([id_column] if id_column else [])):
        if wanted not in there:
            raise UserError(f"{name} has no column {wanted!r} (it has: {', '.join(there)}): see --column and --id-column")
    if arrays is not None and not set(arrays.columns) & set(there):
        raise UserError(f"{name} has none of the columns {', '.join(arrays.columns)} (it has: {', '.join(there)})")
    return rows


def _parquet_part(part: Part, wanted: Wanted) -> list[Row]:
    filesystem, inner = open_folder(part.paths[0])
    id_column = wanted.id_column
    rows: list[Row] = []
    with filesystem.open_input_file(inner) as source, pq.ParquetFile(source) as parquet:
        columns = [name for name in wanted.columns if name in parquet.schema_arrow.names]
        needed = list(dict.fromkeys([*columns, *([id_column] if id_column else [])]))
        start = 0
        for group in range(parquet.metadata.num_row_groups):
            stop = start + parquet.metadata.row_group(group).num_rows
            low, high = max(start, part.first), min(stop, part.first + part.rows)
            if low < high:
                table = parquet.read_row_group(group, columns=needed, use_threads=False).slice(low - start, high - low)
                ids = table.column(id_column).to_pylist() if id_column else [None] * len(table)
                for number, given in zip(range(low, high), ids, strict=True):
                    place = f"{part.names[0]}:{number}"
                    name = columns[0]
                    try:
                        values = {}
                        for name in columns:
                            values[name] = _cell(table[name][number - low])
                        rows.append(checked_row(values, given, place, wanted))
                    except UnicodeDecodeError:
                        rows.append(Row(place if given is None else str(given), None, f"{name!r} is not UTF-8", place))
            start = stop
    return rows


def _cell(value: pa.Scalar) -> Any:
    """A cell of a parquet file as Python has it; a list of numbers without nulls as an array, which is faster."""
    numbers = value.values if isinstance(value, (pa.ListScalar, pa.LargeListScalar, pa.FixedSizeListScalar)) else None
    if numbers is not None and pa.types.is_primitive(numbers.type) and not numbers.null_count:
        return numbers.to_numpy(zero_copy_only=False)
    return value.as_py()


def _image_row(path: str, name: str, wanted: Wanted) -> Row:
    if wanted.kind != "image":
        return Row(name, None, "an image file is no row of arrays" if wanted.kind == "arrays" else "an image file is no text")
    filesystem, inner = open_folder(path)
    try:
        with filesystem.open_input_stream(inner, compression=None) as source:
            return Row(name, source.read())
    except OSError as error:
        return Row(name, None, f"cannot be read ({error})")
