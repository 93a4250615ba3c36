"""Text generation with Perceiver AR."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perceiver.config import PerceiverARConfig, UserError


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    num_latents: int = 1,
    pad_mask: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continues prompts.

    The last `num_latents` prompt positions start as latents. Each new token adds a latent until max_latents are in use; then
    the prefix grows instead, until it holds max_seq_len - max_latents; then the oldest token falls out of the window. With
    the cache, keys and values stay as they were computed: the same tokens come out until the latents are full, afterwards
    what was a latent keeps the norm, place and context that it had as one.

    Args:
        model: a `PerceiverAR`, also a sharded one (then all workers call this together).
        prompt: token ids (B, N).
        max_new_tokens: tokens to add.
        num_latents: prompt positions that start as latents: 1 .. max_latents.
        pad_mask: (B, N), True = padding, on the left.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it and a token is drawn.
        top_k, top_p: draw only among the k likeliest tokens, or the fewest that have probability p together.
        seed: of the drawing; None: torch's own generator.
        use_cache: keep keys and values instead of computing them again for each token.

    Returns:
        The new ids (B, max_new_tokens).

    Raises:
        UserError: a prompt that is empty or too long, or an argument out of range.
    """
    config: PerceiverARConfig = model.config
    _check(config, prompt, max_new_tokens, num_latents, temperature, top_k, top_p)
    generator = None if seed is None else torch.Generator(prompt.device).manual_seed(seed)
    training = model.training
    model.eval()
    ids, pad = prompt, pad_mask
    prefix_len = prompt.shape[1] - num_latents
    cache = model.make_cache(prompt.shape[1] + max_new_tokens) if use_cache else None
    new: list[Tensor] = []
    for number in range(max_new_tokens):
        if cache is not None and number:
            logits = model(new[-1], cache=cache)
        else:
            logits = model(ids, prefix_len, pad, cache=cache)
        new.append(_choose(logits[:, -1].float(), temperature, top_k, top_p, generator))
        if cache is None:
            ids, pad, prefix_len = _slide(config, ids, pad, prefix_len, new[-1])
    model.train(training)
    return torch.cat(new, dim=1) if new else prompt[:, :0]


def _slide(
    config: PerceiverARConfig, ids: Tensor, pad: Tensor | None, prefix_len: int, token: Tensor
) -> tuple[Tensor, Tensor | None, int]:
    """The window with one more token: another latent, or a longer prefix, or without its oldest token."""
    ids = torch.cat([ids, token], dim=1)
    pad = None if pad is None else torch.cat([pad, torch.zeros_like(pad[:, :1])], dim=1)
    if ids.shape[1] > config.max_seq_len:
        ids, pad = ids[:, 1:], None if pad is None else pad[:, 1:]
    return ids, pad, max(prefix_len, ids.shape[1] - config.max_latents)


def _choose(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator) -> Tensor:
    """The next ids (B, 1) of logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.masked_fill((before >= top_p).gather(1, order.argsort(-1)), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


def _check(
    config: PerceiverARConfig,
    prompt: Tensor,
    max_new_tokens: int,
    num_latents: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    length, max_prefix = prompt.shape[1], config.max_seq_len - config.max_latents
    if not 1 <= length <= config.max_seq_len:
        raise UserError(f"the prompt has {length} tokens and must have 1 to {config.max_seq_len}")
    low, high = max(1, length - max_prefix), min(config.max_latents, length)
    if not low <= num_latents <= high:
        raise UserError(f"num_latents is {num_latents} and must be {low} to {high} for a prompt of {length} tokens")
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens} and must not be negative")
    if temperature < 0:
        raise UserError(f"temperature is {temperature} and must be 0 (greedy) or above")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k} and must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p} and must be above 0 and at most 1")
