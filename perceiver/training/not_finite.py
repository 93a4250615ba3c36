"""Losses, gradients and weights that are NaN or infinite: found before they are saved, with the rows they came from."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from perceiver.data.mixture import Mixture
from perceiver.data.order import Order
from perceiver.disk import json_bytes
from perceiver.runs import Run
from perceiver.terminal import number_of
from perceiver.training.loop import StepResult
from perceiver.training.parallel import World

REMEDY = "a lower optim.lr, a longer optim.warmup-steps or optim.max-grad-norm usually help"


class NotFinite(Exception):
    """The loss, the gradient or the weights are NaN or infinite: no restart would help. Raised on all workers alike."""


class Finiteness:
    """Watches the steps of a training. All methods are called on all workers alike.

    Args:
        skipped: steps that were skipped so far.
        limit: how many may be.
    """

    def __init__(self, folder: Path, order: Order | Mixture, world: World, limit: int, skipped: list[int]) -> None:
        self._file = Run(folder).not_finite_file
        self._order, self._world, self._limit = order, world, limit
        self.skipped = list(skipped)
        self._losses: list[Tensor] = []

    def add(self, step: int, result: StepResult) -> None:
        """Notes a step.

        Raises:
            NotFinite: it was skipped, and is one too many.
        """
        if result.spike:
            self._losses = []  # an answer of its own was given
            return
        if not result.skipped:
            self._losses.append(result.loss_sum)
            return
        self.skipped.append(step)
        self._losses = []
        self._keep(self.skipped)
        if len(self.skipped) > self._limit:
            raise NotFinite(
                f"the loss or gradient was not finite at {number_of(len(self.skipped), 'step')}, the last at step {step}, and "
                f"training.skip-not-finite is {self._limit}; {REMEDY} (the steps' rows are in {self._file})"
            )

    def check(self, step: int, loss: float, norm: float) -> None:
        """Checks what has been logged since the last call.

        Raises:
            NotFinite: names the first step that was not finite, whose rows are kept.
        """
        losses, self._losses = self._losses, []
        if math.isfinite(loss) and math.isfinite(norm):
            return
        first = step
        what = f"loss became {loss}" if not math.isfinite(loss) else f"gradient's norm became {norm}"
        if losses and not math.isfinite(loss):
            finite = self._world.all_sum(torch.stack(losses)).isfinite().tolist()
            first = step - len(losses) + 1 + (finite.index(False) if False in finite else len(losses) - 1)
        self._keep([*self.skipped, first])
        raise NotFinite(f"the {what} at step {first}; {REMEDY} (the step's rows are in {self._file})")

    def check_weights(self, step: int, model: nn.Module) -> None:
        """Checks weights before they are saved: one that is not finite would make the checkpoint useless.

        Raises:
            NotFinite: there is one.
        """
        local = [p.detach().to_local() if hasattr(p, "to_local") else p.detach() for p in model.parameters()]
        bad = torch.stack([(~part.isfinite()).any() for part in local]).any().to(torch.int64).to(self._world.device)
        if self._world.all_sum(bad).item():
            self._keep([*self.skipped, step])
            raise NotFinite(
                f"weights became NaN or infinite at step {step} and are not saved; {REMEDY} (the step's rows are in {self._file})"
            )

    def _keep(self, steps: list[int]) -> None:
        if self._world.rank > 0:
            return
        entries = [{"step": step, "rows": [row if isinstance(row, tuple) else int(row) for row in self._rows(step)]} for step in steps]
        try:
            self._file.write_bytes(json_bytes(entries))
        except OSError:
            pass  # the reason that is given says more than this file

    def _rows(self, step: int) -> list:
        """Numbers of the rows in the global batch whose update made this step; of a mixture (source, epoch, row)."""
        return list(self._order.batch_rows(step - 1))
