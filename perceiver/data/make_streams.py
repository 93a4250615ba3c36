"""How rows that are cut from a stream of ids are made, from texts and from performances."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa

from perceiver.data.columns import fixed_column
from perceiver.data.examples import ExamplePart
from perceiver.data.files import InputFile
from perceiver.data.make_documents import encoded, keyed
from perceiver.data.midi import NOTE_OFF
from perceiver.data.preparation import Job, PieceWriter, Preparation, ShardParts, content_hashes
from perceiver.data.read_midi import read_performance
from perceiver.data.rows import EventRows, TokenRows
from perceiver.data.spans import Problems, Span
from perceiver.data.text import join_documents
from perceiver.data.tokenizers import ByteTokenizer


class StreamPreparation(Preparation):
    """Ids, end to end."""

    def block(self, shard: ShardParts, first: int, num: int) -> pa.Table:
        rows, length = self.job.rows, self.job.row_length
        block = np.full((num + rows.lookahead) * length, rows.fill_id, np.uint16)
        ids = shard.read("values", np.uint16, first * length, first * length + len(block))
        block[: len(ids)] = ids
        return pa.table({"tokens": fixed_column(block.reshape(-1, length))})


class TokenPreparation(StreamPreparation):
    """The tokens of all documents."""

    kind = TokenRows.kind

    def keyed(self, span: Span, problems: Problems) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return keyed(self.job, span, problems)

    def add(self, span: Span, problems: Problems, writers: Mapping[str, PieceWriter]) -> None:
        for part in encoded(self, span, problems):
            documents, chosen = part.documents, part.chosen
            marks = document_marks(self.job, span.file)
            ids = join_documents(part.ids, part.lengths, documents.begins[chosen], documents.complete[chosen], *marks)
            writers[part.split].add(ids, {**part.counts, "tokens": len(ids)}, None, None, part.hashes)


class EventPreparation(StreamPreparation):
    """The events of performances, each filled up to whole rows."""

    kind = EventRows.kind

    def add(self, span: Span, problems: Problems, writers: Mapping[str, PieceWriter]) -> None:
        length, fill_id = self.job.row_length, self.job.rows.fill_id
        for events in read_performance(span, problems):
            content = events.tobytes()
            size = -(-(len(events) + 1) // length) * length
            ids = np.full(size, fill_id, np.uint16)
            ids[1 : len(events) + 1] = events
            for split, _ in self.splits(span.file, [content]):
                counts = {"tokens": size, "bytes": len(content), "words": int(np.count_nonzero(events < NOTE_OFF)), "documents": 1}
                writers[split].add(ids, counts, None, None, None if span.file.split == "hash" else content_hashes([content]))


def document_marks(job: Job, file: InputFile | ExamplePart) -> tuple[int | None, int | None]:
    """Ids before and after each document. WikiText as bytes stays as it is: its articles begin with a title anyway."""
    tokenizer = job.tokenizer
    assert tokenizer is not None
    if job.document_marks == "cls-sep":
        return tokenizer.cls_id, tokenizer.sep_id
    running = isinstance(tokenizer, ByteTokenizer) and file.format in ("wikitext", "wikitext-rows")
    return None, None if running else tokenizer.eos_id
