"""What a row of prepared data is: the kinds of rows, each with its columns in parquet.

- "images":    image  fixed_size_list<uint8>[height * width * channels], channels last; label int32
- "tokens":    tokens fixed_size_list<uint16>[T]: the token stream of all documents, cut end to end; 0 after its end
- "events":    tokens fixed_size_list<uint16>[T]: the events of performances, each filled up to whole rows (see `midi.py`)
- "documents": tokens list<uint16>, at most `row_length` ids; label int32
- "tagged-images", "tagged-documents": the same with labels list<uint8> in place of label: 1 or 0 for each class
- "arrays":    named columns of fixed shapes, in any number, which the task names
- "photos", "sounds": see `media_rows.py`
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from perceiver.config import UserError
from perceiver.data.columns import fixed_array, fixed_column
from perceiver.data.midi import PAD
from perceiver.data.row_kind import KINDS, RowKind

DTYPES = ("float32", "float16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "string", "binary")
"""Types of a column's numbers; "string" and "binary" stand alone in a row, with shape ()."""


class LongRows(RowKind):
    """Rows of which one column has a length that the data set sets."""

    def __init__(self, row_length: int) -> None:
        self.row_length = row_length

    @classmethod
    def make(cls, row_length: int, columns: RowKind | None) -> RowKind:
        return cls(row_length)


class ImageRows(LongRows):
    """Images of one shape with their labels."""

    kind = "images"
    has_labels = one_shape = True
    prepared_by_training = True
    made_from = "images"
    new_rows = "image"
    takes_code = False
    formats: ClassVar[tuple[str, ...]] = ("idx", "parquet", "arrow", "tar")
    expected = "idx files (train-images-idx3-ubyte and its labels, .gz or not), .parquet, .arrow, .tar (WebDataset), or folders of pictures"

    @property
    def schema(self) -> pa.Schema:
        image = pa.list_(pa.field("element", pa.uint8(), nullable=False), self.row_length)
        return pa.schema([pa.field("image", image, nullable=False), LABEL])

    @property
    def bytes_per_row(self) -> int:
        return self.row_length


class TaggedImageRows(ImageRows):
    """Images of one shape with any number of classes each."""

    kind = "tagged-images"
    has_tags = True
    formats = ("parquet", "arrow", "tar")
    expected = ".parquet, .arrow, .tar (WebDataset), or pictures beside metadata.csv or metadata.jsonl, with several labels a row"

    @property
    def schema(self) -> pa.Schema:
        return super().schema.remove(1).append(_TAGS)


class _StreamRows(LongRows):
    """A stream of ids, cut into rows of equal length."""

    lookahead = 1
    is_stream = True

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([pa.field("tokens", pa.list_(_TOKEN, self.row_length), nullable=False)])

    @property
    def bytes_per_row(self) -> int:
        return 2 * self.row_length


class TokenRows(_StreamRows):
    """A stream of token ids, cut end to end."""

    kind = "tokens"
    is_text = prepared_by_training = True
    can_stream = takes_unlabelled = True
    least_length = (2, "a token is predicted from another one")
    formats = ("text", "wikitext", "jsonl", "csv", "arrow", "parquet", "wikitext-rows")
    expected = ".txt, .raw, .tokens, .jsonl, .json, .csv, .tsv (also .gz, .bz2, .zst), .arrow or .parquet"


class EventRows(_StreamRows):
    """Events of performances: each begins a row with a fill id, and its last row is filled up with such."""

    kind = "events"
    fill_id = num_ids = PAD
    has_split_tables = prepared_by_training = True
    least_length = (2, "an event is predicted from another one")
    made_from = "performances"
    new_rows = "midi"
    formats = ("midi",)
    expected = ".mid or .midi files"


class DocumentRows(LongRows):
    """Documents of at most the given number of token ids, with their labels."""

    kind = "documents"
    is_text = True
    added_ids = 2
    least_length = (3, "a document stands between [CLS] and [SEP]")
    has_labels = True
    prepared_by_training = True
    formats = ("jsonl", "csv", "arrow", "parquet")
    expected = ".jsonl, .json, .csv, .tsv (also .gz, .bz2, .zst), .arrow or .parquet, with a text and a label column"

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([pa.field("tokens", pa.list_(_TOKEN), nullable=False), LABEL])


class TaggedDocumentRows(DocumentRows):
    """Documents with any number of classes each."""

    kind = "tagged-documents"
    has_tags = True

    @property
    def schema(self) -> pa.Schema:
        return super().schema.remove(1).append(_TAGS)


