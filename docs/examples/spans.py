"""Extractive answers: a pair of texts, and for each position whether the answer begins or ends there. Made questions about colours."""

import numpy as np
import torch
import torch.nn.functional as F

from perceiver.config import Cosine, DataConfig, Experiment, OptimConfig, RunConfig, TaskConfig, TrainingConfig
from perceiver.data.rows import ArrayRows
from perceiver.models import ArrayOutput, DecoderConfig, EncoderConfig, PerceiverIOConfig, TextInput
from perceiver.tasks.base import IGNORE_INDEX, Task, of_examples, padded

LENGTH, PAD, SEP = 64, 0, 5
THINGS = ("door", "boat", "coat", "lamp")
COLOURS = ("red", "blue", "green", "grey", "pink")


def questions(split):
    """A data source: question [SEP] text as bytes (byte b is b + 6), and the answer's first and last position."""
    rng = np.random.default_rng({"train": 0, "val": 1}[split])
    for _ in range({"train": 8192, "val": 512}[split]):
        things, colours = rng.permutation(THINGS)[:2], rng.permutation(COLOURS)[:2]
        asked = int(rng.integers(2))
        text = f"the {things[0]} is {colours[0]}, the {things[1]} is {colours[1]}"
        question = f"{things[asked]}?"
        start = len(question) + 1 + text.index(f"{things[asked]} is {colours[asked]}") + len(f"{things[asked]} is ")
        tokens = [byte + 6 for byte in question.encode()] + [SEP] + [byte + 6 for byte in text.encode()]
        yield {
            "tokens": tokens + [PAD] * (LENGTH - len(tokens)), "start": start, "stop": start + len(colours[asked]) - 1,
        }  # fmt: skip


class Spans(TaskConfig):
    """The span of a text that answers a question."""

    def rows(self, model, data):
        return ArrayRows(tokens=((model.input.max_seq_len,), "int64"), start=((), "int64"), stop=((), "int64"))

    def build(self, model, data, seed):
        return SpansTask(self, model, data, seed)


class SpansTask(Task):
    metric_directions = {"loss": "min", "acc": "max"}

    def collate(self, rows, size, split, train, step):
        arrays = self.rows.arrays(rows)
        batch = {"tokens": padded(arrays["tokens"], size, PAD)}
        if "start" in arrays:
            batch["labels"] = padded(np.stack([arrays["start"], arrays["stop"]], 1), size, IGNORE_INDEX)
        return batch

    def num_targets(self, batch):
        return (batch["labels"][:, 0] != IGNORE_INDEX).sum()

    def logits(self, model, batch):
        """(B, N, 2): how much the answer begins, and ends, at each position; never in padding."""
        padding = batch["tokens"] == PAD
        return model(batch["tokens"], padding).float().masked_fill(padding[..., None], -1e4)

    def loss(self, model, batch):
        logits, labels = self.logits(model, batch), batch["labels"]
        each = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE_INDEX).sum(1)
        if torch.is_grad_enabled():
            return each.sum(), {}
        valid = labels[:, 0] != IGNORE_INDEX
        right = (logits.argmax(1) == labels).all(1)
        return each.sum(), {"right": (right & valid).sum(), **of_examples(each, valid, right)}

    def metrics(self, sums, split):
        """The share of answers that are right from the first byte to the last."""
        return {**super().metrics(sums, split), "acc": float(sums["right"] / max(sums["targets"], 1))}

    def predict(self, model, batch):
        """The likeliest span whose end is not before its beginning."""
        start, stop = self.logits(model, batch).log_softmax(1).unbind(-1)
        pairs = (start[:, :, None] + stop[:, None]).masked_fill(~torch.ones(start.shape[1], stop.shape[1]).triu().bool(), -torch.inf)
        best = pairs.flatten(1).argmax(1)
        return {"start": best // start.shape[1], "stop": best % start.shape[1]}


def tiny():
    return Experiment(
        task=Spans(),
        model=PerceiverIOConfig(
            num_latents=32, num_latent_channels=64, init_scale=0.1,
            input=TextInput(max_seq_len=LENGTH, num_channels=64),
            encoder=EncoderConfig(
                num_cross_attention_heads=4, num_cross_attention_layers=2, num_self_attention_heads=4,
                num_self_attention_layers_per_block=2, num_self_attention_blocks=2),
            decoder=DecoderConfig(num_cross_attention_heads=4),
            output=ArrayOutput(num_outputs=2, ask_by="input")),
        data=DataConfig(source="spans:questions"),
        optim=OptimConfig(lr=2e-3, schedule=Cosine(), warmup_steps=100, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=32, max_epochs=8),
        run=RunConfig(val_every=256, checkpoint_every=256, best_metric="val_acc"),
    )  # fmt: skip
