"""Sharded checkpoints that are complete or do not count.

A checkpoint is a folder `step-00001234` of files written by torch.distributed.checkpoint (each worker its shards of model and
optimizer), and `checkpoint.json`, written last by one worker when all shards are down: a folder without it is not a checkpoint.
Learning rate, order and random numbers are functions of (seed, step), so model, optimizer and step are the whole state.
A checkpoint written by N workers loads on any number.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from perceiver.config import UserError, home
from perceiver.training.mirror import MARKER, Mirror, fetch_run

EXPERIMENT = "experiment.json"
"""File that makes a folder a run: its resolved configuration and the hash of its data."""


@dataclass
class TrainState:
    """All that training changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    metrics: dict[str, float]


def find_run(source: str | Path, storage: str | Path | None = None) -> Path | None:
    """The folder of a run that is given by its path, its URI in an object store (then fetched), or its name among those of
    `storage` or $PERCEIVER_HOME; else None."""
    if not str(source).strip():
        raise UserError("the name of the run is empty: give its folder, its URI or its name")
    if "://" in str(source):
        return fetch_run(str(source))
    candidates = [Path(source).expanduser()]
    if not Path(source).is_absolute():
        candidates += [Path(folder).expanduser() / source for folder in (storage, home() / "runs") if folder]
    return next((folder.absolute() for folder in candidates if (folder / EXPERIMENT).is_file()), None)


def list_checkpoints(folder: str | Path) -> list[CheckpointInfo]:
    """The complete checkpoints in a folder, oldest first."""
    found = []
    for marker in sorted(Path(folder).glob(f"step-*/{MARKER}")):
        data = json.loads(marker.read_text())
        found.append(CheckpointInfo(marker.parent, data["step"], data["metrics"]))
    return found


def mirrored(mirror: Mirror) -> list[CheckpointInfo]:
    """The complete checkpoints of a run's mirror, oldest first; their paths are names alone."""
    return [CheckpointInfo(Path(name), data["step"], data["metrics"]) for name, data in mirror.checkpoints().items()]


def best_of(checkpoints: list[CheckpointInfo], metric: str) -> CheckpointInfo | None:
    """The checkpoint with the best value of a metric (accuracies: the highest, others: the lowest); None if none has it."""
    having = [c for c in checkpoints if metric in c.metrics]
    sign = -1 if metric.endswith("acc") else 1
    return min(having, key=lambda c: (sign * c.metrics[metric], -c.step), default=None)


def choose_checkpoint(folder: str | Path, which: str, metric: str) -> CheckpointInfo:
    """The checkpoint named "last", "best" or by its step.

    Raises:
        UserError: there is none, or none of that step; names the ones there are.
    """
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise UserError(f"{folder} holds no complete checkpoint")
    if which == "last":
        return checkpoints[-1]
    if which == "best":
        return best_of(checkpoints, metric) or checkpoints[-1]
    for checkpoint in checkpoints:
        if re.fullmatch(rf"(step-)?0*{checkpoint.step}", which):
            return checkpoint
    steps = ", ".join(str(c.step) for c in checkpoints)
    raise UserError(f"checkpoint {which!r} does not exist: say best, last or one of the steps {steps}")


