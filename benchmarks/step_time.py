"""Time of a training step against the bound that the machine's matrix products set.

    python -m benchmarks.step_time [--workloads img-clf-mnist clm-wikitext mlm-imdb] [--repeats 5] [--out results.json]
    python -m benchmarks.step_time --workloads optical-flow --with-transformers --threads 1 --cpu-time --repeats 1
    python -m benchmarks.step_time --precision fp32 bf16

A step is zero_grad, forward, loss, backward and a fused AdamW step, in float32 (or, with --precision bf16, as `--training.precision
bf16` trains: parameters in float32, computed with copies in bfloat16), with the dropouts of the preset. The
bound is the GFLOP of the reference implementation's model (krasserm/perceiver-io, constants below; for optical flow and
video that of transformers, counted by PyTorch) divided by the rate of a large square float32 product, measured between
the steps in the same process. The ratio of the two carries over between machines; times do not. Peak memory is that of a
process which does nothing else. Where `transformers` is installed, its Perceiver can run beside ours where it has the same
model (--with-transformers).
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.costs.flops import num_kept
from perceiver.models import build_model
from perceiver.presets import PRESETS
from perceiver.training.parallel import reuse_freed_memory
from perceiver.training.whole import compute_in

MATMUL_SIZE = 3072
OURS = {"fp32": "ours", "bf16": "ours bf16"}
"""This project's side in each precision."""
Clock = Callable[[], float]
T = TypeVar("T")


@dataclass(frozen=True)
class Workload:
    """What is timed. The loss gets a model and a batch."""

    batch_size: int
    reference_gflop: float
    """Of the reference's model: forward and backward of the whole batch, as its own step computes it."""
    goal: float | None
    """Ratio to the bound that is aimed at."""
    batch: Callable[[int], dict[str, Tensor]]
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor]


def image_batch(size: int, shape: tuple[int, ...], num_classes: int) -> dict[str, Tensor]:
    return {"x": torch.rand(size, *shape) * 2 - 1, "labels": torch.randint(num_classes, (size,))}


def event_batch(size: int) -> dict[str, Tensor]:
    """Windows of 2,048 events with 1,024 latents; a tenth of the prefix is dropped."""
    ids = torch.randint(388, (size, 2049))
    keep = torch.rand(size, 1024).topk(num_kept(1024, 0.1)).indices.sort().values
    return {"x": ids[:, :-1], "labels": ids[:, -1024:], "prefix_keep": keep}


def event_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["x"], 1024, prefix_keep=batch["prefix_keep"])
    return F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten())


def flow_batch(size: int) -> dict[str, Tensor]:
    """Features of pairs of frames of 368 x 496 pixels."""
    return {"x": torch.randn(size, 2, 27, 368, 496), "flow": torch.randn(size, 368, 496, 2)}


def flow_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (model(batch["x"]) - batch["flow"]).abs().mean()


def video_batch(size: int) -> dict[str, Tensor]:
    """Videos with sound, of which a step asks for one of 128 parts: 6,272 points and 15 groups of samples."""
    points = {"asked_video": torch.randperm(802_816)[:6272], "asked_audio": torch.randperm(1920)[:15]}
    video, audio = torch.rand(size, 16, 224, 224, 3), torch.rand(size, 30_720) * 2 - 1
    return {"video": video, "audio": audio, "labels": torch.randint(700, (size,)), **points}


def video_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    said = model({**batch, "label": torch.full_like(batch["labels"], -1)})
    return autoencoding_loss(said["video"], said["audio"], said["label"], batch)


def autoencoding_loss(video: Tensor, audio: Tensor, label: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """With the weights of the preset."""
    colours = batch["video"].flatten(1, 3)[:, batch["asked_video"]]
    samples = batch["audio"].unflatten(1, (-1, 16))[:, batch["asked_audio"]]
    errors = 0.03 * (video.flatten(1) - colours.flatten(1)).abs().mean() + (audio.flatten(1) - samples.flatten(1)).abs().mean()
    return errors + 1e-4 * F.cross_entropy(label, batch["labels"])


def classification_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]).float(), batch["labels"])


def text_batch(size: int) -> dict[str, Tensor]:
    """Windows of 4,096 bytes with 512 latents; half of the prefix is kept."""
    ids = torch.randint(6, 262, (size, 4097))
    kept = num_kept(3584, 0.5)
    keep = torch.rand(size, 3584).topk(kept).indices.sort().values
    return {"x": ids[:, :-1], "labels": ids[:, -512:], "prefix_keep": keep}


def causal_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["x"], 3584, prefix_keep=batch["prefix_keep"])
    return F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten())


