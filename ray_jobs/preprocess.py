"""`python -m ray_jobs.preprocess PRESET [--data.source FILES] [--field value ...]`: prepares data with Ray Data."""

from __future__ import annotations

import logging
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from perceiver.config import Experiment, ParallelConfig, UserError, check_tree, digest
from perceiver.data.components import Component, mixture_manifest
from perceiver.data.examples import check_repeatable, is_code
from perceiver.data.manifest import MANIFEST, DamagedData, Manifest
from perceiver.data.pieces import PIECE_BYTES, cut_pieces
from perceiver.data.preparation import Job
from perceiver.data.prepare import histogram, make_split, shared_documents, unigram_nats
from perceiver.data.rows import KINDS
from perceiver.data.shards import broken_files
from perceiver.data.source_hashes import changed, refuse_same_files
from perceiver.data.sources import Source, is_path, mixture_sources, resolve
from perceiver.data.storage import list_folder, remove_file
from perceiver.data.tokenizers import keep_tokenizer, load_tokenizer
from perceiver.data_settings import DataSpec, OtherData, prepare_settings, task_kind
from perceiver.datasets import check_fits, data_folder, with_tokenizer
from perceiver.prepared_folders import find_folder, fingerprint_of, folder_for, new_folder, others_of_the_name, prepared
from perceiver.terminal import number_of
from ray_jobs.cli import main_entry, parse_experiment
from ray_jobs.logs import show_progress
from ray_jobs.passes import duration, find_duplicates, held, hold_out, make_job, remove_staging, run_pieces, run_shards

logger = logging.getLogger("ray_jobs.preprocess")  # which __name__ is not where it is run as a program


def main(argv: list[str]) -> int:
    argv = show_progress(argv)
    experiment = parse_experiment(argv, "ray_jobs.preprocess")
    check_tree(experiment)
    prepare(experiment)
    return 0


def prepare(experiment: Experiment, piece_bytes: int = PIECE_BYTES) -> Manifest:
    """`prepare_data` for an experiment's own data."""
    return prepare_data(experiment, experiment.parallel, piece_bytes)


def prepare_data(spec: DataSpec, parallel: ParallelConfig, piece_bytes: int = PIECE_BYTES) -> Manifest:
    """Prepares data, or continues a stopped preparation, or finds that there is nothing to do.

    Joins the Ray cluster of this process, else runs a local one for the time being.

    Args:
        parallel: how Ray is reached.
        piece_bytes: input bytes of a task. The result does not depend on it.

    Raises:
        UserError: a mistake in the settings or the source, or a fault in an input file. No data set is left then.
    """
    started = time.monotonic()
    spec = with_tokenizer(spec)
    if spec.data.mixture:
        return _prepare_mixture(spec, parallel, piece_bytes)
    settings = prepare_settings(spec)
    own = any(is_path(source) or is_code(source) for source in (spec.data.source, spec.data.val_source) if source)
    there = None if own else find_folder(spec, settings)
    if there is not None and (old := _whole_or_removed(there)) is not None:  # the name stands for the content: no network is needed
        return _nothing_to_do(spec, there, old)
    source = resolve(spec.data, task_kind(spec))
    fingerprint = fingerprint_of(spec.data, source)
    folder = folder_for(spec, settings, fingerprint)
    if (old := _whole_or_removed(folder)) is not None:
        return _nothing_to_do(spec, folder, old)
    for other in others_of_the_name(spec, settings):
        logger.info(f"{other}; this data has a folder of its own")
    if spec.data.prepare == "stream":
        from ray_jobs.streaming import prepare_stream

        return prepare_stream(spec, parallel, source, folder)
    if not all(file.format in ("picture", "sound") for file in source.files):  # of pictures the same ones are counted
        refuse_same_files(fingerprint)
    check_repeatable(source.parts)
    job = make_job(spec, settings, folder, fingerprint, source)

    from ray_jobs.ray_env import connect

    with held(job), connect(parallel):
        if (old := _whole_or_removed(folder)) is not None and changed(old.source, fingerprint):
            raise UserError(f"{folder} was prepared meanwhile from a source of the same name: run the command again")
        pieces = cut_pieces(source.inputs, piece_bytes)
        job, chosen = hold_out(spec, job, pieces, piece_bytes)
        left_out = find_duplicates(spec, job, pieces, piece_bytes)
        notes = run_pieces(job, pieces, piece_bytes, select=spec.data.duplicates != "keep")
        shards = run_shards(spec, job, notes, source)
        manifest = _finish(job, settings, fingerprint, notes, shards, chosen | left_out)
    _summary(folder, manifest, source, time.monotonic() - started)
    return manifest


