"""Small prepared data sets and experiments, made in a moment and without Ray."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import torch.distributed as dist

from perceiver.config import Cosine, DataConfig, Experiment, OptimConfig, RunConfig, TrainingConfig
from perceiver.data.columns import fixed_column
from perceiver.data.manifest import Manifest, Split, shard_name, stream_rows
from perceiver.data.rows import rows_of
from perceiver.data.shards import describe_shard, write_blocks
from perceiver.data.storage import atomic_file
from perceiver.models import (
    ClassOutput,
    DecoderConfig,
    EncoderConfig,
    ImageInput,
    PerceiverARConfig,
    PerceiverIOConfig,
    TextInput,
    TextOutput,
)
from perceiver.tasks.base import Task
from perceiver.tasks.causal_lm import CausalLMConfig
from perceiver.tasks.image_classification import ImageClassificationConfig
from perceiver.tasks.masked_lm import MaskedLMConfig
from perceiver.tasks.text_classification import TextClassificationConfig
from perceiver.training.batches import Loader, make_loader
from perceiver.training.callbacks import Callback

BLOCK, SHARD = 8, 3


def leave() -> NoReturn:
    """Ends a process of a group that has done its work well, when all of the group have.

    Without the interpreter's finalization: gloo's threads may still be releasing tensors of their last work, and one that asks
    for Python's lock after its end aborts the process.
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextmanager
def heard() -> Iterator[list[str]]:
    """The lines that are logged meanwhile, as a person sees them."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("perceiver", "ray_jobs", "tuning")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


class Call(Callback):
    """Calls functions in hooks, by their names."""

    def __init__(self, **hooks: Callable[..., Any]) -> None:
        vars(self).update(hooks)


def loader_of(experiment: Experiment, task: Task, folder: str, split: Split, train: bool) -> Loader:
    """The loader of a split of one data set with an experiment's settings."""
    most = experiment.parallel.micro_batch_size
    return make_loader(task, folder, split, train, data=experiment.data, training=experiment.training, micro_batch_size=most)


def image_experiment(**training) -> Experiment:
    """A tiny Perceiver on 6 x 6 images of 3 classes."""
    return Experiment(
        preset="quickstart",
        task=ImageClassificationConfig(),
        model=PerceiverIOConfig(
            num_latents=4,
            num_latent_channels=16,
            input=ImageInput(image_shape=(6, 6, 1), num_frequency_bands=3),
            encoder=EncoderConfig(
                num_cross_attention_heads=1,
                num_cross_attention_layers=2,
                num_self_attention_heads=2,
                num_self_attention_layers_per_block=1,
                num_self_attention_blocks=3,
                dropout=0.1,
            ),
            decoder=DecoderConfig(num_cross_attention_heads=1),
            output=ClassOutput(num_classes=3, num_query_channels=16),
            init_scale=0.1,
        ),
        data=DataConfig(source="none", rows_per_block=BLOCK, blocks_per_shard=SHARD, shuffle_window_blocks=2, lanes=4),
        optim=OptimConfig(lr=5e-3, schedule=Cosine(), warmup_steps=2, max_grad_norm=1.0),
        training=replace(TrainingConfig(global_batch_size=12, max_steps=12), **training),
        run=RunConfig(log_every=1, val_every=6, checkpoint_every=3),
    )


def text_experiment(**training) -> Experiment:
    """A tiny Perceiver AR on windows of 16 ids."""
    return Experiment(
        preset="clm-wikitext",
        task=CausalLMConfig(random_shift=True, sample_tokens=0),
        model=PerceiverARConfig(vocab_size=262, max_seq_len=16, max_latents=8, num_channels=16, num_heads=2, num_self_attention_layers=2),
        data=DataConfig(source="none", rows_per_block=BLOCK, blocks_per_shard=SHARD, shuffle_window_blocks=2, lanes=4),
        optim=OptimConfig(lr=5e-3),
        training=replace(TrainingConfig(global_batch_size=6, max_steps=12), **training),
        run=RunConfig(log_every=1, val_every=6, checkpoint_every=3),
    )


def masked_experiment(**training) -> Experiment:
    """A tiny masked language model on windows of 32 ids."""
    return replace(
        text_experiment(**training),
        preset="mlm-imdb",
        task=MaskedLMConfig(sample_texts=()),
        model=PerceiverIOConfig(
            num_latents=4,
            num_latent_channels=16,
            input=TextInput(max_seq_len=32, num_channels=8),
            encoder=EncoderConfig(num_cross_attention_heads=2, num_self_attention_heads=2, num_self_attention_layers_per_block=2),
            decoder=DecoderConfig(num_cross_attention_heads=2, cross_attention_residual=False),
            output=TextOutput(),
            init_scale=0.1,
        ),
    )


