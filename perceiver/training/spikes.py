"""Loss spikes: steps whose loss is far above the usual. Their updates are left out, or the weights return to a good checkpoint.

The second is what was done by hand for PaLM (Chowdhery et al., arXiv 2204.02311, section 5.1): start again from a checkpoint before the
spike and leave out the batches since. Here it takes no restart: weights and optimizer become those of the checkpoint, the number of the
step stays. Which rows a step takes and its learning rate are functions of that number, so the rows in between are left out by that alone.
"""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from perceiver.config import TrainingConfig, UserError
from perceiver.data.mixture import Mixture
from perceiver.data.order import Order
from perceiver.disk import json_bytes
from perceiver.runs import Run
from perceiver.training.parallel import World

HISTORY = 100
"""Steps whose losses say what is usual."""
LEAST = 20
"""Of so few none is a spike, unless it is not finite."""
SETTLED = 10
"""A checkpoint is returned to when this many steps without a spike have followed it, where there is one."""
_SIGMA = 1.4826
"""Standard deviation of a normal distribution by its median absolute deviation."""
_LEAST_SIGMA = 0.01
"""Of the median: losses that hardly vary make no spike of a small rise."""


class LossSpikes(UserError):
    """There were more spikes than training.max-spikes. Raised on all workers alike."""


class Spikes:
    """Judges the steps of a training by their losses. All methods are called on all workers alike, which all come to the same.

    Args:
        folder: of the run.
        order: which rows the steps take.
        saved: what `state` gave to the checkpoint that is continued from; empty at a start.
    """

    def __init__(self, folder: Path, order: Order | Mixture, world: World, config: TrainingConfig, saved: dict[str, Any]) -> None:
        self._file = Run(folder).spikes_file
        self._order, self._world, self._config = order, world, config
        self._usual: deque[float] = deque(saved.get("usual", ()), HISTORY)
        self.found: list[dict[str, Any]] = list(saved.get("found", ()))
        """Spikes so far: step, loss, median of the losses before it, limit, and the step that was returned to (None: none was)."""

    @property
    def active(self) -> bool:
        return self._config.on_spike != "ignore"

    @property
    def goes_back(self) -> bool:
        return self._config.on_spike == "rollback"

    def is_spike(self, loss_sum: Tensor, targets: Tensor, norm: Tensor) -> bool:
        """Whether a step is a spike, before its update. Waits for the device.

        Args:
            loss_sum: this worker's, float64 ().
            targets: of all workers, int64 ().
            norm: of the gradient, ().
        """
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self._loss = (self._world.all_sum(loss_sum.clone()) / targets.clamp(min=1)).item()
        if math.isfinite(self._loss) and math.isfinite(norm.item()) and self._loss <= self._limit():
            self._usual.append(self._loss)
            return False
        return True

    def _limit(self) -> float:
        """The highest loss that is no spike."""
        if len(self._usual) < LEAST:
            return math.inf
        middle = median(self._usual)
        sigma = _SIGMA * median(abs(loss - middle) for loss in self._usual)
        return middle + self._config.spike_deviations * max(sigma, _LEAST_SIGMA * abs(middle))

    def add(self, step: int, back_to: int | None) -> str:
        """Notes the spike that was found last; a line about it.

        Args:
            back_to: the step whose weights the training returned to; None: the step's update is left out, and no more.

        Raises:
            LossSpikes: it is one too many.
        """
        usual = median(self._usual) if self._usual else None
        limit = self._limit()
        entry = {"step": step, "loss": self._loss, "usual": usual, "limit": limit, "back_to": back_to}
        self.found.append({name: value if value is None or math.isfinite(value) else None for name, value in entry.items()})
        self._keep()
        what = f"step {step:,} is a spike: loss {self._loss:.4g}" + (f", usual are {usual:.4g}" if usual is not None else "")
        if len(self.found) > self._config.max_spikes:
            raise LossSpikes(
                f"{what}; it is number {len(self.found)}, and training.max-spikes is {self._config.max_spikes}: a lower optim.lr, a longer "
                f"optim.warmup-steps or optim.max-grad-norm usually help (the rows of all are in {self._file})"
            )
        if back_to is None:
            return f"{what}: its update is left out"
        return f"{what}: back to the weights of step {back_to:,}, the rows of steps {back_to + 1:,} to {step:,} are left out"

    def state(self) -> dict[str, Any]:
        """What the next judgements depend on, for a checkpoint; empty where nothing is watched."""
        return {"usual": list(self._usual), "found": self.found} if self.active else {}

    def _keep(self) -> None:
        """Writes the spikes with the rows that each left out: numbers of rows by step; of a mixture (source, epoch, row)."""
        if self._world.rank > 0:
            return
        entries = []
        for spike in self.found:
            step = spike["step"]
            first = step if spike["back_to"] is None else spike["back_to"] + 1
            entries.append({**spike, "left_out": [{"step": n, "rows": _rows(self._order, n)} for n in range(first, step + 1)]})
        try:
            self._file.write_bytes(json_bytes(entries))
        except OSError:
            pass  # it is a record: no reason to end the training


def _rows(order: Order | Mixture, step: int) -> list[Any]:
    return [row if isinstance(row, tuple) else int(row) for row in order.batch_rows(step - 1)]
