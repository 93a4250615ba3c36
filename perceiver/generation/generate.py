"""Text generation with Perceiver AR, on token ids: greedy, sampling and beam search, with and without key/value cache.

The last `num_latents` prompt positions start as latents. Each new token adds a latent until max_latents are in use;
then the prefix grows instead, until it holds max_seq_len - max_latents; then the oldest token falls out of the window.
With the cache, keys and values stay as they were computed: the same tokens come out until the latents are full,
afterwards what was a latent keeps the norm, place and context that it had as one. So each mode has its own, equally
well defined, continuation.

Shapes: B rows (prompts, or prompts times beams), N prompt positions, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from perceiver.config import UserError
from perceiver.data.order import uniforms
from perceiver.generation.options import DEFAULT_SAMPLING, Sampling, is_whole
from perceiver.models import PerceiverARConfig
from perceiver.models.initialize import seed_of

_DRAWN_AT_ONCE = 256
"""Steps whose uniform numbers are made together."""


def generate(
    model: nn.Module,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    num_latents: int = 1,
    pad_mask: Tensor | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
    row_ids: Sequence[int | str] | None = None,
    eos_id: int | None = None,
    use_cache: bool = True,
    compile: bool = False,
) -> Tensor:
    """Continues prompts.

    Args:
        model: a `PerceiverAR`, also a sharded one (then all workers call this together).
        prompt: token ids (B, N).
        max_new_tokens: tokens to add.
        num_latents: prompt positions that start as latents: 1 .. max_latents.
        pad_mask: (B, N), True = padding, on the left.
        sampling: how the next token is chosen.
        row_ids: what is drawn for a row depends on the seed, its id here and the step, not on the other rows. None: the
            rows' numbers, 0 .. B - 1.
        eos_id: a row that has it is finished and filled up with it; None: no row ends before the others.
        use_cache: keep keys and values instead of computing them again for each token.
        compile: with the cache, compile the step of a token, on GPUs record it: it takes longer once, and less for each token
            after that. The cache then has its full size from the start.

    Returns:
        The new ids (B, T), T at most max_new_tokens: fewer where all rows are finished.

    Raises:
        UserError: a prompt that is empty or too long, or an argument out of range.
    """
    tokens = stream(
        model, prompt, max_new_tokens=max_new_tokens, num_latents=num_latents, pad_mask=pad_mask, sampling=sampling,
        row_ids=row_ids, use_cache=use_cache, compile=compile,
    )  # fmt: skip
    new: list[Tensor] = []
    finished = torch.zeros_like(prompt[:, :1], dtype=torch.bool)
    for token in tokens:
        if eos_id is not None:
            token = token.masked_fill(finished, eos_id)
            finished |= token == eos_id
        new.append(token)
        if eos_id is not None and bool(finished.all()):
            break
    return torch.cat(new, dim=1) if new else prompt[:, :0]


def stream(
    model: nn.Module,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    num_latents: int = 1,
    pad_mask: Tensor | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
    row_ids: Sequence[int | str] | None = None,
    use_cache: bool = True,
    compile: bool = False,
) -> Iterator[Tensor]:
    """Like `generate`, but gives each column of new ids (B, 1) as soon as it is there. Arguments are checked at
    once.
    """
    check_prompt(model.config, prompt, max_new_tokens, num_latents)
    sampling.check()
    ids = range(len(prompt)) if row_ids is None else row_ids
    if len(ids) != len(prompt):
        raise UserError(f"row_ids has {len(ids)} ids for {len(prompt)} prompts and must have one for each")
    return _stream(model, prompt, max_new_tokens, num_latents, pad_mask, sampling, ids, use_cache, compile)


@torch.no_grad()
def _stream(
    model: nn.Module,
    prompt: Tensor,
    max_new_tokens: int,
    num_latents: int,
    pad_mask: Tensor | None,
    sampling: Sampling,
    row_ids: Sequence[int | str],
    use_cache: bool,
    compile: bool,
) -> Iterator[Tensor]:
    draws = None if sampling.temperature == 0 else _draws(sampling.seed, row_ids, prompt.device)
    training = model.training
    model.eval()
    try:
        window = Window.start(model, prompt, pad_mask, num_latents, max_new_tokens, use_cache, compile)
        for number in range(max_new_tokens):
            logits = window.logits()
            token = logits.argmax(-1, keepdim=True) if draws is None else _draw(logits, sampling, next(draws))
            if number + 1 < max_new_tokens:
                window.append(token)
            yield token
    finally:
        model.train(training)


@torch.no_grad()
def beam_search(
    model: nn.Module,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    num_beams: int,
    num_latents: int = 1,
    pad_mask: Tensor | None = None,
    eos_id: int | None = None,
    length_penalty: float = 1.0,
    use_cache: bool = True,
) -> tuple[Tensor, Tensor]:
    """The likeliest continuation of each prompt that a beam search finds.

    Args:
        num_beams: continuations that are followed at once, for each prompt.
        eos_id: a continuation that has it is finished; None: all have max_new_tokens.
        length_penalty: continuations are compared by log-probability / length^length_penalty (arXiv 1609.08144 without
            its constants); it matters only where they have different lengths.
        Others: see `generate`.

    Returns:
        New ids (B, T), finished rows filled up with eos_id, and log-probabilities (B,) of each continuation.

    Raises:
        UserError: see `generate`.
    """
    check_prompt(model.config, prompt, max_new_tokens, num_latents)
    if num_beams < 1:
        raise UserError(f"num_beams is {num_beams} and must be at least 1")
    num_prompts, device = prompt.shape[0], prompt.device
    if max_new_tokens == 0:
        return prompt[:, :0], torch.zeros(num_prompts, device=device)
    training = model.training
    model.eval()
    window = Window.start(model, prompt, pad_mask, num_latents, max_new_tokens, use_cache)
    window.select(torch.arange(num_prompts, device=device).repeat_interleave(num_beams))
    # At first the beams of a prompt are equal: all but one are out of the race.
    scores = torch.full((num_prompts, num_beams), -torch.inf, device=device)
    scores[:, 0] = 0.0
    ids = prompt.new_zeros(num_prompts, num_beams, 0)
    lengths = torch.zeros_like(scores)
    finished = torch.zeros_like(scores, dtype=torch.bool)
    for number in range(max_new_tokens):
        steps = window.logits().log_softmax(-1).view(num_prompts, num_beams, -1)
        if eos_id is not None:
            # A finished beam continues in one way only, at no cost.
            steps = steps.masked_fill(finished[..., None], -torch.inf)
            steps[..., eos_id] = steps[..., eos_id].masked_fill(finished, 0.0)
        totals = scores[..., None] + steps
        new_lengths = (lengths + (~finished).to(lengths.dtype))[..., None]
        ranking = (totals / new_lengths**length_penalty).flatten(1)
        chosen = ranking.topk(num_beams, dim=1).indices
        beam, token = chosen // steps.shape[-1], chosen % steps.shape[-1]
        scores = totals.flatten(1).gather(1, chosen)
        lengths = new_lengths.squeeze(-1).gather(1, beam)
        finished = finished.gather(1, beam)
        ids = torch.cat([ids.gather(1, beam[..., None].expand(-1, -1, ids.shape[-1])), token[..., None]], dim=-1)
        if eos_id is not None:
            finished |= token == eos_id
            if bool(finished.all()):
                break
        if number + 1 < max_new_tokens:
            window.select((beam + torch.arange(num_prompts, device=device)[:, None] * num_beams).flatten())
            window.append(token.reshape(-1, 1))
    model.train(training)
    # topk has sorted each prompt's beams: the first is the best.
    return ids[:, 0], scores[:, 0]


class Recorded:
    """A model whose step of one more token is recorded as a CUDA graph, for one batch of sequences with a static cache.

    Such a step is some hundred kernels of a few microseconds each, which a GPU waits for: played back, they follow each other.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.config = model.config
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._token: Tensor | None = None
        self._logits: Tensor | None = None

    def __call__(self, ids: Tensor, prefix_len: int, pad_mask: Tensor | None, cache: Any, last_only: bool) -> Tensor:
        """As the model's; the first call fills the cache."""
        self._steps += 1
        if self._steps <= 2:  # the second makes ready what must not be made while recording
            return self._model(ids, prefix_len, pad_mask, cache=cache, last_only=last_only)
        if self._graph is None:
            self._token, self._graph = ids.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):  # nothing is computed here
                self._logits = self._model(self._token, cache=cache, last_only=last_only)
        assert self._token is not None and self._logits is not None
        self._token.copy_(ids)
        self._graph.replay()
        return self._logits.clone()


