"""Rows of photos and of sounds.

- "photos": image binary: pictures of any size as their files are (JPEG, PNG, ...); label int32
- "sounds": audio fixed_size_list<int16>[samples], one channel; label int32
"""

from __future__ import annotations

import pyarrow as pa

from perceiver.data.row_kind import RowKind
from perceiver.data.rows import LABEL, ArrayRows, LongRows


class SoundRows(LongRows):
    """Sounds of one rate and length with their labels."""

    kind = "sounds"
    has_labels = prepared_by_training = True
    made_from = "sounds"
    new_rows = "audio"
    formats = ("sound",)
    expected = ".wav, .flac, .ogg, .mp3 or .aiff files in folders of classes, or named with their classes in a table among them"

    @property
    def schema(self) -> pa.Schema:
        audio = pa.list_(pa.field("element", pa.int16(), nullable=False), self.row_length)
        return pa.schema([pa.field("audio", audio, nullable=False), LABEL])

    @property
    def bytes_per_row(self) -> int:
        return 2 * self.row_length


class PhotoRows(RowKind):
    """Pictures of any size, encoded, with their labels."""

    kind = "photos"
    has_labels = prepared_by_training = keeps_photos = True
    made_from = "images"
    new_rows = "image"
    takes_code = False
    formats = ("parquet", "arrow", "tar")
    expected = "folders of pictures, .parquet or .arrow with pictures, or .tar (WebDataset)"

    @classmethod
    def stored_columns(cls) -> ArrayRows:
        return ArrayRows(image=((), "binary"), label=((), "int32"))

    @property
    def schema(self) -> pa.Schema:
        return self.stored_columns().schema

    def numbers_in_parquet(self) -> bool | list[str]:
        return ["label"]
