"""Experiments on sounds."""

from perceiver.config import Cosine, DataConfig, Experiment, OptimConfig, RunConfig, TrainingConfig
from perceiver.models import ClassOutput, DecoderConfig, EncoderConfig, LogMelInput, PerceiverIOConfig
from perceiver.tasks.audio_classification import AudioClassificationConfig


def audio_clf_small() -> Experiment:
    """Ten kinds of made sounds, or your own: --data.source FOLDER with a folder for each class. Classes and length come from the data."""
    return Experiment(
        preset="audio-clf-small",
        task=AudioClassificationConfig(random_shift=0.2, random_gain=6, random_noise=10),
        model=PerceiverIOConfig(
            num_latents=24,
            num_latent_channels=64,
            input=LogMelInput(num_samples=0, num_bands=64, patch=(4, 8), num_frequency_bands=12),
            encoder=EncoderConfig(
                num_cross_attention_heads=1,
                num_cross_attention_layers=2,
                num_self_attention_heads=4,
                num_self_attention_layers_per_block=2,
                num_self_attention_blocks=2,
                first_self_attention_block_shared=False,
            ),
            decoder=DecoderConfig(num_cross_attention_heads=1),
            output=ClassOutput(num_classes=0, num_query_channels=64),
            init_scale=0.1,
        ),
        data=DataConfig(source="perceiver.data.made_sounds:Sounds", val_fraction=0.1),
        optim=OptimConfig(lr=2e-3, schedule=Cosine(), warmup_steps=50, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=32, max_epochs=8),
        run=RunConfig(log_every=50, val_every=250, checkpoint_every=250, best_metric="val_acc"),
    )


def audio_clf_esc50() -> Experiment:
    """Fifty environmental sounds (ESC-50): --data.source FOLDER, as unpacked; fold 5, or --data.val-fold, is held out."""
    return Experiment(
        preset="audio-clf-esc50",
        task=AudioClassificationConfig(random_shift=0.5, random_gain=6, random_noise=10, num_masks=2, mask_frames=48, mask_bands=24),
        model=PerceiverIOConfig(
            num_latents=128,
            num_latent_channels=256,
            input=LogMelInput(num_samples=80000, window=800, num_bands=128, patch=(4, 16), num_frequency_bands=32),
            encoder=EncoderConfig(
                num_cross_attention_heads=1,
                num_cross_attention_layers=2,
                num_self_attention_heads=8,
                num_self_attention_layers_per_block=4,
                num_self_attention_blocks=2,
                dropout=0.1,
            ),
            decoder=DecoderConfig(num_cross_attention_heads=1, dropout=0.1),
            output=ClassOutput(num_classes=0, num_query_channels=256),
        ),
        data=DataConfig(label_column="category"),
        optim=OptimConfig(lr=5e-4, schedule=Cosine(), warmup_steps=200, weight_decay=0.05, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=64, max_epochs=200),
        run=RunConfig(log_every=25, val_every=125, checkpoint_every=125, best_metric="val_acc"),
    )