def _prepare_mixture(spec: DataSpec, parallel: ParallelConfig, piece_bytes: int) -> Manifest:
    """Prepares each source as the data set that it is by itself, and writes the manifest that says how they are mixed."""
    from ray_jobs.ray_env import connect

    settings = prepare_settings(spec)
    found = [(part, OtherData.of(spec, replace(spec.data, source=part.source, mixture=()))) for part in mixture_sources(spec.data)]
    missing = [alone for _, alone in found if find_folder(alone, prepare_settings(alone)) is None]
    for alone in missing:  # a mistake in the last source is found before the first is prepared
        resolve(alone.data, task_kind(alone))
    parts = []
    with connect(parallel) if missing else nullcontext():  # one cluster for all of them
        for part, alone in found:
            manifest = prepare_data(alone, parallel, piece_bytes)
            parts.append(Component(part.name, part.share, data_folder(alone), manifest))
    manifest = mixture_manifest(settings, parts)
    folder = _mixture_folder(spec, settings, manifest)
    if _whole_or_removed(folder) != manifest:
        keep_tokenizer(load_tokenizer(spec.data.tokenizer), folder)
        manifest.save(folder)
    logger.info(f"mixture of {' and '.join(f'{part.share:.1%} {part.name}' for part in parts)}: {folder}")
    return manifest


def _mixture_folder(spec: DataSpec, settings: dict[str, Any], manifest: Manifest) -> str:
    """The folder of a mixture: the one whose data sets lie where those of its manifest lie, else a new one."""
    lie = [part["folder"] for part in manifest.mixture]
    for each in prepared(spec.data, settings):
        if each.manifest is not None and [part["folder"] for part in each.manifest.mixture] == lie:
            return each.folder
    return new_folder(spec.data, settings, lie)


def _whole_or_removed(folder: str) -> Manifest | None:
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
    logger.info(f"{fault}: preparing again")
    remove_file(folder, MANIFEST)
    return None


def _nothing_to_do(spec: DataSpec, folder: str, manifest: Manifest) -> Manifest:
    check_fits(spec, manifest)
    skipped = f" ({_skipped(manifest)})" if manifest.stats.get("skipped") else ""
    logger.info(f"data of {spec.preset} is prepared{skipped}, nothing to do: {folder}")
    return manifest


# ----------------------------------------------------------------------------------------------------------- the result


def _finish(
    job: Job,
    settings: dict[str, Any],
    fingerprint: dict[str, Any],
    notes: list[dict[str, Any]],
    shards: dict[str, list[dict[str, Any]]],
    chosen: dict[str, Any],
) -> Manifest:
    """Writes the manifest, and removes what is not part of the data set. `chosen`: how validation was held out, and what was
    left out as duplicates.
    """
    splits = {name: make_split(job, notes, shards[name], name) for name in shards}
    histograms = {name: histogram(job, name) for name in shards}
    skipped: Counter[str] = Counter()
    for note in notes:
        skipped.update(note["skipped"])
    stats: dict[str, Any] = {"skipped": dict(sorted(skipped.items())), **chosen}
    if (shared := shared_documents(job)) is not None:
        stats["shared_documents"] = shared
    empty = {name: sum(note["splits"][name]["empty"] for note in notes) for name in shards}
    if any(empty.values()):
        stats["empty_documents"] = empty
    long = {
        name: {
            "texts": sum(note["splits"][name]["long"] for note in notes),
            "tokens": sum(note["splits"][name]["all_tokens"] for note in notes),
        }
        for name in shards
    }
    if any(found["texts"] for found in long.values()):
        stats["long_texts"] = {name: {**found, "lost": max(0, found["tokens"] - splits[name].tokens)} for name, found in long.items()}
    fitted = {name: {what: sum(note["splits"][name][what] for note in notes) for what in ("cut", "filled")} for name in shards}
    if any(sum(found.values()) for found in fitted.values()):
        stats["fitted"] = fitted
    if job.columns.label is not None:
        stats["labels"] = {name: counts.tolist() for name, counts in histograms.items()}
    elif "train" in histograms and (num_ids := job.rows.num_ids if job.tokenizer is None else job.tokenizer.vocab_size):
        nats = unigram_nats(histograms["train"][:num_ids], histograms["val"][:num_ids], num_ids)
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
        columns=None if job.arrays is None or not job.rows.has_columns else job.arrays.to_json(),
        num_classes=None if job.columns.label is None else max(len(counts) for counts in histograms.values()),
    )
    keep = {shard["file"] for notes in shards.values() for shard in notes}
    for name in list_folder(job.folder):
        if name not in keep:
            remove_file(job.folder, name)
    keep_tokenizer(job.tokenizer, job.folder)
    manifest.save(job.folder)
    remove_staging(job.folder)
    return manifest


