"""Masked language modelling with Perceiver IO: the words that were masked in windows of a stream of text."""

from __future__ import annotations

import math
import re
from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.config import DataConfig, ModelConfig, TaskConfig, UserError
from perceiver.costs.activations import StepSizes
from perceiver.costs.flops import training_flops
from perceiver.costs.memory import has_formulas
from perceiver.data.columns import fixed_array
from perceiver.data.manifest import Manifest, Split
from perceiver.data.order import VALIDATION_SEED
from perceiver.data.text import mask_words
from perceiver.data.tokenizers import Tokenizer, load_tokenizer, missing
from perceiver.generation.masks import MARKS, encode_masked, fill_masks
from perceiver.models import PerceiverIOConfig, TextInput, TextOutput
from perceiver.tasks.base import IGNORE_INDEX, Batch, Sample, Task, loss_of_sources, of_examples, padded
from perceiver.tasks.baselines import Guess, unigram_guess


class MaskedLMConfig(TaskConfig):
    """Masked language modelling on packed windows of text."""

    kind: ClassVar[str] = "tokens"
    document_marks: ClassVar[str] = "cls-sep"
    abilities: ClassVar[tuple[str, ...]] = ("fill_mask", "embed")

    mask_probability: float = 0.15
    """Share of the words (or tokens) that are chosen. Of these, 80% are masked, 10% replaced at random and 10% kept."""
    val_mask_probability: float | None = None
    """The same in validation, so that trainings with different shares can be compared; None: as mask_probability."""
    whole_words: bool = True
    """Choose whole words instead of single tokens."""
    static: bool = False
    """Use the same masks in every epoch, not new ones."""
    sample_texts: tuple[str, ...] = ("I have watched this[ movie] and it was[ great].",)
    """Sentences for validation to fill in. All tokens of what stands in brackets are masked, with the space before a word as in training;
    [MASK] is one masked token."""
    sample_predictions: int = 3
    """Number of best predictions to write for each sentence."""

    @classmethod
    def of_model(cls, model: ModelConfig) -> TaskConfig | None:
        match model:
            case PerceiverIOConfig(input=TextInput(), output=TextOutput()):
                return cls()
        return None

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task:
        text = isinstance(model, PerceiverIOConfig) and isinstance(model.input, TextInput) and isinstance(model.output, TextOutput)
        if not isinstance(model, PerceiverIOConfig) or not text:
            raise UserError("masked language modelling needs a Perceiver IO model with a TextInput and a TextOutput")
        return MaskedLM(self, model, data, seed)


