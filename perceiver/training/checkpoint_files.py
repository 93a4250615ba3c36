"""Files of a checkpoint: one .safetensors file per worker, and a marker that lists them with their sizes and hashes.

Tensors are written through torch.distributed.checkpoint (DCP) in the layout of its `HuggingFaceStorageReader`, so that any tool
that knows safetensors can read them. Nothing here unpickles freely: checkpoints written before that have a pickled `.metadata`,
which is read with an allow-list of classes.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future as TorchFuture

from perceiver.checkpoints import MARKER, CheckpointInfo, DamagedCheckpoint, Files, read_marker
from perceiver.config import UserError
from perceiver.data.storage import file_hash
from perceiver.disk import to_disk
from perceiver.training.old_checkpoints import OLD_METADATA, OldReader
from perceiver.training.safetensors_file import write_safetensors

SUFFIX = ".safetensors"
Result = TypeVar("Result")


def find_damage(checkpoint: CheckpointInfo, rank: int = 0, size: int = 1) -> str | None:
    """Why a checkpoint's files are not the ones that were written; None: they are, as far as its marker can tell.

    Args:
        rank, size: check the share of one of `size` processes.
    """
    if checkpoint.files is None:  # of version 0.1.0, without hashes
        try:
            stored_names(checkpoint.path)
        except DamagedCheckpoint as error:
            return str(error).removeprefix(f"checkpoint {checkpoint.path.name} is damaged: ")
        return None
    if foreign := sorted({path.name for path in checkpoint.path.glob(f"*{SUFFIX}")} - checkpoint.files.keys()):
        return f"{checkpoint.path / foreign[0]} does not belong to it"
    for name in sorted(checkpoint.files)[rank::size]:
        path, (length, digest) = checkpoint.path / name, checkpoint.files[name]
        try:
            found = path.stat().st_size
            if found != length:
                return f"{path} has {found:,} bytes instead of {length:,}"
            if file_hash(path.parent, name)[1] != digest:
                return f"{path} has changed since it was written"
        except FileNotFoundError:
            return f"{path} is missing"
    return None


def check_files(path: Path) -> None:
    """Checks the files of a checkpoint against the hashes in its marker. Called by all workers, each checks a share.

    Raises:
        DamagedCheckpoint: on all workers alike.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    try:
        damage = find_damage(read_marker(path), rank, size)
    except DamagedCheckpoint as error:
        damage = str(error)
    except FileNotFoundError:
        damage = f"{path / MARKER} is missing"
    if size > 1:
        found: list[str | None] = [None] * size
        dist.all_gather_object(found, damage)
        damage = next(filter(None, found), None)
    if damage is not None:
        raise DamagedCheckpoint(f"checkpoint {path.name} is damaged: {damage}")


class ShardWriter(StorageWriter):
    """Writes a worker's tensors into one safetensors file.

    Tensors go to the file one by one, and their bytes into its hash on the way: DCP's own writer holds the whole file in memory
    once more, and Python's lock while it is put together, so that training stands still.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self.path = path
        self.files: Files = {}
        """Sizes and hashes of what this worker wrote."""
        self._name = f"rank-{rank:05d}{SUFFIX}"

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        self.files = {}

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.path.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        written: TorchFuture[list[WriteResult]] = TorchFuture()
        tensors: dict[str, Tensor] = {}
        offsets = {}
        for item in plan.items:
            assert item.tensor_data is not None and item.index.fqn not in tensors, item.index
            tensors[item.index.fqn] = planner.resolve_data(item)  # type: ignore[assignment]
            offsets[item.index.fqn] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
        if tensors:
            extra = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
            self.files[self._name] = write_safetensors(self.path / self._name, tensors, extra)
            to_disk(self.path)
        written.set_result([WriteResult(index=item.index, size_in_bytes=0, storage_data=None) for item in plan.items])
        return written

    def finish(self, metadata: metadata.Metadata, results: list[list[WriteResult]]) -> None:
        to_disk(self.path.parent)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def read_tensors(path: Path, tensors: dict[str, Any]) -> None:
    """Reads a checkpoint into a nested dict of tensors, plain or sharded over the workers, which it must hold all.

    Raises:
        DamagedCheckpoint: it holds others, or cannot be read; on all workers alike.
    """
    _reading(path, lambda: dcp.load(tensors, storage_reader=reader_of(path), no_dist=not dist.is_initialized()))


def stored_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's weights; reads none of them.

    Raises:
        DamagedCheckpoint: it cannot be read.
    """
    entries = _reading(Path(path), lambda: reader_of(Path(path)).read_metadata()).state_dict_metadata
    return {name.removeprefix("model."): tuple(e.size) for name, e in entries.items() if name.startswith("model.")}


def stored_names(path: Path) -> list[str]:
    """Names of all tensors of a checkpoint; reads none of them.

    Raises:
        DamagedCheckpoint: it cannot be read.
    """
    return list(_reading(path, lambda: reader_of(path).read_metadata()).state_dict_metadata)


def differing_weights(one: Path, other: Path) -> tuple[int, dict[str, float]]:
    """The number of weights of two checkpoints in all, and of those that are not bit for bit the same the largest difference, by name;
    infinite where one of them lacks it or has another shape.

    Raises:
        DamagedCheckpoint: one of them cannot be read.
    """
    weights, others = _weights(one), _weights(other)
    names = weights.keys() | others.keys()
    found: dict[str, float] = {}
    for name in sorted(names):
        here, there = weights.get(name), others.get(name)
        if here is None or there is None or here.shape != there.shape or here.dtype != there.dtype:
            found[name] = math.inf
        elif not torch.equal(here, there):
            found[name] = (here.double() - there.double()).abs().max().item()
    return len(names), found


def all_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names begin so, whole and on the CPU, by name.

    Raises:
        DamagedCheckpoint: it cannot be read.
    """
    entries = _reading(path, lambda: reader_of(path).read_metadata()).state_dict_metadata
    found = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in entries.items() if name.startswith(prefix)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process is what is meant
        read_tensors(path, found)
    return found


def _weights(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint, by name."""
    return {name.removeprefix("model."): tensor for name, tensor in all_tensors(path, "model.").items()}


def reader_of(path: Path) -> StorageReader:
    """What reads a checkpoint: in safetensors files, or in the format of 0.1.0."""
    if any(path.glob(f"*{SUFFIX}")):
        return HuggingFaceStorageReader(str(path))
    if (path / OLD_METADATA).is_file():
        reader = OldReader(str(path))
        reader.read_metadata()  # DCP would print a traceback of what this raises, and say something else
        return reader
    raise DamagedCheckpoint(f"checkpoint {path.name} is damaged: {path} holds no weights")


def _reading(path: Path, read: Callable[[], Result]) -> Result:
    """Whatever damaged files make torch raise (its CheckpointException is not even an Exception) as one sentence."""
    try:
        return read()
    except (Exception, CheckpointException) as caught:
        error = cause(caught)
        if isinstance(error, (UserError, MemoryError)) or (isinstance(error, OSError) and not isinstance(error, FileNotFoundError)):
            raise error from None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DamagedCheckpoint(f"checkpoint {path.name} is damaged: {path} cannot be read ({reason})") from caught


def cause(error: BaseException) -> BaseException:
    """The first worker's own error in an error of DCP."""
    if isinstance(error, CheckpointException) and error.failures:
        return error.failures[min(error.failures)][0]
    return error
