"""Next-token prediction with Perceiver AR: what tasks on texts, other events, pixels and other sequences of ids share."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from perceiver.config import TaskConfig, UserError
from perceiver.costs.activations import StepSizes
from perceiver.costs.flops import num_kept, training_flops
from perceiver.costs.memory import has_formulas
from perceiver.data.columns import fixed_array
from perceiver.data.manifest import Split
from perceiver.data.order import uniforms
from perceiver.models import PerceiverARConfig
from perceiver.tasks.base import IGNORE_INDEX, Batch, Task, loss_of_sources, of_examples, padded
from perceiver.tasks.chunked_loss import CHUNK_ELEMENTS, chunked_cross_entropy

PAD_ID = 0
"""Fills windows up on the left; such positions are masked, so that it may be any id."""
LENGTHS = 2
"""Stream of random numbers of the windows' lengths."""


class NextTokenConfig(TaskConfig):
    """Next-token prediction on windows of a stream."""

    random_shift: bool = False
    """Shift all window boundaries by a random offset in each epoch (training only)."""
    min_seq_len: int | None = None
    """Cut training windows to a random length between this and max_seq_len, the same for all windows of a step. None: do not cut."""
    seq_len_multiple: int = 1
    """Round random lengths down to a multiple of this (not below min_seq_len). 64 suits a GPU's kernels, and leaves few different
    lengths."""
    val_stride: int | None = None
    """Distance in tokens between the starts of validation windows; each window scores its last max_latents targets. None: max_seq_len
    (windows do not overlap). max_latents: every target is scored once, with all the text before it that fits (at a text's beginning,
    what there is)."""


A = TypeVar("A", bound=TaskConfig)
S = TypeVar("S", bound=NextTokenConfig)


class Autoregressive(Task[A, PerceiverARConfig]):
    """The last max_latents tokens of a sequence of at most max_seq_len + 1 are predicted, each from those before it.

    A batch has ids (B, T) int64 and labels (B, max_latents) int64; where needed pad_mask (B, T) bool and prefix_keep (B, K) int64.
    """

    def dummy_batch(self, size: int) -> Batch:
        model = self.model_config
        widths, prefix = {"ids": model.max_seq_len, "labels": model.max_latents}, model.max_seq_len - model.max_latents
        if (keep := num_kept(prefix, model.cross_attention_dropout)) < prefix:
            widths["prefix_keep"] = keep
        return {name: torch.zeros(size, width, dtype=torch.int64) for name, width in widths.items()}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        labels = batch["labels"]
        prefix_len = batch["ids"].shape[1] - labels.shape[1]
        hidden = model(batch["ids"], prefix_len, batch.get("pad_mask"), batch.get("prefix_keep"), return_hidden=True)
        # The output matrix is the model's own, not a layer's: sharding leaves it whole from forward to backward.
        # Where a pass without gradients has ended, a worker alone has it in fp32 again.
        weight, bias = (part if part is None else part.to(hidden.dtype) for part in model.output_matrix())
        loss, each = chunked_cross_entropy(hidden, weight, bias, labels)
        return loss, loss_of_sources(each, batch) if torch.is_grad_enabled() else of_examples(each, labels != IGNORE_INDEX)

    def throughput_unit(self) -> tuple[str, int]:
        return "tokens", self._mean_length

    def targets_per_example(self) -> int:
        return self.model_config.max_latents

    def step_sizes(self) -> StepSizes:
        """A step of the longest windows; logits a chunk at a time."""
        return StepSizes(chunk_elements=CHUNK_ELEMENTS)

    def flops_per_example(self) -> float:
        """Of windows of the mean length; of a model without formulas, of the longest."""
        if not has_formulas(self.model_config):
            return super().flops_per_example()
        return training_flops(self.model_config, seq_len=self._mean_length)

    @property
    def _mean_length(self) -> int:
        """Tokens of a training sequence, on average over steps."""
        return self.model_config.max_seq_len

    def _prefix_keep(self, rows: pa.Table, size: int, prefix_len: int) -> Tensor | None:
        """Prefix positions that take part, a random choice per example (prefix dropout, Perceiver AR, Section 3.1)."""
        keep = num_kept(prefix_len, self.model_config.cross_attention_dropout)
        if keep == prefix_len:
            return None
        drawn = uniforms(self.seed, rows["epoch"].to_numpy(), rows["row"].to_numpy(), prefix_len)
        chosen = np.sort(np.argpartition(drawn, keep, axis=1)[:, :keep], axis=1) if rows.num_rows else drawn[:, :keep]
        result = np.tile(np.arange(keep), (size, 1))
        result[: rows.num_rows] = chosen
        return torch.from_numpy(result)


