"""The bits that a change of the code must leave as they are.

`python -m tests.support.record_bits` writes them to tests/support/files/recorded_bits.json.

Three kinds: the order and content of the batches of five data sets, the final weights of small trainings, and the number of
parameters of every preset. Weights depend on the machine's arithmetic too, so they are recorded by `key()`. The command adds
this machine's, prints what differs from the record, and is run again only to change a record on purpose.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from perceiver.config import Cosine, Experiment, RunConfig, TrainingConfig
from perceiver.data.manifest import Manifest
from perceiver.datasets import data_folder
from perceiver.models import build_model
from perceiver.presets import PRESETS
from perceiver.tasks import build_task
from perceiver.training.batches import make_train_loader, read_here
from perceiver.training.parallel import join_world
from perceiver.training.run import Training
from ray_jobs.preprocess import prepare
from tests.conftest import ROOT
from tests.support.preparing import experiment as preset_experiment
from tests.support.preparing import serially, texts, write_jsonl
from tests.support.small import (
    classification_experiment,
    image_experiment,
    masked_experiment,
    text_experiment,
    write_documents,
    write_images,
    write_stream,
)
from tests.support.weights import full
from tests.training.test_training import run

RECORD = ROOT / "tests/support/files/recorded_bits.json"
EPOCHS, STEPS = 3, 50


def read_record() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


def key() -> str:
    """What trained weights depend on besides the code: torch, the kernels it chooses, and the maker of the processor.

    All trainings here compute with one thread.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    maker = next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "unknown processor")
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {maker}, 1 thread"


# ---------------------------------------------------------------------------------------------------------------- orders


def quickstart(folder: Path) -> tuple[Experiment, str, Manifest]:
    """The quickstart preset on the digits that come with the package, prepared without Ray."""
    base = PRESETS["quickstart"]()
    return _prepared(replace(base, data=replace(base.data, root=str(folder / "data"))))


def _prepared(chosen: Experiment) -> tuple[Experiment, str, Manifest]:
    with pytest.MonkeyPatch.context() as patch:
        serially(patch)
        manifest = prepare(chosen)
    return chosen, data_folder(chosen), manifest


def _tokens(folder: Path) -> tuple[Experiment, str, Manifest]:
    return text_experiment(), str(folder), write_stream(folder, _text(3000), _text(400, seed=1))


def _documents(folder: Path) -> tuple[Experiment, str, Manifest]:
    return classification_experiment(), str(folder), write_documents(folder, train=101)


def _mixture(folder: Path) -> tuple[Experiment, str, Manifest]:
    write_jsonl(folder / "web.jsonl", [{"text": text} for text in texts(300)])
    write_jsonl(folder / "books.jsonl", [{"text": text.upper()} for text in texts(30, seed=1)])
    sources = (f"{folder / 'web.jsonl'}=3", f"{folder / 'books.jsonl'}=1")
    return _prepared(_of_text(preset_experiment("clm-wikitext", folder / "data", "", mixture=sources, val_fraction=0.2)))


def _stream(folder: Path) -> tuple[Experiment, str, Manifest]:
    (folder / "in").mkdir()
    for number in range(3):
        write_jsonl(folder / "in" / f"{number}.jsonl", [{"text": text} for text in texts(120, seed=number)])
    settings = {"prepare": "stream", "val_fraction": 0.1, "rows_per_block": 8, "shuffle_window_blocks": 4}
    return _prepared(_of_text(preset_experiment("clm-wikitext", folder / "data", folder / "in", **settings)))


def _of_text(chosen: Experiment) -> Experiment:
    small = text_experiment()
    return replace(chosen, model=small.model, task=small.task, training=small.training, parallel=small.parallel)


DATA_SETS: dict[str, Callable[[Path], tuple[Experiment, str, Manifest]]] = {
    "images (quickstart)": quickstart,
    "tokens": _tokens,
    "documents": _documents,
    "mixture": _mixture,
    "stream": _stream,
}


def order_of(name: str, folder: Path, world: int = 1) -> dict[str, Any]:
    """Digests of the first epochs of a data set: see `batches_of`."""
    return batches_of(*DATA_SETS[name](folder), world)


def batches_of(chosen: Experiment, data: str, manifest: Manifest, world: int = 1) -> dict[str, Any]:
    """Digests of the first epochs: which row is in which slot of which global batch, and the batches themselves."""
    loader = make_train_loader(chosen, build_task(chosen), data, manifest)
    steps = EPOCHS * loader.order.steps_per_epoch
    order, content = hashlib.sha256(), hashlib.sha256()
    read = [loader.batches(rank, world, 0, steps, read_here(loader, loader.plan(rank, world, 0, steps))) for rank in range(world)]
    for parts in zip(*read, strict=True):
        for column in ("source", "epoch", "row"):
            found = [part[column].to_numpy() for part in parts if part is not None and column in part.column_names]
            order.update(np.concatenate([np.zeros(0, np.int64), *found]).astype("<i8").tobytes())
        order.update(b"/")
    for (batch,) in loader.steps(read_here, 0, 1, 0, steps):
        # By their content and not their names, which are the code's own affair.
        for part in sorted(hashlib.sha256(values.numpy().tobytes()).digest() for values in batch.values()):
            content.update(part)
    return {"steps": steps, "rows": order.hexdigest(), "batches": content.hexdigest()}


