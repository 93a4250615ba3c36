"""A class for each token: the per-position head. Names, dates and amounts are marked in made sentences, byte by byte."""

import numpy as np
import torch
import torch.nn.functional as F

from perceiver.config import Cosine, DataConfig, Experiment, OptimConfig, RunConfig, TaskConfig, TrainingConfig
from perceiver.data.rows import ArrayRows
from perceiver.models import ArrayOutput, DecoderConfig, EncoderConfig, PerceiverIOConfig, TextInput
from perceiver.tasks.base import IGNORE_INDEX, Task, of_examples, padded

LENGTH, PAD = 96, 0
TAGS = ("other", "name", "date", "amount")
NAMES = ("Ada", "Noether", "Curie", "Lovelace", "Turing", "Meitner", "Franklin", "Hopper")
MONTHS = ("May", "June", "July", "March")
SENTENCES = (
    "{name} paid {amount} on {date}.",
    "On {date} {name} owed {amount}.",
    "{amount} went to {name}.",
    "Ask {name} by {date}, please.",
)


def sentences(split):
    """A data source: the bytes of a sentence (0: padding; byte b is b + 6), and the tag of each (-100: padding)."""
    rng = np.random.default_rng({"train": 0, "val": 1}[split])
    for _ in range({"train": 4096, "val": 512}[split]):
        parts = {
            "name": rng.choice(NAMES), "date": f"{rng.integers(1, 29)} {rng.choice(MONTHS)}", "amount": f"{rng.integers(1, 999)} euros",
        }  # fmt: skip
        tokens, tags = [], []
        for piece in rng.choice(SENTENCES).replace("{", "|{").replace("}", "}|").split("|"):
            text = parts.get(piece.strip("{}"), piece) if piece.startswith("{") else piece
            tokens += [byte + 6 for byte in text.encode()]
            tags += [TAGS.index(piece.strip("{}")) if piece.startswith("{") else 0] * len(text)
        rest = LENGTH - len(tokens)
        yield {"tokens": tokens + [PAD] * rest, "tags": tags + [IGNORE_INDEX] * rest}


class Tagging(TaskConfig):
    """A class for each token of a text."""

    def rows(self, model, data):
        length = model.input.max_seq_len
        return ArrayRows(tokens=((length,), "int64"), tags=((length,), "int64"))

    def build(self, model, data, seed):
        return TaggingTask(self, model, data, seed)


class TaggingTask(Task):
    metric_directions = {"loss": "min", "acc": "max", "f1": "max"}

    def collate(self, rows, size, split, train, step):
        arrays = self.rows.arrays(rows)
        batch = {"tokens": padded(arrays["tokens"], size, PAD)}
        if "tags" in arrays:  # a prediction does without
            batch["labels"] = padded(arrays["tags"], size, IGNORE_INDEX)
        return batch

    def logits(self, model, batch):
        """(B, N, tags): each position asks for its own."""
        return model(batch["tokens"], batch["tokens"] == PAD).float()

    def loss(self, model, batch):
        logits, labels = self.logits(model, batch), batch["labels"]
        each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORE_INDEX)
        valid, said = labels != IGNORE_INDEX, logits.argmax(-1)
        if torch.is_grad_enabled():
            return each.sum(), {}
        tags = torch.arange(logits.shape[-1])
        counts = [((said[..., None] == tags) & valid[..., None]), (labels[..., None] == tags)]
        sums = {"said": counts[0].sum((0, 1)), "there": counts[1].sum((0, 1)), "hits": (counts[0] & counts[1]).sum((0, 1))}
        return each.sum(), sums | of_examples(each, valid, said == labels)

    def metrics(self, sums, split):
        """Accuracy over all bytes, and the mean F1 of the tags that are not "other"."""
        f1 = 2 * sums["hits"] / np.maximum(sums["said"] + sums["there"], 1)
        return {**super().metrics(sums, split), "acc": float(sums["hits"].sum() / sums["there"].sum()), "f1": float(f1[1:].mean())}

    def predict(self, model, batch):
        return {"tags": self.logits(model, batch).argmax(-1)}


def tiny():
    return Experiment(
        task=Tagging(),
        model=PerceiverIOConfig(
            num_latents=24, num_latent_channels=64, init_scale=0.1,
            input=TextInput(max_seq_len=LENGTH, num_channels=48),
            encoder=EncoderConfig(num_cross_attention_heads=4, num_self_attention_heads=4, num_self_attention_layers_per_block=2),
            decoder=DecoderConfig(num_cross_attention_heads=4),
            output=ArrayOutput(num_outputs=len(TAGS), ask_by="input")),
        data=DataConfig(source="tagging:sentences"),
        optim=OptimConfig(lr=3e-3, schedule=Cosine(), warmup_steps=50, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=32, max_epochs=4),
        run=RunConfig(val_every=128, checkpoint_every=128, best_metric="val_f1"),
    )  # fmt: skip
