"""The output of batch inference as one file: parts in their order as .csv, .jsonl or .parquet."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from perceiver.data.storage import atomic_file, open_folder
from perceiver.inference.predict import CLASS_NAMES

_AT_ONCE = 10_000
"""Rows that are written together."""


def join(folder: str, names: Sequence[str], output: str) -> int:
    """Writes the parts of a folder, in order, as one file that appears whole or not at all; the number of its rows.

    Probabilities of classes go by the names of the classes: in .csv a column "probability_NAME" each, in .jsonl an object, in .parquet a
    struct. So do several numbers that were predicted, by the names of their columns; one alone is a number. Other lists are JSON
    in .csv. Bytes are base64 in .csv and .jsonl.
    """
    root, _, name = output.rpartition("/")
    write = WRITERS[suffix_of(output)]
    with atomic_file(root, name) as file:
        return write(file, _tables(folder, names))


def suffix_of(output: str) -> str:
    """The ending of the output where it is one of a file; "": it is a folder."""
    return next((suffix for suffix in WRITERS if output.lower().endswith(suffix)), "")


def _tables(folder: str, names: Sequence[str]) -> Iterator[pa.Table]:
    filesystem, path = open_folder(folder)
    for name in names:
        yield pq.read_table(f"{path}/{name}", filesystem=filesystem, partitioning=None)


def _names(schema: pa.Schema) -> dict[str, list[str]]:
    """Of columns of lists, what their numbers are of."""
    found = {}
    for field in schema:
        if CLASS_NAMES.encode() in (field.metadata or {}):
            names = json.loads(field.metadata[CLASS_NAMES.encode()])
            if names is not None:
                found[field.name] = names
    return found


def _named(value: Any, names: list[str]) -> Any:
    """A list as an object; of one number that number."""
    if value is None:
        return None
    return value[0] if len(names) == 1 else dict(zip(names, value, strict=True))


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows as Python has them; numbers of 32 bits with the digits that they have."""
    for start in range(0, table.num_rows, _AT_ONCE):
        part = table.slice(start, _AT_ONCE)
        short = {field.name for field in part.schema if _is_float32(field.type)}
        for row in part.to_pylist():
            yield {name: _shortened(value) if name in short else _written(value) for name, value in row.items()}


def _written(value: Any) -> Any:
    """Bytes, such as those of a MIDI file, as base64."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def _is_float32(kind: pa.DataType) -> bool:
    return kind == pa.float32() or (pa.types.is_list(kind) and kind.value_type == pa.float32())


def _shortened(value: Any) -> Any:
    if isinstance(value, list):
        return [_shortened(each) for each in value]
    return None if value is None else float(str(np.float32(value)))


def _write_jsonl(file: BinaryIO, tables: Iterator[pa.Table]) -> int:
    total = 0
    for table in tables:
        names = _names(table.schema)
        for row in _rows(table):
            row |= {name: _named(row[name], each) for name, each in names.items()}
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        total += table.num_rows
    return total


def _write_csv(file: BinaryIO, tables: Iterator[pa.Table]) -> int:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer, total = csv.writer(text, lineterminator="\n"), 0
    for table in tables:
        names = _names(table.schema)
        if not total:
            writer.writerow([column for field in table.schema for column in _columns(field.name, names.get(field.name))])
        for row in _rows(table):
            writer.writerow([cell for name, value in row.items() for cell in _cells(value, names.get(name))])
        total += table.num_rows
    text.detach()
    return total


def _columns(name: str, names: list[str] | None) -> list[str]:
    if names is None or len(names) == 1:
        return [name]
    one = f"{name.removesuffix('probabilities')}probability" if name.endswith("probabilities") else name
    return [f"{one}_{each}" for each in names]


def _cells(value: Any, names: list[str] | None) -> list[Any]:
    if names is not None:
        return [None] * len(names) if value is None else value
    return [json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value]


def _write_parquet(file: BinaryIO, tables: Iterator[pa.Table]) -> int:
    writer, total = None, 0
    for table in tables:
        table = _with_structs(table)
        if writer is None:
            writer = pq.ParquetWriter(file, table.schema)
        writer.write_table(table)
        total += table.num_rows
    if writer is not None:
        writer.close()
    return total


def _with_structs(table: pa.Table) -> pa.Table:
    for column, names in _names(table.schema).items():
        place = table.schema.get_field_index(column)
        number = table.schema.field(place).type.value_type
        kind = number if len(names) == 1 else pa.struct([pa.field(name, number) for name in names])
        values = pa.array([_named(each, names) for each in table[column].to_pylist()], kind)
        table = table.set_column(place, pa.field(column, kind), values)
    return table


WRITERS: dict[str, Callable[[BinaryIO, Iterator[pa.Table]], int]] = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
"""By the ending of the output's name."""
