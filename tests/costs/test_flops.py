"""FLOPs from the configuration are those that PyTorch counts while the model runs."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from perceiver.config import ModelConfig
from perceiver.costs import flops
from perceiver.models import ClassOutput, build_model
from perceiver.presets import PRESETS
from tests.models.test_perceiver_ar import CONFIG as AR
from tests.models.test_perceiver_io import FLOW, IMAGE, TEXT


def counted(config: ModelConfig, *args: torch.Tensor | int, backward: bool = False, **kwargs: torch.Tensor) -> int:
    model = build_model(config).train(backward)
    if hasattr(model, "encoder"):
        model.encoder.factored = False
    with FlopCounterMode(display=False) as counter:
        out = model(*args, **kwargs)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


IDS = torch.randint(0, 40, (1, 12))


def test_forward_flops_of_perceiver_io() -> None:
    assert flops.forward_flops(TEXT).total == counted(TEXT, IDS)
    assert flops.forward_flops(TEXT, seq_len=7).total == counted(TEXT, IDS[:, :7])
    positions = torch.tensor([[1, 2, 5]])
    assert flops.forward_flops(TEXT, num_queries=3).total == counted(TEXT, IDS, positions=positions)
    classes = replace(TEXT, output=ClassOutput(num_queries=2, num_query_channels=8))
    assert flops.forward_flops(classes).total == counted(classes, IDS)
    assert flops.forward_flops(IMAGE).total == counted(IMAGE, torch.rand(1, 6, 4, 2))
    assert flops.forward_flops(FLOW).total == counted(FLOW, torch.rand(1, 2, 3, 6, 4))


def test_forward_flops_of_perceiver_ar() -> None:
    x = torch.randint(0, 50, (1, 24))
    assert flops.forward_flops(AR).total == counted(AR, x, 16)
    assert flops.forward_flops(AR, seq_len=10).total == counted(AR, x[:, :10], 2)
    assert flops.forward_flops(AR, seq_len=5).total == counted(AR, x[:, :5], 0)
    keep = torch.arange(6)[None]
    assert flops.forward_flops(AR, prefix_len=6).total == counted(AR, x, 16, prefix_keep=keep)


def test_training_flops_are_forward_and_backward_with_prefix_dropout() -> None:
    x = torch.randint(0, 50, (1, 24))
    config = replace(AR, cross_attention_dropout=0.4)
    keep = torch.arange(flops.num_kept(16, 0.4))[None]
    # PyTorch counts the scores once more in the backward pass of fused attention, which recomputes them.
    recomputed = sum(2 * 8 * keys * config.num_channels for keys in (keep.shape[1] + 8, *[8] * config.num_self_attention_layers))
    assert flops.training_flops(config) == counted(config, x, 16, prefix_keep=keep, backward=True) - recomputed


def test_training_flops_of_a_frozen_encoder_are_forward_and_the_decoders_backward() -> None:
    config = replace(TEXT, output=ClassOutput(num_query_channels=8))
    frozen = replace(config, encoder=replace(config.encoder, freeze=True))
    forward = flops.forward_flops(config)
    assert flops.training_flops(frozen) == forward.total + 2 * (forward.queries + forward.output)
    assert flops.training_flops(config) == 3 * forward.total


def test_prefix_dropout_keeps_what_the_recipe_keeps() -> None:
    assert flops.num_kept(3584, 0.5) == 1792
    assert flops.num_kept(7, 0.1) == 7
    assert flops.num_kept(10, 0.25) == 8


@pytest.mark.parametrize("name", ["clm-wikitext", "mlm-imdb", "img-clf-mnist", "img-clf-imagenet"])
def test_flops_of_the_published_models_are_those_published_within_a_few_percent(name: str) -> None:
    published = {
        "clm-wikitext": 226.31 / 2,
        "mlm-imdb": 362.85,
        "img-clf-mnist": 78.68 / 128,
        "img-clf-imagenet": 1218.37,
    }
    gflop = flops.training_flops(PRESETS[name]().model) / 1e9
    assert gflop == pytest.approx(published[name], rel=0.05)