_TOKEN = pa.field("element", pa.uint16(), nullable=False)
LABEL = pa.field("label", pa.int32(), nullable=False)
"""The column with the class of a row."""
_TAGS = pa.field("labels", pa.list_(pa.field("element", pa.uint8(), nullable=False)), nullable=False)


@dataclass(frozen=True)
class Column:
    """The values of one name in a row."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_number(self) -> bool:
        return self.dtype not in ("string", "binary")


class BadExample(UserError):
    """An example that cannot be a row: the reason in two words, and what is said of the example."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(what)
        self.reason = reason


class ArrayRows(RowKind):
    """Rows of named arrays: `ArrayRows(past=((72, 7), "float32"), label=((), "int32"))`.

    The order of the columns has no meaning. A row may lack none of them; missing measurements are a mask of their own, say. Rows are
    stored as fixed-size lists.

    Raises:
        UserError: a shape or type that cannot be stored.
    """

    kind = "arrays"
    prepared_by_training = True
    has_columns = True
    made_from = "examples"
    new_rows: ClassVar[Literal["text", "image", "arrays", "frames"]] = "arrays"
    formats: ClassVar[tuple[str, ...]] = ("parquet", "arrow", "jsonl", "csv")
    expected = ".parquet, .arrow, .jsonl, .json, .csv, .tsv or .xlsx, with the task's columns"

    def __init__(self, **columns: tuple[tuple[int, ...], str]) -> None:
        if not columns:
            raise UserError("ArrayRows needs at least one column")
        self.columns: dict[str, Column] = {}
        self.may_miss: frozenset[str] = frozenset()
        for name, column in sorted(columns.items()):
            if not (isinstance(column, tuple) and len(column) == 2 and isinstance(column[0], tuple)):
                raise UserError(f'column {name} is {column!r} and must be its shape and its type, such as ((72, 7), "float32")')
            shape, dtype = column
            if dtype not in DTYPES:
                raise UserError(f"column {name} has type {dtype!r} and must have one of {', '.join(DTYPES)}")
            if any(not isinstance(n, int) or n < 1 for n in shape):
                raise UserError(f"column {name} has shape {shape} and all its sizes must be whole numbers of at least 1")
            if dtype in ("string", "binary") and shape:
                raise UserError(f"column {name} of type {dtype} must have shape ()")
            if name in ("row", "epoch", "source", "valid"):
                raise UserError(f"column {name!r} has a name that the platform uses itself: choose another")
            self.columns[name] = Column(tuple(shape), dtype)

    @classmethod
    def make(cls, row_length: int, columns: RowKind | None) -> RowKind:
        if columns is None:
            raise UserError("the columns of arrays are missing")
        return columns

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ArrayRows) and self.columns == other.columns

    def __hash__(self) -> int:
        return hash(tuple(self.columns.items()))

    def to_json(self, missing: bool = False) -> dict[str, Any]:
        """The columns as JSON-ready data; with `missing` also which may hold nothing, which is no part of what prepared data are."""
        gaps = self.may_miss if missing else ()
        return {name: [list(column.shape), column.dtype, *["nan"] * (name in gaps)] for name, column in self.columns.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ArrayRows:
        """The inverse of `to_json`."""
        found = cls(**{name: (tuple(shape), dtype) for name, (shape, dtype, *_) in data.items()})
        found.may_miss = frozenset(name for name, column in data.items() if "nan" in column[2:])
        return found

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([pa.field(name, _arrow_type(column), nullable=False) for name, column in self.columns.items()])

    @property
    def bytes_per_row(self) -> int:
        """Bytes of a row's numbers."""
        return max(1, sum(column.size * np.dtype(column.dtype).itemsize for column in self.columns.values() if column.is_number))

    def numbers_in_parquet(self) -> bool | list[str]:
        numbers = {name: column for name, column in self.columns.items() if column.is_number}
        if len(numbers) == len(self.columns):
            return True
        return [f"{name}.list.element" if column.shape else name for name, column in numbers.items()]

    def table(self, examples: Iterable[Mapping[str, Any]], where: str) -> pa.Table:
        """Examples as rows.

        Args:
            examples: mappings from names to arrays, lists or scalars; other names are left out.
            where: what messages call their origin.

        Raises:
            UserError: an example lacks a column, or has another shape, or numbers that the column's type cannot hold.
        """
        found = []
        for number, example in enumerate(examples):
            try:
                found.append(self.values(example))
            except BadExample as error:
                raise UserError(f"{where}, example {number:,}: {error}") from None
        return self.stack(found)

    def values(self, example: Any) -> dict[str, Any]:
        """An example's values as their columns hold them.

        Raises:
            BadExample: see `table`.
        """
        if not isinstance(example, Mapping):
            raise BadExample("no mapping", f"it is a {type(example).__name__} and must be a mapping with {', '.join(self.columns)}")
        example = self.filled(example)
        return {name: _value(example, name, column) for name, column in self.columns.items()}

    def missing(self, names: Iterable[str]) -> ArrayRows:
        """The same columns, of which these, of real numbers or texts, may hold nothing in a row: it is read as NaN or an empty text."""
        found = ArrayRows.from_json(self.to_json())
        found.may_miss = frozenset(names)
        return found

    def filled(self, example: Mapping[str, Any]) -> Mapping[str, Any]:
        """An example with NaN or an empty text where it holds None in a column that may miss."""
        gaps = [name for name in self.may_miss if name in example and example[name] is None]
        return {**example, **{name: _nothing(self.columns[name]) for name in gaps}} if gaps else example

    def stack(self, examples: list[dict[str, Any]]) -> pa.Table:
        """Rows of what `values` has returned."""
        values = {name: [example[name] for example in examples] for name in self.columns}
        arrays = []
        for name, column in self.columns.items():
            if column.is_number and column.shape:
                stacked = np.stack(values[name]) if values[name] else np.empty((0, *column.shape), column.dtype)
                arrays.append(fixed_column(stacked.reshape(len(stacked), column.size)))
            else:
                arrays.append(pa.array(values[name], _arrow_type(column)))
        return pa.Table.from_arrays(arrays, schema=self.schema)

    def contents(self, example: Mapping[str, Any]) -> bytes:
        """The bytes of what `values` has returned: what tells examples apart."""
        found = []
        for name, column in self.columns.items():
            value = example[name]
            if column.is_number:
                found.append(np.asarray(value, column.dtype).tobytes())
            else:  # with its length, so that two texts do not run into each other
                data = value.encode() if isinstance(value, str) else value
                found.append(len(data).to_bytes(8, "little") + data)
        return b"".join(found)

    def arrays(self, table: pa.Table) -> dict[str, np.ndarray]:
        """The numbers of rows, (n, *shape) by name; columns that the table lacks and texts are left out."""
        found = {}
        for name, column in self.columns.items():
            if not column.is_number or name not in table.column_names:
                continue
            if column.shape:
                found[name] = fixed_array(table.select([name]), name).reshape(table.num_rows, *column.shape)
            else:
                found[name] = table[name].to_numpy()
        return found

    def zeros(self, num_rows: int) -> pa.Table:
        """Rows of zeros and empty texts: what shapes are counted with."""
        empty = {"string": "", "binary": b""}
        example = {
            name: np.zeros(column.shape, column.dtype) if column.is_number else empty[column.dtype] for name, column in self.columns.items()
        }
        return self.table([example] * num_rows, "zeros")


def _nothing(column: Column) -> Any:
    """What stands for a value that is missing."""
    return np.full(column.shape, math.nan) if column.is_number else "" if column.dtype == "string" else b""


def _arrow_type(column: Column) -> pa.DataType:
    if not column.is_number:
        return pa.string() if column.dtype == "string" else pa.binary()
    item = pa.from_numpy_dtype(np.dtype(column.dtype))
    return pa.list_(pa.field("element", item, nullable=False), column.size) if column.shape else item


def _value(example: Mapping[str, Any], name: str, column: Column) -> Any:
    if name not in example or example[name] is None:
        raise BadExample("missing column", f"it has no {name} (it has: {', '.join(map(str, example)) or 'nothing'})")
    value = example[name]
    if not column.is_number:
        kind = str if column.dtype == "string" else bytes
        if not isinstance(value, kind):
            raise BadExample("wrong type", f"{name} is a {type(value).__name__} and must be {column.dtype}")
        if isinstance(value, str) and not _is_unicode(value):
            raise BadExample("not UTF-8", f"{name} has a lone surrogate, which no UTF-8 text can hold")
        return value
    try:
        array = np.asarray(value)
        with np.errstate(over="ignore", invalid="ignore"):
            converted = array.astype(column.dtype)
    except (ValueError, TypeError, OverflowError):
        raise BadExample("wrong type", f"{name} cannot be read as {column.dtype}: {reprlib.repr(value)}") from None
    if array.shape != column.shape:
        raise BadExample("other shape", f"{name} has shape {array.shape} and must have {column.shape}")
    if np.issubdtype(converted.dtype, np.integer) and not np.array_equal(converted, array):
        raise BadExample("wrong value", f"{name} has values that {column.dtype} cannot hold")
    return converted if column.shape else converted.item()


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def rows_of(kind: str, row_length: int, columns: RowKind | None = None) -> RowKind:
    """The rows of a data set, from what its manifest says.

    Raises:
        UserError: arrays without columns.
    """
    return KINDS[kind].make(row_length, columns)
