"""Input files of batch inference, of any size, cut into parts, the same parts at every call; their rows, each with an id.

Rows are the lines of .txt files, the objects of .jsonl (.json, .ndjson), the rows of .csv, .tsv, .xlsx, .parquet and .arrow (whose columns
may name files), image, sound and MIDI files (a file a row), and the pictures or sounds in .tar and idx files. Files of lines and rows of
text may be packed (.gz, .bz2, .zst).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from perceiver.config import UserError
from perceiver.data.files import OF_SAVED, PACKINGS, InputFile, format_of
from perceiver.data.read_excel import EXCEL, is_excel
from perceiver.data.read_tables import is_json_array, open_arrow
from perceiver.data.rows import ArrayRows
from perceiver.data.storage import find_place, open_folder, whole_place
from perceiver.data.tables import check_once
from perceiver.inference.csv_parts import csv_cuts, csv_rows_of, excel_count, excel_rows_of
from perceiver.inference.frames import FRAMES, IMAGES, MUSIC, SOUNDS, frame_cuts, frames_rows, is_flow, media_row
from perceiver.inference.line_parts import LINES, array_values, bytes_of, json_row, line_cuts, line_part, unpacked_chunks
from perceiver.inference.media_parts import idx_images, idx_rows, tar_cuts, tar_rows
from perceiver.inference.part import Part, as_input_file, named
from perceiver.inference.rows import Kind, Row, Wanted, checked_row

_CSV, _ARROW = (".csv", ".tsv", *EXCEL), (".arrow", ".feather")
_TAR = ".tar"
_TABLES = (*_CSV, ".parquet", *_ARROW)
_MEDIA = (*IMAGES, *SOUNDS, *MUSIC)
"""Endings of files that are a row each."""


def list_inputs(inputs: Sequence[str], kind: Kind | None = None) -> list[tuple[str, str, int]]:
    """(path, name, bytes) of all input files: of files as they are, of folders all readable files in them, sorted.

    Where images or sounds are wanted, tables beside those of a folder, which say their classes, are none.

    Raises:
        UserError: a path that is not there, or nothing to read.
    """
    found = []
    for given in inputs:
        filesystem, path, info = find_place(given, "--input")
        if info.type == pafs.FileType.File:
            found.append((whole_place(given, path), info.base_name, info.size or 0))
        elif info.type == pafs.FileType.Directory:
            for file in filesystem.get_file_info(pafs.FileSelector(path, recursive=True)):
                name = file.path[len(path) :].strip("/")
                if file.type == pafs.FileType.File and not any(p.startswith((".", "_")) for p in name.split("/")):
                    found.append((whole_place(given, file.path), name, file.size))
        else:
            raise UserError(f"--input {given} does not exist: give files or folders")
    saved = any(name.rpartition("/")[2] == "state.json" for _, name, _ in found)  # as `datasets.save_to_disk` writes a data set
    found = [item for item in found if not (saved and OF_SAVED.search(item[1]))]
    known = {item for item in found if _suffix(item[0]) in (*LINES, *_TABLES, *_MEDIA, _TAR) or is_idx(item[0])}
    if kind == "frames":
        known |= {item for item in found if is_flow(item[1])}
    if kind in ("image", "audio", "midi", "frames") and any(_suffix(path) in _MEDIA for path, _, _ in known):
        known = {item for item in known if _suffix(item[0]) not in (*LINES, *_CSV)}
    readable = sorted(known, key=lambda item: (item[1], item[0]))
    if not readable:
        raise UserError(f"--input has no file that can be read: {', '.join((*LINES, *_TABLES, *_MEDIA, _TAR))} or idx")
    if len({name for _, name, _ in readable}) < len(readable):
        raise UserError("--input has two files of the same name: rows of both would have the same ids")
    return readable


def plan_parts(
    files: Sequence[tuple[str, str, int]],
    rows_per_part: int,
    column: str,
    id_column: str | None,
    arrays: ArrayRows | None = None,
    kind: Kind = "text",
    encoding: str = "utf-8",
) -> list[Part]:
    """Cuts files into parts of at most `rows_per_part` rows. Reads files of text once, of parquet files the footers.

    A .json file of one array is one part: its middle cannot be entered.

    Args:
        column: with the text or image.
        arrays: what rows of arrays have instead.
        kind: of the rows.
        encoding: of text.

    Raises:
        UserError: a file that is damaged or lacks the column.
    """
    cuts: list[dict[str, Any]] = []
    images = [(path, name) for path, name, _ in files if _suffix(path) in _MEDIA]
    if arrays == FRAMES:
        cuts += frame_cuts({name: path for path, name, _ in files if _suffix(path) in IMAGES or is_flow(name)}, rows_per_part)
        images = []
    columns = () if arrays is not None else Wanted(kind, column, id_column).columns
    for i in range(0, len(images), rows_per_part):
        paths, names = zip(*images[i : i + rows_per_part], strict=True)
        cuts.append({"paths": paths, "names": names, "rows": len(paths)})
    for path, name, _ in files:
        file = {"paths": (path,), "names": (name,)}
        if _suffix(path) == ".parquet":
            rows = _parquet_rows(path, name, columns, id_column, arrays)
            cuts += [file | {"first": first, "rows": min(rows_per_part, rows - first)} for first in range(0, rows, rows_per_part)]
        elif _suffix(path) in _ARROW:
            rows = _arrow_rows(path, name, columns, id_column, arrays)
            cuts += [file | {"first": first, "rows": min(rows_per_part, rows - first)} for first in range(0, rows, rows_per_part)]
        elif _suffix(path) in _CSV:
            check = partial(_check_columns, name, columns=columns, id_column=id_column, arrays=arrays)
            with named(name):
                if is_excel(path):
                    rows = excel_count(path, name, check)
                    cuts += [file | {"first": first, "rows": min(rows_per_part, rows - first)} for first in range(0, rows, rows_per_part)]
                else:
                    cuts += [file | cut for cut in csv_cuts(unpacked_chunks(path, 0, encoding), path, name, rows_per_part, check)]
        elif _suffix(path) == _TAR:
            cuts += [file | cut for cut in tar_cuts(path, name, rows_per_part, kind)]
        elif is_idx(path):
            rows = idx_images(path, name)
            cuts += [file | {"first": first, "rows": min(rows_per_part, rows - first)} for first in range(0, rows, rows_per_part)]
        elif _is_array(path, name, encoding):
            cuts += [file | {"rows": sum(1 for _ in array_values(path, name, encoding))}]
        elif _suffix(path) in LINES:
            cuts += [file | cut for cut in line_cuts(path, name, rows_per_part, encoding)]
    return [Part(number=number, encoding=encoding, **cut) for number, cut in enumerate(cuts)]


def is_idx(path: str) -> bool:
    """Whether a file is one of images as MNIST has them."""
    return format_of(path) == "idx" and "images" in path.rpartition("/")[2]


def _is_array(path: str, name: str, encoding: str) -> bool:
    with named(name):
        return is_json_array(as_input_file(path, name, encoding))


def to_plain(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Parts as JSON-ready data."""
    return [{name: value for name, value in asdict(part).items() if (name, value) != ("encoding", "utf-8")} for part in parts]


