"""Makes prepared data from input files in two passes of small jobs that do not depend on each other. Knows no Ray.

Pass 1: the input is cut into pieces; each becomes a few files of ids (or pixels) and counts in a staging folder.
Pass 2: from the sums of the counts it is known what each shard holds; each shard takes it from the pieces' files.

Every job writes its files under temporary names and its `.json` last, so that a finished job is known by it; jobs
that were killed are done again. Results do not depend on how the input is cut, on the number of processes, or on
interruptions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from perceiver.data.examples import ExamplePart
from perceiver.data.readers import Columns, Documents, Images, parquet_rows, read_arrays, read_documents, read_images
from perceiver.data.rows import ArrayRows, RowKind, fixed_column, rows_of
from perceiver.data.shards import SPLITS, Shard, Split, describe_shard, shard_name, stream_rows, write_blocks
from perceiver.data.sources import InputFile
from perceiver.data.spans import SECTION, Problems, Span, Unreadable
from perceiver.data.storage import atomic_file, list_folder, open_folder, read_file, read_range, write_file
from perceiver.data.text import count_words, join_documents, truncate
from perceiver.data.tokenizers import ByteTokenizer, Tokenizer

PIECE_BYTES = 32 << 20
"""Input bytes of a piece, about: small files are taken together, large plain files and parquet files cut."""

_MOST_ROWS, _BATCH_BYTES = 1024, 8 << 20
"""Rows of arrays that are gathered before they are written, at most, and their bytes."""
_COUNTED_AT_ONCE = 1 << 16
"""Values counted by one call: what it makes of them then stays in the cache."""
_COUNTS = ("rows", "tokens", "bytes", "words", "documents")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all jobs of a preparation need to know."""

    kind: str
    folder: str
    """Where shards go."""
    staging: str
    """Where pieces and the notes on finished jobs go."""
    columns: Columns
    skip: bool
    """Leave out and count faulty rows and files instead of stopping."""
    val_fraction: float
    row_length: int
    """T, or the greatest length of a document, or height * width * channels."""
    rows_per_block: int
    blocks_per_shard: int
    tokenizer: Tokenizer | None = None
    document_marks: str = ""
    """"eos": an end id after each document; "cls-sep": each document between [CLS] and [SEP]."""
    arrays: ArrayRows | None = None
    """The columns of rows of arrays."""

    @property
    def rows(self) -> RowKind:
        """What the rows are."""
        return rows_of(self.kind, self.row_length, self.arrays)

    @property
    def rows_per_shard(self) -> int:
        return self.rows_per_block * self.blocks_per_shard


# --------------------------------------------------------------------------------------------------------------- pieces


@dataclass(frozen=True)
class Piece:
    """What one task of pass 1 reads."""

    spans: tuple[Span, ...]
    size: int
    """Input bytes, about."""


