"""A forecast from sensors: own data, own input, own task, own optimizer, in one file outside the package.

Hourly series of 7 sensors; from 72 hours a small Perceiver IO tells the next 24 of all of them.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from perceiver.config import DataConfig, Experiment, OptimConfig, OptimizerConfig, ParallelConfig, RunConfig, TaskConfig, TrainingConfig
from perceiver.data.rows import ArrayRows
from perceiver.models.configs import DecoderConfig, EncoderConfig, InputConfig, OutputConfig, OutputQueries, PerceiverIOConfig
from perceiver.models.position import fourier_features
from perceiver.tasks.base import Task

SENSORS, PAST, FUTURE = 7, 72, 24


def series(split):
    """A data source: one example after the other, each a window of the sensors' values in float32."""
    rng = np.random.default_rng({"train": 0, "val": 1}[split])
    for _ in range({"train": 2048, "val": 256}[split]):
        hours = rng.integers(0, 8760) + np.arange(PAST + FUTURE)[:, None]
        phases = rng.uniform(0, 2 * np.pi, SENSORS)
        day, week = np.sin(2 * np.pi * hours / 24 + phases), np.sin(2 * np.pi * hours / 168 + phases)
        values = (day + 0.5 * week + 0.1 * rng.standard_normal(day.shape)).astype(np.float32)
        yield {"past": values[:PAST], "future": values[PAST:]}


class Sensors(InputConfig):
    """A vector of measurements per hour, with Fourier features of the hour."""

    num_hours: int = PAST
    """Hours of the past."""
    num_sensors: int = SENSORS
    """Measurements of an hour."""
    num_frequency_bands: int = 16
    """Fourier bands of the hour."""

    def build(self):
        return SensorAdapter(self)

    def adapted_channels(self):
        return self.num_sensors + 2 * self.num_frequency_bands + 1

    def num_positions(self):
        return self.num_hours


class SensorAdapter(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.register_buffer("hours", torch.empty(config.num_hours, 2 * config.num_frequency_bands + 1), persistent=False)

    def reset_buffers(self):
        self.hours.copy_(fourier_features((self.config.num_hours,), self.config.num_frequency_bands, self.hours.device))

    def forward(self, past):  # (B, hours, sensors) -> (B, hours, channels)
        return torch.cat([past, self.hours.to(past.dtype).expand(len(past), -1, -1)], -1)


class Hours(OutputConfig):
    """A learned query per hour to come, answered by all sensors."""

    num_query_channels: int = 32
    """Channels of the queries."""

    def queries(self, model):
        return OutputQueries(num_learned=FUTURE, num_channels=self.num_query_channels, num_outputs=SENSORS)


class Forecast(TaskConfig):
    """The next day of all sensors."""

    huber: float = 1.0
    """Error from which on the loss grows linearly instead of quadratically."""

    def rows(self, model, data):
        return ArrayRows(past=((PAST, SENSORS), "float32"), future=((FUTURE, SENSORS), "float32"))

    def build(self, model, data, seed):
        return ForecastTask(self, model, data, seed)


class ForecastTask(Task):
    metric_directions = {"loss": "min", "mae": "min"}

    def loss(self, model, batch):
        """Huber loss, summed over the hours and sensors of the batch's real examples."""
        error = model(batch["past"]).float() - batch["future"]
        each = F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=self.config.huber).mean((1, 2))
        return (each * batch["valid"]).sum(), {"absolute": (error.abs().mean((1, 2)) * batch["valid"]).sum()}

    def metrics(self, sums, split):
        return {**super().metrics(sums, split), "mae": float(sums["absolute"] / sums["targets"])}

    def predict(self, model, batch):
        return {"forecast": model(batch["past"])}


class Sgd(OptimizerConfig):
    """Stochastic gradient descent with momentum."""

    momentum: float = 0.9
    """Share of the last step that is kept."""

    def build(self, groups, lr):
        return torch.optim.SGD(groups, lr=lr, momentum=self.momentum, nesterov=True)


def tiny():
    """Three minutes on a laptop."""
    encoder = EncoderConfig(num_cross_attention_heads=1, num_self_attention_heads=4, num_self_attention_layers_per_block=2)
    return Experiment(
        task=Forecast(),
        model=PerceiverIOConfig(
            num_latents=16, num_latent_channels=64, input=Sensors(), output=Hours(), encoder=encoder,
            decoder=DecoderConfig(num_cross_attention_heads=1), init_scale=0.1,
        ),
        data=DataConfig(source="weather:series"),
        optim=OptimConfig(optimizer=Sgd(), lr=0.03, warmup_steps=20, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=32, max_epochs=3),
        parallel=ParallelConfig(workers=2),
        run=RunConfig(val_every=64, checkpoint_every=32),
    )  # fmt: skip
