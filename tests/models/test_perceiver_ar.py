"""Perceiver AR: causality, padding, prefix dropout, and the key/value cache."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from perceiver.models import PerceiverAR, PerceiverARConfig, build_model
from perceiver.models.perceiver_ar import causal_padding_mask
from perceiver.models.position import rotation
from tests.support import golden

CONFIG = PerceiverARConfig(
    vocab_size=50,
    max_seq_len=24,
    max_latents=8,
    num_channels=32,
    num_heads=4,
    num_self_attention_layers=3,
    num_self_attention_rotary_layers=2,
    init_scale=0.3,
)
CONFIGS = {
    "learned and rotary positions": CONFIG,
    "rotary positions only": replace(CONFIG, abs_pos_emb=False, output_norm=True),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def model(request: pytest.FixtureRequest) -> PerceiverAR:
    return build_model(request.param, seed=1).double().eval()


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_pad(x: Tensor, num_padding: int) -> tuple[Tensor, Tensor]:
    """The same rows with padding on the left, and their pad mask."""
    padding = torch.full((x.shape[0], num_padding), 7)
    mask = torch.zeros(x.shape[0], x.shape[1] + num_padding, dtype=torch.bool)
    mask[:, :num_padding] = True
    return torch.cat([padding, x], dim=1), mask


def test_latents_do_not_see_later_tokens(model: PerceiverAR) -> None:
    x = ids(2, 20)
    changed = x.clone()
    changed[:, 15] = (changed[:, 15] + 1) % 50
    before, after = model(x, 12), model(changed, 12)
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=0)
    assert not torch.isclose(before[:, 3:], after[:, 3:]).all(dim=-1).any()


def test_every_latent_sees_the_whole_prefix(model: PerceiverAR) -> None:
    x = ids(1, 20)
    for position in (0, 11):
        changed = x.clone()
        changed[:, position] = (changed[:, position] + 1) % 50
        assert not torch.isclose(model(x, 12), model(changed, 12)).all(dim=-1).any()


@pytest.mark.parametrize("prefix_len", [0, 5, 12])
def test_left_padding_changes_nothing(model: PerceiverAR, prefix_len: int) -> None:
    x = ids(2, prefix_len + 8)
    padded, pad_mask = left_pad(x, 4)
    expected = model(x, prefix_len)
    torch.testing.assert_close(model(padded, prefix_len + 4, pad_mask=pad_mask), expected)


def test_padding_that_reaches_into_the_latents_changes_nothing_for_the_others(model: PerceiverAR) -> None:
    x = ids(2, 5)
    padded, pad_mask = left_pad(x, 15)
    logits = model(padded, 12, pad_mask=pad_mask)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:, 3:], model(x, 0))
    logits[:, 3:].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_rows_of_nothing_but_padding_are_finite(model: PerceiverAR) -> None:
    x = ids(2, 20)
    pad_mask = torch.zeros(2, 20, dtype=torch.bool)
    pad_mask[0] = True
    logits = model(x, 12, pad_mask=pad_mask)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[1:], model(x[1:], 12))


def test_keeping_all_of_the_prefix_is_keeping_none_back(model: PerceiverAR) -> None:
    x = ids(2, 20)
    keep = torch.arange(12).expand(2, -1)
    torch.testing.assert_close(model(x, 12, prefix_keep=keep), model(x, 12))


def test_dropped_prefix_positions_do_not_matter_and_kept_ones_keep_their_places(model: PerceiverAR) -> None:
    x, keep = ids(2, 20), torch.tensor([[0, 3, 7, 11], [1, 2, 9, 10]])
    logits = model(x, 12, prefix_keep=keep)
    changed = ids(2, 20, seed=9)
    changed[:, 12:] = x[:, 12:]
    changed[:, :12].scatter_(1, keep, x[:, :12].gather(1, keep))
    torch.testing.assert_close(model(changed, 12, prefix_keep=keep), logits)
    # A padded prefix without the dropped positions: the mask hides what is left out, positions included.
    rows = torch.arange(2)[:, None]
    hidden = torch.ones(2, 20, dtype=torch.bool)
    hidden[rows, keep] = False
    hidden[:, 12:] = False
    embedded = model.input_adapter(x, torch.arange(20)[None])
    rotate = rotation(torch.arange(20)[None], model.num_rotated_channels)
    expected = model.cross_attention(
        embedded[:, 12:],
        prefix=embedded[:, :12],
        mask=causal_padding_mask(hidden, 8),
        rotate_q=rotate.last(8),
        rotate_k=rotate,
    )
    for number, layer in enumerate(model.self_attention):
        expected = layer(expected, causal=True, rotate=rotate.last(8) if number < 2 else None)
    expected = model.output_norm(expected) if model.output_norm is not None else expected
    torch.testing.assert_close(logits, model.head(expected))


def test_logits_are_the_head_of_the_hidden_states(model: PerceiverAR) -> None:
    x = ids(2, 20)
    torch.testing.assert_close(model.head(model.hidden(x, 12)), model(x, 12))


# ---------------------------------------------------------------------------------------------------------------- cache


def greedy_uncached(model: PerceiverAR, x: Tensor, pad_mask: Tensor | None, num_latents: int, steps: int) -> Tensor:
    """Decoding by recomputing everything: latents grow, then the prefix, then the oldest token falls out."""
    config, length = model.config, x.shape[1]
    prompt_len, prefix_len = length, length - num_latents
    for _ in range(steps):
        window = x[:, -config.max_seq_len :]
        mask = None if pad_mask is None else pad_mask[:, -config.max_seq_len :]
        prefix_len = max(prefix_len, window.shape[1] - config.max_latents)
        next_id = model(window, prefix_len, pad_mask=mask)[:, -1].argmax(-1, keepdim=True)
        x = torch.cat([x, next_id], dim=1)
        if pad_mask is not None:
            pad_mask = torch.cat([pad_mask, torch.zeros_like(pad_mask[:, :1])], dim=1)
    return x[:, prompt_len:]


def greedy_cached(model: PerceiverAR, x: Tensor, pad_mask: Tensor | None, num_latents: int, steps: int) -> Tensor:
    """Decoding with the cache."""
    cache = model.make_cache(x.shape[1] + steps)
    logits = model(x, x.shape[1] - num_latents, pad_mask=pad_mask, cache=cache)
    new = [logits[:, -1].argmax(-1, keepdim=True)]
    for _ in range(steps - 1):
        new.append(model(new[-1], cache=cache)[:, -1].argmax(-1, keepdim=True))
    return torch.cat(new, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("num_padding", [0, 4])
def test_cached_equals_uncached_until_the_latents_are_full(model: PerceiverAR, num_padding: int) -> None:
    x, pad_mask = left_pad(ids(2, 10), num_padding)
    pad_mask[1] = False  # rows with and without padding in one batch
    mask = pad_mask if num_padding else None
    cache = model.make_cache()
    prefix_len = x.shape[1] - 3
    cached = model(x, prefix_len, pad_mask=mask, cache=cache)
    torch.testing.assert_close(cached, model(x, prefix_len, pad_mask=mask))
    for token in ids(2, 5, seed=5).T:
        x = torch.cat([x, token[:, None]], dim=1)
        if mask is not None:
            mask = torch.cat([mask, torch.zeros(2, 1, dtype=torch.bool)], dim=1)
        cached = model(token[:, None], cache=cache)
        torch.testing.assert_close(cached[:, -1], model(x, prefix_len, pad_mask=mask)[:, -1])


@torch.no_grad()
def test_cache_of_one_latent_and_no_prefix(model: PerceiverAR) -> None:
    x = ids(2, 8)
    cache = model.make_cache()
    steps = [model(x[:, i : i + 1], cache=cache) for i in range(8)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(x, 0))


@torch.no_grad()
def test_cache_as_small_as_the_text_gives_the_same_as_a_full_one(model: PerceiverAR) -> None:
    x, tokens = ids(2, 10), ids(2, 6, seed=3)
    small, full = model.make_cache(max_tokens=16), model.make_cache()
    assert small.cross_attention.capacity == 16
    torch.testing.assert_close(model(x, 6, cache=small), model(x, 6, cache=full))
    for token in tokens.T:
        torch.testing.assert_close(model(token[:, None], cache=small), model(token[:, None], cache=full))


@torch.no_grad()
def test_cache_forgets_tokens_that_left_the_window(model: PerceiverAR) -> None:
    outputs = []
    for first in (0, 1):
        cache = model.make_cache()
        x = ids(1, 24)
        x[0, 0] = first
        model(x, 16, cache=cache)
        outputs.append(torch.cat([model(token[None, None], cache=cache) for token in ids(1, 30, seed=2)[0]], dim=1))
    # Each of the 3 self-attention layers hands on what 7 latents before knew, so 21 steps after the prompt it is gone.
    assert not torch.isclose(outputs[0][:, :15], outputs[1][:, :15]).all(dim=-1).any()
    torch.testing.assert_close(outputs[0][:, 21:], outputs[1][:, 21:])


@pytest.mark.parametrize("mode", ["uncached_documented", "cached"])
@torch.no_grad()
def test_golden_generation(shared: Path, mode: str) -> None:
    generation = json.loads((shared / "golden/generation.json").read_text())
    decode = greedy_cached if mode == "cached" else greedy_uncached
    for case in generation["cases"]:
        model, _, _ = golden.load_model(shared / "golden", case["weights"])
        pad_mask = torch.tensor(case["pad_mask"], dtype=torch.bool)
        mask = pad_mask if pad_mask.any() else None
        new = decode(model.eval(), torch.tensor(case["prompt"]), mask, case["num_latents"], generation["new_tokens"])
        assert new.tolist() == case["expected_new_ids"][mode], case["label"]
