"""Experiments on images."""

from dataclasses import replace

from perceiver.config import Cosine, DataConfig, Experiment, FlatCosine, Lamb, OptimConfig, ParallelConfig, RunConfig, TrainingConfig
from perceiver.models import (
    ClassOutput,
    DecoderConfig,
    EncoderConfig,
    ImageInput,
    PerceiverIOConfig,
    StemInput,
)
from perceiver.tasks.image_classification import ImageClassificationConfig, ImageTagsConfig
from perceiver.tasks.photo_classification import PhotoClassificationConfig


def quickstart() -> Experiment:
    """A small Perceiver on 4,000 MNIST digits that come with the package; two workers on a laptop's CPU."""
    return Experiment(
        preset="quickstart",
        # So few digits are learned by heart unless each is seen a little otherwise every time.
        task=ImageClassificationConfig(random_rotation=10, random_scaling=0.1, random_shift=0.07),
        model=PerceiverIOConfig(
            num_latents=16,
            num_latent_channels=64,
            input=StemInput(image_shape=(28, 28, 1), stem="convolution", num_channels=32, num_frequency_bands=4),
            encoder=EncoderConfig(
                num_cross_attention_heads=1,
                num_cross_attention_layers=2,
                num_self_attention_heads=4,
                num_self_attention_layers_per_block=1,
                num_self_attention_blocks=3,
                first_self_attention_block_shared=False,
            ),
            decoder=DecoderConfig(num_cross_attention_heads=1),
            output=ClassOutput(num_query_channels=64),
            init_scale=0.2,
        ),
        data=DataConfig(source="mnist-mini"),
        optim=OptimConfig(lr=3e-3, schedule=Cosine(), warmup_steps=50, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=64, max_epochs=12),
        parallel=ParallelConfig(workers=2),
        run=RunConfig(log_every=50, val_every=252, checkpoint_every=252),
    )


def img_clf_mnist() -> Experiment:
    """MNIST classifier: every pixel attended, Fourier positions, two cross-attention layers."""
    return Experiment(
        preset="img-clf-mnist",
        task=ImageClassificationConfig(),
        model=_mnist_model(),
        data=DataConfig(source="mnist"),
        optim=OptimConfig(lr=1e-3, warmup_steps=500),
        training=TrainingConfig(global_batch_size=256, max_epochs=30),
        run=RunConfig(val_every=235, checkpoint_every=235),
    )


def img_clf() -> Experiment:
    """A classifier of your own pictures: --data.source FOLDER with a folder for each class. Classes and size come from the data."""
    return Experiment(
        preset="img-clf",
        task=ImageClassificationConfig(),
        model=PerceiverIOConfig(
            num_latents=32,
            num_latent_channels=64,
            input=ImageInput(image_shape=(0, 0, 0)),
            encoder=EncoderConfig(
                num_cross_attention_heads=1,
                num_cross_attention_layers=2,
                num_self_attention_heads=4,
                num_self_attention_layers_per_block=1,
                num_self_attention_blocks=3,
                first_self_attention_block_shared=False,
            ),
            decoder=DecoderConfig(num_cross_attention_heads=1),
            output=ClassOutput(num_classes=0, num_query_channels=64),
            init_scale=0.1,
        ),
        data=DataConfig(val_fraction=0.1),
        optim=OptimConfig(lr=1e-3, schedule=Cosine(), warmup_steps=50, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=32, max_epochs=20),
        run=RunConfig(log_every=50, val_every=250, checkpoint_every=250),
    )


def img_tags() -> Experiment:
    """Any number of classes for each of your own pictures: --data.source FOLDER with metadata.csv, labels separated by |."""
    base = img_clf()
    return replace(base, preset="img-tags", task=ImageTagsConfig())


def img_clf_imagenet() -> Experiment:
    """ImageNet classifier with 2D Fourier features (Perceiver IO paper, Section 4.4; vision-perceiver-fourier), by the published recipe."""
    return Experiment(
        preset="img-clf-imagenet",
        task=PhotoClassificationConfig(randaugment_ops=4, randaugment_magnitude=5, mixup=0.2, cutmix=0.2, label_smoothing=0.1),
        model=PerceiverIOConfig(
            num_latents=512,
            num_latent_channels=1024,
            input=ImageInput(image_shape=(224, 224, 3), num_frequency_bands=64),
            encoder=EncoderConfig(
                num_cross_attention_heads=1,
                num_self_attention_layers_per_block=6,
                num_self_attention_blocks=8,
            ),
            decoder=DecoderConfig(num_cross_attention_heads=1),
            output=ClassOutput(num_classes=1000, num_query_channels=1024),
        ),
        data=DataConfig(source="imagenet"),
        optim=OptimConfig(
            optimizer=Lamb(),
            lr=2e-3,  # 5e-4 for each 256 examples of a batch
            weight_decay=0.1,
            schedule=FlatCosine(),
            max_grad_norm=10.0,
            groups=("encoder.latents:decay=0.1", "decoder.queries:decay=0.1"),
        ),
        training=TrainingConfig(global_batch_size=1024, max_epochs=110, precision="bf16"),
        run=RunConfig(val_every=1251, checkpoint_every=1251, best_metric="val_acc"),
    )


def _mnist_model() -> PerceiverIOConfig:
    return PerceiverIOConfig(
        num_latents=32,
        num_latent_channels=128,
        input=ImageInput(),
        encoder=EncoderConfig(
            num_cross_attention_heads=1,
            num_cross_attention_layers=2,
            num_self_attention_layers_per_block=3,
            num_self_attention_blocks=3,
            first_self_attention_block_shared=False,
            dropout=0.1,
        ),
        decoder=DecoderConfig(num_cross_attention_heads=1, dropout=0.1),
        output=ClassOutput(),
        init_scale=0.1,
    )
