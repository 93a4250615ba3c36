"""A training step of models of each newer input and output beside plain PyTorch (nn.MultiheadAttention) on the same work, in one run.

    python -m benchmarks.block_time [--repeats 9] [--only VideoInput]

The plain twin has the same adapter, sizes and heads, and its attention is nn.MultiheadAttention. Printed are the median milliseconds of
forward and backward of both, in turns, on one thread, and the megabytes that each keeps for its backward pass.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from perceiver.models import (
    ArrayInput,
    ArrayOutput,
    AudioInput,
    ClassOutput,
    ConvolutionInput,
    DecoderConfig,
    EncoderConfig,
    EventInput,
    HeadsOutput,
    LearnedPositionInput,
    LogMelInput,
    MultimodalInput,
    PerceiverIOConfig,
    Resampler,
    StemInput,
    TableInput,
    TextInput,
    ValueOutput,
    VideoInput,
    build_model,
)

LATENTS, CHANNELS, HEADS, LAYERS, BATCH = 64, 128, 4, 3, 8


class Layer(nn.Module):
    """Pre-norm attention and MLP around nn.MultiheadAttention."""

    def __init__(self, channels: int, context: int | None = None) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.context_norm = nn.LayerNorm(context) if context else None
        self.attention = nn.MultiheadAttention(channels, HEADS, kdim=context, vdim=context, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        q = self.norm(x)
        kv = q if self.context_norm is None or context is None else self.context_norm(context)
        x = x + self.attention(q, kv, kv, need_weights=False)[0]
        return x + self.mlp(self.mlp_norm(x))


class Plain(nn.Module):
    """A Perceiver IO of plain PyTorch: the adapter of the other one, and everything else its own."""

    def __init__(self, adapter: nn.Module, channels: int, queries: int | None, query_channels: int, outputs: int) -> None:
        super().__init__()
        self.adapter, self.latents = adapter, nn.Parameter(torch.randn(LATENTS, CHANNELS) * 0.02)
        self.cross, self.layers = Layer(CHANNELS, channels), nn.ModuleList(Layer(CHANNELS) for _ in range(LAYERS))
        self.queries = nn.Parameter(torch.randn(queries, query_channels) * 0.02) if queries else None
        self.decode, self.head = Layer(query_channels, CHANNELS), nn.Linear(query_channels, outputs)

    def forward(self, x: Any) -> Tensor:
        adapted = self.adapter(x)
        adapted = adapted[0] if isinstance(adapted, tuple) else adapted
        latents = self.cross(self.latents.expand(len(adapted), -1, -1), adapted)
        for layer in self.layers:
            latents = layer(latents)
        queries = adapted if self.queries is None else self.queries.expand(len(adapted), -1, -1)
        return self.head(self.decode(queries, latents))


def config(given, output) -> PerceiverIOConfig:
    return PerceiverIOConfig(
        num_latents=LATENTS,
        num_latent_channels=CHANNELS,
        input=given,
        encoder=EncoderConfig(
            num_cross_attention_heads=HEADS, num_cross_attention_qk_channels=CHANNELS, num_cross_attention_v_channels=CHANNELS,
            num_self_attention_heads=HEADS, num_self_attention_layers_per_block=LAYERS,
        ),
        decoder=DecoderConfig(num_cross_attention_heads=HEADS),
        output=output,
    )  # fmt: skip


def cases() -> dict[str, tuple[PerceiverIOConfig, Any, int | None, int]]:
    """Configuration, input, learned queries (None: the input itself), numbers of an answer."""
    one = ClassOutput(num_classes=10, num_query_channels=CHANNELS)
    heads = HeadsOutput(names=("a", "b"), heads=(one, ValueOutput(num_values=2, num_query_channels=CHANNELS)))
    tagging = ArrayOutput(num_outputs=10, ask_by="input")
    many = ArrayOutput(num_outputs=10, num_queries=512, num_query_channels=CHANNELS)
    stem = StemInput(image_shape=(128, 128, 3), patch_size=4, num_channels=48)
    sound, image = torch.randn(BATCH, 32000), torch.rand(BATCH, 64, 64, 3)
    ids = torch.randint(6, 262, (BATCH, 512))
    floats, points = torch.randn(BATCH, 1024, 3), torch.rand(BATCH, 1024, 3) * 2 - 1
    events = {"ids": ids % 16, "times": torch.rand(BATCH, 512) * 100, "values": torch.randn(BATCH, 512)}
    both = MultimodalInput(
        names=("sound", "points"),
        inputs=(AudioInput(num_samples=16000, num_frequency_bands=32), ArrayInput(num_features=3, max_positions=1024)),
    )
    return {
        "ArrayInput, learned": (config(ArrayInput(num_features=3, max_positions=1024), one), floats, 1, 10),
        "ArrayInput, rotary": (config(ArrayInput(num_features=3, max_positions=1024, positions="rotary"), one), floats, 1, 10),
        "ArrayInput, grid": (config(ArrayInput(num_features=3, positions="fourier", grid=(32, 32)), one), floats, 1, 10),
        "ArrayInput, coordinates": (
            config(ArrayInput(num_features=3, max_positions=1024, positions="fourier", num_coordinates=3), one),
            {"values": floats, "coordinates": points}, 1, 10,
        ),
        "EventInput": (config(EventInput(max_events=512), one), events, 1, 10),
        "TableInput": (config(TableInput(columns=("a", "b"), shapes=("scalar", "255")), one), floats[:, :256, 0], 1, 10),
        "StemInput, patches": (config(stem, one), torch.rand(BATCH, 128, 128, 3), 1, 10),
        "VideoInput": (config(VideoInput(video_shape=(8, 64, 64, 3)), one), torch.rand(BATCH, 8, 64, 64, 3), 1, 10),
        "MultimodalInput": (config(both, one), {"sound": sound[:, :16000], "points": floats}, 1, 10),
        "512 learned queries": (config(ArrayInput(num_features=3, max_positions=1024), many), floats, 512, 10),
        "LogMelInput": (config(LogMelInput(num_samples=32000), one), sound, 1, 10),
        "AudioInput": (config(AudioInput(num_samples=32000, num_frequency_bands=32), one), sound, 1, 10),
        "LearnedPositionInput": (config(LearnedPositionInput(image_shape=(64, 64, 3)), one), image, 1, 10),
        "ConvolutionInput": (config(ConvolutionInput(image_shape=(64, 64, 3)), one), image, 1, 10),
        "per-position head": (config(TextInput(max_seq_len=512, num_channels=CHANNELS), tagging), ids, None, 10),
        "two heads": (config(ArrayInput(num_features=8, max_positions=512), heads), torch.randn(BATCH, 512, 8), 2, 6),
    }  # fmt: skip


def step(model: nn.Module, x: Any) -> Callable[[], None]:
    def run() -> None:
        answer = model(x)
        answer = sum(part.square().mean() for part in answer.values()) if isinstance(answer, dict) else answer.square().mean()
        answer.backward()
        model.zero_grad()

    return run


def kept(run: Callable[[], None]) -> float:
    """Megabytes of the tensors that the backward pass needs, each storage once, without parameters."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not (tensor._base is not None and isinstance(tensor._base, nn.Parameter)):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(sizes.values()) / 1e6


