"""Text classification: a class per document."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from perceiver.config import DataConfig, Experiment, ModelConfig, TaskConfig, UserError
from perceiver.data.manifest import Split
from perceiver.data.tokenizers import load_tokenizer, missing
from perceiver.models import ClassOutput, PerceiverIOConfig, TextInput
from perceiver.tasks.base import Batch, Task
from perceiver.tasks.class_settings import ClassSettings
from perceiver.tasks.classification import Classification, with_classes
from perceiver.tasks.tags import Tags


class TextClassificationConfig(ClassSettings):
    """A class per document."""

    kind: ClassVar[str] = "documents"
    abilities: ClassVar[tuple[str, ...]] = ("classify", "embed")

    class_names: tuple[str, ...] = ("negative", "positive")
    """Names of the classes, in the order of their labels; none: those of the data, if model.output.num-classes is 0."""
    group_by_length: bool = True
    """Sort a worker's share of a global batch by length before it is cut into micro-batches: less padding, the same batches."""

    @classmethod
    def of_model(cls, model: ModelConfig) -> TaskConfig | None:
        match model:
            case PerceiverIOConfig(input=TextInput(), output=ClassOutput(num_classes=num_classes)):
                usual = cls()
                same = len(usual.class_names) == num_classes
                return usual if same else cls(class_names=tuple(str(number) for number in range(num_classes)))
        return None

    def completed(self, experiment: Experiment) -> Experiment:
        return with_classes(experiment)

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task:
        if not isinstance(model, PerceiverIOConfig) or not isinstance(model.input, TextInput):
            raise UserError("text classification needs a Perceiver IO model with a TextInput")
        return TextClassification(self, model, data, seed)


class TextClassification(Classification[TextClassificationConfig]):
    """Documents as [CLS] ids [SEP], cut to max_seq_len with both kept, padded on the right to the longest of their batch.

    Batches differ in length, also between workers: nothing in a step needs them equal but the number of micro-batches.
    """

    def check(self) -> None:
        super().check()
        tokenizer = load_tokenizer(self.data.tokenizer)
        if tokenizer.cls_id is None or tokenizer.sep_id is None:
            raise missing(self.data, tokenizer, "tokens for the begin and the end of a text", "[CLS] and [SEP], or <s> and </s>")

    def arrange(self, rows: pa.Table) -> pa.Table:
        """Sorted by length where `group_by_length` is on, so that micro-batches need little padding."""
        if not self.config.group_by_length or rows.num_rows < 2:
            return rows
        return rows.take(pa.array(np.argsort(_lengths(rows), kind="stable")))

    def collate(self, rows: pa.Table, size: int, split: Split, train: bool, step: int) -> Batch:
        """ids (size, L) int64, labels (size,) int64; where documents differ in length, pad_mask (size, L) bool."""
        tokenizer = load_tokenizer(self.data.tokenizer)
        lengths, num = _lengths(rows), rows.num_rows
        longest = int(lengths.max(initial=0))
        ids = np.full((size, longest + 2), tokenizer.pad_id or 0, np.int64)
        ids[:, 0] = tokenizer.cls_id
        text = np.arange(longest) < lengths[:, None]
        ids[:num, 1:-1][text] = pc.list_flatten(rows["tokens"]).to_numpy()
        ends = np.full(size, longest + 1)
        ends[:num] = lengths + 1
        ids[np.arange(size), ends] = tokenizer.sep_id
        batch = {"ids": torch.from_numpy(ids), "labels": self.labels(rows, size)}
        pad_mask = np.arange(longest + 2) > ends[:, None]
        if pad_mask.any():
            batch["pad_mask"] = torch.from_numpy(pad_mask)
        return batch

    def dummy_batch(self, size: int) -> Batch:
        text = self.model_config.input
        assert isinstance(text, TextInput)  # or the task were not built
        shape = (size, text.max_seq_len)
        batch = {"ids": torch.zeros(shape, dtype=torch.int64), "labels": self.dummy_labels(size)}
        return {**batch, "pad_mask": torch.zeros(shape, dtype=torch.bool)}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["ids"], batch.get("pad_mask"))


def _lengths(rows: pa.Table) -> np.ndarray:
    """Ids of each document: int64 (n,)."""
    return pc.list_value_length(rows["tokens"]).to_numpy().astype(np.int64)


class TextTagsConfig(TextClassificationConfig):
    """Any number of classes per text."""

    kind: ClassVar[str] = "tagged-documents"
    several_classes: ClassVar[bool] = True

    @classmethod
    def of_model(cls, model: ModelConfig) -> TaskConfig | None:
        return None

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task[Any, Any]:
        if not isinstance(model, PerceiverIOConfig) or not isinstance(model.input, TextInput):
            raise UserError("classes of texts need a Perceiver IO model with a TextInput")
        return TextTags(self, model, data, seed)


class TextTags(Tags[TextTagsConfig], TextClassification):  # type: ignore[misc]
    """Texts with any number of classes each."""
