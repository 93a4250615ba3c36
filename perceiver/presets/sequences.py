"""Experiments of Perceiver AR on whole sequences: copies, and images pixel by pixel."""

from perceiver.config import Cosine, DataConfig, Experiment, OptimConfig, ParallelConfig, RunConfig, TrainingConfig
from perceiver.models import PerceiverARConfig
from perceiver.tasks.copying import CopyingConfig
from perceiver.tasks.image_generation import ImageGenerationConfig


def copy_small() -> Experiment:
    """128 random symbols and the same mirrored: a check of long prefixes that takes minutes on two cores."""
    return Experiment(
        preset="copy-small",
        task=CopyingConfig(),
        model=PerceiverARConfig(
            vocab_size=33, max_seq_len=256, max_latents=64, num_channels=128, num_heads=4, num_self_attention_layers=2,
            cross_attention_dropout=0.0,
        ),
        data=DataConfig(source="perceiver.tasks.copying:ShortSequences"),
        optim=OptimConfig(lr=1e-3, schedule=Cosine(), warmup_steps=50, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=32, max_steps=400),
        run=RunConfig(val_every=100, checkpoint_every=100, best_metric="val_acc"),
    )  # fmt: skip


def copy_131072() -> Experiment:
    """65,536 random symbols and the same mirrored (Perceiver AR, Section 4.1): 1,024 latents, 6 layers."""
    return Experiment(
        preset="copy-131072",
        task=CopyingConfig(val_windows=1),
        model=PerceiverARConfig(
            vocab_size=257, max_seq_len=131_072, max_latents=1024, num_channels=512, num_self_attention_layers=6,
            cross_attention_dropout=0.0,
        ),
        data=DataConfig(source="perceiver.tasks.copying:LongSequences", rows_per_block=8),
        optim=OptimConfig(lr=3e-4, schedule=Cosine(), warmup_steps=500, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=32, max_steps=25_000),
        parallel=ParallelConfig(workers=8, micro_batch_size=1),
        run=RunConfig(val_every=1000, best_metric="val_acc"),
    )  # fmt: skip


def img_ar_mnist() -> Experiment:
    """MNIST digits pixel by pixel."""
    return Experiment(
        preset="img-ar-mnist",
        task=ImageGenerationConfig(),
        model=PerceiverARConfig(
            vocab_size=257, max_seq_len=784, max_latents=256, num_channels=128, num_heads=4, num_self_attention_layers=4,
            cross_attention_dropout=0.0,
        ),
        data=DataConfig(source="mnist"),
        optim=OptimConfig(lr=2e-3, schedule=Cosine(), warmup_steps=100, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=16, max_steps=2000),
        run=RunConfig(val_every=250, val_batches=16, checkpoint_every=250),
    )  # fmt: skip


def img_ar_imagenet64() -> Experiment:
    """ImageNet at 64 x 64 pixel by pixel (Perceiver AR, Section 5.1): 60 layers of 1,024 channels. Its positions are one embedding each,
    where the paper adds those of row, column and color.
    """
    return Experiment(
        preset="img-ar-imagenet64",
        task=ImageGenerationConfig(image_shape=(64, 64, 3), val_windows=1),
        model=PerceiverARConfig(
            vocab_size=259, max_seq_len=12_288, max_latents=1024, num_channels=1024, num_heads=16, num_self_attention_layers=60,
            cross_attention_dropout=0.0, output_norm=True,
        ),
        data=DataConfig(),
        optim=OptimConfig(lr=3e-4, schedule=Cosine(), warmup_steps=10_000, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=1024, max_steps=750_000),
        parallel=ParallelConfig(workers=64, micro_batch_size=8),
    )  # fmt: skip
