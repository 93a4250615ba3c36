"""Experiments on arrays that are no text and no images: series and point clouds, on data that is made."""

from perceiver.config import Cosine, DataConfig, Experiment, OptimConfig, RunConfig, TrainingConfig
from perceiver.data.made import FUTURE, PAST, POINTS, SHAPES
from perceiver.models import ArrayInput, ArrayOutput, ClassOutput, DecoderConfig, EncoderConfig, PerceiverIOConfig
from perceiver.tasks.forecasting import ForecastingConfig
from perceiver.tasks.point_clouds import PointCloudsConfig


def forecast_seasons() -> Experiment:
    """The next day of made hourly series, as Gaussians, from the week before."""
    return Experiment(
        preset="forecast-seasons",
        task=ForecastingConfig(),
        model=PerceiverIOConfig(
            num_latents=24,
            num_latent_channels=64,
            input=ArrayInput(num_channels=32, positions="fourier", grid=(PAST,), num_frequency_bands=32),
            encoder=EncoderConfig(num_cross_attention_heads=4, num_self_attention_heads=4, num_self_attention_layers_per_block=2),
            decoder=DecoderConfig(num_cross_attention_heads=4),
            output=ArrayOutput(num_outputs=2, num_queries=FUTURE),
            init_scale=0.1,
        ),
        data=DataConfig(source="perceiver.data.made:Seasons"),
        optim=OptimConfig(lr=2e-3, schedule=Cosine(), warmup_steps=50, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=64, max_epochs=10),
        run=RunConfig(log_every=50, val_every=250, checkpoint_every=250, best_metric="val_crps"),
    )


def points_shapes() -> Experiment:
    """Eight shapes by clouds of points on their surfaces, made."""
    return Experiment(
        preset="points-shapes",
        task=PointCloudsConfig(class_names=SHAPES),
        model=PerceiverIOConfig(
            num_latents=24,
            num_latent_channels=64,
            input=ArrayInput(
                num_features=3, max_positions=POINTS, num_channels=32, positions="fourier", num_coordinates=3, num_frequency_bands=6,
                resolution=12,
            ),
            encoder=EncoderConfig(num_cross_attention_heads=4, num_self_attention_heads=4, num_self_attention_layers_per_block=3),
            decoder=DecoderConfig(num_cross_attention_heads=4),
            output=ClassOutput(num_classes=len(SHAPES), num_query_channels=64),
            init_scale=0.1,
        ),
        data=DataConfig(source="perceiver.data.made:Shapes"),
        optim=OptimConfig(lr=2e-3, schedule=Cosine(), warmup_steps=50, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=64, max_epochs=15),
        run=RunConfig(log_every=50, val_every=250, checkpoint_every=250, best_metric="val_acc"),
    )  # fmt: skip