def classification_experiment(**training) -> Experiment:
    """A tiny classifier of documents of at most 30 ids, with the encoder of `masked_experiment`."""
    base = masked_experiment(**training)
    return replace(
        base,
        preset="txt-clf-imdb-all",
        task=TextClassificationConfig(),
        model=replace(
            base.model,
            decoder=DecoderConfig(num_cross_attention_heads=1),
            output=ClassOutput(num_classes=2, num_query_channels=8),
        ),
    )


def write_images(folder: Path, train: int = 100, val: int = 17, seed: int = 0) -> Manifest:
    """Images whose brightest third tells their class, so that they can be learned."""
    rng = np.random.default_rng(seed)
    splits = {}
    for name, count in (("train", train), ("val", val)):
        labels = rng.integers(0, 3, count).astype(np.int32)
        images = rng.integers(0, 100, (count, 3, 12)).astype(np.uint8)
        images[np.arange(count), labels] += 150
        table = pa.table({"image": fixed_column(images.reshape(count, 36)), "label": pa.array(labels)})
        blocks = [table.slice(i, BLOCK) for i in range(0, count, BLOCK)]
        splits[name] = _write(folder, name, "images", blocks, count, 36, 0, tokens=0)
    return _save(folder, "images", splits, image_shape=(6, 6, 1), num_classes=3)


def write_stream(folder: Path, train: np.ndarray, val: np.ndarray, length: int = 16) -> Manifest:
    """Token streams as rows of `length` ids."""
    splits = {}
    for name, stream in (("train", train), ("val", val)):
        rows = stream_rows(len(stream), length)
        whole = np.zeros((rows + BLOCK + 1) * length, np.uint16)
        whole[: len(stream)] = stream
        whole = whole.reshape(-1, length)
        blocks = []
        for first in range(0, rows, BLOCK):
            count = min(BLOCK, rows - first)
            blocks.append(pa.table({"tokens": fixed_column(whole[first : first + count + 1])}))
        splits[name] = _write(folder, name, "tokens", blocks, rows, length, 1, tokens=len(stream))
    return _save(folder, "tokens", splits)


def write_documents(folder: Path, train: int = 60, val: int = 17, seed: int = 0) -> Manifest:
    """Documents of 0 to 30 ids; those of class 1 hold the letter "z" and those of class 0 do not."""
    rng = np.random.default_rng(seed)
    splits = {}
    for name, count in (("train", train), ("val", val)):
        labels = rng.integers(0, 2, count).astype(np.int32)
        documents = [rng.integers(6 + 97, 6 + 122, rng.integers(0, 30)).astype(np.uint16) for _ in labels]
        z = np.full(1, 6 + 122, np.uint16)
        documents = [np.concatenate([d, z]) if label else d for d, label in zip(documents, labels, strict=True)]
        table = pa.table({"tokens": pa.array(documents, pa.list_(pa.uint16())), "label": pa.array(labels)})
        table = table.cast(rows_of("documents", 30).schema)
        blocks = [table.slice(i, BLOCK) for i in range(0, count, BLOCK)]
        tokens = sum(map(len, documents))
        splits[name] = _write(folder, name, "documents", blocks, count, 30, 0, tokens=tokens)
    return _save(folder, "documents", splits, num_classes=2)


def _write(folder, name, kind, blocks, rows, row_length, lookahead, tokens) -> Split:
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for first in range(0, len(blocks), SHARD):
        file, own = shard_name(name, first // SHARD), blocks[first : first + SHARD]
        with atomic_file(folder, file) as target:
            write_blocks(target, rows_of(kind, row_length), own)
        shards.append(describe_shard(folder, file, sum(len(block) - lookahead for block in own)))
    return Split(
        name=name, kind=kind, rows=rows, tokens=tokens, bytes=tokens, words=tokens // 5, documents=1, row_length=row_length,
        rows_per_block=BLOCK, blocks_per_shard=SHARD, lookahead=lookahead, shards=tuple(shards),
    )  # fmt: skip


def _save(folder: Path, kind: str, splits: dict[str, Split], **fields) -> Manifest:
    manifest = Manifest(kind=kind, settings={}, settings_digest="", splits=splits, **fields)
    manifest.save(folder)
    return manifest
