"""What a kind of rows says of itself; the kinds that come with the package are in `rows.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pyarrow as pa

KINDS: dict[str, type[RowKind]] = {}
"""The kinds of rows by name; each is known when its class is defined."""
ENDINGS: dict[str, str] = {}
"""Formats of files by the ending of their names (".vec"), as kinds of rows that are not the package's say them."""


class RowKind(ABC):
    """What the rows of a data set are. How they are made says a `Preparation` (preparation.py) of the same kind."""

    kind: ClassVar[str]
    """Its name in manifests and settings."""
    lookahead: ClassVar[int] = 0
    """Physical rows at the end of a block that belong to the next block."""
    is_stream: ClassVar[bool] = False
    """Rows are cut from one stream of ids, whatever pieces of the input these come from."""
    fill_id: ClassVar[int] = 0
    """Id after the end of a stream."""
    num_ids: ClassVar[int | None] = None
    """Ids that its documents can hold, from 0; None: a tokenizer says it, or there are none."""
    is_text: ClassVar[bool] = False
    """Made from text, with a tokenizer."""
    has_labels: ClassVar[bool] = False
    """Each row has a class number."""
    has_tags: ClassVar[bool] = False
    """These are several of any number: 1 or 0 for each class."""
    formats: ClassVar[tuple[str, ...]]
    """Formats of files that it can be made from."""
    endings: ClassVar[Mapping[str, str]] = {}
    """Endings of files in formats that the package does not read, with the names of these formats: {".vec": "vec"}. `formats` has
    the names, too. Such a file is read as a whole, by one task."""
    expected: ClassVar[str]
    """The same for a person."""
    made_from: ClassVar[str] = "documents"
    """What its rows are made from, in the plural."""
    new_rows: ClassVar[Literal["text", "image", "audio", "midi", "arrays", "frames"]] = "text"
    """What a row of new input holds, where a trained model is applied."""
    prepared_by_training: ClassVar[bool] = False
    """Whether a training (or a sweep) makes them of files by itself, where they are not made yet; else it names the command."""
    least_length: ClassVar[tuple[int, str]] = (1, "a row holds something")
    """Shortest input of a model that reads it, where the model sets the rows' length, and why."""
    added_ids: ClassVar[int] = 0
    """Ids of a model's input that are none of the row's."""
    can_stream: ClassVar[bool] = False
    """It can be read from files as they are, without being prepared before."""
    takes_code: ClassVar[bool] = True
    """It can be made from examples that a function of the user's yields."""
    one_shape: ClassVar[bool] = False
    """All its rows are images of one shape, which the manifest has."""
    keeps_photos: ClassVar[bool] = False
    """Its rows are pictures of any size, scaled and normalised as the published ImageNet models want it."""
    takes_unlabelled: ClassVar[bool] = False
    """A source's files without labels are its training split, where there are such."""
    has_columns: ClassVar[bool] = False
    """Which columns its rows have says the task (`TaskConfig.rows`), so that rows can be made up to try it on."""
    has_split_tables: ClassVar[bool] = False
    """A table beside the files may say which file is of which split."""

    def __init_subclass__(cls) -> None:
        if "kind" in cls.__dict__:
            KINDS[cls.kind] = cls
        ENDINGS.update(cls.endings)

    @classmethod
    def make(cls, row_length: int, columns: RowKind | None) -> RowKind:
        """The rows of a data set, from what its manifest says.

        Raises:
            UserError: that is not enough.
        """
        return cls()

    @classmethod
    def found(cls, listed: list[tuple[str, str, int]], label: str, what: str) -> list[Any] | None:
        """The files of a source (`perceiver.data.files.Found`) where several belong to a row; None: each is read by itself.

        Args:
            listed: path, path inside the source, and bytes of all its files.
            label: what messages and the manifest call the source.
            what: how the source was given.
        """
        return None

    @classmethod
    def stored_columns(cls) -> Any:
        """The columns of its rows as `perceiver.data.rows.ArrayRows`, where they are arrays and always the same; else None."""
        return None

    @property
    @abstractmethod
    def schema(self) -> pa.Schema:
        """The columns of a shard. Nothing is ever null."""

    @property
    def bytes_per_row(self) -> int | None:
        """Bytes of a row in memory; None: rows differ in it."""
        return None

    def numbers_in_parquet(self) -> bool | list[str]:
        """Columns of numbers by their paths in parquet; True: all."""
        return True
