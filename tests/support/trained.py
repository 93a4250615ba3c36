"""Tiny trained models for tests of inference: runs written without training, and models of each task."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from perceiver.checkpoints import MARKER, CheckpointInfo, marker_content
from perceiver.config import Experiment, to_dict
from perceiver.models import ClassOutput, DecoderConfig, EncoderConfig, PerceiverIOConfig, TextInput, build_model
from perceiver.run_files import CHECKPOINTS, EXPERIMENT
from perceiver.tasks.masked_lm import MaskedLMConfig
from perceiver.tasks.text_classification import TextClassificationConfig
from perceiver.training.checkpoint_files import ShardWriter
from tests.support.small import image_experiment, text_experiment

TEXT_MODEL = PerceiverIOConfig(
    num_latents=4,
    num_latent_channels=16,
    input=TextInput(vocab_size=262, max_seq_len=32, num_channels=16),
    encoder=EncoderConfig(
        num_cross_attention_heads=2, num_cross_attention_qk_channels=8, num_cross_attention_v_channels=16,
        num_self_attention_heads=2, num_self_attention_qk_channels=8, num_self_attention_v_channels=16,
        num_self_attention_layers_per_block=2,
    ),
    decoder=DecoderConfig(num_cross_attention_heads=2, cross_attention_residual=False),
    init_scale=0.3,
)  # fmt: skip


def experiment(task: str) -> Experiment:
    """A tiny experiment: "causal", "masked", "sentiment" or "images"."""
    if task == "causal":
        base = text_experiment()
        return replace(base, model=replace(base.model, init_scale=0.3))
    if task == "images":
        return image_experiment()
    if task == "masked":
        return replace(text_experiment(), preset="mlm-imdb", task=MaskedLMConfig(), model=TEXT_MODEL)
    decoder = replace(TEXT_MODEL.decoder, cross_attention_residual=True)
    model = replace(TEXT_MODEL, decoder=decoder, output=ClassOutput(num_classes=2, num_query_channels=16))
    return replace(text_experiment(), preset="txt-clf-imdb-all", task=TextClassificationConfig(), model=model)


def write_run(folder: Path, task: str, losses: dict[int, float] | None = None) -> Path:
    """A run's folder with a checkpoint for each step, with other weights each (seed = step)."""
    config = experiment(task)
    folder.mkdir(parents=True)
    (folder / EXPERIMENT).write_text(json.dumps({"experiment": to_dict(config), "data": "none"}))
    for step, loss in (losses or {1: 1.0}).items():
        path = folder / CHECKPOINTS / f"step-{step:08d}"
        with warnings.catch_warnings(action="ignore"):
            writer = ShardWriter(path, 0)
            dcp.save({"model": build_model(config.model, seed=step).state_dict()}, storage_writer=writer, no_dist=True)
        checkpoint = CheckpointInfo(path, step, {"val_loss": loss}, frozenset(), writer.files)
        (path / MARKER).write_bytes(marker_content(checkpoint))
    return folder


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two models have bitwise the same weights."""
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