def compared(name: str, ours: Callable[[], None], theirs: Callable[[], None], repeats: int) -> None:
    memory = kept(ours), kept(theirs)
    times: tuple[list[float], list[float]] = [], []
    for _ in range(repeats):
        for run, found in zip((ours, theirs), times, strict=True):
            started = time.perf_counter()
            run()
            found.append(1000 * (time.perf_counter() - started))
    one, other = map(statistics.median, times)
    print(
        f"{name:24} {one:8.1f} ms  plain {other:8.1f} ms  {one / other:5.2f}x   {memory[0]:7.1f} MB  plain {memory[1]:7.1f} MB", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", default="", help="cases whose names have this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, (chosen, x, queries, outputs) in cases().items():
        if args.only not in name:
            continue
        channels = chosen.input.adapted_channels()
        plain = Plain(chosen.input.build(), channels, queries, CHANNELS if queries else channels, outputs)
        for parameter in plain.adapter.parameters():
            nn.init.normal_(parameter, std=0.02)
        if hasattr(plain.adapter, "reset_buffers"):
            plain.adapter.reset_buffers()
        compared(name, step(build_model(chosen), x), step(plain, x), args.repeats)
    if args.only not in "Resampler":
        return
    resampler = Resampler(256, num_latents=LATENTS, num_channels=CHANNELS, num_layers=LAYERS, num_heads=HEADS)
    plain = Plain(nn.Linear(256, CHANNELS), CHANNELS, None, CHANNELS, 1)
    twin = nn.ModuleDict({"adapter": plain.adapter, "cross": plain.cross, "layers": plain.layers, "norm": nn.LayerNorm(CHANNELS)})

    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts, self.latents = twin, nn.Parameter(torch.randn(LATENTS, CHANNELS) * 0.02)

        def forward(self, x: Tensor) -> Tensor:
            latents = self.parts["cross"](self.latents.expand(len(x), -1, -1), self.parts["adapter"](x))
            for layer in self.parts["layers"]:
                latents = layer(latents)
            return self.parts["norm"](latents)

    x = torch.randn(BATCH, 1024, 256)
    compared("Resampler", step(resampler, x), step(Twin(), x), args.repeats)


if __name__ == "__main__":
    main()
