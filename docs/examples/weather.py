"""A forecast from sensors: own data, input, output, task and optimizer in one file. From 72 hours of 7 sensors the next 24 of all."""

import numpy as np
import torch
from torch import nn

from perceiver.config import Cosine, DataConfig, Experiment, OptimConfig, OptimizerConfig, RunConfig, TaskConfig, TrainingConfig
from perceiver.data.rows import ArrayRows
from perceiver.models import EncoderConfig, InputConfig, OutputConfig, OutputQueries, PerceiverIOConfig
from perceiver.models.position import fourier_features
from perceiver.tasks.base import Sample, Task

SENSORS, PAST, FUTURE = 7, 72, 24


def series(split):
    """A data source: yields one example after the other, the same each time."""
    rng = np.random.default_rng({"train": 0, "val": 1}[split])
    for _ in range({"train": 2048, "val": 256}[split]):
        hours = rng.integers(0, 8760) + np.arange(PAST + FUTURE)[:, None]
        phases = rng.uniform(0, 2 * np.pi, SENSORS)
        day, week = np.sin(2 * np.pi * hours / 24 + phases), np.sin(2 * np.pi * hours / 168 + phases)
        values = (day + 0.5 * week + 0.1 * rng.standard_normal(day.shape)).astype(np.float32)
        yield {"past": values[:PAST], "future": values[PAST:]}


class Sensors(InputConfig):
    """A vector of measurements per hour, with Fourier features of the hour."""

    num_frequency_bands: int = 16
    """Fourier bands of the hour."""

    def build(self):
        return SensorAdapter(self.num_frequency_bands)

    def adapted_channels(self):
        return SENSORS + 2 * self.num_frequency_bands + 1

    def num_positions(self):
        return PAST


class SensorAdapter(nn.Module):
    def __init__(self, num_bands):
        super().__init__()
        self.num_bands = num_bands
        self.register_buffer("hours", torch.empty(PAST, 2 * num_bands + 1), persistent=False)

    def reset_buffers(self):
        self.hours.copy_(fourier_features((PAST,), self.num_bands, self.hours.device))

    def forward(self, past):  # (B, hours, sensors) -> (B, hours, channels)
        return torch.cat([past, self.hours.to(past.dtype).expand(len(past), -1, -1)], dim=-1)


class Hours(OutputConfig):
    """A learned query for each hour to come, answered with all sensors' values."""

    num_query_channels: int = 32
    """Channels of the queries."""

    def queries(self, model):
        return OutputQueries(num_learned=FUTURE, num_channels=self.num_query_channels, num_outputs=SENSORS)


class Forecast(TaskConfig):
    """The next day of all sensors."""

    huber: float = 1.0
    """Error above which the loss grows linearly instead of quadratically."""

    def rows(self, model, data):
        return ArrayRows(past=((PAST, SENSORS), "float32"), future=((FUTURE, SENSORS), "float32"))

    def build(self, model, data, seed):
        return ForecastTask(self, model, data, seed)


class ForecastTask(Task):
    metric_directions = {"loss": "min", "mae": "min", "naive_mae": "min"}
    baseline_metrics = {"mae": ("naive_mae", "today again")}  # printed beside it

    def loss(self, model, batch):
        """The sum over the batch's real examples of their mean Huber loss; sums for the metrics."""
        error = model(batch["past"]).float() - batch["future"]
        each = nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=self.config.huber).mean((1, 2))
        errors = {"mae": error, "naive_mae": batch["past"][:, -FUTURE:] - batch["future"]}  # tomorrow as today is what must be beaten
        return (each * batch["valid"]).sum(), {name: (e.abs() * batch["valid"][:, None, None]).sum(0) for name, e in errors.items()}

    def metrics(self, sums, split):
        return {**super().metrics(sums, split), **{m: float(sums[m].mean() / sums["targets"]) for m in ("mae", "naive_mae")}}

    def samples(self, model, sums, split):
        by_hour = sums["mae"].mean(1) / sums["targets"]
        return [Sample("error-by-hour", text="\n".join(f"+{h + 1:2} h {'#' * int(200 * e)} {e:.3f}" for h, e in enumerate(by_hour)))]

    def predict(self, model, batch):
        return {"forecast": model(batch["past"])}


class NAdam(OptimizerConfig):
    """Adam with Nesterov's momentum."""

    momentum: float = 0.9
    """Decay of the mean of the gradients."""

    def build(self, groups, lr):
        return torch.optim.NAdam(groups, lr=lr, betas=(self.momentum, 0.999), decoupled_weight_decay=True)


def tiny():
    return Experiment(
        task=Forecast(),
        model=PerceiverIOConfig(num_latents=16, num_latent_channels=64, input=Sensors(), output=Hours(), init_scale=0.1,
                                encoder=EncoderConfig(num_self_attention_layers_per_block=2)),
        data=DataConfig(source="weather:series"),
        optim=OptimConfig(optimizer=NAdam(), lr=5e-3, schedule=Cosine(), warmup_steps=20, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=32, max_epochs=6),
        run=RunConfig(val_every=64, checkpoint_every=32, best_metric="val_mae"),
    )  # fmt: skip
