"""How rows of arrays are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa

from perceiver.data.preparation import PieceWriter, Preparation, ShardParts, content_hashes
from perceiver.data.read_arrays import read_arrays
from perceiver.data.rows import ArrayRows
from perceiver.data.spans import Problems, Span


class ArrayPreparation(Preparation):
    """Examples, each a row."""

    kind = ArrayRows.kind

    def add(self, span: Span, problems: Problems, writers: Mapping[str, PieceWriter]) -> None:
        rows = self._columns
        for example, group in read_arrays(span, rows, problems, self.job.columns.group):
            content = rows.contents(example)
            alone = span.file.split == "hash" and group is None  # equal ones are of one split
            for split, _ in self.splits(span.file, [content], [group] if group else None):
                writers[split].add_example(example, content, None if alone else content_hashes([content]))

    def keyed(self, span: Span, problems: Problems) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for example, group in read_arrays(span, self._columns, problems, self.job.columns.group):
            yield content_hashes([group or self._columns.contents(example)]), np.zeros(1, np.int64)

    def block(self, shard: ShardParts, first: int, num: int) -> pa.Table:
        return shard.read_rows(self._columns, first, first + num)

    @property
    def _columns(self) -> ArrayRows:
        assert self.job.arrays is not None
        return self.job.arrays