class NextToken(Autoregressive[S]):
    """Windows of max_seq_len + 1 tokens; the last max_latents of a window are predicted."""

    def check(self) -> None:
        model, stride, shortest = self.model_config, self.config.val_stride, self.config.min_seq_len
        if stride is not None and (stride < 1 or model.max_seq_len % stride or stride > model.max_seq_len):
            raise UserError(f"task.val-stride is {stride} and must divide model.max-seq-len ({model.max_seq_len})")
        if shortest is not None and not model.max_latents <= shortest <= model.max_seq_len:
            raise UserError(
                f"task.min-seq-len is {shortest} and must be from model.max-latents ({model.max_latents}) "
                f"to model.max-seq-len ({model.max_seq_len})"
            )

        if (multiple := self.config.seq_len_multiple) != 1 and not (shortest is not None and 1 < multiple <= model.max_seq_len):
            raise UserError(
                f"task.seq-len-multiple is {multiple} and must be 1 where task.min-seq-len is None, and else from 1 to "
                f"model.max-seq-len ({model.max_seq_len})"
            )

    def collate(self, rows: pa.Table, size: int, split: Split, train: bool, step: int) -> Batch:
        """ids (B, T) int64, labels (B, max_latents) int64; where needed pad_mask (B, T) bool, prefix_keep (B, K) int64.

        B is `size`, or `size` times the windows that start in a row (and those of `_first_windows` where a text begins). T is
        max_seq_len, or in training the step's length (of a row's window the first T + 1 tokens). Windows are right-aligned:
        padding is on the left.
        """
        model, stride = self.model_config, model_stride(self.config, self.model_config, train)
        length, latents = self._length(step) if train else model.max_seq_len, model.max_latents
        tokens = padded(fixed_array(rows, "tokens").astype(np.int64), size, PAD_ID).numpy()
        real = padded(rows["length"].to_numpy(), size, 0).numpy()
        starts = np.arange(0, model.max_seq_len, stride)
        windows = np.stack([tokens[:, s : s + length + 1] for s in starts], 1).reshape(-1, length + 1)
        real = np.clip(real[:, None] - starts, 0, length + 1).reshape(-1)
        missing = length + 1 - real
        position = np.arange(length + 1) - missing[:, None]
        windows = np.take_along_axis(windows, np.maximum(position, 0), 1)
        # A window that the text's end cuts short is moved right, so some of its targets were another window's already.
        first = np.full((size, len(starts)), 1 if stride == model.max_seq_len else length + 1 - latents)
        heads = self._heads(rows)
        if stride != latents:
            first[heads, 0] = 1
        own = position >= first.reshape(-1, 1)
        padding = (position[:, :-1] < 0) & (real > 0)[:, None]
        if stride == latents and not train:
            for head in heads:
                more = self._first_windows(tokens[head], int(rows["length"][head].as_py()))
                windows, own, padding = (np.concatenate(both) for both in zip((windows, own, padding), more, strict=True))
        labels = np.where(own, windows, IGNORE_INDEX)[:, -latents:]
        batch = {"ids": torch.from_numpy(windows[:, :-1].copy()), "labels": torch.from_numpy(labels.copy())}
        if missing[: rows.num_rows * len(starts)].any() or padding[size * len(starts) :].any():
            batch["pad_mask"] = torch.from_numpy(padding)
        if train and (keep := self._prefix_keep(rows, size, length - latents)) is not None:
            batch["prefix_keep"] = keep
        return batch

    def examples_of(self, rows: pa.Table, size: int) -> np.ndarray | None:
        of = np.repeat(np.arange(size), self.model_config.max_seq_len // self._stride)
        if self._stride == self.model_config.max_latents:
            of = np.concatenate([of, *(np.full(len(self._first_ends), head) for head in self._heads(rows))])
        return of

    def _heads(self, rows: pa.Table) -> np.ndarray:
        """Places of the rows in which a text begins: int64 (n,)."""
        return np.flatnonzero(rows["row"].to_numpy() == 0)

    def _first_windows(self, tokens: np.ndarray, real: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Windows that score the targets of a text's beginning, which are no window's last max_latents.

        Args:
            tokens: the text's first ids, of which `real` are real.

        Returns:
            Windows (n, T + 1) as if they began before the text; which targets are scored (n, T + 1); padding (n, T).
        """
        length, latents = self.model_config.max_seq_len, self.model_config.max_latents
        ends = self._first_ends
        shown = np.minimum(ends + 1, real)[:, None]
        position = np.arange(length + 1) - (length + 1 - shown)
        return tokens[np.maximum(position, 0)], position > (ends - latents)[:, None], position[:, :-1] < 0

    @property
    def _first_ends(self) -> np.ndarray:
        """The last target of each of a text's first windows."""
        return np.arange(self.model_config.max_latents, self.model_config.max_seq_len, self.model_config.max_latents)

    @property
    def _stride(self) -> int:
        return model_stride(self.config, self.model_config, False)

    @property
    def _mean_length(self) -> int:
        longest = self.model_config.max_seq_len
        shortest = min(self.config.min_seq_len or longest, longest)
        return int(self._rounded(np.arange(shortest, longest + 1)).mean())

    def _length(self, step: int) -> int:
        """Length of a step's windows, uniform from min_seq_len to max_seq_len, then rounded: the same for all its examples and workers."""
        longest = self.model_config.max_seq_len
        shortest = self.config.min_seq_len or longest
        drawn = uniforms(self.seed, 0, np.array([step]), 1, stream=LENGTHS)[0, 0]
        return int(self._rounded(np.array([shortest + int(drawn * (longest + 1 - shortest))]))[0])

    def _rounded(self, lengths: np.ndarray) -> np.ndarray:
        """Lengths as windows have them."""
        return np.maximum(self.config.min_seq_len or 0, lengths - lengths % self.config.seq_len_multiple)

    def _shift(self, epoch: int, length: int) -> int:
        """The epoch's shift of window boundaries, 0 .. length - 1; none in the first epoch."""
        return int(uniforms(self.seed, epoch, np.zeros(1, np.int64), 1, stream=1)[0, 0] * length) if epoch else 0


def model_stride(settings: NextTokenConfig, model: PerceiverARConfig, train: bool) -> int:
    """How many tokens the windows of a row are apart: training and plain validation have one window a row."""
    return model.max_seq_len if train or settings.val_stride is None else settings.val_stride
