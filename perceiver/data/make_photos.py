"""How rows of encoded pictures are made: their bytes as they are, once it is known that they can be decoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa

from perceiver.data.media_rows import PhotoRows
from perceiver.data.preparation import PieceWriter, Preparation, ShardParts, content_hashes
from perceiver.data.read_photos import read_photos
from perceiver.data.spans import Problems, Span


class PhotoPreparation(Preparation):
    """Encoded pictures and labels."""

    kind = PhotoRows.kind

    def keyed(self, span: Span, problems: Problems) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for photo in read_photos(span, self.job.columns, problems):
            yield content_hashes([photo.group or photo.content]), np.array([photo.label])

    def add(self, span: Span, problems: Problems, writers: Mapping[str, PieceWriter]) -> None:
        for photo in read_photos(span, self.job.columns, problems):
            alone = span.file.split == "hash" and photo.group is None  # equal ones are of one split
            hashes = None if alone else content_hashes([photo.content])
            for split, _ in self.splits(span.file, [photo.content], [photo.group] if photo.group else None):
                writers[split].add_example({"image": photo.content, "label": photo.label}, photo.content, hashes, photo.label)

    def block(self, shard: ShardParts, first: int, num: int) -> pa.Table:
        return shard.read_rows(PhotoRows.stored_columns(), first, first + num)
