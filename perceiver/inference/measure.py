"""What a trained model says of whole inputs: classes, embeddings, flows, losses.

Shapes: B inputs, L latents, D channels of a latent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.config import UserError
from perceiver.data.images import rgb
from perceiver.data.tokenizers import Tokenizer
from perceiver.generation.masks import with_marks
from perceiver.generation.texts import check_text, pad_left
from perceiver.inference.images import pixels_of

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Classification:
    """The class of an input."""

    label: str
    """Its name; of a model of any number of classes an input the names of all of probability above 0.5, separated by |."""
    index: int
    """Of the likeliest class."""
    probability: float
    """The same."""
    probabilities: tuple[float, ...]
    """Of all classes, in their order."""


@dataclass(frozen=True)
class Score:
    """How well a language model foresees a document."""

    loss: float
    """Mean of -log p, in nats a token."""
    bits_per_byte: float
    """The same in bits a UTF-8 byte: comparable between tokenizers."""
    tokens: int
    """Tokens scored: all of the document."""


def document_rows(tokenizer: Tokenizer, texts: Sequence[str], max_seq_len: int) -> list[np.ndarray]:
    """Documents as ids [CLS] ... [SEP], cut to max_seq_len with both marks kept, as in training."""
    room = max_seq_len - (2 if tokenizer.cls_id is not None and tokenizer.sep_id is not None else 0)
    return [with_marks(tokenizer, tokenizer.encode(check_text(text))[:room]) for text in texts]


@torch.no_grad()
def classify(
    model: nn.Module, x: Tensor, pad_mask: Tensor | None, class_names: Sequence[str], several: bool = False
) -> list[Classification]:
    """Classes of inputs.

    Args:
        model: a `PerceiverIO` with class output.
        x: ids (B, N) or images (B, H, W, C) in [-1, 1].
        pad_mask: (B, N), True = padding.
        class_names: in the order of the classes.
        several: an input has any number of them: those of a probability above 0.5.
    """
    logits = model(x, pad_mask).float()
    probabilities = (logits.sigmoid() if several else logits.softmax(-1)).cpu()
    best = probabilities.argmax(-1).tolist()
    rows = list(zip(best, probabilities.tolist(), strict=True))
    if several:
        labels = ["|".join(name for name, value in zip(class_names, row, strict=True) if value > 0.5) for _, row in rows]
        return [Classification(label, i, row[i], tuple(row)) for label, (i, row) in zip(labels, rows, strict=True)]
    return [Classification(class_names[i], i, row[i], tuple(row)) for i, row in rows]


@torch.no_grad()
def embed(model: nn.Module, x: Tensor, pad_mask: Tensor | None, pool: bool) -> np.ndarray:
    """Latents of a `PerceiverIO`: float32 (B, L, D), or their mean (B, D) if pooled. Arguments: see `classify`."""
    latents = model.encode(x, pad_mask).float()
    return (latents.mean(1) if pool else latents).cpu().numpy()


@torch.no_grad()
def embed_causal(model: nn.Module, rows: Sequence[np.ndarray], pool: bool) -> list[np.ndarray]:
    """Final latents of a `PerceiverAR`, of the last max_latents tokens of each row of ids.

    Returns:
        For each row float32 (its latents, D), or their mean (D,) if pooled.
    """
    config = model.config
    ids, pad_mask = pad_left([row[-config.max_seq_len :] for row in rows], next(model.parameters()).device)
    num_latents = min(config.max_latents, ids.shape[1])
    hidden = model(ids, ids.shape[1] - num_latents, pad_mask, return_hidden=True).float().cpu().numpy()
    latents = [hidden[i, -min(len(row), num_latents) :] for i, row in enumerate(rows)]
    return [latent.mean(0) for latent in latents] if pool else latents


@torch.no_grad()
def flows(model: nn.Module, task: Any, pairs: Sequence[Any], device: torch.device, batch_size: int = 4) -> list[np.ndarray]:
    """The flow of pairs of frames, each float32 (height, width, 2); for the arguments see `perceiver.inference.trained.TrainedModel.flow`.

    Raises:
        UserError: a pair that is none, a frame that cannot be read, or two of different sizes.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size} and must be at least 1")
    found = []
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise UserError("frames must be two images, or a list of pairs of images")
        first, second = (rgb(pixels_of(frame)) for frame in pair)
        if first.shape != second.shape:
            sizes = " and ".join(f"{frame.shape[1]} x {frame.shape[0]}" for frame in (first, second))
            raise UserError(f"the two frames have {sizes} pixels and must have one size")
        frames = torch.from_numpy(np.stack([first, second])).to(device)
        found.append(task.whole_flows(model, [frames], batch_size)[0].float().cpu().numpy())
    return found


@torch.no_grad()
def score(model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int) -> list[Score]:
    """The loss of each document under a causal language model.

    Every token is scored, the first one after the end of the document before. A token sees all before it that fits:
    windows end max_latents tokens apart and score what the one before has not (as validation does with the same
    stride).

    Raises:
        UserError: a text is empty or no text, or the tokenizer has no id for the end of a document.
    """
    if tokenizer.eos_id is None:
        raise UserError("the model's tokenizer has no id for the end of a document: documents cannot be scored from their start")
    config, device = model.config, next(model.parameters()).device
    windows: list[tuple[int, np.ndarray, int]] = []  # document, ids with the last target, targets to score
    documents = [tokenizer.encode(check_text(text)) for text in texts]
    if not all(map(len, documents)):
        raise UserError("the text is empty: there is nothing to score")
    for number, document in enumerate(documents):
        ids = np.concatenate([[tokenizer.eos_id], document]).astype(np.int64)
        for start in range(0, len(document), config.max_latents):
            stop = min(start + config.max_latents, len(document))
            windows.append((number, ids[max(0, stop - config.max_seq_len) : stop + 1], stop - start))
    sums = np.zeros(len(documents))
    for first in range(0, len(windows), batch_size):
        numbers, rows, counts = zip(*windows[first : first + batch_size], strict=True)
        ids, pad_mask = pad_left([row[:-1] for row in rows], device)
        num_latents = min(config.max_latents, ids.shape[1])
        labels = torch.full((len(rows), num_latents), IGNORE_INDEX)
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            labels[i, -count:] = torch.from_numpy(row[-count:])
        logits = model(ids, ids.shape[1] - num_latents, pad_mask)
        losses = F.cross_entropy(logits.transpose(1, 2).float(), labels.to(device), reduction="none", ignore_index=IGNORE_INDEX)
        np.add.at(sums, list(numbers), losses.double().sum(1).cpu().numpy())
    return [
        Score(total / len(document), total / math.log(2) / len(text.encode()), len(document))
        for total, document, text in zip(sums.tolist(), documents, texts, strict=True)
    ]
