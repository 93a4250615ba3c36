"""Attention: what is seen, dropout, and the ring of the key/value cache."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from perceiver.models import attend as kernels
from perceiver.models.attend import LONG_ENOUGH_TO_SPLIT, attend, head_sizes, pad_heads
from perceiver.models.attention import KeyValueCache
from perceiver.models.dropout import softmax_drop
from perceiver.models.perceiver_ar import causal_padding_mask
from perceiver.models.position import fourier_features, rotation, token_positions


def heads(length: int, channels: int, seed: int) -> Tensor:
    return torch.randn(2, 3, length, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The definition: softmax(q k^T / sqrt(d)) v over what the mask lets through."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def right_aligned(num_queries: int, num_keys: int) -> Tensor:
    """Query i sees key j where j <= num_keys - num_queries + i."""
    i, j = torch.arange(num_queries)[:, None], torch.arange(num_keys)
    return j <= num_keys - num_queries + i


@pytest.mark.parametrize("value_channels", [8, 5])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(6, 6), (4, 9), (1, 9)])
def test_causal_attention_is_aligned_at_the_right_ends(num_queries: int, num_keys: int, value_channels: int) -> None:
    q, k, v = heads(num_queries, 8, 0), heads(num_keys, 8, 1), heads(num_keys, value_channels, 2)
    expected = plain(q, k, v, right_aligned(num_queries, num_keys))
    torch.testing.assert_close(attend(q, k, v, causal=True), expected)


@pytest.mark.parametrize("value_channels", [8, 5])
def test_long_causal_attention_in_parts_equals_the_definition_in_value_and_gradient(value_channels: int) -> None:
    length = 2 * LONG_ENOUGH_TO_SPLIT + 3
    inputs = [heads(length, channels, seed)[:1, :1] for seed, channels in enumerate((8, 8, value_channels))]
    results = []
    for function in (lambda *t: attend(*t, causal=True), lambda *t: plain(*t, right_aligned(length, length))):
        tensors = [t.clone().requires_grad_() for t in inputs]
        out = function(*tensors)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        results.append([out.detach(), *(t.grad for t in tensors)])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("value_channels", [8, 5])
def test_masks_are_obeyed(value_channels: int) -> None:
    q, k, v = heads(4, 8, 0), heads(9, 8, 1), heads(9, value_channels, 2)
    mask = torch.rand(2, 1, 4, 9) > 0.4
    mask[..., 0] = True
    torch.testing.assert_close(attend(q, k, v, mask=mask), plain(q, k, v, mask.expand(2, 3, 4, 9)))


@pytest.mark.parametrize("causal", [False, True])
def test_dropout_keeps_the_mean_of_attention(causal: bool) -> None:
    q, k, v = heads(4, 8, 0), heads(9, 8, 1), heads(9, 8, 2)
    torch.manual_seed(0)
    mean = torch.stack([attend(q, k, v, causal=causal, dropout=0.3) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, attend(q, k, v, causal=causal), atol=0.08, rtol=0)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.999])
def test_dropout_zeroes_the_wanted_share_of_weights_and_nothing_else(probability: float) -> None:
    torch.manual_seed(0)
    scores = torch.rand(333, 3001)  # a size that no 64-bit number ends with
    weights = scores.softmax(-1)
    dropped, scale = softmax_drop(scores, probability)
    zero = dropped == 0
    assert abs(float(zero.double().mean()) - probability) < 2e-3
    torch.testing.assert_close(dropped[~zero], weights[~zero], atol=0, rtol=0)
    assert abs(scale - 1 / (1 - probability)) < 0.02 * scale
    # Neighbours, four of which share a random number, are independent.
    together = (zero[:, 1:] & zero[:, :-1]).double().mean()
    assert abs(float(together) - probability**2) < 3e-3


@pytest.mark.parametrize("masked", [False, True])
def test_dropout_has_the_bits_of_softmax_and_masked_fill_forward_and_backward(masked: bool) -> None:
    scores, gradient = torch.randn(3, 7, 33, generator=torch.Generator().manual_seed(0)), torch.randn(3, 7, 33)
    if masked:
        scores = scores.masked_fill(torch.arange(33) % 3 == 1, -torch.inf)
    scores[0, 0, 0] = 200.0  # the other weights of this row underflow to 0
    fused, plain = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    torch.manual_seed(1)
    dropped, _ = softmax_drop(fused, 0.3)
    dropped.backward(gradient)
    torch.manual_seed(1)
    numbers = torch.empty(-(-scores.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    decided = numbers.view(torch.int16)[: scores.numel()].view_as(scores) < round(0.3 * 2**16) - 2**15
    expected = plain.softmax(-1).masked_fill(decided, 0.0)
    expected.backward(gradient)
    assert torch.equal(dropped, expected)
    assert torch.equal(fused.grad, plain.grad)


def test_dropout_follows_the_seed_and_probability_zero_draws_nothing() -> None:
    scores = torch.rand(10, 10)
    torch.manual_seed(3)
    first, _ = softmax_drop(scores, 0.5)
    torch.manual_seed(3)
    second, _ = softmax_drop(scores, 0.5)
    assert torch.equal(first, second)
    state = torch.get_rng_state()
    undisturbed, scale = softmax_drop(scores, 0.0)
    assert torch.equal(undisturbed, scores.softmax(-1))
    assert scale == 1.0
    assert torch.equal(torch.get_rng_state(), state)


def test_ring_keeps_the_newest() -> None:
    cache = KeyValueCache(capacity=4)
    numbers = torch.arange(9.0).view(1, 1, 9, 1)
    first, _ = cache.append(numbers[:, :, :3], -numbers[:, :, :3])
    assert first.flatten().tolist() == [0, 1, 2]
    for i in range(3, 9):
        keys, values = cache.append(numbers[:, :, i : i + 1], -numbers[:, :, i : i + 1])
        assert sorted(keys.flatten().tolist()) == list(range(max(0, i - 3), i + 1))
        assert torch.equal(keys, -values)


def test_padding_masks_leave_no_query_without_a_key() -> None:
    pad_mask = torch.tensor([[True] * 6, [True, True, False, False, False, False]])
    mask = causal_padding_mask(pad_mask, 3)[:, 0]
    assert mask.any(-1).all()
    assert torch.equal(mask[0], torch.eye(6, dtype=torch.bool)[3:])
    assert torch.equal(mask[1], right_aligned(3, 6) & ~pad_mask[1])


def test_positions_start_at_the_first_token_that_is_not_padding() -> None:
    x = torch.zeros(2, 5, dtype=torch.long)
    pad_mask = torch.tensor([[False] * 5, [True, True, False, False, False]])
    assert token_positions(x, pad_mask).tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]
    assert token_positions(x, None).tolist() == [[0, 1, 2, 3, 4]]


def test_rotated_scores_depend_on_distance_alone() -> None:
    q, k = heads(1, 8, 0), heads(1, 8, 1)

    def score(position_q: int, position_k: int) -> Tensor:
        turn_q, turn_k = (rotation(torch.tensor([[p]]), 6) for p in (position_q, position_k))
        return (turn_q(q) * turn_k(k)).sum(-1)

    torch.testing.assert_close(score(7, 3), score(1004, 1000), atol=1e-4, rtol=0)
    assert not torch.allclose(score(7, 3), score(7, 4), atol=1e-3)


def test_rotation_leaves_the_other_channels_and_all_lengths_alone() -> None:
    q = heads(5, 8, 0)
    turned = rotation(torch.arange(5)[None], 6)(q)
    assert torch.equal(turned[..., 6:], q[..., 6:])
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1), atol=1e-6, rtol=0)
    assert torch.equal(turned[:, :, 0], q[:, :, 0])


def test_fourier_features_of_a_grid() -> None:
    features = fourier_features((3, 5), 4)
    assert features.shape == (15, 2 * (2 * 4 + 1))
    assert features[:, :2].view(3, 5, 2)[2, 0].tolist() == [1.0, -1.0]
    # Second axis: frequencies 1 .. 5 / 2, its sines come after those of the first.
    frequencies = torch.linspace(1, 2.5, 4)
    x = torch.linspace(-1, 1, 5)[1]
    torch.testing.assert_close(features.view(3, 5, -1)[0, 1, 6:10], torch.sin(torch.pi * x * frequencies))
    torch.testing.assert_close(features.view(3, 5, -1)[0, 1, 14:18], torch.cos(torch.pi * x * frequencies))


def test_gpus_are_given_no_causal_mask_but_the_kernels_own_alignment() -> None:
    bias = kernels.right_aligned(3, 5, torch.device("cuda"))
    assert isinstance(bias, CausalBias) and (bias.seq_len_q, bias.seq_len_kv) == (3, 5)
    assert bias._materialize().equal(right_aligned(3, 5))
    assert kernels.right_aligned(3, 5, torch.device("cpu")).equal(right_aligned(3, 5))


@pytest.mark.parametrize(
    ("sizes", "masked", "expected"),
    [
        ((128, 128), False, (128, 128, 128)),
        ((32, 160), False, (160, 160, 160)),
        ((131, 131), False, (136, 136, 136)),
        ((32, 160), True, (32, 32, 160)),
        ((131, 40), True, (136, 136, 40)),
        ((261, 1024), False, (264, 264, 1024)),
    ],
)
def test_heads_are_filled_up_to_one_size_where_the_flash_kernel_takes_them(sizes, masked, expected) -> None:
    assert head_sizes(*sizes, masked) == expected


def test_heads_that_are_filled_up_give_the_same_attention() -> None:
    q, k, v = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 6, 5), torch.randn(2, 3, 6, 9)
    filled = F.scaled_dot_product_attention(*(pad_heads(t, 16) for t in (q, k, v)), scale=5**-0.5)
    assert torch.allclose(filled[..., :9], attend(q, k, v), atol=1e-6)
    assert filled[..., 9:].abs().max() == 0
