"""Experiments on symbolic music."""

from perceiver.config import Cosine, DataConfig, Experiment, OptimConfig, ParallelConfig, RunConfig, TrainingConfig
from perceiver.models import (
    PerceiverARConfig,
)
from perceiver.tasks.symbolic_audio import SymbolicAudioConfig


def sam_maestro() -> Experiment:
    """Perceiver AR on piano performances (MAESTRO v3)."""
    return Experiment(
        preset="sam-maestro",
        task=SymbolicAudioConfig(random_shift=True, val_stride=1024),
        model=_music_model(max_seq_len=2048, max_latents=1024, num_channels=512, num_self_attention_layers=8),
        data=DataConfig(source="maestro"),
        optim=_music_optim(),
        training=TrainingConfig(global_batch_size=192, max_steps=20_000),
        parallel=ParallelConfig(workers=2, micro_batch_size=48),
    )


def sam_giantmidi() -> Experiment:
    """Perceiver AR on transcribed piano recordings (GiantMIDI-Piano)."""
    return Experiment(
        preset="sam-giantmidi",
        task=SymbolicAudioConfig(random_shift=True, min_seq_len=2048, val_stride=2048),
        model=_music_model(max_seq_len=6144, max_latents=2048, num_channels=768, num_self_attention_layers=18),
        data=DataConfig(source="giantmidi", val_fraction=0.05),
        optim=_music_optim(),
        training=TrainingConfig(global_batch_size=32, max_steps=20_000),
        parallel=ParallelConfig(workers=2, micro_batch_size=8),
    )


def sam_small() -> Experiment:
    """A small Perceiver AR on piano performances, for a laptop: half an hour of two cores."""
    return Experiment(
        preset="sam-small",
        task=SymbolicAudioConfig(random_shift=True, val_stride=256, transpose=3),
        model=PerceiverARConfig(
            vocab_size=389, max_seq_len=512, max_latents=256, num_channels=128, num_heads=4, num_self_attention_layers=4,
            abs_pos_emb=False, output_norm=True, output_bias=False, cross_attention_dropout=0.1,
        ),
        data=DataConfig(source="maestro"),
        optim=OptimConfig(lr=2e-3, schedule=Cosine(), warmup_steps=100, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=16, max_steps=1500),
        run=RunConfig(val_every=250, checkpoint_every=250),
    )  # fmt: skip


def _music_model(**sizes: int) -> PerceiverARConfig:
    return PerceiverARConfig(
        vocab_size=389,
        abs_pos_emb=False,
        output_norm=True,
        output_bias=False,
        cross_attention_dropout=0.1,
        post_attention_dropout=0.1,
        residual_dropout=0.1,
        **sizes,
    )


def _music_optim() -> OptimConfig:
    return OptimConfig(lr=2e-4, schedule=Cosine(), warmup_steps=200, max_grad_norm=0.5)
