"""How rows of documents are made, and what is common to all rows of text: documents as ids."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from perceiver.config import UserError
from perceiver.data.preparation import Job, PieceWriter, Preparation, ShardParts, content_hashes, strata
from perceiver.data.read_documents import Documents, read_documents
from perceiver.data.rows import DocumentRows, TaggedDocumentRows
from perceiver.data.spans import Problems, Span
from perceiver.data.text import count_words, split_long, stride_long, truncate


@dataclass(frozen=True)
class Encoded:
    """Documents of one split as ids."""

    split: str
    documents: Documents
    """All that were read together."""
    chosen: np.ndarray
    """Which of them are of this split."""
    ids: np.ndarray
    lengths: np.ndarray
    counts: dict[str, int]
    hashes: np.ndarray | None


def encoded(preparation: Preparation, span: Span, problems: Problems) -> Iterator[Encoded]:
    """The documents of a part of the input as ids, by split."""
    job = preparation.job
    assert job.tokenizer is not None
    for documents in read_documents(span, job.columns, problems):
        texts = [text.encode() for text in documents.texts]
        for split, chosen in preparation.splits(span.file, texts, documents.groups):
            places = np.flatnonzero(chosen)
            ids, lengths = job.tokenizer.encode_batch([documents.texts[i] for i in places])
            counts = {
                "bytes": sum(len(texts[i]) for i in places),
                "words": count_words(b"\n".join(texts[i] for i in places)),
                "documents": int(np.count_nonzero(documents.complete[chosen])),
                "empty": int(np.count_nonzero(lengths == 0)),
            }
            alone = span.file.split == "hash" and documents.groups is None  # equal ones are of one split
            hashes = None if alone else content_hashes([texts[i] for i in places if texts[i]])
            yield Encoded(split, documents, chosen, ids, lengths, counts, hashes)


def keyed(job: Job, span: Span, problems: Problems) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """See `Preparation.keyed`."""
    for documents in read_documents(span, job.columns, problems):
        keys = content_hashes(documents.groups or [text.encode() for text in documents.texts])
        yield keys, np.zeros(len(keys), np.int64) if documents.labels is None else strata(documents.labels)


class DocumentPreparation(Preparation):
    """Documents of at most the given number of ids, with their labels."""

    kind = DocumentRows.kind

    def keyed(self, span: Span, problems: Problems) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return keyed(self.job, span, problems)

    def add(self, span: Span, problems: Problems, writers: Mapping[str, PieceWriter]) -> None:
        for part in encoded(self, span, problems):
            assert part.documents.labels is not None
            limit, labels = self.job.row_length, part.documents.labels[part.chosen]
            is_long = part.lengths > limit
            if self.job.long_texts == "refuse" and is_long.any():
                first = int(np.argmax(is_long))
                text = part.documents.texts[np.flatnonzero(part.chosen)[first]]
                raise UserError(
                    f"{span.file.name}: a text has {part.lengths[first]:,} tokens, and the model takes {limit:,} ({reprlib.repr(text)}): "
                    "--data.long-texts cut, split or stride takes it, a larger max-seq-len too"
                )
            if self.job.long_texts == "split":
                parts, lengths = split_long(part.lengths, limit)
                ids, labels = part.ids, np.repeat(labels, parts, axis=0)
            elif self.job.long_texts == "stride":
                parts, ids, lengths = stride_long(part.ids, part.lengths, limit, self.job.text_stride or max(1, limit // 2))
                labels = np.repeat(labels, parts, axis=0)
            else:
                ids, lengths = truncate(part.ids, part.lengths, limit)
            counts = {"rows": len(lengths), "tokens": len(ids), "long": int(np.count_nonzero(is_long)), "all_tokens": len(part.ids)}
            writers[part.split].add(ids, part.counts | counts, labels, lengths, part.hashes)

    def block(self, shard: ShardParts, first: int, num: int) -> pa.Table:
        return pa.table({"tokens": shard.read_lists(first, first + num), **shard.labels(first, num)})


class TaggedDocumentPreparation(DocumentPreparation):
    """The same with any number of classes each."""

    kind = TaggedDocumentRows.kind
