"""The copy task: a sequence, and then the same mirrored, so that what comes next stands up to a whole prefix before it
(Perceiver AR, arXiv 2202.07765, Section 4.1).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from perceiver.config import DataConfig, ModelConfig, UserError
from perceiver.data.examples import Example, ExampleSource
from perceiver.data.manifest import Manifest, Split
from perceiver.data.rows import ArrayRows
from perceiver.models import PerceiverARConfig
from perceiver.tasks.base import EACH, IGNORE_INDEX, Batch, Task
from perceiver.tasks.baselines import Guess
from perceiver.tasks.whole_sequences import WholeSequenceConfig, WholeSequences


class CopyingConfig(WholeSequenceConfig):
    """The second half of a sequence is the first, mirrored; it alone is predicted. Ids are symbols, and the last one begins all."""

    def rows(self, model: ModelConfig, data: DataConfig) -> ArrayRows:
        assert isinstance(model, PerceiverARConfig)  # or the task were not built
        return ArrayRows(symbols=((model.max_seq_len // 2,), "uint8"))

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task:
        if not isinstance(model, PerceiverARConfig):
            raise UserError("the copy task needs a Perceiver AR model")
        return Copying(self, model, data, seed)


class Copying(WholeSequences[CopyingConfig]):
    """max_seq_len // 2 symbols and the same mirrored."""

    metric_directions = {"loss": "min", "acc": "max"}

    def __init__(self, config: CopyingConfig, model: PerceiverARConfig, data: DataConfig, seed: int) -> None:
        super().__init__(config, model, data, seed)
        self.first_target = model.max_seq_len // 2 + 1

    def check(self) -> None:
        super().check()
        model = self.model_config
        if model.max_seq_len % 2:
            raise UserError(f"model.max-seq-len is {model.max_seq_len} and must be even: symbols, and as many copies")
        if not 3 <= model.vocab_size <= 257:
            raise UserError(f"model.vocab-size is {model.vocab_size} and must be from 3 to 257: two to 256 symbols, and what begins them")

    def sequences(self, rows: pa.Table, split: Split) -> np.ndarray:
        symbols, begin = self.rows.arrays(rows)["symbols"], self.model_config.vocab_size - 1
        if symbols.size and symbols.max() >= begin:
            raise UserError(f"the data has symbol {symbols.max()}, but with model.vocab-size {begin + 1} they must be 0 to {begin - 1}")
        return np.concatenate([np.full((len(symbols), 1), begin), symbols, symbols[:, ::-1]], 1)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, sums = super().loss(model, batch)
        if torch.is_grad_enabled():
            return loss, sums
        labels = batch["labels"]
        found = model(batch["ids"], batch["ids"].shape[1] - labels.shape[1], batch.get("pad_mask")).argmax(-1)
        right = (found == labels) & (labels != IGNORE_INDEX)
        return loss, sums | {"right": right.sum(), f"{EACH}acc": right.sum(1).double()}

    def metrics(self, sums: dict[str, np.ndarray], split: Split) -> dict[str, float]:
        return {**Task.metrics(self, sums, split), "acc": float(sums["right"] / max(sums["targets"], 1))}

    def guess(self, manifest: Manifest, trained_on: Manifest) -> Guess | None:
        """Guessing one of the symbols at random."""
        symbols = self.model_config.vocab_size - 1
        sums = {"loss": np.float64(np.log(symbols)), "targets": np.float64(1), "right": np.float64(1 / symbols)}
        return Guess(sums, dict.fromkeys(self.metric_directions, "guessing a symbol"))


class RandomSymbols(ExampleSource):
    """Sequences of random symbols. A subclass says how many and how long."""

    length: int
    symbols: int = 256
    rows = {"train": 8192, "val": 256}

    def parts(self, split: str) -> int:
        return 8

    def examples(self, split: str, part: int) -> Iterable[Example]:
        rng = np.random.default_rng([("train", "val").index(split), part])
        for _ in range(self.rows[split] // self.parts(split)):
            yield {"symbols": rng.integers(0, self.symbols, self.length, dtype=np.uint8)}


class ShortSequences(RandomSymbols):
    """Those of `copy-small`."""

    length = 128
    symbols = 32


class LongSequences(RandomSymbols):
    """Those of `copy-131072`."""

    length = 65_536