class MaskedLM(Task[MaskedLMConfig, PerceiverIOConfig]):
    """Windows of max_seq_len tokens, of which only the labelled positions are decoded (about 15%), always all of them."""

    metric_directions = {"loss": "min", "bits_per_byte": "min", "acc": "max"}

    def check(self) -> None:
        settings = self.config
        for name in ("mask_probability", "val_mask_probability"):
            if (share := getattr(settings, name)) is not None and not 0 < share < 1:
                raise UserError(f"task.{name.replace('_', '-')} is {share} and must be between 0 and 1")
        if not 1 <= settings.sample_predictions <= self._input.vocab_size:
            raise UserError(f"task.sample-predictions is {settings.sample_predictions} and must be at least 1")
        if self._tokenizer.mask_id is None:
            raise missing(self.data, self._tokenizer, "mask token", " or ".join(MARKS))
        for text in settings.sample_texts:
            encode_masked(self._tokenizer, with_masks(text, self._tokenizer), self._input.max_seq_len)

    @property
    def _input(self) -> TextInput:
        text = self.model_config.input
        assert isinstance(text, TextInput)  # or the task were not built
        return text

    def examples(self, block: pa.Table, split: Split, first_row: int, epoch: int, train: bool) -> pa.Table:
        """Windows "tokens" (T ids), and "length", how many are real."""
        rows = super().examples(block, split, first_row, epoch, train)
        length = self._input.max_seq_len
        real = np.clip(split.tokens - (first_row + np.arange(rows.num_rows)) * length, 0, length)
        return rows.append_column("length", pa.array(real))

    def collate(self, rows: pa.Table, size: int, split: Split, train: bool, step: int) -> Batch:
        """ids (B, T), and of the M positions to decode their numbers (B, M) and labels (B, M); all int64.

        M is the same for nearly all batches (`usual_positions`); one with a row of more labels has the next multiple that
        holds them. A text's last window is filled up on the right and then has a pad_mask (B, T), bool.
        """
        length, settings, mask_id = self._input.max_seq_len, self.config, self._tokenizer.mask_id
        assert mask_id is not None
        probability = settings.mask_probability if train else settings.val_mask_probability or settings.mask_probability
        tokens, row = fixed_array(rows, "tokens"), rows["row"].to_numpy()
        real = rows["length"].to_numpy()
        valid = None if (real == length).all() else np.arange(length) < real[:, None]
        inputs, labels = mask_words(
            tokens,
            self._tokenizer.words,
            mask_id=mask_id,
            probability=probability,
            seed=self.seed if train else VALIDATION_SEED,
            epoch=rows["epoch"].to_numpy() if train and not settings.static else 0,
            rows=row,
            whole_words=settings.whole_words,
            valid=valid,
        )
        positions, targets = gather_labels(labels, *usual_positions(length, probability))
        batch = {
            "ids": padded(inputs.astype(np.int64), size),
            "positions": padded(positions, size),
            "labels": padded(targets, size, IGNORE_INDEX),
        }
        if valid is not None:
            batch["pad_mask"] = padded(~valid, size)
        return batch

    def dummy_batch(self, size: int) -> Batch:
        decoded, _ = usual_positions(self._input.max_seq_len, self.config.mask_probability)
        widths = {"ids": self._input.max_seq_len, "positions": decoded, "labels": decoded}
        return {name: torch.zeros(size, width, dtype=torch.int64) for name, width in widths.items()}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        labels = batch["labels"]
        logits = model(batch["ids"], batch.get("pad_mask"), batch["positions"])
        each = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=IGNORE_INDEX)
        if torch.is_grad_enabled():
            return each.sum(), loss_of_sources(each.view(labels.shape), batch)
        right = logits.argmax(-1) == labels
        return each.sum(), {"correct": right.sum(), **of_examples(each.view(labels.shape), labels != IGNORE_INDEX, right)}

    def metrics(self, sums: dict[str, np.ndarray], split: Split) -> dict[str, float]:
        """Loss in nats per masked token, bits per masked byte of text, and the share of masked tokens guessed right."""
        loss = super().metrics(sums, split)["loss"]
        tokens_per_byte = (split.tokens - 2 * split.documents) / max(split.bytes, 1)
        return {
            "loss": loss,
            "bits_per_byte": loss / math.log(2) * tokens_per_byte,
            "acc": float(sums["correct"] / max(sums["targets"], 1)),
        }

    def samples(self, model: nn.Module, sums: dict[str, np.ndarray], split: Split) -> list[Sample]:
        """The sample sentences, each followed by its best completions."""
        texts, lines = self.config.sample_texts, []
        if not texts:
            return []
        was_training = model.training
        model.eval()
        masked = [with_masks(text, self._tokenizer) for text in texts]
        filled = fill_masks(model, self._tokenizer, masked, self.config.sample_predictions)
        model.train(was_training)
        for text, fills in zip(texts, filled, strict=True):
            lines += [text, *(f"{i}. {fill.text}" for i, fill in enumerate(fills, 1))]
        return [Sample("filled", text="\n".join(lines))]

    def guess(self, manifest: Manifest, trained_on: Manifest) -> Guess | None:
        """Of the whole text, not of the masked words alone. How often the most frequent token is right is not on record."""
        return unigram_guess(manifest, ("loss", "bits_per_byte"), correct=math.nan)

    def throughput_unit(self) -> tuple[str, int]:
        return "tokens", self._input.max_seq_len

    def step_sizes(self) -> StepSizes:
        """The positions that nearly all batches decode."""
        return StepSizes(num_queries=usual_positions(self._input.max_seq_len, self.config.mask_probability)[0])

    def flops_per_example(self) -> float:
        if not has_formulas(self.model_config):
            return super().flops_per_example()
        decoded, _ = usual_positions(self._input.max_seq_len, self.config.mask_probability)
        return training_flops(self.model_config, num_queries=decoded)

    @property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.data.tokenizer)


def usual_positions(length: int, probability: float) -> tuple[int, int]:
    """How many positions of a window of `length` are decoded, and the step in which that grows where a window has more labels.

    Half as many again as are labelled on average: at 2,048 bytes and 15% 512, more than 4 standard deviations above it.
    """
    step = max(1, length // 16)
    return min(length, math.ceil(1.5 * probability * length / step) * step), step


def gather_labels(labels: np.ndarray, least: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The labelled positions of each row and their labels, side by side.

    Args:
        labels: (n, T), IGNORE_INDEX where there is none.
        least, step: M is `least` or, where a row has more labels, more by a multiple of `step` (at most T).

    Returns:
        positions (n, M) int64, in ascending order, then 0; their labels (n, M) int64, then IGNORE_INDEX.
    """
    row, column = np.nonzero(labels != IGNORE_INDEX)
    counts = np.bincount(row, minlength=len(labels))
    excess = max(0, int(counts.max(initial=0)) - least)
    num = min(labels.shape[1], least + math.ceil(excess / step) * step)
    place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    positions, targets = np.zeros((len(labels), num), np.int64), np.full((len(labels), num), IGNORE_INDEX, np.int64)
    positions[row, place] = column
    targets[row, place] = labels[row, column]
    return positions, targets


def with_masks(text: str, tokenizer: Tokenizer) -> str:
    """A text with as many masks in place of each bracketed part as that has tokens; "[MASK]" is a single one."""

    def masks(match: re.Match) -> str:
        return "[MASK]" * len(tokenizer.encode_rest(match[1]) if match.start() else tokenizer.encode(match[1]))

    return re.sub(r"\[(?!MASK\])([^\[\]]*)\]", masks, text)