class Window:
    """What generation has seen so far, and the logits of what comes next: with a cache, or computed anew from the
    ids.
    """

    def __init__(self, model: nn.Module, ids: Tensor, pad_mask: Tensor | None, prefix_len: int, cache) -> None:
        self.model, self.ids, self.pad_mask, self.prefix_len, self.cache = model, ids, pad_mask, prefix_len, cache
        self._logits: Tensor | None = None

    @classmethod
    def start(
        cls,
        model: nn.Module,
        prompt: Tensor,
        pad_mask: Tensor | None,
        num_latents: int,
        max_new_tokens: int,
        use_cache: bool,
        compile: bool = False,
    ) -> Window:
        """The window of a prompt."""
        cache = model.make_cache(prompt.shape[1] + max_new_tokens, static=compile) if use_cache else None
        if compile and use_cache and prompt.device.type == "cuda":
            model = Recorded(model)
        elif compile and use_cache:
            model.compile_next()
        if pad_mask is not None and not bool(pad_mask.any()):
            pad_mask = None
        return cls(model, prompt, pad_mask, prompt.shape[1] - num_latents, cache)

    def logits(self) -> Tensor:
        """Logits of the next token (B, V), float32 or better."""
        if self._logits is None:
            logits = self.model(self.ids, self.prefix_len, self.pad_mask, cache=self.cache, last_only=True)[:, -1]
            self._logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self._logits

    def append(self, token: Tensor) -> None:
        """One more token (B, 1): another latent, or a longer prefix, or the window without its oldest token."""
        if self.cache is not None:
            self.logits()
            self.ids, self.prefix_len, self.pad_mask, self._logits = token, 0, None, None
            return
        config: PerceiverARConfig = self.model.config
        ids = torch.cat([self.ids, token], dim=1)[:, -config.max_seq_len :]
        if self.pad_mask is not None:
            pad_mask = torch.cat([self.pad_mask, torch.zeros_like(token, dtype=torch.bool)], dim=1)
            self.pad_mask = pad_mask[:, -config.max_seq_len :]
        self.ids, self.prefix_len = ids, max(self.prefix_len, ids.shape[1] - config.max_latents)
        self._logits = None

    def select(self, rows: Tensor) -> None:
        """Continues with the given rows (any number of them, (R,))."""
        self._logits = self.logits()[rows]
        self.ids = self.ids[rows]
        if self.pad_mask is not None:
            self.pad_mask = self.pad_mask[rows]
        if self.cache is not None:
            self.cache.select(rows)