def from_plain(data: Sequence[dict[str, Any]]) -> list[Part]:
    """The inverse of `to_plain`."""
    return [Part(**{**part, "paths": tuple(part["paths"]), "names": tuple(part["names"])}) for part in data]


def read_part(part: Part, kind: Kind, column: str, id_column: str | None, arrays: ArrayRows | None = None) -> list[Row]:
    """The rows of a part, `part.rows` of them, in order; for the arguments see `plan_parts`.

    Raises:
        UserError: the file has changed since it was cut.
    """
    folder = part.paths[0].rpartition("/")[0]
    suffix, wanted = _suffix(part.paths[0]), Wanted(kind, column, id_column, arrays, folder)
    if suffix in IMAGES and arrays == FRAMES:
        rows = frames_rows(part.paths, part.names)
    elif suffix in _MEDIA:
        rows = [media_row(path, name, wanted) for path, name in zip(part.paths, part.names, strict=True)]
    elif suffix == _TAR:
        rows = tar_rows(part.paths[0], part.names[0], part.start, part.rows, wanted)
    elif is_idx(part.paths[0]):
        rows = idx_rows(part.paths[0], part.names[0], part.first, part.rows, wanted)
    elif suffix == ".parquet":
        rows = _parquet_part(part, wanted)
    elif suffix in _ARROW:
        rows = _arrow_part(part, wanted)
    elif is_excel(part.paths[0]):
        with named(part.names[0]):
            rows = excel_rows_of(part.paths[0], part.names[0], part.first, part.rows, wanted)
    elif suffix in _CSV:
        path, name = part.paths[0], part.names[0]
        rows = csv_rows_of(unpacked_chunks(path, 0, part.encoding), bytes_of(part), path, name, part.first, part.start, wanted)
    elif _is_array(part.paths[0], part.names[0], part.encoding):
        values = array_values(part.paths[0], part.names[0], part.encoding)
        rows = [json_row(value, f"{part.names[0]}:{number}", wanted) for number, value in values]
    else:
        rows = line_part(part, wanted, objects=suffix != ".txt")
    if len(rows) != part.rows:
        raise UserError(f"{part.names[0]} has changed since this job began: choose another --output")
    return rows


