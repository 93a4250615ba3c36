"""What tests of preparation and evaluation share: small inputs of every kind, and both jobs without Ray."""

import gzip
import json
import struct
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from perceiver import presets
from perceiver.config import Experiment
from perceiver.data.columns import fixed_array
from perceiver.data.manifest import Manifest
from perceiver.data.shards import read_block
from perceiver.datasets import Dataset
from perceiver.training.batches import read_here, val_loaders
from perceiver.training.metrics import evaluate
from perceiver.training.parallel import join_world
from perceiver.training.run import build_state
from perceiver.training.state import load_average, load_model
from ray_jobs import passes, streaming


def serially(monkeypatch) -> None:
    """Makes `preprocess.prepare` run its jobs one after the other in this process."""
    import ray_jobs.ray_env

    for module in (passes, streaming):
        monkeypatch.setattr(module, "in_parallel", lambda function, items: ((i, function(i)) for i in items))
    monkeypatch.setattr(ray_jobs.ray_env, "connect", lambda parallel: nullcontext())


def evaluating_here(monkeypatch) -> None:
    """Makes `evaluate.evaluate_run` do its workers' part in this process."""
    serially(monkeypatch)
    monkeypatch.setattr("ray_jobs.driver.evaluate_checkpoint", _evaluate_here)
    monkeypatch.setattr("ray_jobs.evaluate.plan_resources", lambda experiment: None)


def _evaluate_here(experiment, dataset, run_folder, resources, checkpoint, origin=None, averaged=False):
    """What Ray's workers do for an evaluation."""
    data, training, world = dataset.experiment.data, experiment.training, join_world(torch.device("cpu"))
    task = experiment.task.build(experiment.model, data, training.seed)
    model = build_state(experiment, task, world).model
    load_model(checkpoint, model)
    if averaged:
        load_average(checkpoint, model)
    size, examples = experiment.parallel.micro_batch_size, {}
    loaders = val_loaders(
        task, dataset.folder, dataset.manifest, data=data, training=training, micro_batch_size=size, numbered=True
    )  # fmt: skip
    metrics, sums, _ = evaluate(task, model, loaders, world, read_here, keep=examples.__setitem__)
    return {"metrics": metrics, "sums": {name: value.tolist() for name, value in sums.items()}, "examples": examples}


def experiment(preset: str, root: Path | str, source: Path | str, length: int = 16, **data) -> Experiment:
    """A preset with small rows, blocks and shards."""
    base = presets.PRESETS[preset]()
    settings = {"rows_per_block": 4, "blocks_per_shard": 3, "root": str(root), "source": str(source)} | data
    model = base.model
    if hasattr(model, "max_seq_len"):
        model = replace(model, max_seq_len=length)
    elif hasattr(model.input, "max_seq_len"):
        model = replace(model, input=replace(model.input, max_seq_len=length))
    return replace(base, model=model, data=replace(base.data, **settings))


def load_prepared(experiment: Experiment) -> tuple[str, Manifest]:
    """Folder and manifest of an experiment's prepared data."""
    found = Dataset.find(experiment)
    return found.folder, found.manifest


def texts(num: int = 40, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghij é\n"))
    return ["".join(rng.choice(letters, int(n))) for n in rng.integers(1, 80, num)]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def write_parquet(path: Path, rows: list[dict], rows_per_group: int = 7) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=rows_per_group)


def write_idx(folder: Path, split: str, num: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (num, 28, 28), np.uint8)
    (folder / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, num, 28, 28) + pixels.tobytes())
    labels = rng.integers(0, 10, num, np.uint8)
    (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(struct.pack(">2i", 2049, num) + labels.tobytes()))


def rows_of(folder: str, manifest: Manifest, split: str) -> pa.Table:
    """All logical rows of a split."""
    part = manifest.splits[split]
    blocks = [read_block(folder, part, b).slice(0, part.block_rows(b)) for b in range(part.num_blocks)]
    return pa.concat_tables(blocks)


def stream_of(folder: str, manifest: Manifest, split: str) -> np.ndarray:
    """The ids of a token split: all logical rows, and the row after the last one."""
    part = manifest.splits[split]
    tables = [
        rows_of(folder, manifest, split),
        read_block(folder, part, part.num_blocks - 1).slice(part.block_rows(part.num_blocks - 1)),
    ]
    flat = np.concatenate([fixed_array(table, "tokens").reshape(-1) for table in tables])
    assert not flat[part.tokens :].any()
    return flat[: part.tokens]


def content(folder: str | Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
