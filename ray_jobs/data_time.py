"""How long a preparation takes: measured on a part of the source, in this process, and extrapolated."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from perceiver.config import UserError
from perceiver.data.files import CUT, InputFile
from perceiver.data.held_out import choose, is_chosen, list_keys
from perceiver.data.pieces import Piece, cut_pieces, make_piece
from perceiver.data.prepare import make_shard, plan_shards
from perceiver.data.sources import Source, resolve
from perceiver.data_settings import DataSpec, prepare_settings, task_kind
from perceiver.datasets import with_tokenizer
from ray_jobs.cli import parse_experiment
from ray_jobs.passes import duration, make_job

SAMPLE_BYTES = 1 << 20
"""Of what is measured at once, about."""
MOST_BYTES = 8 << 20
"""Larger parts are not measured: files that are read from their beginning, such as .csv and packed ones, are one part each."""
SECONDS = 1.0
"""No other part is measured after this time."""


def time_lines(preset: str, words: list[str]) -> list[str]:
    """What is said of the time to prepare a source for the preset that reads it; nothing where it is not prepared as it is."""
    try:
        spec = with_tokenizer(parse_experiment([preset, *words, "--data.on-error", "skip"], "ray_jobs.preprocess"))
        source = resolve(spec.data, task_kind(spec))
        pieces = [piece for piece in cut_pieces(source.inputs, SAMPLE_BYTES) if piece.size]
        total = sum(piece.size for piece in pieces)
        small = [piece for piece in pieces if piece.size <= MOST_BYTES]
        if not small:
            return (
                [f"time to prepare: not measured, {pieces[0].spans[0].file.name} is read from its beginning to its end"] if pieces else []
            )
        measured, seconds = _measure(spec, source, small)
    except UserError:  # of faults there are lines already
        return []
    side_by_side = max(1, min(os.cpu_count() or 1, len(cut_pieces(source.inputs))))
    estimate = seconds * total / measured / side_by_side
    about = "less than a second" if estimate < 1 else f"about {estimate:.0f} s" if estimate < 60 else f"about {duration(estimate)}"
    what = f"all {total / 1e6:.1f} MB" if measured == total else f"{measured / 1e6:.1f} of {total / 1e6:.1f} MB"
    cpus = "on one CPU" if side_by_side == 1 else f"on one CPU, and {side_by_side} work side by side"
    return [f"time to prepare for {preset}: {about} ({what} took {seconds:.2g} s here {cpus}; Ray's start comes to it)"]


def _measure(spec: DataSpec, source: Source, pieces: list[Piece]) -> tuple[int, float]:
    """Bytes that were prepared, spread over the pieces, and the seconds that it took."""
    chosen: list[Piece] = []
    with TemporaryDirectory() as folder:
        job = make_job(spec, prepare_settings(spec), str(Path(folder) / "data"), {}, source)
        started = time.monotonic()
        step = max(1, len(pieces) // 8)
        notes = []
        for piece in [*pieces[::step], *(piece for i, piece in enumerate(pieces) if i % step)]:
            index = len(chosen)
            chosen.append(piece)
            if is_chosen(job, [piece], spec.data.stratify):
                list_keys(job, index, piece)
                notes.append(make_piece(replace(job, held_out=choose(job, index + 1)[0]), index, piece))
            else:
                notes.append(make_piece(job, index, piece))
            if time.monotonic() - started > SECONDS:
                break
        for split in ("train", "val"):
            for plan in plan_shards(job, notes, split):
                make_shard(job, plan)
        size, text = sum(piece.size for piece in chosen), sum(count["bytes"] for note in notes for count in note["splits"].values())
        plain = all(
            isinstance(file := span.file, InputFile) and file.format in CUT and not file.compressed for p in chosen for span in p.spans
        )
        most = sum(piece.size for piece in pieces)
        return min(max(size, text), most) if plain else size, time.monotonic() - started  # of one long line a part has all
