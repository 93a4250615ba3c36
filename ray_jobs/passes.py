"""The two passes of a preparation, by Ray Data: pieces of the input become notes and rows, then rows become shards."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from perceiver.config import UserError, digest
from perceiver.data.duplicates import LeftOut, leave_out, list_rows
from perceiver.data.duplicates import listed as listed_rows
from perceiver.data.files import InputFile
from perceiver.data.held_out import choose, is_chosen, list_keys, listed
from perceiver.data.labels import label_counts
from perceiver.data.pieces import Piece, finished_pieces, make_piece
from perceiver.data.preparation import Job, Preparation, ShardPlan
from perceiver.data.prepare import finished_shards, make_shard, plan_shards
from perceiver.data.read_images import image_shape
from perceiver.data.rows import KINDS
from perceiver.data.sources import Source
from perceiver.data.storage import (
    list_folder,
    open_folder,
    read_file,
    remove_folder,
    write_file,
)
from perceiver.data.tables import Columns
from perceiver.data.times import TimeColumn, together_by
from perceiver.data.tokenizers import tokenizer_of
from perceiver.data_settings import DataSpec, array_rows, stored_shape
from perceiver.datasets import check_image_shape, needs_tokenizer
from perceiver.disk import locked

logger = logging.getLogger(__name__)

PIECE_FORMAT = 3
"""Of what pass 1 leaves for pass 2: who changes it raises it, so that a preparation stopped before begins again."""


def make_job(spec: DataSpec, settings: dict[str, Any], folder: str, fingerprint: dict[str, Any], source: Source) -> Job:
    """What all tasks need to know. Looks at the first image for the images' shape.

    Raises:
        UserError: images of a shape that the model does not take.
    """
    data, kind = spec.data, settings["kind"]
    rows, shape = KINDS[kind], None
    if rows.one_shape:
        shape = _first_image_shape(source, skip=data.on_error == "skip")
        if data.image_size is not None or all(file.format in ("picture", "tar") for file in source.files):
            shape = stored_shape(spec, shape)
        check_image_shape(spec, shape)
    together = together_by(data)
    if together is not None:
        _check_groups(together, source, kind)
    num_classes, class_names = _classes(spec, source) if rows.has_labels else (0, ())
    columns = Columns(
        text=data.text_column,
        label=data.label_column if rows.has_labels else None,
        num_classes=num_classes,
        class_names=class_names,
        tags=rows.has_tags,
        left_out=tuple(getattr(spec.task, "leave_out", ())),
        group=together,
        image_shape=shape,
        fit_images=data.image_size is not None,
        sample_rate=settings.get("sample_rate"),
    )
    attempt: dict[str, Any] = {"settings": settings, "source": fingerprint, "on_error": data.on_error}
    if source.parts:
        attempt["parts"] = [[part.name, part.read, part.part] for part in source.parts]
    key = digest(attempt, 8)
    return Job(
        kind=kind,
        folder=folder,
        staging=f"{_staging_prefix(folder)}{key}",
        columns=columns,
        skip=data.on_error == "skip",
        val_fraction=data.val_fraction,
        row_length=settings.get("row_length", 0) if shape is None else shape[0] * shape[1] * shape[2],
        rows_per_block=data.rows_per_block,
        blocks_per_shard=data.blocks_per_shard,
        tokenizer=tokenizer_of(data) if needs_tokenizer(spec) else None,
        document_marks=settings.get("document_marks", ""),
        arrays=array_rows(spec) if rows.has_columns else rows.stored_columns(),
        long_texts=data.long_texts,
        text_stride=data.text_stride,
    )


@contextmanager
def held(job: Job) -> Iterator[None]:
    """Holds a local data set for this process: two preparations would remove each other's files.

    Raises:
        UserError: another process prepares it.
    """
    if "://" in job.folder:
        yield
        return
    path = Path(f"{job.folder}.lock").expanduser()
    with locked(path, f"{job.folder} is being prepared by another process: wait for it or stop it"):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _check_groups(column: str, source: Source, kind: str) -> None:
    """Raises UserError where rows can have no group, or no time."""
    field = "--data.time-column" if isinstance(column, TimeColumn) else "--data.group-column"
    if Preparation.of(kind).keyed is Preparation.keyed:
        raise UserError(f"{field} is {column}, and {KINDS[kind].made_from} have no columns: leave it out")
    for file in source.files:
        table = file.format in ("csv", "jsonl", "parquet", "arrow")
        if not table and not (file.format in ("picture", "sound") and file.group is not None):
            what = "a table (.csv, .tsv, .jsonl, .parquet, .arrow)"
            pictures = f" or {KINDS[kind].made_from} named in metadata.csv" if KINDS[kind].new_rows in ("image", "audio") else ""
            raise UserError(f"{field} is {column}, and {file.name} has no columns: it needs {what}{pictures}")


def _classes(spec: DataSpec, source: Source) -> tuple[int, tuple[str, ...]]:
    """How many classes labels may name, and their names (none: labels are numbers).

    Where the model has no classes the task does not look at labels (it draws pictures, say), and those of the files are taken as they are.
    """
    classes = spec.model.number_of_classes()
    if classes is not None:
        return classes, getattr(spec.task, "class_names", None) or ()
    found = sorted(label_counts(source, spec.data.label_column, skip=spec.data.on_error == "skip"))
    if all(label.isdecimal() for label in found):
        return max(map(int, found), default=0) + 1, ()
    return len(found), tuple(found)


def _first_image_shape(source: Source, skip: bool) -> tuple[int, int, int]:
    """The shape of the first image; where faults are skipped, of the first file that is readable."""
    for file in source.files[:-1]:
        try:
            return image_shape(file, skip)
        except UserError:
            if not skip:
                raise
    return image_shape(source.files[-1], skip)


def _staging_prefix(folder: str) -> str:
    root, _, name = folder.rpartition("/")
    return f"{root}/.staging-{name}-"


def hold_out(spec: DataSpec, job: Job, pieces: list[Piece], piece_bytes: int) -> tuple[Job, dict[str, Any]]:
    """The job with what is held out for validation, where that is chosen by class or by group; and what the manifest says of it."""
    if not is_chosen(job, pieces, spec.data.stratify):
        return job, {}
    _same_layout(job, pieces, piece_bytes)
    there = listed(job, len(pieces))
    for _ in in_parallel(lambda i: list_keys(job, i, pieces[i]), [i for i in range(len(pieces)) if i not in there]):
        pass
    held_out, stats = choose(job, len(pieces))
    return replace(job, held_out=held_out), stats


def find_duplicates(spec: DataSpec, job: Job, pieces: list[Piece], piece_bytes: int) -> dict[str, Any]:
    """Looks for duplicates where they are not kept. What the manifest says of it.

    Raises:
        UserError: there are duplicates, and they are refused.
    """
    if spec.data.duplicates == "keep":
        return {}
    _same_layout(job, pieces, piece_bytes)
    there = listed_rows(job, len(pieces))
    for _ in in_parallel(lambda i: list_rows(job, i, pieces[i]), [i for i in range(len(pieces)) if i not in there]):
        pass
    try:
        return leave_out(job, pieces, _source_name(spec), refuse=spec.data.duplicates == "refuse")
    except UserError:
        remove_folder(job.staging)
        raise


def _same_layout(job: Job, pieces: list[Piece], piece_bytes: int) -> None:
    """Removes what a preparation left that was stopped and had cut its input otherwise, or was of another version."""
    layout = json.dumps({"piece_bytes": piece_bytes, "pieces": len(pieces), "format": PIECE_FORMAT}).encode()
    if "layout.json" in list_folder(job.staging) and read_file(job.staging, "layout.json") != layout:
        remove_folder(job.staging)  # the numbers of its pieces mean nothing here
    write_file(job.staging, "layout.json", layout)


def run_pieces(job: Job, pieces: list[Piece], piece_bytes: int, select: bool = False) -> list[dict[str, Any]]:
    """Pass 1: the notes on all pieces.

    Args:
        select: leave out the duplicates that `find_duplicates` has noted.
    """
    _same_layout(job, pieces, piece_bytes)
    notes = finished_pieces(job, len(pieces))
    if notes:
        logger.info(f"continuing: {len(notes)} of {len(pieces)} pieces are there")
    code = not all(isinstance(span.file, InputFile) for piece in pieces for span in piece.spans)  # whose bytes nobody knows
    weights = [1 if code else piece.size for piece in pieces]
    meter = Meter("parts" if code else "pieces", len(pieces), sum(weights), len(notes), sum(weights[i] for i in notes))
    todo = [i for i in range(len(pieces)) if i not in notes]
    for i, note in in_parallel(lambda i: make_piece(job, i, pieces[i], LeftOut(job, i) if select else None), todo):
        notes[i] = note
        meter.add(weights[i], sum(count["tokens"] for count in note["splits"].values()))
    return [notes[i] for i in range(len(pieces))]


def run_shards(spec: DataSpec, job: Job, notes: list[dict[str, Any]], source: Source) -> dict[str, list[dict[str, Any]]]:
    """Pass 2: the notes on all shards, by split.

    Raises:
        UserError: a split is empty.
    """
    wanted = ("val",) if all(file.split == "val" for file in source.inputs) else ("train", "val")
    plans: list[ShardPlan] = []
    for split in wanted:
        found = plan_shards(job, notes, split)
        if not found:
            remove_folder(job.staging)
            raise UserError(_empty_split(spec, split, source))
        if job.rows.is_text and job.rows.has_labels and not any(note["splits"][split]["tokens"] for note in notes):
            remove_folder(job.staging)
            raise UserError(f"{_source_name(spec)} has no text for the {split} split: all of its documents are empty")
        plans += found
    done = finished_shards(job, plans)
    todo = [i for i in range(len(plans)) if i not in done]
    rows = [plan.rows for plan in plans]
    meter = Meter("shards", len(plans), sum(rows), len(done), sum(rows[i] for i in done))
    for i, note in in_parallel(lambda i: make_shard(job, plans[i]), todo):
        done[i] = note
        meter.add(rows[i])
    return {split: [done[i] for i, plan in enumerate(plans) if plan.split == split] for split in wanted}


def _source_name(spec: DataSpec) -> str:
    data = spec.data
    return f"data.source {data.source}" if data.source else f"data.val-source {data.val_source}"


def _empty_split(spec: DataSpec, split: str, source: Source) -> str:
    what = _source_name(spec)
    if any(file.split == "hash" for file in source.inputs):
        return (
            f"{what} has too few {KINDS[spec.task.kind].made_from}: none fell into the {split} split (data.val-fraction is "
            f"{spec.data.val_fraction}); give validation files as data.val-source, or change data.val-fraction"
        )
    return f"{what} has no rows for the {split} split: everything in it is empty or was skipped"


def in_parallel(function: Callable[[int], dict[str, Any]], items: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Results of one task an item, by Ray Data, as they come.

    Raises:
        UserError: the first one that a task raised (and returned as data: Ray would wrap the exception in its own).
    """
    if not items:
        return
    import ray

    from ray_jobs.shipping import Shipped

    shipped = Shipped(function)

    def run(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"item": row["item"], "result": json.dumps(shipped.value(int(row["item"]))), "error": ""}
        except UserError as error:
            return {"item": row["item"], "result": "", "error": str(error)}

    plan = ray.data.from_items([{"item": i} for i in items], override_num_blocks=len(items))
    for row in plan.map(run).iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        yield int(row["item"]), json.loads(row["result"])


