"""`python -m ray_jobs.preprocess PRESET [--data.source FILES] [--field value ...]`: prepares data with Ray Data."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from perceiver.config import Experiment, UserError, digest
from perceiver.data.chunks import fingerprint as stream_fingerprint
from perceiver.data.components import Component, mixture_manifest
from perceiver.data.examples import check_repeatable, is_code
from perceiver.data.prepare import (
    PIECE_BYTES,
    Job,
    Piece,
    ShardPlan,
    cut_pieces,
    finished_pieces,
    finished_shards,
    histogram,
    make_piece,
    make_shard,
    make_split,
    plan_shards,
    shared_documents,
    unigram_nats,
)
from perceiver.data.readers import Columns, image_shape
from perceiver.data.rows import KINDS, ArrayRows
from perceiver.data.shards import MANIFEST, DamagedData, Manifest, broken_files
from perceiver.data.sources import InputFile, Source, is_path, mixture_sources, resolve, same_file
from perceiver.data.storage import (
    file_hash,
    list_folder,
    open_folder,
    read_file,
    remove_file,
    remove_folder,
    write_file,
)
from perceiver.data.tokenizers import TOKENIZER, SentencePieceTokenizer, load_tokenizer
from perceiver.datasets import check_fits, check_image_shape, data_folder, prepare_settings, task_kind, with_tokenizer
from ray_jobs.cli import main_entry, parse_experiment

Say = Callable[[str], Any]

HASHES = ".source-hashes.json"
"""File in data.root that keeps the hashes of source files by path, size and time, so that they are not read again."""


PIECE_FORMAT = 2
"""Of what pass 1 leaves for pass 2: who changes it raises it, so that a preparation stopped before begins again."""


def main(argv: list[str]) -> int:
    experiment = parse_experiment(argv, "ray_jobs.preprocess")
    prepare(experiment, lambda text: print(text, flush=True))
    return 0


def prepare(experiment: Experiment, progress: Say = print, piece_bytes: int = PIECE_BYTES) -> Manifest:
    """Prepares an experiment's data, or continues a stopped preparation, or finds that there is nothing to do.

    Joins the Ray cluster of this process, else runs a local one for the time being.

    Args:
        progress: takes lines of progress.
        piece_bytes: input bytes of a task. The result does not depend on it.

    Raises:
        UserError: a mistake in the experiment or its source, or a fault in an input file. No data set is left then.
    """
    started = time.monotonic()
    experiment = with_tokenizer(experiment)
    if experiment.data.mixture:
        return _prepare_mixture(experiment, progress, piece_bytes)
    settings, folder = prepare_settings(experiment), data_folder(experiment)
    old = _whole_or_removed(folder, progress)
    own = any(is_path(source) or is_code(source) for source in (experiment.data.source, experiment.data.val_source) if source)
    if old is not None and not own:  # the name stands for the content: no network is needed
        return _nothing_to_do(experiment, folder, old, progress)
    source = resolve(experiment.data, task_kind(experiment))
    if experiment.data.prepare == "stream":
        from ray_jobs.streaming import prepare_stream

        if old is None:
            return prepare_stream(experiment, source, folder, progress)
        _refuse_changed_source(experiment, folder, old, stream_fingerprint(source))
        return _nothing_to_do(experiment, folder, old, progress)
    fingerprint = _fingerprint(experiment, source, progress)
    if old is not None:
        _refuse_changed_source(experiment, folder, old, fingerprint)
        return _nothing_to_do(experiment, folder, old, progress)
    _refuse_same_files(fingerprint)
    check_repeatable(source.parts)
    job = make_job(experiment, settings, folder, fingerprint, source)

    from ray_jobs.ray_env import connect

    with locked(job), connect(experiment.parallel):
        notes = run_pieces(job, cut_pieces(source.inputs, piece_bytes), progress, piece_bytes)
        shards = run_shards(experiment, job, notes, source, progress)
        manifest = _finish(job, settings, fingerprint, notes, shards)
    _summary(folder, manifest, source, time.monotonic() - started, progress)
    return manifest


def _prepare_mixture(experiment: Experiment, progress: Say, piece_bytes: int) -> Manifest:
    """Prepares each source as the data set that it is by itself, and writes the manifest that says how they are mixed."""
    from ray_jobs.ray_env import connect

    settings, folder = prepare_settings(experiment), data_folder(experiment)
    found = [
        (part, replace(experiment, data=replace(experiment.data, source=part.source, mixture=())))
        for part in mixture_sources(experiment.data)
    ]
    missing = [alone for _, alone in found if MANIFEST not in list_folder(data_folder(alone))]
    for alone in missing:  # a mistake in the last source is found before the first is prepared
        resolve(alone.data, task_kind(alone))
    parts = []
    with connect(experiment.parallel) if missing else nullcontext():  # one cluster for all of them
        for part, alone in found:
            manifest = prepare(alone, progress, piece_bytes)
            parts.append(Component(part.name, part.share, data_folder(alone), manifest))
    manifest = mixture_manifest(settings, parts)
    if _whole_or_removed(folder, progress) != manifest:
        if isinstance(tokenizer := load_tokenizer(experiment.data.tokenizer), SentencePieceTokenizer):
            write_file(folder, TOKENIZER, tokenizer.model)
        manifest.save(folder)
    progress(f"mixture of {' and '.join(f'{part.share:.1%} {part.name}' for part in parts)}: {folder}")
    return manifest


def _whole_or_removed(folder: str, progress: Say) -> Manifest | None:
    """The manifest of data that is prepared and whole; of damaged data it is removed, so that it is prepared again.

    Raises:
        UserError: the data has another version's format.
    """
    if MANIFEST not in list_folder(folder):
        return None
    try:
        manifest = Manifest.load(folder)
        broken = broken_files(folder, manifest)
        fault = f"{folder}/{broken[0]} is missing or damaged" if broken else None
    except DamagedData as error:
        fault = str(error)
    if fault is None:
        return manifest
    progress(f"{fault}: preparing again")
    remove_file(folder, MANIFEST)
    return None


def _nothing_to_do(experiment: Experiment, folder: str, manifest: Manifest, progress: Say) -> Manifest:
    check_fits(experiment, manifest)
    skipped = f" ({_skipped(manifest)})" if manifest.stats.get("skipped") else ""
    progress(f"data of {experiment.preset} is prepared{skipped}, nothing to do: {folder}")
    return manifest


# ----------------------------------------------------------------------------------------------------------- the source


def _fingerprint(experiment: Experiment, source: Source, progress: Say) -> dict[str, Any]:
    """What the source is: of files names, sizes and hashes; of the hub names, sizes and its revision; of code what stands for it."""
    paths = [p for f in source.files for p in (f.path, f.labels_path) if p is not None]
    local = [p for p in paths if "://" not in p]
    hashes = _hashes(local, experiment.data.root_path, progress)

    def entry(file: InputFile) -> dict[str, Any]:
        result: dict[str, Any] = {
            "name": file.name,
            "split": file.split,
            "bytes": file.size,
            "sha256": hashes.get(file.path),
        }
        if file.labels_path is not None:
            result["labels_sha256"] = hashes.get(file.labels_path)
        return result

    result = {**(source.origin or {}), "files": [entry(file) for file in source.files]}
    if source.parts:
        firsts = {(part.name, part.split): part for part in source.parts}
        result["examples"] = [{"name": name, "split": split, "content": part.fingerprint()} for (name, split), part in firsts.items()]
    return result


def _hashes(paths: list[str], root: str, progress: Say) -> dict[str, str]:
    """sha256 of local files, remembered by path, size and time of change.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    known = json.loads(read_file(root, HASHES)) if HASHES in list_folder(root) else {}
    try:
        states = {path: [info.st_size, info.st_mtime_ns] for path, info in ((p, os.stat(p)) for p in paths)}
        new = [path for path in states if known.get(path, [None])[:2] != states[path]]
        total = sum(states[path][0] for path in new)
        if total > 1 << 30:
            progress(f"reading {len(new):,} source files once for their hashes ({total / 1e9:.1f} GB)")
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for path, (_, sha256) in zip(new, pool.map(_hash, new), strict=True):
                known[path] = [*states[path], sha256]
    except OSError as error:
        raise UserError(f"{error.filename or 'a source file'} cannot be read ({error.strerror or error})") from None
    if new:
        write_file(root, HASHES, json.dumps(known, indent=1).encode())
    return {path: known[path][2] for path in paths}


