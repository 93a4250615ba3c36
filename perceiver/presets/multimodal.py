"""Experiments on several modalities at once."""

from perceiver.config import Cosine, DataConfig, Experiment, OptimConfig, RunConfig, TrainingConfig
from perceiver.config.optimizers import Lamb
from perceiver.data import made_video
from perceiver.models import (
    AudioInput,
    AutoencoderOutput,
    ClassInput,
    DecoderConfig,
    EncoderConfig,
    MultimodalInput,
    PerceiverIOConfig,
    VideoInput,
)
from perceiver.tasks.multimodal_autoencoding import MultimodalAutoencodingConfig


def multimodal_kinetics() -> Experiment:
    """Video, audio and class of Kinetics-700 out of 784 latents (Perceiver IO paper, Section 4.3; multimodal-perceiver)."""
    return Experiment(
        preset="multimodal-kinetics",
        task=MultimodalAutoencodingConfig(),
        model=PerceiverIOConfig(
            num_latents=784,
            num_latent_channels=512,
            input=MultimodalInput(
                names=("audio", "video", "label"),
                inputs=(AudioInput(resolution=30720), VideoInput(), ClassInput()),
                masked=(0.0, 0.0, 1.0),
            ),
            encoder=EncoderConfig(num_cross_attention_heads=1, num_cross_attention_qk_channels=704, num_self_attention_layers_per_block=8),
            decoder=DecoderConfig(num_cross_attention_heads=1, num_cross_attention_qk_channels=512, cross_attention_residual=False),
            output=AutoencoderOutput(),
        ),
        data=DataConfig(rows_per_block=4),
        optim=OptimConfig(optimizer=Lamb(), lr=1e-3, schedule=Cosine(), warmup_steps=1000, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=1024, max_epochs=100, precision="bf16"),
        run=RunConfig(best_metric="val_loss"),
    )


def multimodal_small() -> Experiment:
    """The same of small made videos: shapes that move while a tone of their own sounds; minutes on two cores."""
    shape, samples, group = (made_video.FRAMES, made_video.SIZE, made_video.SIZE, 3), made_video.SAMPLES, 16
    return Experiment(
        preset="multimodal-small",
        # With a weight of 1, the video takes the latents for itself, and silence is what is left of the sound.
        task=MultimodalAutoencodingConfig(
            class_names=made_video.CLASSES, asked_video=256, asked_audio=32, label_weight=0.05, video_weight=0.3
        ),
        model=PerceiverIOConfig(
            num_latents=48,
            num_latent_channels=96,
            input=MultimodalInput(
                names=("audio", "video", "label"),
                inputs=(
                    AudioInput(num_samples=samples, group=group, num_frequency_bands=16),
                    VideoInput(video_shape=shape, patch=(1, 4, 4), num_frequency_bands=6),
                    ClassInput(num_classes=len(made_video.CLASSES)),
                ),
                masked=(0.0, 0.0, 1.0),
            ),
            encoder=EncoderConfig(num_cross_attention_heads=4, num_self_attention_heads=4, num_self_attention_layers_per_block=4),
            decoder=DecoderConfig(num_cross_attention_heads=4, num_cross_attention_qk_channels=96),
            output=AutoencoderOutput(
                video_shape=shape,
                num_video_bands=8,
                video_resolution=(made_video.FRAMES, made_video.SIZE, made_video.SIZE),
                num_samples=samples,
                group=group,
                num_audio_bands=32,
                audio_resolution=samples // group,
                num_classes=len(made_video.CLASSES),
                num_label_channels=62,
                num_own_channels=2,
                num_decoded_channels=96,
            ),
            init_scale=0.1,
        ),
        data=DataConfig(source="perceiver.data.made_video:SoundingShapes"),
        optim=OptimConfig(lr=4e-3, schedule=Cosine(), warmup_steps=50, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=16, max_epochs=20),
        run=RunConfig(log_every=50, val_every=512, checkpoint_every=512, best_metric="val_loss"),
    )