def remove_staging(folder: str) -> None:
    """Removes the staging folders of a data set, also those of attempts with other files."""
    filesystem, root = open_folder(folder.rpartition("/")[0])
    attempt = re.compile(re.escape(_staging_prefix(folder).rpartition("/")[2]) + "[0-9a-f]{8}")  # not those of a longer name
    for info in filesystem.get_file_info(pafs.FileSelector(root)):
        if attempt.fullmatch(info.base_name):
            filesystem.delete_dir(info.path)


class Meter:
    """Says how far a pass is, at most once a second and at its end."""

    def __init__(self, what: str, total: int, weight: int, done: int, weight_done: int) -> None:
        self._what, self._total, self._weight = what, total, weight
        self._done, self._weight_done, self._begin = done, weight_done, weight_done
        self._started = self._said = time.monotonic()
        self._tokens = 0

    def add(self, weight: int, tokens: int = 0) -> None:
        self._done += 1
        self._weight_done += weight
        self._tokens += tokens
        now = time.monotonic()
        if now - self._said < 1 and self._done < self._total:
            return
        self._said = now
        seconds = max(now - self._started, 1e-9)
        rate = (self._weight_done - self._begin) / seconds
        left = duration((self._weight - self._weight_done) / max(rate, 1e-9))
        unit = {"pieces": f", {rate / 1e6:.1f} MB/s", "parts": ""}.get(self._what, f", {rate:,.0f} rows/s")
        speed = f", {self._tokens / seconds / 1e6:.2f} million tokens/s" if self._tokens else ""
        logger.info(f"  {self._what} {self._done:,}/{self._total:,}{unit}{speed}, {left} left")


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
