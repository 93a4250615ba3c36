"""Continuations of prompts as text: token by token, until a stop string or the end of the document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from perceiver.config import UserError
from perceiver.data.tokenizers import Tokenizer
from perceiver.generation.generate import beam_search, check_prompt, stream
from perceiver.generation.options import DEFAULT_SAMPLING, Sampling, check_stop
from perceiver.generation.texts import check_text, pad_left

_CONTEXT = 16
"""Ids of the prompt that are decoded with a continuation: white space between pieces depends on the piece before."""


class Continuation:
    """The text of one row while its ids come in.

    Attributes:
        text: what is certain so far: whole characters, and nothing that may become a stop string.
        finished: a stop string or the end of the document was reached.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray, stop: Sequence[str], eos_id: int | None) -> None:
        self._tokenizer, self._stop, self._eos_id = tokenizer, tuple(stop), eos_id
        self._ids = prompt[-_CONTEXT:].astype(np.int64).tolist()
        self._skip = len(tokenizer.decode(np.array(self._ids)))
        self.text, self.finished = "", False

    def push(self, token: int) -> str:
        """Takes the next id and returns the text that has become certain by it."""
        if self.finished:
            return ""
        if token == self._eos_id:
            return self.close()
        self._ids.append(token)
        text = self._decode()
        # At most the last three bytes may be the beginning of a character of four.
        while text.endswith("\ufffd") and len(text) > len(self.text) and len(self._decode()) - len(text) < 3:
            text = text[:-1]
        return self._advance(text, held=True)

    def close(self) -> str:
        """No more ids: returns what was held back."""
        if self.finished:
            return ""
        new = self._advance(self._decode(), held=False)
        self.finished = True
        return new

    def _decode(self) -> str:
        return self._tokenizer.decode(np.array(self._ids))[self._skip :]

    def _advance(self, text: str, held: bool) -> str:
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            text, self.finished = text[: min(places)], True
        elif held:
            text = text[: len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)]
        new = text[len(self.text) :]
        self.text += new
        return new


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, and is longer than."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def stream_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    num_latents: int | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
    row_ids: Sequence[int | str] | None = None,
    stop: Sequence[str] = (),
    use_cache: bool = True,
    compile: bool = False,
) -> Iterator[list[str]]:
    """The continuations of prompts as they grow: for each step the new pieces of text, one a prompt (often "").

    Arguments: see `generate_text`; they are checked at once.
    """
    rows = encode_prompts(tokenizer, prompts)
    _check_latents(model, rows, num_latents)
    check_stop(stop)
    device = next(model.parameters()).device
    ids, pad_mask = pad_left(rows, device)
    tokens = stream(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        num_latents=_num_latents(model, rows, num_latents),
        pad_mask=pad_mask,
        sampling=sampling,
        row_ids=row_ids,
        use_cache=use_cache,
        compile=compile,
    )
    return _pieces(tokens, [Continuation(tokenizer, row, stop, tokenizer.eos_id) for row in rows])


def _pieces(tokens: Iterator[torch.Tensor], rows: list[Continuation]) -> Iterator[list[str]]:
    for token in tokens:
        yield [row.push(int(i)) for row, i in zip(rows, token[:, 0].tolist(), strict=True)]
        if all(row.finished for row in rows):
            return
    last = [row.close() for row in rows]
    if any(last):
        yield last


def generate_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    num_latents: int | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
    row_ids: Sequence[int | str] | None = None,
    num_beams: int = 1,
    stop: Sequence[str] = (),
    use_cache: bool = True,
    compile: bool = False,
) -> list[str]:
    """The continuations of prompts, without the prompts.

    Args:
        model: a `PerceiverAR`.
        prompts: texts; "" begins a new document, where the tokenizer has an id for that.
        max_new_tokens: a continuation's greatest length in tokens; the end of the document ends it before.
        num_latents: prompt positions that start as latents; None: as many as the model has, as in training.
        row_ids: see `perceiver.generation.generate.generate`.
        num_beams: above 1: beam search for the most likely continuation, without sampling.
        stop: strings that end a continuation and do not belong to it.
        use_cache, compile: see `perceiver.generation.generate`; beams are not compiled.

    Raises:
        UserError: a prompt that is too long or no text, or an argument out of range.
    """
    if num_beams == 1:
        result = ["" for _ in prompts]
        for pieces in stream_text(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            num_latents=num_latents,
            sampling=sampling,
            row_ids=row_ids,
            stop=stop,
            use_cache=use_cache,
            compile=compile,
        ):
            result = [text + piece for text, piece in zip(result, pieces, strict=True)]
        return result
    rows = encode_prompts(tokenizer, prompts)
    _check_latents(model, rows, num_latents)
    check_stop(stop)
    ids, pad_mask = pad_left(rows, next(model.parameters()).device)
    new, _ = beam_search(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        num_latents=_num_latents(model, rows, num_latents),
        pad_mask=pad_mask,
        eos_id=tokenizer.eos_id,
        use_cache=use_cache,
    )
    continuations = [Continuation(tokenizer, row, stop, tokenizer.eos_id) for row in rows]
    for continuation, tokens in zip(continuations, new.tolist(), strict=True):
        for token in tokens:
            continuation.push(token)
        continuation.close()
    return [continuation.text for continuation in continuations]


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[np.ndarray]:
    """Prompts as ids; an empty one as the end of the document before.

    Raises:
        UserError: there are no prompts, or one is no text, or empty where the tokenizer knows no end of documents.
    """
    if not prompts:
        raise UserError("there is no prompt: give at least one text")
    rows = [tokenizer.encode(check_text(prompt)) for prompt in prompts]
    if tokenizer.eos_id is not None:
        rows = [row if len(row) else np.array([tokenizer.eos_id]) for row in rows]
    if not all(map(len, rows)):
        raise UserError("a prompt is empty: give at least one character")
    return rows


def _num_latents(model: nn.Module, rows: list[np.ndarray], num_latents: int | None) -> int:
    return min(model.config.max_latents, max(map(len, rows))) if num_latents is None else num_latents


def _check_latents(model: nn.Module, rows: list[np.ndarray], num_latents: int | None) -> None:
    """Each prompt must allow the number by itself: what is refused does not depend on the other prompts of a batch."""
    if num_latents is not None:
        for row in rows:
            check_prompt(model.config, torch.from_numpy(row)[None], 0, num_latents)
