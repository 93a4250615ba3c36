"""A baseline for weather.py: a plain Transformer encoder under the same task, data and optimizer."""

from dataclasses import replace

import torch
from torch import nn
from weather import FUTURE, PAST, SENSORS, tiny

from perceiver.config import ModelConfig
from perceiver.models.initialize import initialize


class TransformerConfig(ModelConfig):
    """PyTorch's Transformer encoder over the hours; the last one's features are mapped to the forecast."""

    num_channels: int = 64
    """Channels of all layers."""
    num_heads: int = 4
    """Heads of the attention."""
    num_layers: int = 3
    """Encoder layers."""

    def build(self):
        return Transformer(self)


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.num_channels
        self.positions = nn.Parameter(torch.empty(PAST, width))
        self.input = nn.Linear(SENSORS, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, config.num_heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(config.num_layers)
        )
        self.output = nn.Linear(width, FUTURE * SENSORS)

    def layers(self):
        return list(self.blocks)

    def init_weights(self, seed):
        initialize(self, 0.1, seed)

    def reset_buffers(self):
        """Has none."""

    def forward(self, past):
        """past (B, hours, sensors) -> (B, hours to come, sensors)"""
        x = self.input(past) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.output(x[:, -1]).unflatten(-1, (FUTURE, SENSORS))


def baseline():
    return replace(tiny(), model=TransformerConfig())
