"""Which columns of a table go into a model, and as what: numbers, categories, texts."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from perceiver.config import DataConfig, UserError
from perceiver.data.survey import Reading
from perceiver.data.table_schema import TableSchema
from perceiver.data.tokenizers import ByteTokenizer, tokenizer_of
from perceiver.models import Categories, TableInput
from perceiver.models.table_input import CATEGORY, text_of, text_shape

logger = logging.getLogger(__name__)

READINGS = ("number", "category", "text")
_ENCODED_AT_ONCE = 1000
_ENCODED = 10_000
"""Texts of a column that are encoded to count what is cut, where the tokenizer is not that of bytes."""


def names_of(given: tuple[str, ...]) -> tuple[str, ...]:
    """Names of columns, given as words or separated by commas."""
    return tuple(name for word in given for name in word.split(",") if name)


def with_columns(table: TableInput, schema: TableSchema, targets: Collection[str], data: DataConfig, field: str) -> TableInput:
    """The input with its columns as they are found in the data; says which are texts and how much of them is cut.

    Args:
        table: as it was given.
        targets: columns to predict.
        data: with the tokenizer of texts.
        field: what names the targets, for messages.

    Raises:
        UserError: a column is not there, cannot go in, or is to be predicted; there is none.
    """
    readings = _given(table, schema) if table.columns else _found(schema, targets)
    if not readings:
        raise UserError(f"{schema.name} has no column beside the targets that a model can take: model.input.columns needs one")
    if both := sorted(set(readings) & set(targets)):
        raise UserError(f"--model.input.columns and {field} both name {both[0]!r}: what is predicted cannot go in")
    shapes, categories = [], []
    for name, reading in readings.items():
        if reading == "text":
            texts = _lengths(schema, name, data, table.text_length)
            logger.info(f"column {name!r} is read as text: {texts.said(table.text_length)}")
            shapes.append(text_shape(min(table.text_length, max(texts.longest, 1))))
        elif reading == "category":
            values = tuple(schema.distinct(name))
            logger.info(f"column {name!r} is read as one of {len(values):,} categories")
            categories.append(Categories(column=name, values=values))
            shapes.append(CATEGORY)
        else:
            shapes.append(text_of(schema.shape(name, "--model.input.columns")))
    vocab_size = tokenizer_of(data).vocab_size if "text" in readings.values() else 0
    return replace(table, columns=tuple(readings), shapes=tuple(shapes), categories=tuple(categories), vocab_size=vocab_size)


def _given(table: TableInput, schema: TableSchema) -> dict[str, Reading]:
    """How the columns that were named are read: as was said, else as is found."""
    found: dict[str, Reading] = {}
    for word in names_of(table.columns):
        name, _, reading = word.rpartition("=") if word not in schema.types and "=" in word else (word, "", "")
        schema.check(name, "--model.input.columns")
        if name in found:
            raise UserError(f"--model.input.columns names {name!r} twice")
        if reading and reading not in READINGS:
            raise UserError(f"--model.input.columns has {word!r}, and what follows = must be {', '.join(READINGS[:-1])} or {READINGS[-1]}")
        if reading in ("category", "text") and not schema.is_text(name):
            raise UserError(f"--model.input.columns has {word!r}, and {name!r} holds {schema.types[name]}: {reading} needs texts")
        if reading == "number":
            schema.shape(name, "--model.input.columns")
        if not reading and schema.is_text(name):
            found[name] = schema.reading(name) or "text"
        else:
            found[name] = reading or "number"  # type: ignore[assignment]
    return found


def _found(schema: TableSchema, targets: Collection[str]) -> dict[str, Reading]:
    """The columns that go in by themselves; says which do not."""
    found: dict[str, Reading] = {}
    left = []
    for name in schema.types:
        if name in targets:
            continue
        reading = schema.reading(name) if schema.is_text(name) else "number" if schema.is_numeric(name) else None
        if reading is None:
            left.append(name)
        else:
            found[name] = reading
    if left:
        logger.info(
            f"not used: {', '.join(map(repr, left))} (different in nearly every row, the same in all, or of a type that is not read)"
        )
    return found


@dataclass
class _TextLengths:
    """How long the texts of a column are, in tokens."""

    texts: int = 0
    tokens: int = 0
    long: int = 0
    lost: int = 0
    longest: int = 0
    looked_at: str = ""

    def said(self, limit: int) -> str:
        if not self.long:
            return f"texts of at most {self.longest:,} tokens{self.looked_at}"
        lost = f"{self.lost:,} of {self.tokens:,} tokens ({self.lost / self.tokens:.1%}) are cut off"
        share = f"{self.long:,} of {self.texts:,} texts ({self.long / self.texts:.1%})"
        return f"{share} have more than {limit:,} tokens{self.looked_at}: {lost} (--model.input.text-length takes more)"

    def add(self, lengths: np.ndarray, limit: int) -> None:
        over = np.maximum(lengths - limit, 0)
        self.texts, self.tokens = self.texts + len(lengths), self.tokens + int(lengths.sum())
        self.long, self.lost = self.long + int((over > 0).sum()), self.lost + int(over.sum())
        self.longest = max(self.longest, int(lengths.max(initial=0)))


def _lengths(schema: TableSchema, name: str, data: DataConfig, limit: int) -> _TextLengths:
    """Of all texts of a column, by a tokenizer other than bytes of the first ones: these must then not be the longest."""
    tokenizer, found = tokenizer_of(data), _TextLengths()
    most = None if isinstance(tokenizer, ByteTokenizer) else _ENCODED
    for texts in schema.texts(name, _ENCODED_AT_ONCE):
        if isinstance(tokenizer, ByteTokenizer):
            found.add(np.array([len(text.encode()) for text in texts], np.int64), limit)
        else:
            found.add(tokenizer.encode_batch(texts)[1], limit)
        if most is not None and found.texts >= most:
            found.looked_at, found.longest = f" among the first {found.texts:,}", limit
            break
    return found
