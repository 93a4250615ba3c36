"""Forecasting: from a window of a series its next values, each as a Gaussian."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from perceiver.config import DataConfig, ModelConfig, TaskConfig, UserError
from perceiver.data.manifest import Split
from perceiver.data.rows import ArrayRows
from perceiver.models import ArrayInput, ArrayOutput, PerceiverIOConfig
from perceiver.plots import forecasts, pixels
from perceiver.tasks.base import IGNORE_INDEX, Batch, Sample, Task, loss_of_sources, of_examples, padded
from perceiver.tasks.moments import Moments
from perceiver.tasks.table_numbers import deviation, gaussian_crps

SHOWN = 3
"""Windows of the validation split that are drawn: its first, and others at equal distances; of those that a pass over a part of the split
leaves out, others that it has."""
_DRAWN = ("past", "future", "center", "spread")


class ForecastingConfig(TaskConfig):
    """The next values of series: rows have "past" (steps, series) and "future" (steps, series)."""

    measured = ("mean", "scale")

    season: int = 24
    """Number of steps after which a series is expected to repeat. The baseline repeats the last season."""
    mean: tuple[float, ...] = ()
    """Mean of each series in the training split, set by the training."""
    scale: tuple[float, ...] = ()
    """Standard deviation of the same."""

    def rows(self, model: ModelConfig, data: DataConfig) -> ArrayRows:
        past, future, series = _sizes(model)
        return ArrayRows(past=((past, series), "float32"), future=((future, series), "float32"))

    def measure(self, model: ModelConfig, blocks: Iterator[pa.Table]) -> TaskConfig:
        rows = self.rows(model, DataConfig())
        moments = Moments(rows.columns["past"].shape[1])
        for block in blocks:
            moments.add(rows.arrays(block)["past"].reshape(-1, moments.size))
        return replace(self, mean=tuple(moments.mean.tolist()), scale=tuple(moments.scale.tolist()))

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task[Any, Any]:
        past, _, _ = _sizes(model)
        if not 1 <= self.season <= past:
            raise UserError(f"task.season is {self.season} and must be from 1 to the steps of a window, {past}")
        assert isinstance(model, PerceiverIOConfig)
        return Forecasting(self, model, data, seed)


def _sizes(model: ModelConfig) -> tuple[int, int, int]:
    """Steps of the past, steps of the future, series.

    Raises:
        UserError: the model is none that forecasts.
    """
    if (
        not isinstance(model, PerceiverIOConfig)
        or not isinstance(model.input, ArrayInput)
        or not isinstance(model.output, ArrayOutput)
        or model.output.ask_by != "learned"
    ):
        raise UserError("forecasting needs a Perceiver IO model with an ArrayInput and an ArrayOutput that asks by learned queries")
    series = model.input.num_features
    if model.output.num_outputs != 2 * series:
        raise UserError(
            f"model.output.num-outputs is {model.output.num_outputs} and must be {2 * series}: mean and deviation of each of "
            f"model.input.num-features, {series}"
        )
    return model.input.num_positions(), model.output.num_queries, series


class Forecasting(Task[ForecastingConfig, PerceiverIOConfig]):
    """Learned in units of the training split's deviations, measured in the series' own, beside the last season said again."""

    metric_directions = {
        "loss": "min", "mae": "min", "rmse": "min", "crps": "min", "mae_last": "min", "rmse_last": "min", "crps_last": "min",
        "naive_mae": "min", "naive_rmse": "min",
    }  # fmt: skip
    baseline_metrics = {name: (f"naive_{name}", "the last season again") for name in ("mae", "rmse")}

    def __init__(self, config: ForecastingConfig, model: PerceiverIOConfig, data: DataConfig, seed: int) -> None:
        super().__init__(config, model, data, seed)
        self._seen: list[dict[str, np.ndarray]] = []
        """The first windows that this worker saw in a validation, of their first series."""

    def collate(self, rows: pa.Table, size: int, split: Split, train: bool, step: int) -> Batch:
        """Rows that lack their future are for prediction."""
        stored = ArrayRows(**{name: (c.shape, c.dtype) for name, c in self.rows.columns.items() if name in rows.column_names})
        batch = {name: padded(values, size) for name, values in stored.arrays(rows).items()}
        shown = np.zeros((rows.num_rows, SHOWN), bool)
        if not train and "row" in rows.column_names:
            numbers = np.arange(SHOWN) * max(split.rows // SHOWN, 1)
            shown = rows["row"].to_numpy()[:, None] == numbers
        return {**batch, "valid": padded(np.ones(rows.num_rows, bool), size), "shown": padded(shown, size)}

    def _units(self, device: torch.device) -> tuple[Tensor, Tensor]:
        series = self.rows.columns["past"].shape[1]
        mean, scale = self.config.mean or (0.0,) * series, self.config.scale or (1.0,) * series
        return torch.tensor(mean, device=device), torch.tensor(scale, device=device)

    def said(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Means and deviations of the future (B, steps, series), in standard deviations from the mean."""
        mean, scale = self._units(batch["past"].device)
        said = model((batch["past"] - mean) / scale).float().unflatten(-1, (-1, 2))
        return said[..., 0], deviation(said)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over examples of the mean over their future."""
        (center, spread), (mean, scale) = self.said(model, batch), self._units(batch["past"].device)
        future, valid = (batch["future"] - mean) / scale, batch["valid"]
        nats = 0.5 * ((future - center) / spread).square() + spread.log() + 0.5 * math.log(2 * math.pi)
        each = torch.where(valid, nats.mean((1, 2)), 0.0)
        if torch.is_grad_enabled():
            return each.sum(), loss_of_sources(each, {**batch, "labels": torch.where(valid, 0, IGNORE_INDEX)})
        error, naive = (center - future) * scale, self.naive(batch["past"]) - batch["future"]
        found = {
            "mae": error.abs(),
            "square": error.square(),
            "crps": gaussian_crps(center, spread, future) * scale,
            "naive_mae": naive.abs(),
            "naive_square": naive.square(),
        }
        weights = valid.double()
        sums = {name: torch.einsum("b,bfs->f", weights, values.double()) / values.shape[2] for name, values in found.items()}
        drawn = {"past": batch["past"], "future": batch["future"], "center": center * scale + mean, "spread": spread * scale}
        for i in valid.nonzero().flatten().tolist()[: SHOWN - len(self._seen)]:
            self._seen.append({name: values[i, :, 0].double().cpu().numpy() for name, values in drawn.items()})
        shown = (batch["shown"] & valid[:, None]).double()
        sums["shown"] = shown.sum(0)
        sums |= {f"shown_{name}": torch.einsum("bn,bf->nf", shown, values[..., 0].double()) for name, values in drawn.items()}
        return each.sum(), sums | of_examples(each, valid)

    def naive(self, past: Tensor) -> Tensor:
        """The last season again and again, (B, steps of the future, series)."""
        season, steps = past[:, -self.config.season :], self.rows.columns["future"].shape[0]
        return season.repeat(1, -(-steps // season.shape[1]), 1)[:, :steps]

    def metrics(self, sums: dict[str, np.ndarray], split: Split) -> dict[str, float]:
        by_step = {name: sums[name] / max(float(sums["targets"]), 1.0) for name in ("mae", "square", "crps", "naive_mae", "naive_square")}
        found = {**super().metrics(sums, split)}
        for suffix, steps in (("", slice(None)), ("_last", slice(-1, None))):
            found[f"mae{suffix}"] = float(by_step["mae"][steps].mean())
            found[f"rmse{suffix}"] = math.sqrt(float(by_step["square"][steps].mean()))
            found[f"crps{suffix}"] = float(by_step["crps"][steps].mean())
        return found | {
            "naive_mae": float(by_step["naive_mae"].mean()),
            "naive_rmse": math.sqrt(float(by_step["naive_square"].mean())),
        }

    def samples(self, model: nn.Module, sums: dict[str, np.ndarray], split: Split) -> list[Sample]:
        there = np.flatnonzero(sums["shown"])[: split.rows]
        drawn = {name: list(sums[f"shown_{name}"][there]) for name in _DRAWN}
        for window in self._seen:
            again = any(np.array_equal(window["past"], past) for past in drawn["past"])
            if len(drawn["past"]) < SHOWN and not again:
                for name in _DRAWN:
                    drawn[name].append(window[name])
        self._seen = []
        if not drawn["past"]:
            return []
        windows = {name: np.stack(found) for name, found in drawn.items()}
        naive = self.naive(torch.from_numpy(windows["past"])[..., None])[..., 0].numpy()
        return [Sample("forecasts", image=pixels(forecasts(**windows, naive=naive)))]

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        (center, spread), (mean, scale) = self.said(model, batch), self._units(batch["past"].device)
        return {"forecast": center * scale + mean, "deviation": spread * scale}
