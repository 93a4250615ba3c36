"""Filling masked positions with a masked language model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from perceiver.config import UserError
from perceiver.data.tokenizers import Tokenizer
from perceiver.generation.texts import check_text, pad_right

MARKS = ("<mask>", "[MASK]")
"""How a masked position is written: one token each, so with a byte tokenizer one byte."""

MAX_FILLS = 10_000
"""Fills of one text, at most."""


@dataclass(frozen=True)
class Fill:
    """One way to fill a text's masks."""

    text: str
    """The whole text."""
    filled: tuple[str, ...]
    """What stands in the place of each run of neighbouring masks."""
    probability: float
    """Of these tokens together; positions are filled independently of each other."""


@torch.no_grad()
def fill_masks(model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], top_k: int = 1) -> list[list[Fill]]:
    """The likeliest ways to fill each text's masks, best first.

    Args:
        model: a `PerceiverIO` with text output.
        texts: with masks written as in `MARKS`.
        top_k: fills a text (fewer where fewer exist).

    Raises:
        UserError: a text without a mask or too long, a tokenizer without a mask id, top_k below 1.
    """
    check_top_k(top_k)
    rows = [encode_masked(tokenizer, text, model.config.input.max_seq_len) for text in texts]
    device = next(model.parameters()).device
    ids, pad_mask = pad_right(rows, device)
    # Only masked positions are decoded: (B, M), rows with fewer masks than others repeat position 0.
    places = [np.flatnonzero(row == tokenizer.mask_id) for row in rows]
    positions = torch.zeros(len(rows), max(map(len, places)), dtype=torch.long)
    for i, row in enumerate(places):
        positions[i, : len(row)] = torch.from_numpy(row)
    logits = model(ids, pad_mask, positions=positions.to(device))
    # A mask is never the answer to a mask, nor are the other special ids.
    special = torch.from_numpy(np.flatnonzero(tokenizer.words.special)).to(device)
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).index_fill(-1, special, -torch.inf)
    return [
        [_fill(tokenizer, row, where, chosen, score) for score, chosen in _best(scores[: len(where)], top_k)]
        for row, where, scores in zip(rows, places, log_probs.cpu(), strict=True)
    ]


def check_top_k(top_k: int) -> None:
    """Raises UserError where a text cannot have that number of fills."""
    if not 1 <= top_k <= MAX_FILLS:
        raise UserError(f"top_k is {top_k} and must be at least 1 and at most {MAX_FILLS:,}")


def encode_masked(tokenizer: Tokenizer, text: str, max_seq_len: int) -> np.ndarray:
    """A text with masks as ids, between [CLS] and [SEP] where the tokenizer has these.

    Raises:
        UserError: see `fill_masks`.
    """
    check_text(text)
    if tokenizer.mask_id is None:
        raise UserError("the model's tokenizer has no mask id: it cannot fill masks")
    parts = re.split("|".join(map(re.escape, MARKS)), text)
    if len(parts) == 1:
        raise UserError(f"the text has no mask: write {MARKS[0]} (or {MARKS[1]}) for each token to be filled in")
    pieces = [tokenizer.encode(parts[0])] if parts[0] else []
    for part in parts[1:]:
        pieces += [np.array([tokenizer.mask_id])] + ([tokenizer.encode_rest(part)] if part else [])
    row = with_marks(tokenizer, np.concatenate(pieces))
    if len(row) > max_seq_len:
        raise UserError(f"the text has {len(row)} tokens and must have at most {max_seq_len}")
    return row


def with_marks(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """Ids of a text between [CLS] and [SEP], where the tokenizer has these."""
    if tokenizer.cls_id is None or tokenizer.sep_id is None:
        return ids
    return np.concatenate([[tokenizer.cls_id], ids, [tokenizer.sep_id]])


def _best(log_probs: Tensor, top_k: int) -> list[tuple[float, list[int]]]:
    """The top_k best choices of one token a position, of independent log-probabilities (M, V): exact, position by
    position.
    """
    scores, chosen = np.zeros(1), np.zeros((1, 0), np.int64)
    best = log_probs.double().topk(min(top_k, log_probs.shape[-1]))
    for tokens, values in zip(best.indices.numpy(), best.values.numpy(), strict=True):
        possible = int((values > -np.inf).sum())
        # Both are sorted. As (i + 1) * (j + 1) pairs are at least as good as the pair (i, j), few can be among the best.
        widths = np.minimum(possible, top_k // np.arange(1, len(scores) + 1))
        i = np.repeat(np.arange(len(scores)), widths)
        j = np.arange(len(i)) - np.repeat(widths.cumsum() - widths, widths)
        order = np.argsort(-(scores[i] + values[j]), kind="stable")[:top_k]
        i, j = i[order], j[order]
        scores, chosen = scores[i] + values[j], np.concatenate([chosen[i], tokens[j, None]], 1)
    return list(zip(scores.tolist(), chosen.tolist(), strict=True))


def _fill(tokenizer: Tokenizer, row: np.ndarray, places: np.ndarray, chosen: list[int], score: float) -> Fill:
    ids = row.copy()
    ids[places] = chosen
    runs = np.split(np.array(chosen), np.flatnonzero(np.diff(places) > 1) + 1)
    return Fill(tokenizer.decode(ids), tuple(tokenizer.decode(run) for run in runs), float(np.exp(score)))
