"""How rows of sounds are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa

from perceiver.data.columns import fixed_column
from perceiver.data.media_rows import SoundRows
from perceiver.data.preparation import PieceWriter, Preparation, ShardParts, content_hashes
from perceiver.data.read_sounds import read_sounds
from perceiver.data.spans import Problems, Span


class SoundPreparation(Preparation):
    """Samples and labels."""

    kind = SoundRows.kind

    def keyed(self, span: Span, problems: Problems) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for sound in read_sounds(span, self.job.columns, self.job.row_length, problems):
            yield content_hashes([sound.group or sound.samples.tobytes()]), np.array([sound.label])

    def add(self, span: Span, problems: Problems, writers: Mapping[str, PieceWriter]) -> None:
        length = self.job.row_length
        for sound in read_sounds(span, self.job.columns, length, problems):
            content = sound.samples.tobytes()
            alone = span.file.split == "hash" and sound.group is None  # equal ones are of one split
            counts = {"rows": 1, "documents": 1, "bytes": len(content)}
            counts |= {"cut": int(sound.original_length > length), "filled": int(sound.original_length < length)}
            for split, _ in self.splits(span.file, [content], [sound.group] if sound.group else None):
                hashes = None if alone else content_hashes([content])
                writers[split].add(sound.samples, counts, np.array([sound.label]), None, hashes)

    def block(self, shard: ShardParts, first: int, num: int) -> pa.Table:
        samples = shard.read("values", np.int16, first, first + num, width=self.job.row_length)
        labels = pa.array(shard.read("labels", np.int32, first, first + num))
        return pa.table({"audio": fixed_column(samples.reshape(num, -1)), "label": labels})
