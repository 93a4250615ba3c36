"""Images a second of the data path of img-clf-imagenet on one core, beside torchvision's ImageFolder and DataLoader on the same work.

    python -m benchmarks.image_path [FOLDER] [--images 400] [--repeats 3]

Work: decode, random part scaled to 224 x 224, mirror, RandAugment (4 operations, magnitude 5), a batch of 64 uint8 images. Ours: what a
data task does (shards read, rows in the order of the epoch, `Task.decode`) and the worker's `collate`. Theirs: ImageFolder with
torchvision.io's decoder and torchvision.transforms.v2, DataLoader without workers. Both in this process on one thread, in turns. Without
a folder of class folders, 500 x 375 JPEGs are made (quality 90).
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

BATCH = 64


def made(folder: Path, number: int) -> Path:
    """JPEGs of smooth colours with texture, in two classes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(number):
        path = folder / "photos" / ("even", "odd")[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
        fine = np.asarray(coarse, np.int16) + rng.normal(0, 8, (375, 500, 3))
        Image.fromarray(np.clip(fine, 0, 255).astype(np.uint8)).save(path, quality=90)
    return folder / "photos"


def ours(source: Path, home: Path):
    """A function that goes through an epoch and says how many images it saw."""
    import ray_jobs.ray_env
    from perceiver.datasets import Dataset
    from perceiver.tasks import build_task
    from perceiver.training.batches import make_loader
    from ray_jobs import passes
    from ray_jobs.cli import parse_experiment
    from ray_jobs.preprocess import prepare

    passes.in_parallel = lambda function, items: ((i, function(i)) for i in items)
    ray_jobs.ray_env.connect = lambda parallel: nullcontext()
    given = ["img-clf-imagenet", "--data.source", str(source), "--data.root", str(home), "--model.output.num-classes", "0"]
    words = ["--task.mixup", "0", "--task.cutmix", "0", "--data.val-fraction", "0.02", "--training.global-batch-size", str(BATCH)]
    experiment = parse_experiment([*given, *words], "ray_jobs.preprocess")
    manifest = prepare(experiment)
    task, folder = build_task(experiment), Dataset.find(experiment).folder
    split = manifest.splits["train"]
    loader = make_loader(task, folder, split, True, data=experiment.data, training=replace(experiment.training, global_batch_size=BATCH))
    steps = -(-split.rows // BATCH)

    def epoch(number: int) -> int:
        first = number * steps
        batches = loader.steps(lambda own, units: map(own.read, units), 0, 1, first, first + steps)
        return sum(int((batch["labels"] >= 0).sum()) for (batch,) in batches)

    return epoch


def theirs(source: Path):
    """The same with torchvision and DataLoader."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    changes = v2.Compose(
        [v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip(), v2.RandAugment(4, 5, num_magnitude_bins=11)]
    )
    data = ImageFolder(str(source), changes, loader=lambda path: decode_image(path, ImageReadMode.RGB, apply_exif_orientation=True))
    loader = DataLoader(data, batch_size=BATCH, shuffle=True)
    return lambda number: sum(len(images) for images, _ in loader)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        source = args.folder or made(Path(home), args.images)
        paths = {"ours": ours(source, Path(home) / "data"), "torchvision + DataLoader": theirs(source)}
        rates: dict[str, list[float]] = {name: [] for name in paths}
        for number in range(args.repeats + 1):  # the first round warms up
            for name, epoch in paths.items():
                started = time.process_time()
                count = epoch(number)
                rates[name].append(count / (time.process_time() - started))
        medians = {name: statistics.median(found[1:]) for name, found in rates.items()}
    for name, rate in medians.items():
        print(f"{name:26} {rate:7.1f} images/s of a core ({', '.join(f'{r:.1f}' for r in rates[name][1:])})")
    print(f"ours / theirs: {medians['ours'] / medians['torchvision + DataLoader']:.2f}")


if __name__ == "__main__":
    main()