def masked_batch(size: int) -> dict[str, Tensor]:
    """2,048 bytes, 15% of which carry a label."""
    x = torch.randint(6, 262, (size, 2048))
    positions = torch.rand(size, 2048).topk(307).indices.sort().values
    return {"x": x, "positions": positions, "labels": x.gather(1, positions)}


def masked_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["x"], positions=batch["positions"])
    return F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten())


WORKLOADS = {
    "img-clf-mnist": Workload(128, 78.68, 1.0, lambda b: image_batch(b, (28, 28, 1), 10), classification_loss),
    "clm-wikitext": Workload(2, 226.31, 1.2, text_batch, causal_loss),
    "mlm-imdb": Workload(1, 362.85, 1.3, masked_batch, masked_loss),
    "sam-maestro": Workload(1, 241.85, 1.4, event_batch, event_loss),
    "img-clf-imagenet": Workload(1, 1218.37, None, lambda b: image_batch(b, (224, 224, 3), 1000), classification_loss),
    "optical-flow": Workload(1, 5658.97, None, flow_batch, flow_loss),
    "multimodal-kinetics": Workload(1, 921.85, None, video_batch, video_loss),
}


# --------------------------------------------------------------------------------------------------------- transformers


def transformers_step(name: str, batch: dict[str, Tensor]) -> tuple[nn.Module, Callable[[nn.Module], Tensor]] | None:
    """The same model by transformers and its loss; None for workloads that it does not have."""
    from transformers import (
        PerceiverConfig,
        PerceiverForImageClassificationFourier,
        PerceiverForMaskedLM,
        PerceiverForMultimodalAutoencoding,
        PerceiverForOpticalFlow,
    )

    if name == "mlm-imdb":
        model = PerceiverForMaskedLM(PerceiverConfig(qk_channels=256, v_channels=1280))
        labels = torch.full_like(batch["x"], -100).scatter(1, batch["positions"], batch["labels"])
        return model, lambda m: m(inputs=batch["x"], labels=labels).loss
    if name == "img-clf-imagenet":
        config = PerceiverConfig(
            num_latents=512, d_latents=1024, d_model=261, num_blocks=8, num_self_attends_per_block=6,
            num_cross_attention_heads=1, num_labels=1000, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        images = batch["x"].permute(0, 3, 1, 2).contiguous()
        model = PerceiverForImageClassificationFourier(config)
        return model, lambda m: m(inputs=images, labels=batch["labels"]).loss
    if name == "optical-flow":
        config = PerceiverConfig(
            num_latents=2048, d_latents=512, d_model=322, num_blocks=1, num_self_attends_per_block=24, num_self_attention_heads=16,
            num_cross_attention_heads=1, train_size=[368, 496], attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return PerceiverForOpticalFlow(config), lambda m: (m(inputs=batch["x"]).logits - batch["flow"]).abs().mean()
    if name == "multimodal-kinetics":
        config = PerceiverConfig(
            num_latents=784, d_latents=512, d_model=704, num_blocks=1, num_self_attends_per_block=8, num_self_attention_heads=8,
            num_cross_attention_heads=1, num_frames=16, image_size=56, audio_samples_per_frame=1920, samples_per_patch=16,
            output_shape=[1, 16, 224, 224], num_labels=700, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        size = len(batch["labels"])
        image, audio = batch["video"].permute(0, 1, 4, 2, 3).contiguous(), batch["audio"][..., None]
        inputs = {"image": image, "audio": audio, "label": torch.zeros(size, 700)}
        asked = {"image": batch["asked_video"], "audio": batch["asked_audio"], "label": None}

        def of_video(m: nn.Module) -> Tensor:
            said = m(inputs=inputs, subsampled_output_points=asked).logits
            return autoencoding_loss(said["image"], said["audio"], said["label"], batch)

        return PerceiverForMultimodalAutoencoding(config), of_video
    return None


# ------------------------------------------------------------------------------------------------------------ measuring


def matmul_rate(a: Tensor, b: Tensor, out: Tensor, clock: Clock) -> float:
    """FLOP/s of one large square product."""
    start = clock()
    torch.mm(a, b, out=out)
    return 2 * MATMUL_SIZE**3 / (clock() - start)


def timed_step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], clock: Clock = time.perf_counter) -> tuple[float, float]:
    """Seconds of a whole step, and of its forward and backward pass."""
    start = clock()
    optimizer.zero_grad()
    loss().backward()
    middle = clock()
    optimizer.step()
    return clock() - start, middle - start


def build_side(name: str, side: str, threads: int) -> tuple[nn.Module, Callable[[], Tensor], torch.optim.Optimizer] | None:
    """A model, its loss on a fixed batch and its optimizer; None where transformers does not have the model.

    Args:
        side: "ours", "ours bf16" or "transformers".
    """
    torch.set_num_threads(threads)
    reuse_freed_memory()
    torch.manual_seed(0)
    workload = WORKLOADS[name]
    batch = workload.batch(workload.batch_size)
    if side in OURS.values():
        model, loss = build_model(PRESETS[name]().model), workload.loss
        if side == OURS["bf16"]:
            compute_in(torch.bfloat16, model, model.layers())
        step = lambda: loss(model, batch)  # noqa: E731
    elif other := transformers_step(name, batch):
        model, other_loss = other
        step = lambda: other_loss(model)  # noqa: E731
    else:
        return None
    return model.train(), step, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def peak_memory(name: str, side: str, threads: int) -> float:
    """Peak resident memory in MiB of a process that does three steps and nothing else. Run in a fresh process."""
    _, loss, optimizer = build_side(name, side, threads)
    for _ in range(3):
        timed_step(optimizer, loss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, repeats: int, threads: int, asked: list[str], cpu_time: bool) -> list[dict[str, float | str]]:
    """Rows for one workload, medians over the repeats. Run in a fresh process.

    Args:
        asked: the sides, measured alternately; one that does not have the workload is left out.
    """
    clock = time.process_time if cpu_time else time.perf_counter
    sides = {side: built for side in asked if (built := build_side(name, side, threads))}
    if not sides:
        return []
    a, b, out = torch.rand(3, MATMUL_SIZE, MATMUL_SIZE).unbind()
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    rates = []
    for repeat in range(-1, repeats):  # the first is to warm up
        for side, (_, loss, optimizer) in sides.items():
            seconds = timed_step(optimizer, loss, clock)
            rate = matmul_rate(a, b, out, clock)
            if repeat >= 0:
                times[side].append(seconds)
                rates.append(rate)
    rate = statistics.median(rates)
    rows = []
    for side, seconds in times.items():
        step, passes = (statistics.median(column) for column in zip(*seconds, strict=True))
        rows.append(
            {
                "workload": name,
                "implementation": side,
                "step_ms": 1e3 * step,
                "forward_backward_ms": 1e3 * passes,
                "matmul_gflop_per_s": rate / 1e9,
                "ratio_to_bound": step * rate / (WORKLOADS[name].reference_gflop * 1e9),
            }
        )
    return rows


def apart(function: Callable[..., T], *arguments: object) -> T:
    """What a function returns in a process of its own; an error where that is ended (out of memory, say)."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=[n for n, w in WORKLOADS.items() if w.goal])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", nargs="+", choices=OURS, default=["fp32"], help="of this project's step, measured alternately")
    parser.add_argument("--with-transformers", action="store_true")
    parser.add_argument("--apart", action="store_true", help="one after the other, where models do not fit into memory beside each other")
    parser.add_argument("--cpu-time", action="store_true", help="measure processor time, on a machine with other work: with --threads 1")
    parser.add_argument("--out", type=Path, help="JSON file to write the rows to")
    args = parser.parse_args()
    rows: list[dict[str, float | str]] = []
    columns = ("step ms", "fwd+bwd", "GFLOP/s", "x bound", "goal", "RSS MiB")
    print(f"{'workload':20}{'implementation':16}" + "".join(f"{column:>9}" for column in columns))
    for name in args.workloads:
        sides = [OURS[precision] for precision in args.precision] + (["transformers"] if args.with_transformers else [])
        new = []
        for together in [[side] for side in sides] if args.apart else [sides]:
            new += apart(measure, name, args.repeats, args.threads, together, args.cpu_time)
        for row in new:
            row["peak_rss_mib"] = apart(peak_memory, name, row["implementation"], args.threads)
        for row in new:
            goal = WORKLOADS[name].goal
            print(
                f"{name:20}{row['implementation']:16}{row['step_ms']:9.0f}{row['forward_backward_ms']:9.0f}"
                f"{row['matmul_gflop_per_s']:9.1f}{row['ratio_to_bound']:9.2f}{goal or '':>9}"
                f"{row['peak_rss_mib']:9.0f}",
                flush=True,
            )
        rows += new
    if args.out:
        settings = {
            "threads": args.threads,
            "repeats": args.repeats,
            "torch": torch.__version__,
            "cpu_time": args.cpu_time,
        }
        temporary = args.out.with_suffix(".tmp")
        temporary.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2))
        os.replace(temporary, args.out)


if __name__ == "__main__":
    main()
