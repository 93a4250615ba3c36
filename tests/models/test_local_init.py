"""Models that start with attention to neighbouring positions look there, and learn what others do not."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver.config import UserError
from perceiver.interop.comparison import resolved_architecture
from perceiver.models import (
    DecoderConfig,
    EncoderConfig,
    PerceiverIO,
    PerceiverIOConfig,
    TextInput,
    TextOutput,
    attention,
    build_model,
    check_model,
)
from tests.models.test_perceiver_io import IMAGE

LENGTH, LATENTS, HEADS = 64, 32, 4
LOCAL = PerceiverIOConfig(
    num_latents=LATENTS,
    num_latent_channels=64,
    input=TextInput(vocab_size=8, max_seq_len=LENGTH, num_channels=64),
    encoder=EncoderConfig(num_cross_attention_heads=HEADS, num_self_attention_heads=HEADS, num_self_attention_layers_per_block=1),
    decoder=DecoderConfig(num_cross_attention_heads=HEADS),
    init_scale=0.1,
    init="local",
)


def attention_weights(model: PerceiverIO, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Of the input, of the latents' layer and of the output: (heads, queries, keys) for the first row of x."""
    seen, attend = [], attention.attend

    def record(q: Tensor, k: Tensor, v: Tensor, **settings: object) -> Tensor:
        seen.append((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[0])
        return attend(q, k, v, **settings)

    monkeypatch.setattr(attention, "attend", record)
    with torch.no_grad():
        model(x)
    return seen


def test_heads_start_by_looking_at_places_around_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randint(0, 8, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    inputs, within, outputs = (w.argmax(-1) for w in attention_weights(build_model(LOCAL), x, monkeypatch))
    middle = slice(4, -4)  # at the ends, heads look beyond the text
    latents = torch.arange(LATENTS)[middle]
    places = torch.stack([2 * latents + distance for distance in (-1, 0, 1, 2)])
    assert torch.equal(inputs[:, middle], places)
    assert torch.equal(within[:, middle], torch.stack([latents + distance for distance in (-2, -1, 0, 1)]))
    near = (outputs - torch.arange(LENGTH) // 2).abs()
    assert near[:, middle].max() <= 1


def test_a_model_that_starts_locally_is_the_same_model() -> None:
    local, normal = (dict(build_model(c).named_parameters()) for c in (LOCAL, replace(LOCAL, init="normal")))
    assert {n: p.shape for n, p in local.items()} == {n: p.shape for n, p in normal.items()}
    assert resolved_architecture(LOCAL) == resolved_architecture(replace(LOCAL, init="normal"))


def loss_after_training(config: PerceiverIOConfig, steps: int) -> float:
    """Loss on masked ids that equal the one before them, where all are equally frequent: ids come in pairs."""
    model, generator = build_model(config), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        labels = torch.randint(1, 8, (16, LENGTH // 2), generator=generator).repeat_interleave(2, dim=1)
        positions = 2 * torch.randint(0, LENGTH // 2, (16, 6), generator=generator) + 1
        x = labels.scatter(1, positions, 0)
        loss = F.cross_entropy(model(x, None, positions).flatten(0, 1), labels.gather(1, positions).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


def test_a_local_start_learns_from_neighbours_what_a_normal_start_does_not() -> None:
    unigram = torch.tensor(7.0).log().item()
    assert loss_after_training(LOCAL, 150) < 0.5 * unigram
    assert loss_after_training(replace(LOCAL, init="normal", init_scale=0.02), 150) > 0.95 * unigram


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(IMAGE, init="local"), "needs model.input to be TextInput"),
        (
            replace(LOCAL, input=replace(LOCAL.input, num_channels=66), decoder=DecoderConfig(num_cross_attention_heads=2)),
            "model.input.num-channels is 66",
        ),
        (replace(LOCAL, num_latent_channels=16), "model.num-latent-channels is 16 and must be at least 32"),
        (replace(LOCAL, output=TextOutput(num_query_channels=16)), "model.output.num-query-channels is 16"),
        (
            replace(LOCAL, encoder=replace(LOCAL.encoder, num_cross_attention_qk_channels=HEADS)),
            "model.encoder.num-cross-attention-qk-channels is 4 and must be at least 8",
        ),
    ],
)
def test_models_without_room_for_places_are_refused(config: PerceiverIOConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_model(config)