def new_seed() -> int:
    """A seed drawn by torch's own generator."""
    return int(torch.randint(2**63 - 1, ()))


def _draws(seed: int | None, row_ids: Sequence[int | str], device: torch.device) -> Iterator[Tensor]:
    """For each step a uniform number in [0, 1) for each row (B,), float64, that depends on (seed, row's id, step) alone."""
    keys = [seed_of(new_seed() if seed is None else seed, str(row)) for row in row_ids]
    start = 0
    while True:
        steps = np.arange(start, start + _DRAWN_AT_ONCE)
        # Two numbers of 24 bits each make one of 48: fine enough for the rarest token.
        halves = np.stack([uniforms(key, 0, steps, 2).astype(np.float64) for key in keys], 1)
        yield from torch.from_numpy(halves[..., 0] + halves[..., 1] * 2.0**-24).to(device)
        start += _DRAWN_AT_ONCE


def _draw(logits: Tensor, sampling: Sampling, drawn: Tensor) -> Tensor:
    """The next ids (B, 1) of logits (B, V), by the inverse of their distribution function at uniform numbers (B,)."""
    # In float64, and relative to the most likely token: no temperature, however small, makes a number that is not finite.
    logits = logits.double()
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None:
        least = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p is not None:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.masked_fill((before >= sampling.top_p).gather(1, order.argsort(-1)), -torch.inf)
    below = logits.softmax(-1).cumsum(-1)
    total = below[:, -1:]
    # Below the total, so that rounding never leads past the last token that can be drawn.
    point = torch.minimum(drawn[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(below, point, right=True).clamp(max=logits.shape[-1] - 1)


def check_prompt(config: PerceiverARConfig, prompt: Tensor, max_new_tokens: int, num_latents: int) -> None:
    """Raises UserError with the valid range where a prompt (B, N), or an argument, is out of it."""
    length, max_prefix = prompt.shape[1], config.max_seq_len - config.max_latents
    if not 1 <= length <= config.max_seq_len:
        raise UserError(f"the prompt has {length} tokens and must have 1 to {config.max_seq_len}")
    low, high = max(1, length - max_prefix), min(config.max_latents, length)
    if not low <= num_latents <= high:
        raise UserError(f"num_latents is {num_latents} and must be {low} to {high} for a prompt of {length} tokens")
    if not is_whole(max_new_tokens) or max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens!r} and must be a whole number and must not be negative")
