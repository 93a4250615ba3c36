"""Next-token prediction with Perceiver AR on sequences that are rows of their own, all of one length: pixels, and what is to be copied."""

from __future__ import annotations

from abc import abstractmethod
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch

from perceiver.config import TaskConfig, UserError
from perceiver.costs.activations import StepSizes
from perceiver.data.manifest import Split
from perceiver.data.order import uniforms
from perceiver.tasks.base import IGNORE_INDEX, Batch
from perceiver.tasks.chunked_loss import CHUNK_ELEMENTS
from perceiver.tasks.next_token import LENGTHS, PAD_ID, Autoregressive


class WholeSequenceConfig(TaskConfig):
    """Next-token prediction on sequences of max_seq_len tokens and what begins them.

    In training sequences end at a random place, all of a step at the same, so that each target is among the last max_latents equally
    often.
    """

    val_windows: int | None = None
    """Validation scores this many windows of a sequence, evenly spread; None: all, so that every target is scored once."""


W = TypeVar("W", bound=WholeSequenceConfig)


class WholeSequences(Autoregressive[W]):
    """Sequences of max_seq_len + 1 tokens, of which the first begins all of them."""

    first_target = 1
    """Place in a sequence of the first token that is predicted."""

    @abstractmethod
    def sequences(self, rows: pa.Table, split: Split) -> np.ndarray:
        """Rows as ids (n, max_seq_len + 1) int64."""

    def check(self) -> None:
        most = -(-(self.model_config.max_seq_len + 1 - self.first_target) // self.model_config.max_latents)
        if self.config.val_windows is not None and not 1 <= self.config.val_windows <= most:
            raise UserError(f"task.val-windows is {self.config.val_windows} and must be from 1 to {most}, all of a sequence's")

    def collate(self, rows: pa.Table, size: int, split: Split, train: bool, step: int) -> Batch:
        """See `Autoregressive`. In training a sequence up to the step's end; in validation `size` times the windows of a sequence, which
        end max_latents apart and see all that is before their targets. Padding is on the left.
        """
        longest, latents = self.model_config.max_seq_len, self.model_config.max_latents
        tokens = np.full((size, longest + 1), PAD_ID, np.int64)
        tokens[: rows.num_rows] = self.sequences(rows, split)
        drawn = np.array([self._end(step)]) if train else self._ends()
        ends = np.minimum(drawn, longest)
        length = max(latents, int(ends[0])) if train else longest
        position = np.arange(length + 1) + (ends - length)[:, None]  # (windows, T + 1); below 0: padding
        windows = tokens[:, np.maximum(position, 0)].reshape(-1, length + 1)
        scored = position >= np.maximum(self.first_target, drawn - latents + 1)[:, None]
        scored = scored[None] & (np.arange(size) < rows.num_rows)[:, None, None]
        labels = np.where(scored.reshape(-1, length + 1), windows, IGNORE_INDEX)[:, -latents:]
        batch = {"ids": torch.from_numpy(windows[:, :-1].copy()), "labels": torch.from_numpy(labels.copy())}
        if (padding := position[:, :-1] < 0).any():
            batch["pad_mask"] = torch.from_numpy(np.tile(padding, (size, 1)))
        if train and (keep := self._prefix_keep(rows, size, length - latents)) is not None:
            batch["prefix_keep"] = keep
        return batch

    def step_sizes(self) -> StepSizes:
        return StepSizes(chunk_elements=CHUNK_ELEMENTS)

    @property
    def _mean_length(self) -> int:
        longest, latents = self.model_config.max_seq_len, self.model_config.max_latents
        if longest + 1 - self.first_target <= latents:
            return longest
        drawn = np.arange(self.first_target, self._most_drawn() + 1)
        return round(float(np.clip(drawn, latents, longest).mean()))

    def _most_drawn(self) -> int:
        """The greatest end that is drawn. Where it is beyond the last target, fewer targets are scored: the last is then no rarer than
        the others, and none of them more frequent.
        """
        return self.model_config.max_seq_len + self.model_config.max_latents - 1

    def _end(self, step: int) -> int:
        """Where a step's targets end."""
        longest, latents, first = self.model_config.max_seq_len, self.model_config.max_latents, self.first_target
        if longest + 1 - first <= latents:  # all targets at once
            return longest
        drawn = uniforms(self.seed, 0, np.array([step]), 1, stream=LENGTHS)[0, 0]
        return first + int(drawn * (self._most_drawn() + 1 - first))

    def _ends(self) -> np.ndarray:
        """Places of the last targets of a validation's windows: int64 (windows,)."""
        longest, latents = self.model_config.max_seq_len, self.model_config.max_latents
        ends = np.arange(longest, self.first_target - 1, -latents)[::-1]
        if self.config.val_windows is None:
            return ends
        return ends[np.linspace(0, len(ends) - 1, self.config.val_windows + 1).round().astype(int)[1:]]
