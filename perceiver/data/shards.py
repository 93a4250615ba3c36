"""Writing and reading blocks of prepared rows, and checking them; what a data set holds is in `manifest.py`.

Nothing that was damaged is read: the manifest has a hash of itself, and of each shard's footer; a shard's footer has a
checksum of each of its blocks, all bytes of it, which are compared when they are read.
"""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from perceiver.config import UserError
from perceiver.data.manifest import MANIFEST, DamagedData, Manifest, Shard, Split
from perceiver.data.row_kind import RowKind
from perceiver.data.storage import file_hash, list_folder, open_folder
from perceiver.data.tokenizer_base import TOKENIZER, TOKENIZER_FILES

BLOCK_CHECKS = b"block_crc32"
"""Key of a shard's footer: crc32 of the bytes of each block, 8 hexadecimal digits each."""
CHECKED_BYTES = 512 << 20
"""Shards on this machine that have at most this number of bytes together are compared with their hashes when a job begins (1 to 2 s)."""


def write_blocks(file: BinaryIO, rows: RowKind, blocks: Iterable[pa.Table]) -> None:
    """Writes a shard: each table is a block. The same tables give the same bytes.

    The encoding of numbers (bytes of equal place together, then zstd) was the smallest and the fastest to read of those that
    parquet has.
    """
    columns, sums = rows.schema, _Sums(file)
    with pq.ParquetWriter(
        sums, columns, compression="zstd", use_dictionary=False, use_byte_stream_split=rows.numbers_in_parquet(),
        write_statistics=False, write_page_checksum=True,
    ) as writer:  # fmt: skip
        sums.take()
        found = []
        for block in blocks:
            writer.write_table(block.cast(columns), row_group_size=max(1, block.num_rows))
            found.append(f"{sums.take():08x}")
        writer.add_key_value_metadata({BLOCK_CHECKS: "".join(found)})


