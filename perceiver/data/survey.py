"""What a source holds, looked at before it is prepared: files, columns, labels, lengths, duplicates."""

from __future__ import annotations

import hashlib
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from perceiver.config import UserError
from perceiver.data.csv_values import field_value
from perceiver.data.files import InputFile
from perceiver.data.read_documents import parsed_lines
from perceiver.data.read_tables import array_rows, csv_rows, is_json_array, open_arrow
from perceiver.data.spans import SHOWN, Problems, Span, Unreadable, chunks
from perceiver.data.tables import label_text, open_parquet

LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Upper ends of the histogram of lengths, in bytes of UTF-8; longer texts come last."""
_LABEL_NAMES = ("label", "labels", "tags", "class", "category", "target", "sentiment", "stars", "rating", "y")
_MOST_VALUES = 1000
"""Different values of a column that are counted; a column with more is no label."""


Reading = Literal["number", "category", "text"]
"""What a model takes a column of a table as."""


@dataclass
class ColumnSurvey:
    """What the rows have under one name."""

    types: Counter[str] = field(default_factory=Counter)
    values: Counter[str] | None = field(default_factory=Counter)
    """How often each value occurs; None: too many different ones, or values that are no labels."""
    labels: Counter[str] = field(default_factory=Counter)
    """How often each label occurs in lists of labels."""
    text_bytes: int = 0
    """Bytes of its texts together."""
    spaces: int = 0
    """Spaces in them."""
    low: float = math.inf
    """The least of its numbers."""
    high: float = -math.inf
    """The greatest."""
    total: float = 0.0
    """Their sum."""
    example: Any = None

    def add(self, value: Any, is_field: bool = False) -> None:
        """Counts a row's value; that of a field of a .csv file is a text, whatever it holds."""
        held = field_value(value) if is_field and isinstance(value, str) else value
        self.types["missing" if held is None or held == "" else type(held).__name__] += 1
        if isinstance(held, (int, float)) and math.isfinite(held):
            self.low, self.high, self.total = min(self.low, held), max(self.high, held), self.total + held
        if self.example is None and value != "":
            self.example = value
        if isinstance(value, str):
            self.text_bytes += len(value.encode(errors="replace"))
            self.spaces += value.count(" ")
        if isinstance(value, list) and len(self.labels) <= _MOST_VALUES:
            self.labels.update(label_text(each) for each in value if isinstance(each, (str, int)) and len(str(each)) <= 200)
        if self.values is None or value is None or value == "":
            return
        if isinstance(value, (list, dict, bytes)) or (isinstance(value, str) and len(value) > 200):
            self.values = None
            return
        self.values[label_text(value)] += 1
        if len(self.values) > _MOST_VALUES:
            self.values = None

    def settle(self) -> None:
        """Gives fields of a .csv file, each looked at by itself, the type of their column: numbers among texts are texts."""
        for less, more in (("int", "float"), ("bool", "str"), ("int", "str"), ("float", "str"), ("list", "str")):
            if less in self.types and more in self.types:
                self.types[more] += self.types.pop(less)

    @property
    def mean(self) -> float:
        """Of its numbers."""
        return self.total / max(1, sum(self.types[kind] for kind in ("int", "float", "bool")))

    @property
    def is_number(self) -> bool:
        """Whether all values that are there are numbers or lists of such."""
        there = self.types.keys() - {"missing"}
        return bool(there) and there <= {"int", "float", "bool", "list"} and all(map(_is_int, self.labels))

    @property
    def is_quantity(self) -> bool:
        """Whether its values are real numbers, which name no classes."""
        return bool(self.types["float"]) and any("." in value and "e" not in value for value in self.values or ("0.5",))

    def reading(self, rows: int) -> Reading | None:
        """How a model takes its texts: as free text, of which most are different and have several words or are long; as categories, of
        which each occurs often. None: as neither, such as the names of rows, or one value in all of them.

        Args:
            rows: of the table.
        """
        values = math.inf if self.values is None else len(self.values)
        few = 2 <= values <= max(2, rows // 3)
        if self.is_prose and not (few and values <= max(20, rows // 20)):
            return "text" if values > 1 else None
        return "category" if few else None

    @property
    def is_prose(self) -> bool:
        """Whether its texts are of several words, and no names of categories, dates or the like."""
        count = self.types["str"]
        return bool(count) and (self.spaces >= 2 * count or self.text_bytes >= 40 * count)


@dataclass
class TableSurvey:
    """What the rows of tables have."""

    rows: int = 0
    columns: dict[str, ColumnSurvey] = field(default_factory=dict)
    lengths: Counter[int] = field(default_factory=Counter)
    """Texts by the upper end of their class in LENGTHS; 0: longer ones."""
    longer: int = 0
    """Texts longer than what a model takes."""
    cut_bytes: int = 0
    """Bytes of them that it does not see."""
    duplicates: int = 0
    """Texts that occurred before."""
    shared: int = 0
    """Texts of validation files that occur in those for training."""
    faults: Faults = field(default_factory=lambda: Faults())
    """Rows that cannot be read."""
    not_utf_8: int = 0
    """Rows with bytes that are no UTF-8."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Files that cannot be read to their end, by their paths: what is wrong with each. Their rows count for nothing."""


def _is_int(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


class Faults(Problems):
    """Faults that are kept, and neither refused nor forgotten."""

    def __init__(self) -> None:
        super().__init__(skip=False)
        self.first: list[str] = []

    def report(self, reason: str, sentence: str) -> None:
        self.counts[reason] += 1
        if len(self.first) < SHOWN:
            self.first.append(sentence)


def table_rows(file: InputFile, problems: Problems | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a table of any format, with all columns; faulty ones are left out, and reported if `problems` are given.

    Raises:
        UserError: the file cannot be read.
    """
    span = Span(file, 0, sys.maxsize if file.format in ("parquet", "arrow") else file.size)
    nothing = Problems(skip=True) if problems is None else problems
    try:
        if file.format == "csv":
            yield from (row for _, row in csv_rows(span, [], nothing))
        elif file.format == "parquet":
            with open_parquet(file) as parquet:
                for batch in parquet.iter_batches(1024):
                    yield from batch.to_pylist()
        elif file.format == "arrow":
            with open_arrow(file) as (_, batches):
                for batch in batches:
                    yield from batch.to_pylist()
        else:
            rows = (row for _, row in array_rows(span, nothing)) if is_json_array(file) else parsed_lines(span, problems)
            yield from (row for row in rows if isinstance(row, dict))
    except Unreadable as error:
        raise UserError(str(error.args[-1])) from None


def survey_columns(files: list[InputFile]) -> TableSurvey:
    """Columns of tables with their types and values. Raises UserError where no file can be read."""
    found = TableSurvey()
    for file in files:
        if fault := damage_of(file):
            found.unreadable[file.path] = fault
            continue
        for row in table_rows(file, found.faults):
            found.rows += 1
            found.not_utf_8 += any(isinstance(value, str) and not value.isascii() and _has_bytes(value) for value in row.values())
            for name, value in row.items():
                if (column := found.columns.get(str(name))) is None:
                    column = found.columns[str(name)] = ColumnSurvey()
                column.add(value, file.format == "csv")
    if found.unreadable and len(found.unreadable) == len(files):
        raise UserError(next(iter(found.unreadable.values())))
    if all(file.format == "csv" for file in files):
        for column in found.columns.values():
            column.settle()
    return found


def damage_of(file: InputFile) -> str:
    """What is wrong with a packed file, or one of another encoding, which is read as a whole or not at all; "" where it is sound."""
    try:
        if file.compressed:
            for _ in chunks(Span(file, 0, 0), 0):
                pass
        elif file.format in ("csv", "jsonl"):
            next(chunks(Span(file, 0, 0), 0), None)
        elif file.format == "parquet":
            with open_parquet(file):
                pass
        elif file.format == "arrow":
            with open_arrow(file):
                pass
    except Unreadable as error:
        return str(error.args[-1])
    return ""


def _has_bytes(text: str) -> bool:
    """Whether a text has bytes that were no UTF-8 where it was read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def survey_texts(found: TableSurvey, files: list[InputFile], column: str, most_bytes: int) -> None:
    """Adds lengths and duplicates of texts, and what a model that takes `most_bytes` would cut."""
    seen: dict[bytes, bool] = {}
    for file in sorted(files, key=lambda file: file.split == "val"):
        for text in (row.get(column) for row in table_rows(file)):
            if not isinstance(text, str):
                continue
            data = text.encode(errors="replace")
            found.lengths[next((end for end in LENGTHS if len(data) <= end), 0)] += 1
            if len(data) > most_bytes:
                found.longer += 1
                found.cut_bytes += len(data) - most_bytes
            digest = hashlib.blake2b(data, digest_size=8).digest()
            found.duplicates += digest in seen
            found.shared += file.split == "val" and seen.get(digest, False)
            seen.setdefault(digest, file.split == "train")


def text_column(found: TableSurvey) -> str | None:
    """The column that texts most likely stand in: "text", else that with the most text; None: it is a table of numbers."""
    if "text" in found.columns:
        return "text"
    texts = [name for name, column in found.columns.items() if column.types["str"]]
    numbers = [
        name
        for name, column in found.columns.items()
        if column.is_number and not column.types["list"] and name.lower() not in _LABEL_NAMES and not _is_id(found, name)
    ]
    if prose := [name for name in texts if found.columns[name].is_prose] if numbers else texts:
        return max(prose, key=lambda each: found.columns[each].text_bytes)
    return None


def target_column(found: TableSurvey) -> str | None:
    """The column of a table of numbers that is most likely to be predicted: one of a usual name, else the last that is no id."""
    usual = next((name for name in found.columns if name.lower() in _LABEL_NAMES), None)
    rest = [
        name
        for name, column in found.columns.items()
        if not _is_id(found, name) and (column.is_number or column.values) and (column.values is None or len(column.values) > 1)
    ]
    return usual or (rest[-1] if len(rest) > 1 else None)


def _is_id(found: TableSurvey, name: str) -> bool:
    """Whether a column numbers or names the rows."""
    column = found.columns[name]
    return name.lower() in ("", "id", "index", "row", "unnamed: 0") or (column.values is None and not column.is_number)


def labels_column(found: TableSurvey) -> str | None:
    """The column that lists of labels most likely stand in: one of a usual name, else the first of lists with few different values."""
    candidates = [name for name, column in found.columns.items() if 2 <= len(column.labels) <= max(2, found.rows // 3)]
    return next((name for name in candidates if name.lower() in _LABEL_NAMES), next(iter(candidates), None))


def label_column(found: TableSurvey, text: str | None) -> str | None:
    """The column that classes most likely stand in: one of a usual name, else that with the fewest different values."""
    candidates = {
        name: column.values
        for name, column in found.columns.items()
        if name != text and column.values is not None and 2 <= len(column.values) <= max(2, found.rows // 3) and not column.is_quantity
    }
    usual = next((name for name in candidates if name.lower() in _LABEL_NAMES), None)
    return usual or min(candidates, key=lambda name: len(candidates[name]), default=None)