def _summary(folder: str, manifest: Manifest, source: Source, seconds: float) -> None:
    logger.info(f"prepared in {duration(seconds)}: {folder}")
    for name, split in manifest.splits.items():
        parts = [number_of(split.rows, "row")]
        if manifest.image_shape is not None:
            height, width, channels = manifest.image_shape
            parts.append(f"images of {height} x {width} x {channels}")
        elif KINDS[manifest.kind].keeps_photos:
            parts.append(f"{split.bytes:,} bytes of encoded images")
        elif rate := manifest.settings.get("sample_rate"):
            parts.append(f"sounds of {split.row_length / rate:g} s at {rate:,} Hz")
        elif manifest.columns is not None or not split.tokens:
            parts.append(f"{split.bytes:,} bytes")
        else:
            parts += [
                number_of(split.tokens, "token"),
                f"{split.bytes:,} bytes",
                number_of(split.words, "word"),
                number_of(split.documents, "document"),
            ]
        parts.append(number_of(len(split.shards), "shard"))
        logger.info(f"  {name + ':':<6} {', '.join(parts)}")
    if manifest.columns is not None:
        logger.info(f"  columns: {', '.join(f'{name} {tuple(shape)} {dtype}' for name, (shape, dtype) in manifest.columns.items())}")
    what = KINDS[manifest.kind].made_from
    if how := manifest.stats.get("held_out"):
        share = manifest.splits["val"].rows / max(sum(split.rows for split in manifest.splits.values()), 1)
        groups = f" of {manifest.stats['groups']:,}{' times' * ('time' in how)}" if "groups" in manifest.stats else ""
        logger.info(f"  held out {how}{groups}: {share:.1%} of the rows")
    skip = "(--data.duplicates skip leaves them out)"
    if (repeated := manifest.stats.get("repeated")) and "duplicates" not in manifest.stats:
        logger.info(f"  repeated: {repeated:,} {what} have the content of another one; equal ones are of one split {skip}")
    if found := manifest.stats.get("duplicates"):
        counts = " and ".join(f"{count:,} {name}" for name, count in found.items() if count)
        logger.info(f"  duplicates: {counts} {what} with the content of another one are left out")
    if shared := manifest.stats.get("shared_documents"):
        logger.info(f"  shared: {shared:,} of the {manifest.splits['val'].documents:,} validation {what} occur in training, too {skip}")
    if empty := manifest.stats.get("empty_documents"):
        logger.info(f"  empty: {' and '.join(f'{count:,} {name}' for name, count in empty.items() if count)} documents have no text")
    for name, found in manifest.stats.get("long_texts", {}).items():
        if found["texts"]:
            lost = f"{found['lost']:,} of {found['tokens']:,} tokens ({found['lost'] / found['tokens']:.1%}) are lost"
            stride = manifest.settings.get("text_stride")
            became = lost if found["lost"] else f"their parts begin {stride:,} tokens after each other" if stride else "they are split"
            length, documents = manifest.splits[name].row_length, manifest.splits[name].documents
            logger.info(f"  long: {found['texts']:,} of {documents:,} {name} documents have more than {length:,} tokens: {became}")
    for name, found in manifest.stats.get("fitted", {}).items():
        length = manifest.splits[name].row_length / manifest.settings["sample_rate"]
        logger.info(f"  {name}: {found['cut']:,} cut to their middle {length:g} s, {found['filled']:,} filled up with silence")
    if manifest.stats.get("skipped"):
        logger.info(f"  {_skipped(manifest)}")
    if source.ignored:
        more = ", ..." if len(source.ignored) > 5 else ""
        logger.info(f"  not used: {', '.join(source.ignored[:5])}{more}")


def _skipped(manifest: Manifest) -> str:
    return "skipped: " + ", ".join(f"{count:,} x {reason}" for reason, count in manifest.stats["skipped"].items())


if __name__ == "__main__":
    main_entry(main)
