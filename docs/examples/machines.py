"""Events at any times and fixed properties together, answered by two heads: which part of a machine wears out, and after how many hours.

Readings of sensors come when they come: each is a sensor, a time and a value. Nothing of it is an image, a text or a regular series.
"""

import numpy as np
import torch
import torch.nn.functional as F

from perceiver.config import Cosine, DataConfig, Experiment, OptimConfig, RunConfig, TaskConfig, TrainingConfig
from perceiver.data.rows import ArrayRows
from perceiver.models import (
    ArrayInput,
    ClassOutput,
    DecoderConfig,
    EncoderConfig,
    EventInput,
    HeadsOutput,
    MultimodalInput,
    PerceiverIOConfig,
    ValueOutput,
)  # fmt: skip
from perceiver.tasks.base import IGNORE_INDEX, Task, of_examples, padded

EVENTS, SENSORS, PARTS, PROPERTIES = 64, 4, ("bearing", "belt", "pump"), 3
AVERAGE, UNIT = 114, 25  # hours until a part has worn out are learned as the distance from their average, in units of 25


def readings(split):
    """A data source: up to 64 readings (sensor, time in hours, value; sensor -1: none) of a machine, and what happened to it."""
    rng = np.random.default_rng({"train": 0, "val": 1}[split])
    for _ in range({"train": 6000, "val": 1000}[split]):
        part, number = int(rng.integers(len(PARTS))), int(rng.integers(24, EVENTS + 1))
        age = rng.uniform(0.5, 2.0, PROPERTIES)  # the first property is the speed of wear
        sensor, times = rng.integers(0, SENSORS, number), np.sort(rng.uniform(0, 100, number))
        begins = rng.uniform(20, 60)
        rises = np.maximum(times - begins, 0) * 0.05 * (sensor == part)  # the sensor of the worn part, and its neighbour a little
        rises += np.maximum(times - begins, 0) * 0.02 * (sensor == part + 1)
        rest = EVENTS - number
        yield {
            "sensor": np.pad(sensor, (0, rest), constant_values=-1), "time": np.pad(times, (0, rest)).astype(np.float32),
            "value": np.pad(rng.normal(0, 0.4, number) + rises, (0, rest)).astype(np.float32), "properties": age.astype(np.float32),
            "part": part, "hours": np.float32((begins + 80 / age[0] - AVERAGE) / UNIT),
        }  # fmt: skip


class Wear(TaskConfig):
    """The part that wears out, and when."""

    hours_weight: float = 1.0
    """Weight of the error in hours beside the cross-entropy of the parts."""

    def rows(self, model, data):
        events = {"sensor": ((EVENTS,), "int64"), "time": ((EVENTS,), "float32"), "value": ((EVENTS,), "float32")}
        return ArrayRows(**events, properties=((PROPERTIES,), "float32"), part=((), "int64"), hours=((), "float32"))

    def build(self, model, data, seed):
        return WearTask(self, model, data, seed)


class WearTask(Task):
    metric_directions = {"loss": "min", "part_acc": "max", "part_usual": "max", "hours_mae": "min", "hours_mean": "min"}
    baseline_metrics = {"part_acc": ("part_usual", "always the commonest part"), "hours_mae": ("hours_mean", "always the average")}

    def collate(self, rows, size, split, train, step):
        arrays = ArrayRows(**{n: (c.shape, c.dtype) for n, c in self.rows.columns.items() if n in rows.column_names}).arrays(rows)
        batch = {name: padded(arrays[name], size, -1 if name == "sensor" else 0) for name in ("sensor", "time", "value", "properties")}
        if "part" in arrays:  # a prediction does without
            batch |= {"labels": padded(arrays["part"], size, IGNORE_INDEX), "hours": padded(arrays["hours"], size)}
        return batch

    def said(self, model, batch):
        """What both heads say, by name."""
        missing = batch["sensor"] < 0
        events = {"ids": batch["sensor"].clamp(min=0), "times": batch["time"], "values": batch["value"], "mask": missing}
        return model({"events": events, "properties": batch["properties"][..., None]})

    def loss(self, model, batch):
        said, labels = self.said(model, batch), batch["labels"]
        valid, parts = labels != IGNORE_INDEX, said["part"].float()
        nats = F.cross_entropy(parts, labels, reduction="none", ignore_index=IGNORE_INDEX)
        error = torch.where(valid, said["hours"].float()[:, 0] - batch["hours"], 0.0)
        each = nats + self.config.hours_weight * error.square()
        if torch.is_grad_enabled():
            return each.sum(), {}
        right, hours = parts.argmax(-1) == labels, UNIT * batch["hours"][valid].double().abs().sum()
        sums = {"part_acc": (right & valid).sum(), "hours_mae": UNIT * error.double().abs().sum(), "hours_mean": hours}
        return each.sum(), sums | {"parts": labels[valid].bincount(minlength=len(PARTS)), **of_examples(each, valid, right)}

    def metrics(self, sums, split):
        """The share of right parts and the mean error in hours, each beside the same answer for all machines."""
        found = {**sums, "part_usual": sums["parts"].max()}
        means = {name: float(found[name] / max(sums["targets"], 1)) for name in self.metric_directions if name != "loss"}
        return {**super().metrics(sums, split), **means}

    def predict(self, model, batch):
        said = self.said(model, batch)
        return {"part": said["part"].argmax(-1), "hours": said["hours"][:, 0] * UNIT + AVERAGE}


def tiny():
    inputs = (EventInput(num_ids=SENSORS, max_events=EVENTS, num_channels=32, num_time_bands=8, shortest_period=10.0, longest_period=400.0),
              ArrayInput(num_features=1, max_positions=PROPERTIES, num_channels=32))  # fmt: skip
    heads = (ClassOutput(num_classes=len(PARTS), num_query_channels=32), ValueOutput(num_values=1, num_query_channels=32))
    return Experiment(
        task=Wear(),
        model=PerceiverIOConfig(
            num_latents=16, num_latent_channels=64, init_scale=0.1,
            input=MultimodalInput(names=("events", "properties"), inputs=inputs),
            encoder=EncoderConfig(num_cross_attention_heads=4, num_self_attention_heads=4, num_self_attention_layers_per_block=2),
            decoder=DecoderConfig(num_cross_attention_heads=4),
            output=HeadsOutput(names=("part", "hours"), heads=heads)),
        data=DataConfig(source="machines:readings"),
        optim=OptimConfig(lr=2e-3, schedule=Cosine(), warmup_steps=50, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=64, max_epochs=10),
        run=RunConfig(val_every=188, checkpoint_every=188, best_metric="val_part_acc"),
    )  # fmt: skip
