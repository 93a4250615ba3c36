"""Sharded checkpoints that are complete or do not count.

A checkpoint is a folder `step-00001234` of safetensors files (each worker its shards of model and optimizer), and
`checkpoint.json`, written last by one worker when all shards are on disk: it lists them with their hashes, and a folder without
it is not a checkpoint. Learning rate, order and random numbers are functions of (seed, step), and the optimizer's settings are
the experiment's, so the tensors of model and optimizer and the step are the whole state.
A checkpoint written by N workers loads on any number.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    get_state_dict,
)

from perceiver.checkpoints import (
    MARKER,
    CheckpointInfo,
    DamagedCheckpoint,
    best_first,
    checkpoint_name,
    damaged_name,
    is_better,
    list_checkpoints,
    marked,
    marker_content,
    parse_marker,
    read_marker,
)
from perceiver.data.storage import write_file
from perceiver.disk import to_disk
from perceiver.training.checkpoint_files import ShardWriter, cause, find_damage
from perceiver.training.hooks import STATES, pack
from perceiver.training.remote_copy import RemoteCopy
from perceiver.training.safetensors_file import write_safetensors
from perceiver.training.state import TrainState, load_state, state_tensors

logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves checkpoints of a run asynchronously and keeps the newest few and the best.

    Training is blocked while the state is copied; files are written by threads over a process group of their own.
    `blocked_seconds` adds up the time that training waited. With a remote copy each worker sends its shards there, in the same thread,
    and a checkpoint counts when all have.

    Args:
        keep: how many of the newest.
        keep_best: how many of the best.
        higher_is_better: whether higher values of a metric are better.
        completed: called with step and folder of a checkpoint that is complete, in the thread that trains.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int,
        best_metric: str,
        higher_is_better: Callable[[str], bool],
        rank: int,
        remote: RemoteCopy | None = None,
        completed: Callable[[int, Path], None] = lambda step, path: None,
        keep_best: int = 1,
    ) -> None:
        self.completed = completed
        self.folder = Path(folder)
        self.keep, self.keep_best = keep, keep_best
        self.best_metric = best_metric
        self.higher_is_better = higher_is_better
        self.rank = rank
        self.remote = remote
        self.blocked_seconds = 0.0
        self._copies = ThreadPoolExecutor(1, "checkpoint")
        self._group: dist.ProcessGroup | None = dist.new_group(backend="gloo")
        self._stager: DefaultStager | None = None
        self._pending: Future | None = None
        self._saved_step = -1
        self._best: list[float] = []
        """The best values so far, the best first."""

    def resume(self, state: TrainState) -> CheckpointInfo | None:
        """Loads the newest checkpoint that is whole, the same on all workers, and returns it; None: there is none.

        Newer ones that are damaged are set aside: renamed, so that they do not count. Where one is found to be damaged while it
        is loaded and there is none before it, the state is undefined.
        """
        while True:
            if self.remote is not None:
                self.remote.fetch()
            name = self._first_of_all(self._newest() if self.rank == 0 else None)
            if name is None:
                return None
            loaded = self._load_or_set_aside(name, state)
            if loaded is not None:
                best = best_first(self._complete(), self.best_metric)[: self.keep_best] if self.rank == 0 else []
                self._best = self._first_of_all([checkpoint.metrics[self.best_metric] for checkpoint in best])
                return loaded

    def go_back(self, state: TrainState, before: int) -> CheckpointInfo | None:
        """Loads the newest checkpoint that is whole and of step `before` or an earlier one; of none such, the oldest. Called by all
        workers.

        None: there is no checkpoint at all. Those that are damaged are set aside.
        """
        self._finish()
        while True:
            if self.remote is not None:
                self.remote.fetch(None)
            name = None
            if self.rank == 0 and (there := [c for c in self._complete() if c.step < state.step]):
                name = next((c for c in reversed(there) if c.step <= before), there[0]).path.name
            name = self._first_of_all(name)
            if name is None or (loaded := self._load_or_set_aside(name, state)) is not None:
                return None if name is None else loaded

    def _load_or_set_aside(self, name: str, state: TrainState) -> CheckpointInfo | None:
        loaded, damage = self._try(name, state)
        if damage is None:
            return loaded
        kept = self._first_of_all(self._set_aside(name) if self.rank == 0 else None)
        if self.rank == 0:
            logger.warning("checkpoint %s is damaged and set aside as %s: %s", name, kept, damage)
        return None

    def is_best(self, metrics: dict[str, float]) -> bool:
        """Whether a validation is among the best so far (the first of equal ones), which it then is. Called on all workers alike."""
        value, higher = metrics.get(self.best_metric, math.nan), self.higher_is_better(self.best_metric)
        if not math.isfinite(value):
            return False
        if len(self._best) == self.keep_best and not is_better(value, self._best[-1], higher):
            return False
        self._best = sorted([*self._best, value], reverse=higher)[: self.keep_best]
        return True

    def save(self, state: TrainState, metrics: dict[str, float], more: dict[str, Any] | None = None) -> None:
        """Starts to save the state. Called by all workers.

        Args:
            metrics: of a validation of this very state; empty if there was none.
            more: what else belongs to it, plain data and tensors on the CPU, the same on all workers: see `hooks.pack`.
        """
        if state.step == self._saved_step:
            return
        start = time.perf_counter()
        self._finish()
        path = self.folder / checkpoint_name(state.step)
        if self.rank == 0 and path.exists():
            shutil.rmtree(path)
        dist.barrier(self._group)
        writer = ShardWriter(path, self.rank)
        tensors = state_tensors(state, *get_state_dict(state.model, state.optimizer))
        if self._stager is None and (options := staging_of(next(state.model.parameters()).device)):
            self._stager = DefaultStager(options)
        written = dcp.async_save(tensors, storage_writer=writer, process_group=self._group, async_stager=self._stager)
        higher = frozenset(filter(self.higher_is_better, metrics))
        self._pending = self._copies.submit(self._end, written, writer, CheckpointInfo(path, state.step, metrics, higher), more)
        self._saved_step = state.step
        self.blocked_seconds += time.perf_counter() - start

    def close(self) -> None:
        """Waits until all is on disk, and ends threads and process group. Called by all workers; nothing is saved after it."""
        start = time.perf_counter()
        self._finish()
        self._copies.shutdown()
        if self._stager is not None:
            self._stager.close()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
        self.blocked_seconds += time.perf_counter() - start

    def poll(self) -> None:
        """Raises what has gone wrong in a save that is over."""
        if self._pending and self._pending.done():
            self._finish()

    def _finish(self) -> None:
        if self._pending is None:
            return
        checkpoint = self._pending.result()
        self._pending = None
        self.completed(checkpoint.step, checkpoint.path)

    def _end(self, written: Any, writer: ShardWriter, checkpoint: CheckpointInfo, more: dict[str, Any] | None) -> CheckpointInfo:
        """Makes a checkpoint count when all workers have written (and, with a remote copy, copied there) their files."""
        try:
            written.result()
        except CheckpointException as error:
            raise cause(error) from None
        if more is not None and self.rank == 0:
            writer.files[STATES] = write_safetensors(checkpoint.path / STATES, *pack(more))
            to_disk(checkpoint.path)
        parts: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(parts, writer.files, self._group)
        checkpoint = replace(checkpoint, files={name: part[name] for part in parts for name in sorted(part)})
        marker = marker_content(checkpoint)
        if self.remote is not None:
            self.remote.send_shards(checkpoint.path.name, writer.files)
            dist.barrier(self._group)
            if self.rank == 0:
                self.remote.complete(checkpoint.path.name, marker)
                self.remote.send_records()
                for old in self._superfluous(self.remote.checkpoints()):
                    self.remote.remove(old.path.name)
        if self.rank == 0 or self.remote is not None:
            write_file(checkpoint.path, MARKER, marker)
            self._prune()
        dist.barrier(self._group)
        return checkpoint

    def _prune(self) -> None:
        """Removes what is neither among the newest nor the best. With a remote copy each worker does so: its folder may be its own."""
        for checkpoint in self._superfluous(list_checkpoints(self.folder)):
            # Another worker of the same folder may be at it too.
            (checkpoint.path / MARKER).unlink(missing_ok=True)
            shutil.rmtree(checkpoint.path, ignore_errors=self.remote is not None)

    def _superfluous(self, checkpoints: list[CheckpointInfo]) -> list[CheckpointInfo]:
        best = {checkpoint.step for checkpoint in best_first(checkpoints, self.best_metric)[: self.keep_best]}
        return [checkpoint for checkpoint in checkpoints[: -self.keep] if checkpoint.step not in best]

    def _complete(self) -> list[CheckpointInfo]:
        return self.remote.checkpoints() if self.remote is not None else list_checkpoints(self.folder)

    def _newest(self) -> str | None:
        """Folder of the newest checkpoint that has a marker, or of any that has a damaged one."""
        if self.remote is not None:
            names = list(self.remote.markers())
        else:
            names = [path.name for path in marked(self.folder)]
        whole = {checkpoint.path.name for checkpoint in self._complete()}
        return next((name for name in names if name not in whole), names[-1] if names else None)

    def _try(self, name: str, state: TrainState) -> tuple[CheckpointInfo | None, str | None]:
        """Checks and loads a checkpoint: what its marker says, and what one of the workers found damaged."""
        checkpoint, damage, path = None, None, self.folder / name
        try:
            checkpoint = read_marker(path) if self.remote is None else parse_marker(path, self.remote.markers()[name])
            # Where the folder is shared, each worker checks a part of it.
            share = (self.rank, dist.get_world_size(self._group)) if self.remote is None else (0, 1)
            damage = find_damage(checkpoint, *share)
        except (DamagedCheckpoint, FileNotFoundError, KeyError) as error:
            damage = str(error)
        if damage := self._any(damage):
            return None, damage
        try:
            load_state(path, state, checked=True)
        except DamagedCheckpoint as error:
            damage = str(error)
        return checkpoint, self._any(damage)

    def _set_aside(self, name: str) -> str:
        """Renames a checkpoint so that it does not count; its new name."""
        if self.remote is not None:
            return self.remote.set_aside(name)
        target = self.folder / damaged_name(name)
        while target.exists():
            target = target.with_name(f"{target.name}-again")
        os.replace(self.folder / name, target)
        return target.name

    def _any(self, text: str | None) -> str | None:
        """The text of the first worker that has one."""
        texts: list[str | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(texts, text, self._group)
        return next(filter(None, texts), None)

    def _first_of_all(self, value: Any) -> Any:
        """The first worker's value, on all workers."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]


def staging_of(device: torch.device) -> StagingOptions | None:
    """How the state is copied to the host, for which training waits: from GPUs to pinned memory, which all saves use again (as large as a
    checkpoint's part). None: PyTorch's way, which takes new memory each time.
    """
    if device.type != "cuda":
        return None
    return StagingOptions(use_pinned_memory=True, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=True)