def _hash(path: str) -> tuple[int, str]:
    folder, _, name = path.rpartition("/")
    return file_hash(folder or "/", name)


def _refuse_same_files(fingerprint: dict[str, Any]) -> None:
    """Raises UserError where a file for validation has the content of one for training."""
    files = [file for file in fingerprint["files"] if file["sha256"] is not None and file["bytes"]]
    train = {file["sha256"]: file["name"] for file in files if file["split"] == "train"}
    for file in files:
        if file["split"] == "val" and file["sha256"] in train:
            raise UserError(same_file(train[file["sha256"]], file["name"]))


def _refuse_changed_source(experiment: Experiment, folder: str, old: Manifest, fingerprint: dict[str, Any]) -> None:
    """Raises UserError where prepared data was made from other files than the source has now."""
    before, now = _entries(old.source), _entries(fingerprint)
    changed = sorted({name for name, split in before.keys() | now.keys() if before.get((name, split)) != now.get((name, split))})
    if changed:
        what, more = experiment.data.source or experiment.data.val_source, ", ..." if len(changed) > 5 else ""
        hint = ""
        if any(entry["content"].startswith("code:") for entry in now.values() if "content" in entry):
            hint = " (of code without a method fingerprint() the source file counts, with all that it imports from beside it)"
        raise UserError(
            f"data.source {what} has changed since {folder} was prepared from it ({', '.join(changed[:5])}{more}){hint}: "
            "remove that folder, or prepare into another --data.root"
        )