class _Sums(io.RawIOBase):
    """Passes what is written on to a file, and sums it up."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size, self._crc = file, 0, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._file.write(data)
        self._size += len(data)
        self._crc = zlib.crc32(data, self._crc)
        return len(data)

    def tell(self) -> int:
        return self._size

    def take(self) -> int:
        """crc32 of what was written since the last call."""
        crc, self._crc = self._crc, 0
        return crc


def read_block(folder: str | Path, split: Split, block: int) -> pa.Table:
    """The physical rows of a block (`split.block_rows(block) + split.lookahead`), read by one request.

    Args:
        folder: a local path, or a URI that pyarrow or fsspec know (s3://, gs://, ...).

    Raises:
        DamagedData: the shard is missing, or not as it was written.
    """
    shard, group = split.shards[block // split.blocks_per_shard], block % split.blocks_per_shard
    filesystem, path = open_folder(folder)
    place = f"{folder}/{shard.file}"
    metadata = _metadata(str(folder), shard)
    if group >= metadata.num_row_groups:
        raise DamagedData(f"{place} is damaged (it has {metadata.num_row_groups} row groups)")
    start, stop = _place(metadata.row_group(group))
    with _opened(filesystem, f"{path}/{shard.file}", place) as source:
        data = source.read_at(stop - start, start)
    if shard.footer and zlib.crc32(data) != int(metadata.metadata[BLOCK_CHECKS][8 * group : 8 * group + 8], 16):
        raise DamagedData(f"{place} is damaged (row group {group} does not have its checksum)")
    try:
        table = pq.ParquetFile(_Window(data, start, shard.bytes), metadata=metadata, pre_buffer=False).read_row_group(group)
    except (pa.ArrowException, OSError, ValueError) as error:  # of bytes that are in memory
        raise DamagedData(f"{place} is damaged (row group {group}: {(str(error).splitlines() or [''])[0]})") from None
    if table.num_rows != split.block_rows(block) + split.lookahead or table.schema != split.stored.schema:
        raise DamagedData(f"{place} is damaged (row group {group} has other rows or columns)")
    return table


def _opened(filesystem: pafs.FileSystem, path: str, place: str) -> pa.NativeFile:
    try:
        return filesystem.open_input_file(path)
    except FileNotFoundError:
        raise DamagedData(f"{place} is missing") from None


def _place(group: pq.RowGroupMetaData) -> tuple[int, int]:
    """Where a row group's bytes are in its file: first, last + 1."""
    columns = [group.column(i) for i in range(group.num_columns)]
    starts = [c.data_page_offset if c.dictionary_page_offset is None else c.dictionary_page_offset for c in columns]
    return min(starts), max(start + column.total_compressed_size for start, column in zip(starts, columns, strict=True))


class _Window(io.RawIOBase):
    """Some bytes of a file at their place, for whoever reads no others."""

    def __init__(self, data: bytes, start: int, size: int) -> None:
        self._data, self._start, self._size, self._position = data, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        first = self._position - self._start
        if first < 0 or size < 0:
            raise OSError("bytes outside of the row group are asked for")
        found = self._data[first : first + size]
        self._position += len(found)
        return found


@lru_cache(maxsize=64)
def _metadata(folder: str, shard: Shard) -> pq.FileMetaData:
    """A shard's footer, kept because blocks are read one by one. The shard's hash is part of the key.

    Raises:
        DamagedData: the shard is missing, or its size or footer is not as it was written.
    """
    footer = _footer(folder, shard.file, shard.bytes)
    place = f"{folder}/{shard.file}"
    if shard.footer and footer_hash(footer) != shard.footer:
        raise DamagedData(f"{place} is damaged (its footer does not have its hash)")
    try:
        return pq.read_metadata(pa.BufferReader(footer))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DamagedData(f"{place} is damaged ({str(error).splitlines()[0]})") from None


def _footer(folder: str | Path, name: str, size: int) -> bytes:
    """The last bytes of a shard: the footer, its length, and parquet's mark."""
    filesystem, path = open_folder(folder)
    place = f"{folder}/{name}"
    with _opened(filesystem, f"{path}/{name}", place) as source:
        if source.size() != size:
            raise DamagedData(f"{place} is damaged (it has {source.size():,} bytes, not {size:,})")
        length = min(size, _TAIL)
        tail = source.read_at(length, size - length)
        needed = int.from_bytes(tail[-8:-4], "little") + 8
        if needed > size:
            raise DamagedData(f"{place} is damaged (its footer says that it is larger than the file)")
        return tail[-needed:] if needed <= length else source.read_at(needed, size - needed)


_TAIL = 64 << 10
"""Bytes that most footers fit into."""


def footer_hash(footer: bytes) -> str:
    """The hash of a shard's footer, as the manifest records it."""
    return hashlib.sha256(footer).hexdigest()[:16]


def describe_shard(folder: str | Path, name: str, rows: int) -> Shard:
    """What the manifest says of a shard that has been written."""
    size, sha256 = file_hash(folder, name)
    return Shard(file=name, rows=rows, bytes=size, sha256=sha256, footer=footer_hash(_footer(folder, name, size)))


def broken_files(folder: str | Path, manifest: Manifest) -> list[str]:
    """Files that are not there, or not as the manifest says: shards, the tokenizer, the data sets of a mixture.

    Of shards on this machine with at most CHECKED_BYTES together all bytes are compared, of others the sizes: their blocks
    are checked when they are read.
    """
    there = list_folder(folder)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    broken = [shard.file for shard in shards if there.get(shard.file) != shard.bytes]
    if not broken and "://" not in str(folder) and sum(shard.bytes for shard in shards) <= CHECKED_BYTES:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = pool.map(lambda shard: file_hash(folder, shard.file)[1], shards)
            broken = [shard.file for shard, sha256 in zip(shards, found, strict=True) if sha256 != shard.sha256]
    beside = str(folder).rpartition("/")[0]
    for part in manifest.mixture:
        path = f"{beside}/{part['folder']}"
        other = readable(path)
        if other is None or other.digest != part["digest"]:
            broken.append(f"../{part['folder']}/{MANIFEST}")
        else:
            broken += [f"../{part['folder']}/{name}" for name in broken_files(path, other)]
    wanted = (manifest.tokenizer or {}).get("sha256")
    if wanted:
        kept = next((name for name in TOKENIZER_FILES if name in there), TOKENIZER)
        if kept not in there or file_hash(folder, kept)[1] != wanted:
            broken.append(kept)
    return broken


def readable(folder: str) -> Manifest | None:
    """The manifest of a folder; None where there is none, or none that can be read."""
    try:
        return Manifest.load(folder) if MANIFEST in list_folder(folder) else None
    except UserError:
        return None
