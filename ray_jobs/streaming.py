"""What `--data.prepare stream` does before a training: sizes of the files, a sample, and shards of the validation data."""

from __future__ import annotations

import logging
import time
from typing import Any

from perceiver.config import ParallelConfig, UserError, digest
from perceiver.data.chunks import Size, chunk_ids, chunk_rows, chunks_of, fingerprint, measure, sample_pieces
from perceiver.data.files import InputFile
from perceiver.data.manifest import Manifest, Split
from perceiver.data.order import STREAM_BLOCKS
from perceiver.data.pieces import PIECE_BYTES, cut_pieces
from perceiver.data.preparation import Job
from perceiver.data.prepare import make_split
from perceiver.data.sources import Source
from perceiver.data.tokenizers import keep_tokenizer
from perceiver.data_settings import DataSpec, prepare_settings
from ray_jobs.passes import held, in_parallel, make_job, remove_staging, run_pieces, run_shards

logger = logging.getLogger(__name__)


def prepare_stream(spec: DataSpec, parallel: ParallelConfig, source: Source, folder: str) -> Manifest:
    """Makes the manifest of a source that is streamed, and shards of its validation data.

    Raises:
        UserError: a fault in the input, or too little text for chunks.
    """
    from ray_jobs.ray_env import connect

    started = time.monotonic()
    files = [file for file in source.files if file.split != "val"]
    known = fingerprint(source)
    settings = prepare_settings(spec)
    job = make_job(spec, settings, folder, known, source)
    with held(job), connect(parallel):
        sizes = _measure(job, files)
        described = _describe(spec, job, files, sizes)
        train, val = chunks_of(files, described, job.row_length)
        val = val or cut_pieces(tuple(file for file in source.files if file.split == "val"))
        notes = run_pieces(job, val, PIECE_BYTES)
        val_source = Source(files=tuple(span.input_file for piece in val for span in piece.spans))
        shards = run_shards(spec, job, notes, val_source)
        rows = len(train) * described["rows"]
        split = Split(
            name="train", kind="tokens", rows=rows, tokens=rows * job.row_length + 1,
            bytes=round(rows * job.row_length / described["ids_per_byte"]), words=0, documents=0, row_length=job.row_length,
            rows_per_block=described["rows"], blocks_per_shard=job.blocks_per_shard, lookahead=1, shards=(),
        )  # fmt: skip
        manifest = Manifest(
            kind="tokens",
            settings=settings,
            settings_digest=digest(settings, 8),
            splits={"train": split, "val": make_split(job, notes, shards["val"], "val")},
            tokenizer=settings["tokenizer"],
            source={**known, "stream": described},
        )
        keep_tokenizer(job.tokenizer, folder)
        manifest.save(folder)
        remove_staging(folder)
    total = sum(size.bytes for size in sizes)
    logger.info(f"ready to stream after {time.monotonic() - started:.0f} s: {folder}")
    logger.info(
        f"  train: {len(train):,} chunks of {described['rows']:,} rows, {split.tokens:,} of about "
        f"{round(total * described['ids_per_byte']):,} tokens (the others are left over at the chunks' ends or held out)"
    )
    logger.info(f"  val:   {manifest.splits['val'].rows:,} rows, {manifest.splits['val'].tokens:,} tokens")
    return manifest


def _measure(job: Job, files: list[InputFile]) -> list[Size]:
    def run(i: int) -> dict[str, int]:
        size = measure(files[i])
        return {"units": size.units, "bytes": size.bytes}

    found = dict(in_parallel(run, list(range(len(files)))))
    return [Size(**found[i]) for i in range(len(files))]


def _describe(spec: DataSpec, job: Job, files: list[InputFile], sizes: list[Size]) -> dict[str, Any]:
    """What determines the chunks, beside the files: for the manifest."""
    pieces = sample_pieces(files, sizes)
    counts = dict(in_parallel(lambda i: {"ids": len(chunk_ids(job, pieces[i]))}, list(range(len(pieces)))))
    tokens, total = sum(count["ids"] for count in counts.values()), sum(piece.size for piece in pieces)
    if not tokens:
        raise UserError(f"data.source {spec.data.source} has no text: everything in it is empty or was skipped")
    data = spec.data
    most = data.rows_per_block * (data.shuffle_window_blocks or STREAM_BLOCKS)
    rows = chunk_rows(sum(size.bytes for size in sizes), tokens / total, job.row_length, most)
    return {
        "rows": rows,
        "ids_per_byte": round(tokens / total, 6),
        "val_fraction": data.val_fraction if files[0].split == "hash" else 0.0,
        "sizes": [[size.units, size.bytes] for size in sizes],
    }