def _entries(fingerprint: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """What a fingerprint says of each file or source, by name and split."""
    return {(entry["name"], entry["split"]): entry for entry in (*fingerprint["files"], *fingerprint.get("examples", ()))}


def make_job(experiment: Experiment, settings: dict[str, Any], folder: str, fingerprint: dict[str, Any], source: Source) -> Job:
    """What all tasks need to know. Looks at the first image for the images' shape.

    Raises:
        UserError: images of a shape that the model does not take.
    """
    data, kind = experiment.data, settings["kind"]
    task: Any = experiment.task
    model: Any = experiment.model  # of tasks with labels both have classes, whatever their types
    rows, shape = KINDS[kind], None
    if kind == "images":
        shape = _first_image_shape(source, skip=data.on_error == "skip")
        check_image_shape(experiment, shape)
    columns = Columns(
        text=data.text_column,
        label=data.label_column if rows.has_labels else None,
        num_classes=model.output.num_classes if rows.has_labels else 0,
        class_names=(task.class_names or ()) if rows.has_labels else (),
        image_shape=shape,
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
        tokenizer=load_tokenizer(data.tokenizer) if rows.is_text else None,
        document_marks=settings.get("document_marks", ""),
        arrays=ArrayRows.from_json(settings["columns"]) if "columns" in settings else None,
    )


@contextmanager
def locked(job: Job) -> Iterator[None]:
    """Holds a local data set for this process: two preparations would remove each other's files.

    Raises:
        UserError: another process prepares it.
    """
    if "://" in job.folder:
        yield
        return
    path = Path(f"{job.folder}.lock").expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{job.folder} is being prepared by another process: wait for it or stop it") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


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


# ----------------------------------------------------------------------------------------------------------- two passes


def run_pieces(job: Job, pieces: list[Piece], progress: Say, piece_bytes: int) -> list[dict[str, Any]]:
    """Pass 1: the notes on all pieces."""
    layout = json.dumps({"piece_bytes": piece_bytes, "pieces": len(pieces), "format": PIECE_FORMAT}).encode()
    if "layout.json" in list_folder(job.staging) and read_file(job.staging, "layout.json") != layout:
        remove_folder(job.staging)  # pieces cut otherwise, or by another version: their numbers mean nothing here
    write_file(job.staging, "layout.json", layout)
    notes = finished_pieces(job, len(pieces))
    if notes:
        progress(f"continuing: {len(notes)} of {len(pieces)} pieces are there")
    code = not all(isinstance(span.file, InputFile) for piece in pieces for span in piece.spans)  # whose bytes nobody knows
    weights = [1 if code else piece.size for piece in pieces]
    meter = _Meter(progress, "parts" if code else "pieces", len(pieces), sum(weights), len(notes), sum(weights[i] for i in notes))
    todo = [i for i in range(len(pieces)) if i not in notes]
    for i, note in in_parallel(lambda i: make_piece(job, i, pieces[i]), todo):
        notes[i] = note
        meter.add(weights[i], sum(count["tokens"] for count in note["splits"].values()))
    return [notes[i] for i in range(len(pieces))]


def run_shards(
    experiment: Experiment, job: Job, notes: list[dict[str, Any]], source: Source, progress: Say
) -> dict[str, list[dict[str, Any]]]:
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
            raise UserError(_empty_split(experiment, split, source))
        if job.rows.is_text and job.rows.has_labels and not any(note["splits"][split]["tokens"] for note in notes):
            remove_folder(job.staging)
            raise UserError(f"{_source_name(experiment)} has no text for the {split} split: all of its documents are empty")
        plans += found
    done = finished_shards(job, plans)
    todo = [i for i in range(len(plans)) if i not in done]
    rows = [plan.rows for plan in plans]
    meter = _Meter(progress, "shards", len(plans), sum(rows), len(done), sum(rows[i] for i in done))
    for i, note in in_parallel(lambda i: make_shard(job, plans[i]), todo):
        done[i] = note
        meter.add(rows[i])
    return {split: [done[i] for i, plan in enumerate(plans) if plan.split == split] for split in wanted}


def _source_name(experiment: Experiment) -> str:
    data = experiment.data
    return f"data.source {data.source}" if data.source else f"data.val_source {data.val_source}"


def _empty_split(experiment: Experiment, split: str, source: Source) -> str:
    what = _source_name(experiment)
    if any(file.split == "hash" for file in source.inputs):
        return (
            f"{what} has too few {_documents(experiment.task.kind)}: none fell into the {split} split (data.val_fraction is "
            f"{experiment.data.val_fraction}); give validation files as data.val_source, or change data.val_fraction"
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


# ----------------------------------------------------------------------------------------------------------- the result


def _finish(
    job: Job,
    settings: dict[str, Any],
    fingerprint: dict[str, Any],
    notes: list[dict[str, Any]],
    shards: dict[str, list[dict[str, Any]]],
) -> Manifest:
    """Writes the manifest, and removes what is not part of the data set."""
    splits = {name: make_split(job, notes, shards[name], name) for name in shards}
    histograms = {name: histogram(job, name) for name in shards}
    skipped: Counter[str] = Counter()
    for note in notes:
        skipped.update(note["skipped"])
    stats: dict[str, Any] = {"skipped": dict(sorted(skipped.items()))}
    if (shared := shared_documents(job)) is not None:
        stats["shared_documents"] = shared
    empty = {name: sum(note["splits"][name]["empty"] for note in notes) for name in shards}
    if any(empty.values()):
        stats["empty_documents"] = empty
    if job.columns.label is not None:
        stats["labels"] = {name: counts.tolist() for name, counts in histograms.items()}
    elif "train" in histograms and job.tokenizer is not None:
        nats = unigram_nats(histograms["train"], histograms["val"], job.tokenizer.vocab_size)
        stats["unigram_nats_per_token"] = round(nats, 6)
    manifest = Manifest(
        kind=job.kind,
        settings=settings,
        settings_digest=digest(settings, 8),
        splits=splits,
        tokenizer=settings.get("tokenizer"),
        source=fingerprint,
        stats=stats,
        image_shape=job.columns.image_shape,
        columns=None if job.arrays is None else job.arrays.to_json(),
        num_classes=None if job.columns.label is None else max(len(counts) for counts in histograms.values()),
    )
    keep = {shard["file"] for notes in shards.values() for shard in notes}
    for name in list_folder(job.folder):
        if name not in keep:
            remove_file(job.folder, name)
    if isinstance(job.tokenizer, SentencePieceTokenizer):
        write_file(job.folder, TOKENIZER, job.tokenizer.model)
    manifest.save(job.folder)
    remove_staging(job.folder)
    return manifest


def remove_staging(folder: str) -> None:
    """Removes the staging folders of a data set, also those of attempts with other files."""
    filesystem, root = open_folder(folder.rpartition("/")[0])
    prefix = _staging_prefix(folder).rpartition("/")[2]
    for info in filesystem.get_file_info(pafs.FileSelector(root)):
        if info.base_name.startswith(prefix):
            filesystem.delete_dir(info.path)


def _summary(folder: str, manifest: Manifest, source: Source, seconds: float, progress: Say) -> None:
    progress(f"prepared in {_duration(seconds)}: {folder}")
    for name, split in manifest.splits.items():
        parts = [f"{split.rows:,} rows"]
        if manifest.kind == "images":
            assert manifest.image_shape is not None
            height, width, channels = manifest.image_shape
            parts.append(f"images of {height} x {width} x {channels}")
        elif manifest.columns is not None:
            parts.append(f"{split.bytes:,} bytes")
        else:
            parts += [
                f"{split.tokens:,} tokens",
                f"{split.bytes:,} bytes",
                f"{split.words:,} words",
                f"{split.documents:,} documents",
            ]
        parts.append(f"{len(split.shards):,} shard{'s' * (len(split.shards) != 1)}")
        progress(f"  {name + ':':<6} {', '.join(parts)}")
    if manifest.columns is not None:
        progress(f"  columns: {', '.join(f'{name} {tuple(shape)} {dtype}' for name, (shape, dtype) in manifest.columns.items())}")
    what = _documents(manifest.kind)
    if shared := manifest.stats.get("shared_documents"):
        progress(f"  shared: {shared:,} of the {manifest.splits['val'].documents:,} validation {what} occur in training, too")
    if empty := manifest.stats.get("empty_documents"):
        progress(f"  empty: {' and '.join(f'{count:,} {name}' for name, count in empty.items() if count)} documents have no text")
    if manifest.stats.get("skipped"):
        progress(f"  {_skipped(manifest)}")
    if source.ignored:
        more = ", ..." if len(source.ignored) > 5 else ""
        progress(f"  not used: {', '.join(source.ignored[:5])}{more}")


def _documents(kind: str) -> str:
    """What a data set of a kind of rows is made from, in the plural."""
    return {"images": "images", "arrays": "examples"}.get(kind, "documents")


def _skipped(manifest: Manifest) -> str:
    return "skipped: " + ", ".join(f"{count:,} x {reason}" for reason, count in manifest.stats["skipped"].items())


class _Meter:
    """Says how far a pass is, at most once a second and at its end."""

    def __init__(self, progress: Say, what: str, total: int, weight: int, done: int, weight_done: int) -> None:
        self._say, self._what, self._total, self._weight = progress, what, total, weight
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
        left = _duration((self._weight - self._weight_done) / max(rate, 1e-9))
        unit = {"pieces": f", {rate / 1e6:.1f} MB/s", "parts": ""}.get(self._what, f", {rate:,.0f} rows/s")
        speed = f", {self._tokens / seconds / 1e6:.2f} million tokens/s" if self._tokens else ""
        self._say(f"  {self._what} {self._done:,}/{self._total:,}{unit}{speed}, {left} left")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


if __name__ == "__main__":
    main_entry(main)
