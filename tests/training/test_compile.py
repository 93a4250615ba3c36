"""`parallel.compile`: how often layers are compiled, counted with a compiler that leaves graphs as they are."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from perceiver.config import ParallelConfig
from perceiver.models import build_model
from perceiver.presets import PRESETS
from perceiver.training.parallel import World, build_sharded


@pytest.fixture
def graphs(monkeypatch):
    """Graphs that were compiled so far."""
    torch._dynamo.reset()
    found = []
    compile_layer = nn.Module.compile

    def leave(graph, inputs):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", lambda self, **settings: compile_layer(self, backend=leave, **settings))
    yield found
    torch._dynamo.reset()


def test_the_lengths_of_clm_c4_take_three_compilations(graphs):
    """One for the cross-attention, two for the layers after it (with and without rotation); prefixes of no and of one token, of which
    compilers have code of their own, take another each where they are drawn.
    """
    chosen = PRESETS["clm-c4"]()
    small = {"vocab_size": 64, "num_channels": 32, "num_heads": 4, "max_seq_len": 128, "max_latents": 64, "num_self_attention_layers": 4}
    config = replace(chosen.model, **small)
    with torch.device("meta"):
        model = build_model(config)
    world = World(0, 1, torch.device("cpu"), None)
    build_sharded(model, world, ParallelConfig(compile=True), chosen.training, model.layers())
    numbers = torch.Generator().manual_seed(0)
    lengths = torch.randint(config.max_latents + 2, config.max_seq_len + 1, (200,), generator=numbers).tolist()
    for length in lengths:
        model(torch.randint(64, (2, length), generator=numbers), length - config.max_latents).square().mean().backward()
    assert len(set(lengths)) > 50
    assert len(graphs) == 3
    for prefix in (0, 1, 0, 1):
        model(torch.randint(64, (2, config.max_latents + prefix)), prefix).square().mean().backward()
    assert len(graphs) == 5
