"""Causal language modelling with Perceiver AR: next-token prediction on windows of a stream of text."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from perceiver.config import DataConfig, ModelConfig, TaskConfig, UserError
from perceiver.data.columns import fixed_array, fixed_column
from perceiver.data.manifest import Manifest, Split
from perceiver.data.tokenizers import load_tokenizer, tokenizer_is_there
from perceiver.generation.generate import generate
from perceiver.generation.options import Sampling
from perceiver.models import PerceiverARConfig
from perceiver.tasks.base import Sample, Task
from perceiver.tasks.baselines import Guess, unigram_guess
from perceiver.tasks.next_token import NextToken, NextTokenConfig


class CausalLMConfig(NextTokenConfig):
    """Next-token prediction on packed windows of text."""

    kind: ClassVar[str] = "tokens"
    abilities: ClassVar[tuple[str, ...]] = ("generate", "stream", "score", "embed")
    takes_any: ClassVar[bool] = True

    sample_prompt: str = "The "
    """Prompt of the sample text that each validation writes."""
    sample_tokens: int = 128
    """Length of the sample text in tokens; 0: write none."""

    @classmethod
    def of_model(cls, model: ModelConfig) -> TaskConfig | None:
        return cls() if isinstance(model, PerceiverARConfig) else None

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task:
        if not isinstance(model, PerceiverARConfig):
            raise UserError("causal language modelling needs a Perceiver AR model")
        return CausalLM(self, model, data, seed)


class CausalLM(NextToken[CausalLMConfig]):
    """Windows of max_seq_len + 1 tokens; the last max_latents of a window are predicted."""

    metric_directions = {"loss": "min", "bits_per_byte": "min", "perplexity": "min", "word_perplexity": "min"}

    def check(self) -> None:
        super().check()
        if self.config.sample_tokens < 1 or not tokenizer_is_there(self.data.tokenizer):
            return
        length, most = len(self._prompt()), self.model_config.max_seq_len
        if not 1 <= length <= most:
            raise UserError(
                f"--task.sample-prompt has {length:,} tokens and must have 1 to {most:,} (--task.sample-tokens 0 writes no sample)"
            )

    def examples(self, block: pa.Table, split: Split, first_row: int, epoch: int, train: bool) -> pa.Table:
        """Windows "tokens" (T + 1 ids from the row's start on, plus the epoch's shift), and "length", how many are real.

        With a validation stride below T, the "tokens" of a row reach so far that all windows starting in it are in them.
        """
        stream = fixed_array(block, "tokens").reshape(-1)
        length, num_rows = split.row_length, block.num_rows - split.lookahead
        shift = self._shift(epoch, length) if train and self.config.random_shift else 0
        size = length + 1 if train else length + 1 + length - self._stride
        windows = np.lib.stride_tricks.sliding_window_view(stream[shift:], size)[::length][:num_rows]
        starts = (first_row + np.arange(num_rows)) * length + shift
        real = np.clip(split.tokens - starts, 0, size)
        return pa.table({"tokens": fixed_column(windows), "length": pa.array(real)})

    def metrics(self, sums: dict[str, np.ndarray], split: Split) -> dict[str, float]:
        """Loss in nats per token, bits per byte of the text, perplexity per token and per word."""
        loss = super().metrics(sums, split)["loss"]
        return {
            "loss": loss,
            "bits_per_byte": loss / math.log(2) * split.tokens / max(split.bytes, 1),
            "perplexity": _exp(loss),
            "word_perplexity": _exp(loss * split.tokens / max(split.words, 1)),
        }

    def samples(self, model: nn.Module, sums: dict[str, np.ndarray], split: Split) -> list[Sample]:
        settings = self.config
        if settings.sample_tokens < 1:
            return []
        tokenizer = load_tokenizer(self.data.tokenizer)
        prompt = torch.from_numpy(self._prompt().astype(np.int64))[None]
        device = next(model.parameters()).device
        # One latent to begin with, or as many as the prompt is longer than the prefix can be.
        num_latents = max(1, prompt.shape[1] - (self.model_config.max_seq_len - self.model_config.max_latents))
        ids = generate(
            model,
            prompt.to(device),
            max_new_tokens=settings.sample_tokens,
            num_latents=num_latents,
            sampling=Sampling(temperature=0.8, top_k=40, seed=0),
        )
        return [Sample("continuation", text=tokenizer.decode(ids[0].cpu().numpy()))]

    def _prompt(self) -> np.ndarray:
        return load_tokenizer(self.data.tokenizer).encode(self.config.sample_prompt)

    def guess(self, manifest: Manifest, trained_on: Manifest) -> Guess | None:
        return unigram_guess(manifest, ("loss", "bits_per_byte", "perplexity", "word_perplexity"))


def _exp(value: float) -> float:
    """exp, infinite instead of an error where a model is hopeless."""
    return math.exp(value) if value < 700 else math.inf