def cut_pieces(inputs: Sequence[InputFile | ExamplePart], piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """The input in pieces of about `piece_bytes`, in order. A part of a source that is code is a piece of its own."""
    pieces: list[Piece] = []
    spans: list[Span] = []
    size = 0
    for file in inputs:
        for span, more in _spans(file, piece_bytes) if isinstance(file, InputFile) else [(Span(file, 0, 0), piece_bytes)]:
            if spans and size + more > piece_bytes:
                pieces.append(Piece(tuple(spans), size))
                spans, size = [], 0
            spans.append(span)
            size += more
    return [*pieces, Piece(tuple(spans), size)] if spans else pieces


def _spans(file: InputFile, piece_bytes: int) -> Iterator[tuple[Span, int]]:
    """A file's spans with their bytes. What cannot be entered in the middle stays whole."""
    if file.format in ("parquet", "wikitext-rows"):
        try:
            rows, size = parquet_rows(file)
        except Unreadable:  # whoever reads it will say so
            rows, size = 0, file.size
        step = max(1, min(rows, rows * piece_bytes // max(size, 1)))
        for first in range(0, max(rows, 1), step):
            stop = min(first + step, rows)
            yield Span(file, first, stop), size * (stop - first) // max(rows, 1)
    elif file.format == "idx" or file.compressed:
        yield Span(file, 0, file.size), file.size
    else:
        step = -(-piece_bytes // SECTION) * SECTION
        for first in range(0, max(file.size, 1), step):
            yield Span(file, first, min(first + step, file.size)), min(step, file.size - first)


def make_piece(job: Job, index: int, piece: Piece) -> dict[str, Any]:
    """Pass 1 for one piece: its files in the staging folder, and the note on it, which is also returned.

    Raises:
        UserError: a fault in the input.
    """
    problems = Problems(job.skip)
    with ExitStack() as stack:
        writers = {split: _PieceWriter(job, index, split, stack) for split in SPLITS}
        for span in piece.spans:
            if job.kind == "images":
                for images in read_images(span, job.columns, problems):
                    _add_images(job, span.file, images, writers)
            elif job.arrays is not None:
                for example in read_arrays(span, job.arrays, problems):
                    _add_example(job.arrays, span.file, example, job.val_fraction, writers)
            else:
                for documents in read_documents(span, job.columns, problems):
                    _add_documents(job, span.file, documents, writers)
        counts = {split: writer.finish() for split, writer in writers.items()}
    note = {"splits": counts, "skipped": dict(problems.counts)}
    write_file(job.staging, _piece_note(index), json.dumps(note).encode())
    return note


class _PieceWriter:
    """The files of one piece for one split: values (ids or pixels), and where rows have labels, lengths and labels."""

    def __init__(self, job: Job, index: int, split: str, stack: ExitStack) -> None:
        self._job, self._stack, self._name = job, stack, f"piece-{index:06d}-{split}"
        self._files: dict[str, BinaryIO] = {}
        self._counts = dict.fromkeys((*_COUNTS, "empty"), 0)
        self._histogram = np.zeros(0, np.int64)
        self._examples: list[dict[str, Any]] = []
        self._tables: pa.RecordBatchWriter | None = None

    def add_example(self, example: dict[str, Any], content: bytes, digest: np.ndarray | None) -> None:
        """A row of arrays."""
        for name, count in (("rows", 1), ("documents", 1), ("bytes", len(content))):
            self._counts[name] += count
        if digest is not None:
            self._write("hashes", digest)
        self._examples.append(example)
        assert self._job.arrays is not None
        if len(self._examples) == rows_at_once(self._job.arrays):
            self._flush()

    def _flush(self) -> None:
        """Writes the rows of arrays that have been gathered."""
        rows = self._job.arrays
        if rows is not None and self._examples:
            if self._tables is None:
                file = self._stack.enter_context(atomic_file(self._job.staging, f"{self._name}.rows"))
                self._tables = self._stack.enter_context(pa.ipc.new_file(file, rows.schema))
            self._tables.write_table(rows.stack(self._examples))
            self._examples = []

    def add(
        self,
        values: np.ndarray,
        counts: dict[str, int],
        labels: np.ndarray | None,
        lengths: np.ndarray | None,
        hashes: np.ndarray | None,
    ) -> None:
        for name, count in counts.items():
            self._counts[name] += count
        self._write("values", values)
        if labels is not None:
            self._write("labels", labels.astype(np.int32))
        if lengths is not None:
            self._write("lengths", lengths.astype(np.int32))
        if hashes is not None:
            self._write("hashes", hashes)
        self._count(values if labels is None else labels)

    def _count(self, values: np.ndarray) -> None:
        if len(values):
            missing = int(values.max()) + 1 - len(self._histogram)
            self._histogram = np.pad(self._histogram, (0, max(missing, 0)))
        for first in range(0, len(values), _COUNTED_AT_ONCE):
            part = values[first : first + _COUNTED_AT_ONCE]
            self._histogram += np.bincount(part, minlength=len(self._histogram))

    def finish(self) -> dict[str, int]:
        """Writes what is left, and how often each id (or label) occurs; the counts."""
        self._flush()
        if len(self._histogram):
            self._write("histogram", self._histogram)
        return self._counts

    def _write(self, part: str, values: np.ndarray) -> None:
        if part not in self._files:
            name = f"{self._name}.{part}"
            self._files[part] = self._stack.enter_context(atomic_file(self._job.staging, name))
        self._files[part].write(np.ascontiguousarray(values).data)


def _add_images(job: Job, file: InputFile | ExamplePart, images: Images, writers: dict[str, _PieceWriter]) -> None:
    pixels = np.ascontiguousarray(images.pixels)
    contents = [image.tobytes() for image in pixels]
    for split, chosen in splits_of(file, contents, job.val_fraction):
        values = pixels[chosen].reshape(-1)
        num = int(np.count_nonzero(chosen))
        counts = {"rows": num, "bytes": values.nbytes, "documents": num}
        hashes = None if file.split == "hash" else content_hashes(contents)
        writers[split].add(values, counts, images.labels[chosen], None, hashes)


def rows_at_once(rows: ArrayRows) -> int:
    """Rows of a batch in the files of pieces: all batches but the last have this number."""
    return max(1, min(_MOST_ROWS, _BATCH_BYTES // rows.bytes_per_row))


def _add_example(
    rows: ArrayRows, file: InputFile | ExamplePart, example: dict[str, Any], val_fraction: float, writers: dict[str, _PieceWriter]
) -> None:
    content = rows.contents(example)
    for split, _ in splits_of(file, [content], val_fraction):
        writers[split].add_example(example, content, None if file.split == "hash" else content_hashes([content]))


def _add_documents(job: Job, file: InputFile | ExamplePart, documents: Documents, writers: dict[str, _PieceWriter]) -> None:
    assert job.tokenizer is not None
    encoded = [text.encode() for text in documents.texts]
    for split, chosen in splits_of(file, encoded, job.val_fraction):
        places = np.flatnonzero(chosen)
        ids, lengths = job.tokenizer.encode_batch([documents.texts[i] for i in places])
        complete = documents.complete[chosen]
        counts = {
            "bytes": sum(len(encoded[i]) for i in places),
            "words": count_words(b"\n".join(encoded[i] for i in places)),
            "documents": int(np.count_nonzero(complete)),
            "empty": int(np.count_nonzero(lengths == 0)),
        }
        hashes = None if file.split == "hash" else content_hashes([content for content in encoded if content])
        if job.kind == "tokens":
            ids = join_documents(ids, lengths, documents.begins[chosen], complete, *document_marks(job, file))
            writers[split].add(ids, {**counts, "tokens": len(ids)}, None, None, hashes)
        else:
            assert documents.labels is not None
            ids, lengths = truncate(ids, lengths, job.row_length)
            counts |= {"rows": len(places), "tokens": len(ids)}
            writers[split].add(ids, counts, documents.labels[chosen], lengths, hashes)


def document_marks(job: Job, file: InputFile | ExamplePart) -> tuple[int | None, int | None]:
    """Ids before and after each document. WikiText as bytes stays as it is: its articles begin with a title anyway."""
    tokenizer = job.tokenizer
    assert tokenizer is not None
    if job.document_marks == "cls-sep":
        return tokenizer.cls_id, tokenizer.sep_id
    running = isinstance(tokenizer, ByteTokenizer) and file.format in ("wikitext", "wikitext-rows")
    return None, None if running else tokenizer.eos_id


def content_hashes(contents: Sequence[bytes]) -> np.ndarray:
    """What tells documents (or images) apart by their content: uint64 (n,)."""
    data = b"".join(hashlib.blake2b(content, digest_size=8).digest() for content in contents)
    return np.frombuffer(data, ">u8").astype(np.uint64)


def splits_of(file: InputFile | ExamplePart, contents: Any, val_fraction: float) -> Iterator[tuple[str, np.ndarray]]:
    """The splits that a file's documents go to, with which ones; equal documents go to the same."""
    if file.split != "hash":
        yield file.split, np.ones(len(contents), bool)
        return
    is_val = content_hashes(contents).astype(np.float64) < val_fraction * 2.0**64
    for split, chosen in (("train", ~is_val), ("val", is_val)):
        if chosen.any():
            yield split, chosen


# --------------------------------------------------------------------------------------------------------------- shards


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """One shard to make: its rows, and where in which pieces they lie."""

    split: str
    number: int
    first_row: int
    rows: int
    parts: tuple[tuple[int, int, int], ...]
    """(piece, first, last + 1): ids of a stream, or rows, counted in the piece."""


def split_rows(job: Job, notes: list[dict[str, Any]], split: str) -> int:
    """Logical rows of a split, from the notes on all pieces."""
    counts = [note["splits"][split] for note in notes]
    if job.kind == "tokens":
        tokens = sum(count["tokens"] for count in counts)
        return stream_rows(tokens, job.row_length) if tokens else 0
    return sum(count["rows"] for count in counts)


def plan_shards(job: Job, notes: list[dict[str, Any]], split: str) -> list[ShardPlan]:
    """The shards of a split."""
    stream = job.kind == "tokens"
    sizes = [note["splits"][split]["tokens" if stream else "rows"] for note in notes]
    ends = np.cumsum(sizes)
    rows = split_rows(job, notes, split)
    plans = []
    for number, first_row in enumerate(range(0, rows, job.rows_per_shard)):
        num = min(job.rows_per_shard, rows - first_row)
        scale = job.row_length if stream else 1
        start, stop = first_row * scale, (first_row + num + job.rows.lookahead) * scale
        parts = []
        for piece in range(int(np.searchsorted(ends, start, side="right")), len(sizes)):
            begin = int(ends[piece]) - sizes[piece]
            if begin >= stop:
                break
            parts.append((piece, max(start - begin, 0), min(stop - begin, sizes[piece])))
        plans.append(ShardPlan(split=split, number=number, first_row=first_row, rows=num, parts=tuple(parts)))
    return plans


def make_shard(job: Job, plan: ShardPlan) -> dict[str, Any]:
    """Pass 2 for one shard: its file, and the note on it, which is also returned."""
    name = shard_name(plan.split, plan.number)
    with atomic_file(job.folder, name) as file:
        write_blocks(file, job.rows, _blocks(job, plan))
    note = asdict(describe_shard(job.folder, name, plan.rows))
    write_file(job.staging, _shard_note(plan), json.dumps(note).encode())
    return note


def _blocks(job: Job, plan: ShardPlan) -> Iterator[pa.Table]:
    for first in range(0, plan.rows, job.rows_per_block):
        num = min(job.rows_per_block, plan.rows - first)
        if job.kind == "tokens":
            block = np.zeros((num + 1) * job.row_length, np.uint16)
            start = first * job.row_length
            ids = _read_part(job, plan, "values", np.uint16, start, start + len(block))
            block[: len(ids)] = ids
            yield pa.table({"tokens": fixed_column(block.reshape(num + 1, job.row_length))})
            continue
        if job.arrays is not None:
            yield _read_rows(job, job.arrays, plan, first, first + num)
            continue
        labels = pa.array(_read_part(job, plan, "labels", np.int32, first, first + num))
        if job.kind == "images":
            pixels = _read_part(job, plan, "values", np.uint8, first, first + num, width=job.row_length)
            yield pa.table({"image": fixed_column(pixels.reshape(num, -1)), "label": labels})
        else:
            yield pa.table({"tokens": _read_documents(job, plan, first, first + num), "label": labels})


def _read_part(job: Job, plan: ShardPlan, part: str, dtype: type, start: int, stop: int, width: int = 1) -> np.ndarray:
    """Values start .. stop - 1 of a shard (each of `width` numbers), from the pieces that they lie in."""
    size = np.dtype(dtype).itemsize * width
    found = []
    for piece, low, high in _parts(plan, start, stop):
        data = read_range(job.staging, f"piece-{piece:06d}-{plan.split}.{part}", low * size, high * size)
        found.append(np.frombuffer(data, dtype))
    return np.concatenate(found) if found else np.empty(0, dtype)


def _read_documents(job: Job, plan: ShardPlan, start: int, stop: int) -> pa.ListArray:
    """Rows start .. stop - 1 of a shard as lists of ids."""
    ids, lengths = [], []
    for piece, low, high in _parts(plan, start, stop):
        name = f"piece-{piece:06d}-{plan.split}"
        sizes = np.frombuffer(read_range(job.staging, f"{name}.lengths", 0, high * 4), np.int32).astype(np.int64)
        first = int(sizes[:low].sum())
        last = first + int(sizes[low:].sum())
        ids.append(np.frombuffer(read_range(job.staging, f"{name}.values", first * 2, last * 2), np.uint16))
        lengths.append(sizes[low:])
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int32)
    item = pa.list_(pa.field("element", pa.uint16(), nullable=False))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(ids)), type=item)


def _read_rows(job: Job, rows: ArrayRows, plan: ShardPlan, start: int, stop: int) -> pa.Table:
    """Rows start .. stop - 1 of a shard of arrays."""
    filesystem, staging = open_folder(job.staging)
    size, found = rows_at_once(rows), []
    for piece, low, high in _parts(plan, start, stop):
        with filesystem.open_input_file(f"{staging}/piece-{piece:06d}-{plan.split}.rows") as source:
            reader = pa.ipc.open_file(source)
            first = low // size
            batches = [reader.get_batch(i) for i in range(first, (high - 1) // size + 1)]
            found.append(pa.Table.from_batches(batches).slice(low - first * size, high - low))
    return pa.concat_tables(found).combine_chunks()


def _parts(plan: ShardPlan, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """What values start .. stop - 1 of a shard are in the pieces: (piece, first, last + 1)."""
    begin = 0
    for piece, low, high in plan.parts:
        first, last = max(start - begin, 0), min(stop - begin, high - low)
        if first < last:
            yield piece, low + first, low + last
        begin += high - low


def make_split(job: Job, notes: list[dict[str, Any]], shards: list[dict[str, Any]], split: str) -> Split:
    """A split's part of the manifest."""
    counts = {name: sum(note["splits"][split][name] for note in notes) for name in _COUNTS}
    counts["rows"] = split_rows(job, notes, split)
    return Split(
        name=split,
        kind=job.kind,
        row_length=job.row_length,
        rows_per_block=job.rows_per_block,
        blocks_per_shard=job.blocks_per_shard,
        lookahead=job.rows.lookahead,
        shards=tuple(Shard(**shard) for shard in shards),
        **counts,
    )


def histogram(job: Job, split: str) -> np.ndarray:
    """How often each id (or label) occurs in a split: int64."""
    total = np.zeros(0, np.int64)
    for name in sorted(list_folder(job.staging)):
        if name.startswith("piece-") and name.endswith(f"-{split}.histogram"):
            part = np.frombuffer(read_file(job.staging, name), np.int64).copy()
            longer, shorter = (part, total) if len(part) > len(total) else (total, part)
            longer[: len(shorter)] += shorter
            total = longer
    return total


def shared_documents(job: Job) -> int | None:
    """How many validation documents (or images; of plain text sections) have the content of a training one.

    None where it cannot be: equal documents of the same files go to the same split.
    """
    names = sorted(list_folder(job.staging))
    train, val = ([name for name in names if name.endswith(f"-{split}.hashes")] for split in ("train", "val"))
    if not train or not val:
        return None
    wanted = np.concatenate([np.frombuffer(read_file(job.staging, name), np.uint64) for name in val])
    shared = np.zeros(len(wanted), bool)
    for name in train:
        shared |= np.isin(wanted, np.frombuffer(read_file(job.staging, name), np.uint64))
    return int(np.count_nonzero(shared))


def unigram_nats(train: np.ndarray, val: np.ndarray, vocab_size: int) -> float:
    """Cross-entropy of the validation ids under the training ids' frequencies (plus one each), in nats per id."""
    counts = np.ones(vocab_size)
    counts[: len(train)] += train
    weights = np.zeros(vocab_size)
    weights[: len(val)] = val
    return float(-(weights * np.log(counts / counts.sum())).sum() / max(weights.sum(), 1))


def finished_pieces(job: Job, num: int) -> dict[int, dict[str, Any]]:
    """The notes on the pieces that are finished, of `num`."""
    there = list_folder(job.staging)
    names = {i: _piece_note(i) for i in range(num)}
    return {i: json.loads(read_file(job.staging, name)) for i, name in names.items() if name in there}


def finished_shards(job: Job, plans: list[ShardPlan]) -> dict[int, dict[str, Any]]:
    """The notes on the shards that are finished, by their place in `plans`."""
    notes, shards = list_folder(job.staging), list_folder(job.folder)
    done = {}
    for i, plan in enumerate(plans):
        if _shard_note(plan) in notes:
            note = json.loads(read_file(job.staging, _shard_note(plan)))
            if shards.get(note["file"]) == note["bytes"]:
                done[i] = note
    return done


def _piece_note(index: int) -> str:
    return f"piece-{index:06d}.json"


def _shard_note(plan: ShardPlan) -> str:
    return f"shard-{plan.split}-{plan.number:06d}.json"
