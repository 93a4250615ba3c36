"""Reading checkpoints of version 0.1.0, whose index is a pickle: only what such an index holds is unpickled, nothing is imported."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata

from perceiver.checkpoints import DamagedCheckpoint, plain_name
from perceiver.config import UserError
from perceiver.training.safetensors_file import DTYPES

OLD_METADATA = ".metadata"
"""DCP's own pickled index, of checkpoints written before safetensors."""


class OldReader(dcp.FileSystemReader):
    """Reads checkpoints of before safetensors: tensors alone, and their index with an allow-list of classes.

    What is no tensor there is pickled, too, and DCP would unpickle it: such entries are left out of the index.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        path = Path(self.path) / OLD_METADATA
        found = _Unpickler(path).load()
        try:
            entries, places = found.state_dict_metadata, found.storage_data
            tensors = {name: entry for name, entry in entries.items() if type(entry) is metadata.TensorStorageMetadata}
            for place in places.values():
                plain_name(place.relative_path)
        except (AttributeError, TypeError, ValueError) as error:
            raise DamagedCheckpoint(f"{path} is damaged: it is no index of a checkpoint") from error
        return replace(found, state_dict_metadata=tensors, storage_meta=metadata.StorageMeta(load_id=self.load_id))


class _Unpickler(pickle.Unpickler):
    """Of DCP's index: its dataclasses, and what torch and pathlib put into them."""

    ALLOWED: Mapping[tuple[str, str], Callable[..., Any]] = {
        **{
            (metadata.__name__, name): getattr(metadata, name)
            for name in (
                "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
                "TensorProperties", "_MEM_FORMAT_ENCODING",
            )
        },
        (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
        ("torch", "Size"): torch.Size,
        ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
        ("pathlib", "PosixPath"): PurePosixPath,
        ("pathlib._local", "PosixPath"): PurePosixPath,
        **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in DTYPES},  # type: ignore[dict-item]
    }  # fmt: skip

    def __init__(self, path: Path) -> None:
        self._path = path
        super().__init__(io.BytesIO(path.read_bytes()))

    def load(self) -> metadata.Metadata:
        try:
            found = super().load()
        except UserError:
            raise
        except Exception as error:  # damaged pickles raise whatever they like
            raise DamagedCheckpoint(f"{self._path} is damaged: it is no index of a checkpoint") from error
        if type(found) is not metadata.Metadata:
            raise DamagedCheckpoint(f"{self._path} is damaged: it is no index of a checkpoint")
        return found

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise DamagedCheckpoint(
                f"{self._path} asks for {module}.{name}, which no checkpoint holds: it was not written by a training, and is not loaded"
            ) from None
