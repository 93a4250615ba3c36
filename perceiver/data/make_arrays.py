"""How rows of arrays are made."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from perceiver.data.preparation import PieceWriter, Preparation, ShardParts, content_hashes, splits_of
from perceiver.data.read_arrays import read_arrays
from perceiver.data.rows import ArrayRows
from perceiver.data.spans import Problems, Span


class ArrayPreparation(Preparation):
    """Examples, each a row."""

    kind = ArrayRows.kind

    def add(self, span: Span, problems: Problems, writers: Mapping[str, PieceWriter]) -> None:
        rows = self._columns
        for example in read_arrays(span, rows, problems):
            content = rows.contents(example)
            for split, _ in splits_of(span.file, [content], self.job.val_fraction):
                writers[split].add_example(example, content, None if span.file.split == "hash" else content_hashes([content]))

    def block(self, shard: ShardParts, first: int, num: int) -> pa.Table:
        return shard.read_rows(self._columns, first, first + num)

    @property
    def _columns(self) -> ArrayRows:
        assert self.job.arrays is not None
        return self.job.arrays