def _suffix(path: str) -> str:
    path = path.lower()
    packing = next((ending for ending in PACKINGS if path.endswith(ending)), "")
    return Path(path.removesuffix(packing)).suffix


# ---------------------------------------------------------------------------------------------------------------- lines


# ---------------------------------------------------------------------------------------------------------------- tables


def _check_columns(name: str, there: Sequence[str], columns: Sequence[str], id_column: str | None, arrays: ArrayRows | None) -> None:
    """Raises UserError where a file lacks what is read of it, or has it twice."""
    with named(name):
        check_once(name, there)
    for choice in (columns, (id_column,) if id_column else ()):
        if choice and not set(choice) & set(there):
            names = " or ".join(map(repr, choice))
            raise UserError(f"{name} has no column {names} (it has: {', '.join(there)}): see --column and --id-column")
    if arrays is not None and not set(arrays.columns) & set(there):
        raise UserError(f"{name} has none of the columns {', '.join(arrays.columns)} (it has: {', '.join(there)})")


# -------------------------------------------------------------------------------------------------------------- parquet


def _parquet_rows(path: str, name: str, columns: Sequence[str], id_column: str | None, arrays: ArrayRows | None) -> int:
    filesystem, inner = open_folder(path)
    try:
        with filesystem.open_input_file(inner) as source, pq.ParquetFile(source) as parquet:
            there = parquet.schema_arrow.names
            rows = parquet.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name} is no readable parquet file ({str(error).splitlines()[0]})") from None
    _check_columns(name, there, columns, id_column, arrays)
    return rows


def _parquet_part(part: Part, wanted: Wanted) -> list[Row]:
    filesystem, inner = open_folder(part.paths[0])
    rows: list[Row] = []
    with filesystem.open_input_file(inner) as source, pq.ParquetFile(source) as parquet:
        needed = _needed(parquet.schema_arrow.names, wanted)
        start = 0
        for group in range(parquet.metadata.num_row_groups):
            stop = start + parquet.metadata.row_group(group).num_rows
            low, high = max(start, part.first), min(stop, part.first + part.rows)
            if low < high:
                table = parquet.read_row_group(group, columns=needed, use_threads=False).slice(low - start, high - low)
                rows += _table_rows(table, low, part.names[0], wanted)
            start = stop
    return rows


def _arrow_rows(path: str, name: str, columns: Sequence[str], id_column: str | None, arrays: ArrayRows | None) -> int:
    with named(name), open_arrow(InputFile(path=path, name=name, format="arrow", size=0)) as (schema, batches):
        _check_columns(name, schema.names, columns, id_column, arrays)
        return sum(batch.num_rows for batch in batches)


def _arrow_part(part: Part, wanted: Wanted) -> list[Row]:
    rows: list[Row] = []
    start = 0
    with open_arrow(InputFile(path=part.paths[0], name=part.names[0], format="arrow", size=0)) as (schema, batches):
        needed = _needed(schema.names, wanted)
        for batch in batches:
            low, high = max(start, part.first), min(start + batch.num_rows, part.first + part.rows)
            if low < high:
                table = pa.Table.from_batches([batch]).select(needed).slice(low - start, high - low)
                rows += _table_rows(table, low, part.names[0], wanted)
            start += batch.num_rows
    return rows


def _needed(there: Sequence[str], wanted: Wanted) -> list[str]:
    return list(dict.fromkeys([*(name for name in wanted.columns if name in there), *([wanted.id_column] if wanted.id_column else [])]))


def _table_rows(table: pa.Table, first: int, name: str, wanted: Wanted) -> Iterator[Row]:
    """The rows of a table, of which the first has the given number in its file."""
    columns = [column for column in wanted.columns if column in table.column_names]
    ids = table.column(wanted.id_column).to_pylist() if wanted.id_column else [None] * table.num_rows
    for number, given in enumerate(ids):
        place, column = f"{name}:{first + number}", columns[0]
        try:
            values = {}
            for column in columns:
                values[column] = _cell(table[column][number])
            yield checked_row(values, given, place, wanted)
        except UnicodeDecodeError:
            yield Row(place if given is None else str(given), None, f"{column!r} is not UTF-8", place)


def _cell(value: pa.Scalar) -> Any:
    """A cell of a parquet file as Python has it; a list of numbers without nulls as an array, which is faster."""
    numbers = value.values if isinstance(value, (pa.ListScalar, pa.LargeListScalar, pa.FixedSizeListScalar)) else None
    if numbers is not None and pa.types.is_primitive(numbers.type) and not numbers.null_count:
        return numbers.to_numpy(zero_copy_only=False)
    return value.as_py()
