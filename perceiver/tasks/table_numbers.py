"""Numbers from a row of a table: one each, or a distribution."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.data.manifest import Split
from perceiver.tasks.base import Batch, of_examples
from perceiver.tasks.table_task import NumberTargets, losses_of_sources, model_input


class TableRegression(NumberTargets):
    """Numbers, learned in units of their standard deviations in the training split, measured in their own."""

    metric_directions = {
        "loss": "min", "mae": "min", "rmse": "min", "r2": "max", "crps": "min", "baseline_mae": "min", "baseline_rmse": "min",
    }  # fmt: skip
    baseline_metrics = {name: (f"baseline_{name}", "always the mean") for name in ("mae", "rmse")}

    def said(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, targets, outputs of one), in standard deviations from the mean."""
        return model(model_input(batch)).float().unflatten(1, (-1, self.config.outputs_per_target))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        given, said = ~batch["targets"].isnan(), self.said(model, batch)
        mean, scale = self._mean_and_scale(said.device)
        targets = batch["targets"].double().sub(mean).div(scale).float().nan_to_num(0.0)
        each = torch.where(given, self._losses()(said, targets), 0.0)
        if torch.is_grad_enabled():
            return each.sum(), losses_of_sources(each, given, batch)
        error = torch.where(given, (self.middle(said) - targets).double(), 0.0) * scale
        spread = torch.where(given, targets.double(), 0.0) * scale  # about the training split's mean, so that squares do not cancel
        sums = {
            "abs": error.abs(),
            "square": error.square(),
            "spread": spread,
            "spread_square": spread.square(),
            "spread_abs": spread.abs(),
        }
        if self.config.loss in ("gaussian", "quantiles"):
            sums["crps"] = torch.where(given, self._crps(said, targets).double(), 0.0) * scale
        return each.sum(), {"given": given.sum(0), **{name: values.sum(0) for name, values in sums.items()}, **of_examples(each, given)}

    def _mean_and_scale(self, device: torch.device) -> tuple[Tensor, Tensor]:
        number = self.config.num_targets
        values = self.config.target_mean or (0.0,) * number, self.config.target_scale or (1.0,) * number
        mean, scale = (torch.tensor(value, dtype=torch.float64, device=device) for value in values)
        return mean, scale

    def middle(self, said: Tensor) -> Tensor:
        """(B, targets): one number for each target, the mean or the quantile nearest to the median."""
        quantiles = self.config.quantiles
        return said[..., min(range(len(quantiles)), key=lambda i: abs(quantiles[i] - 0.5)) if self.config.loss == "quantiles" else 0]

    def _losses(self) -> Callable[[Tensor, Tensor], Tensor]:
        config = self.config
        return {
            "mse": lambda said, t: (said[..., 0] - t).square(),
            "mae": lambda said, t: (said[..., 0] - t).abs(),
            "huber": lambda said, t: F.huber_loss(said[..., 0], t, reduction="none", delta=config.huber),
            "gaussian": lambda said, t: -torch.distributions.Normal(said[..., 0], deviation(said), validate_args=False).log_prob(t),
            "quantiles": lambda said, t: pinball(said, t, config.quantiles).sum(-1),
        }[config.loss]

    def _crps(self, said: Tensor, targets: Tensor) -> Tensor:
        if self.config.loss == "gaussian":
            return gaussian_crps(said[..., 0], deviation(said), targets)
        return 2 * pinball(said, targets, self.config.quantiles).mean(-1)

    def metrics(self, sums: dict[str, np.ndarray], split: Split) -> dict[str, float]:
        given = np.maximum(sums["given"].astype(np.float64), 1.0)
        total = given.sum()
        about_mean = sums["spread_square"] - sums["spread"] ** 2 / given
        found = {
            **super().metrics(sums, split),
            "mae": float(sums["abs"].sum() / total),
            "rmse": math.sqrt(float(sums["square"].sum() / total)),
            "r2": float(np.mean(1 - sums["square"] / np.maximum(about_mean, 1e-300))) if (about_mean > 0).all() else 0.0,
        }
        if "crps" in sums:
            found["crps"] = float(sums["crps"].sum() / total)
        found["baseline_mae"] = float(sums["spread_abs"].sum() / total)
        found["baseline_rmse"] = math.sqrt(float(sums["spread_square"].sum() / total))
        return found

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        said = self.said(model, batch).double()
        mean, scale = self._mean_and_scale(said.device)
        found = {"prediction": self.middle(said) * scale + mean}
        if self.config.loss == "gaussian":
            found["deviation"] = deviation(said) * scale
        if self.config.loss == "quantiles":
            found["quantiles"] = said.sort(-1).values * scale[:, None] + mean[:, None]
        return found

    def prediction_names(self) -> dict[str, tuple[str, ...]]:
        return dict.fromkeys(("prediction", "deviation"), self.config.number_names)


def deviation(said: Tensor) -> Tensor:
    """The standard deviation of a Gaussian that is said as (mean, any number)."""
    return F.softplus(said[..., 1]) + 1e-3


def pinball(said: Tensor, targets: Tensor, quantiles: tuple[float, ...]) -> Tensor:
    """The loss whose minimum is each quantile, (..., quantiles)."""
    shares, error = said.new_tensor(quantiles), targets[..., None] - said
    return torch.maximum(shares * error, (shares - 1) * error)


def gaussian_crps(mean: Tensor, deviation: Tensor, targets: Tensor) -> Tensor:
    """The continuous ranked probability score of Gaussians."""
    z = (targets - mean) / deviation
    below = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    return deviation * (z * (2 * below - 1) + 2 * density - 1 / math.sqrt(math.pi))