def parameters() -> dict[str, int]:
    """The number of parameters of every preset, counted on the model itself."""
    with torch.device("meta"):
        return {name: sum(p.numel() for p in build_model(preset().model).parameters()) for name, preset in PRESETS.items()}


# --------------------------------------------------------------------------------------------------------------- weights


def _text(size: int, seed: int = 0) -> np.ndarray:
    """Ids of a text with something to learn: each follows from the one before it three times out of four."""
    rng = np.random.default_rng(seed)
    ids = [6]
    for follows, other in zip(rng.random(size - 1) < 0.75, rng.integers(6, 262, size - 1), strict=True):
        ids.append((ids[-1] * 7 + 1) % 256 + 6 if follows else int(other))
    return np.array(ids, np.uint16)


def _language_model(base: Experiment) -> Experiment:
    """With dropout, clipping and a schedule, so that all that decides on the weights takes part."""
    return replace(
        base,
        optim=replace(base.optim, lr=3e-3, schedule=Cosine(min_lr_fraction=0.1), warmup_steps=5, max_grad_norm=1.0),
        training=TrainingConfig(global_batch_size=8, max_steps=STEPS),
        run=RunConfig(log_every=10, val_every=25, checkpoint_every=25),
    )


def _causal_model() -> Experiment:
    base = _language_model(text_experiment())
    model = replace(base.model, post_attention_dropout=0.1, residual_dropout=0.1)
    return replace(base, model=model, task=replace(base.task, min_seq_len=8, random_shift=False))


def _masked_model() -> Experiment:
    base = _language_model(masked_experiment())
    encoder, decoder = replace(base.model.encoder, dropout=0.1), replace(base.model.decoder, dropout=0.1)
    return replace(base, model=replace(base.model, encoder=encoder, decoder=decoder))


def images_of_two_workers(folder: Path) -> str:
    """Six epochs of a small image classifier."""
    write_images(folder / "data")
    chosen = replace(image_experiment(max_steps=None, max_epochs=6), run=RunConfig(val_every=100, checkpoint_every=100))
    return digest(run(chosen, folder / "data", folder / "run", world=2))


def quickstart_of_two_workers(folder: Path) -> str:
    """The quickstart as it is: twelve epochs of the digits that come with the package."""
    chosen, data, _ = quickstart(folder)
    return digest(run(chosen, Path(data), folder / "run", world=2, timeout=1800))


def masked(folder: Path) -> str:
    write_stream(folder / "data", _text(5000), _text(500, seed=1), length=32)
    return _train(_masked_model(), folder)


def causal(folder: Path) -> str:
    write_stream(folder / "data", _text(5000), _text(500, seed=1))
    return _train(_causal_model(), folder)


def causal_continued(folder: Path) -> str:
    """As `causal`, but stopped in the middle and continued."""
    write_stream(folder / "data", _text(5000), _text(500, seed=1))
    _train(_causal_model(), folder, stop_at=STEPS // 2)
    return _train(_causal_model(), folder)


TRAININGS: dict[str, Callable[[Path], str]] = {
    "images, 6 epochs, 2 workers": images_of_two_workers,
    "masked language model, 50 steps": masked,
    "causal language model, 50 steps": causal,
    "causal language model, 25 + 25 steps": causal_continued,
}
SLOW_TRAININGS: dict[str, Callable[[Path], str]] = {"quickstart, 12 epochs, 2 workers": quickstart_of_two_workers}


def _train(chosen: Experiment, folder: Path, stop_at: int | None = None) -> str:
    """Trains in this process and returns the digest of the weights."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        training = Training(
            chosen, build_task(chosen), str(folder / "data"), Manifest.load(folder / "data"), join_world(torch.device("cpu")),
            folder / "run", read_here, stop_at=stop_at,
        )  # fmt: skip
        training.run()
    finally:
        torch.set_num_threads(threads)
    return digest({name: full(p).numpy() for name, p in training.state.model.named_parameters()})


def digest(weights: dict[str, np.ndarray]) -> str:
    """SHA-256 of all weights, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(weights):
        total.update(name.encode() + np.ascontiguousarray(weights[name]).tobytes())
    return total.hexdigest()


# ---------------------------------------------------------------------------------------------------------------- record


def main() -> None:
    record = read_record() if RECORD.is_file() else {"orders": {}, "parameters": {}, "weights": {}}
    before = json.dumps(record)
    with tempfile.TemporaryDirectory() as temporary:

        def folder(number: int) -> Path:
            (made := Path(temporary) / str(number)).mkdir()
            return made

        record["orders"] = {name: order_of(name, folder(i)) for i, name in enumerate(DATA_SETS)}
        record["parameters"] = parameters()
        trainings = {**TRAININGS, **SLOW_TRAININGS}
        record["weights"][key()] = {name: train(folder(10 + i)) for i, (name, train) in enumerate(trainings.items())}
    for line in differences(json.loads(before), record):
        print(line)
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """A line for every value that is not the same in both."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted({*old, *new})
        return [line for part in names for line in differences(old.get(part), new.get(part), f"{name}/{part}".lstrip("/"))]
    return [] if old == new else [f"{name}: {old} -> {new}"]


if __name__ == "__main__":
    main()