class Checkpointer:
    """Saves checkpoints of a run asynchronously and keeps the newest few and the best.

    Training is blocked while the state is copied; files are written by a thread over a process group of its own.
    `blocked_seconds` adds up the time that training waited. With a mirror each worker copies its shards there, in the same thread,
    and a checkpoint counts when all have.
    """

    def __init__(self, folder: str | Path, keep: int, best_metric: str, rank: int, mirror: Mirror | None = None) -> None:
        self.folder = Path(folder)
        self.keep = keep
        self.best_metric = best_metric
        self.rank = rank
        self.mirror = mirror
        self.blocked_seconds = 0.0
        self._copies = ThreadPoolExecutor(1, "mirror")
        self._group = dist.new_group(backend="gloo")
        self._pending: tuple[Future, Path, dict[str, Any]] | None = None
        self._saved_step = -1

    def save(self, state: TrainState, metrics: dict[str, float]) -> None:
        """Starts to save the state. Called by all workers; `metrics` are stored with it."""
        if state.step == self._saved_step:
            return
        start = time.perf_counter()
        self._finish()
        path = self.folder / f"step-{state.step:08d}"
        if self.rank == 0 and path.exists():
            shutil.rmtree(path)
        dist.barrier(self._group)
        model, optimizer = get_state_dict(state.model, state.optimizer)
        future = dcp.async_save({"model": model, "optimizer": optimizer}, checkpoint_id=str(path), process_group=self._group)
        content = {"step": state.step, "metrics": metrics}
        if self.mirror is not None:
            future = self._copies.submit(self._copy, future, path.name, content)
        self._pending = (future, path, content)
        self._saved_step = state.step
        self.blocked_seconds += time.perf_counter() - start

    def close(self) -> None:
        """Waits until all is on disk."""
        start = time.perf_counter()
        self._finish()
        self.blocked_seconds += time.perf_counter() - start

    def poll(self) -> None:
        """Completes a save whose files are all down, so that it counts at once."""
        if self._pending and self._pending[0].done():
            self._finish()

    def _finish(self) -> None:
        if self._pending is None:
            return
        future, path, content = self._pending
        future.result()
        self._pending = None
        if self.rank == 0 or self.mirror is not None:
            write_json(path / MARKER, content)
            self._prune()

    def _copy(self, written: Future, checkpoint: str, content: dict[str, Any]) -> None:
        """Copies this worker's shards when they are written; when all workers have, the checkpoint counts."""
        written.result()
        assert self.mirror is not None
        self.mirror.send_shards(checkpoint, self.rank)
        dist.barrier(self._group)
        if self.rank == 0:
            self.mirror.complete(checkpoint, json.dumps(content).encode())
            self.mirror.send_records()
            for old in self._superfluous(mirrored(self.mirror)):
                self.mirror.remove(old.path.name)

    def _prune(self) -> None:
        """Removes what is neither among the newest nor the best. With a mirror each worker does so: its folder may be its own."""
        for checkpoint in self._superfluous(list_checkpoints(self.folder)):
            # Another worker of the same folder may be at it too.
            (checkpoint.path / MARKER).unlink(missing_ok=True)
            shutil.rmtree(checkpoint.path, ignore_errors=self.mirror is not None)

    def _superfluous(self, checkpoints: list[CheckpointInfo]) -> list[CheckpointInfo]:
        best = best_of(checkpoints, self.best_metric)
        return [c for c in checkpoints[: -self.keep] if best is None or c.step != best.step]


def load_state(path: str | Path, state: TrainState) -> None:
    """Loads a checkpoint into a state whose model and optimizer are built and sharded, on any number of workers.

    The optimizer's settings (weight decay, betas, ...) stay those it was built with: they are the experiment's, not the state's.
    """
    settings = [{k: v for k, v in group.items() if k != "params"} for group in state.optimizer.param_groups]
    model, optimizer = get_state_dict(state.model, state.optimizer)
    dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=str(path))
    set_state_dict(state.model, state.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    for group, own in zip(state.optimizer.param_groups, settings, strict=True):
        group.update(own)
    state.step = json.loads((Path(path) / MARKER).read_text())["step"]


def load_model(path: str | Path, model: nn.Module) -> None:
    """Loads the model alone from a checkpoint: sharded over the workers, or plain in one process without any."""
    weights = get_model_state_dict(model)
    dcp.load({"model": weights}, checkpoint_id=str(path), no_dist=not dist.is_initialized())
    set_model_state_dict(model, weights, options=StateDictOptions(strict=True))


def stored_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's weights; reads none of them."""
    entries = dcp.FileSystemReader(str(path)).read_metadata().state_dict_metadata
    return {name.removeprefix("model."): tuple(e.size) for name, e in entries.items() if name.startswith("model.")}


def load_weights(path: str | Path, model: nn.Module, names: Collection[str]) -> None:
    """Loads some of the model's weights from a checkpoint and leaves the others as they are; otherwise as `load_model`."""
    weights = {name: value for name, value in get_model_state_dict(model).items() if name in names}
    dcp.load({"model": weights}, checkpoint_id=str(path), no_dist=not dist.is_initialized())
    set_model_state_dict(model, weights, options=StateDictOptions(strict=False))


def write_json(path: Path, content: Any) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    os.replace(temporary, path)
