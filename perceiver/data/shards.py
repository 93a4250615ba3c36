"""The format of prepared data: a folder with parquet shards and one manifest.

    folder/manifest.json             written last: a folder without it holds no data set
    folder/train-00000.parquet ...   and val-00000.parquet ...

The columns of a row depend on its kind, see `rows.py`.

Blocks (row groups) have a constant size, so that finding a row is arithmetic: block b holds the rows from b *
rows_per_block on and lies in shard b // blocks_per_shard as row group b % blocks_per_shard. Only the last block and
the last shard of a split may be shorter. Blocks of tokens end with one physical row more than they have logical rows
(`lookahead`): the next T ids of the stream, whatever block or shard they lie in, so that windows can be shifted and
the last target of a row is at hand.

A stream of n ids has ceil((n - 1) / T) rows (at least 1): windows of T + 1 ids that overlap by one id, so that every
id but the first is the target of exactly one window.

Manifest and shards hold no times and no absolute paths: preparing the same input twice gives the same bytes.

Nothing that was damaged is read: the manifest has a hash of itself, and of each shard's footer; a shard's footer has a
checksum of each of its blocks, all bytes of it, which are compared when they are read.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from perceiver.config import UserError, digest
from perceiver.data.rows import KINDS, ArrayRows, RowKind, rows_of
from perceiver.data.storage import file_hash, list_folder, open_folder, read_file, write_file
from perceiver.data.tokenizers import TOKENIZER

FORMAT_VERSION = 1
"""Who raises it also adds it to `prepare_settings`, so that data sets of the old format are not found any more."""
MANIFEST = "manifest.json"
BLOCK_CHECKS = b"block_crc32"
"""Key of a shard's footer: crc32 of the bytes of each block, 8 hexadecimal digits each."""
CHECKED_BYTES = 512 << 20
"""Shards on this machine that have at most this number of bytes together are compared with their hashes when a job begins (1 to 2 s)."""
SPLITS = ("train", "val")


class DamagedData(UserError):
    """Prepared data that is missing or not as it was written: the message names the file."""


# ------------------------------------------------------------------------------------------------------------- manifest


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One parquet file of a split."""

    file: str
    rows: int
    """Logical rows."""
    bytes: int
    sha256: str
    footer: str = ""
    """Hash of the footer (`footer_hash`); "": prepared by an older version, without checksums of blocks."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """The training or validation part of a data set."""

    name: str
    kind: str
    rows: int
    """Logical rows: images, windows, documents or examples."""
    tokens: int
    """Ids of the stream, or of all documents as stored; 0 for images and arrays."""
    bytes: int
    """Bytes of the text as UTF-8 (without ids that mark documents), of the pixels, or of the arrays."""
    words: int
    """Words of the text, separated by ASCII whitespace."""
    documents: int
    """Documents (or images, or examples) that it was made from."""
    row_length: int
    """T, or height * width * channels, or the greatest length of a document; 0 for arrays."""
    rows_per_block: int
    blocks_per_shard: int
    lookahead: int
    """Physical rows at the end of a block that belong to the following block."""
    shards: tuple[Shard, ...]
    image_shape: tuple[int, int, int] | None = None
    """Height, width, channels, for images: the manifest's, which alone stores it."""
    columns: ArrayRows | None = None
    """The columns of arrays: the manifest's, which alone stores them."""

    @property
    def num_blocks(self) -> int:
        return -(-self.rows // self.rows_per_block)

    @property
    def bytes_per_row(self) -> int:
        """Bytes of a row in memory, about."""
        return self.stored.bytes_per_row or 2 * self.tokens // max(self.rows, 1) + 8

    @property
    def stored(self) -> RowKind:
        """What its rows are."""
        return rows_of(self.kind, self.row_length, self.columns)

    def block_rows(self, block: int) -> int:
        """Logical rows of a block."""
        return min(self.rows_per_block, self.rows - block * self.rows_per_block)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prepared data set is and where it came from."""

    format_version: int = FORMAT_VERSION
    kind: str
    settings: dict[str, Any]
    """What was asked for, as far as it determines the content (`prepare_settings`)."""
    settings_digest: str
    splits: dict[str, Split]
    tokenizer: dict[str, Any] | None = None
    """Name, vocabulary size and hash of the tokenizer, for text."""
    source: dict[str, Any] = field(default_factory=dict)
    """Fingerprint of the input: files with size and sha256, or name and revision on the hub; or the data sets of a mixture."""
    stats: dict[str, Any] = field(default_factory=dict)
    """ "skipped": what was left out, counted by reason; "unigram_nats_per_token": cross-entropy of the validation
    stream under the training stream's id frequencies (tokens); "labels": how often each label occurs, by split
    (images, documents); "shared_documents": how many validation documents or images have the content of a training one, where
    the splits are different files; "empty_documents": how many documents have no ids, by split, where there are any.
    """
    image_shape: tuple[int, int, int] | None = None
    """Height, width, channels, for images."""
    num_classes: int | None = None
    """Greatest label + 1, where rows have labels."""
    columns: dict[str, Any] | None = None
    """Shape and type of each column of arrays, as `ArrayRows.to_json` has them."""

    def __post_init__(self) -> None:
        columns = None if self.columns is None else ArrayRows.from_json(self.columns)
        splits = {name: replace(split, image_shape=self.image_shape, columns=columns) for name, split in self.splits.items()}
        object.__setattr__(self, "splits", splits)

    @property
    def digest(self) -> str:
        """Hash of the manifest's content, and so of the data (it holds the hash of each shard)."""
        return digest(self._stored())

    def _stored(self) -> dict[str, Any]:
        data = asdict(self)
        if self.columns is None:  # as it was written before there were arrays
            del data["columns"]
        for split in data["splits"].values():
            del split["image_shape"], split["columns"]
            for shard in split["shards"]:
                if not shard["footer"]:  # as it was written
                    del shard["footer"]
        return data

    @property
    def mixture(self) -> list[dict[str, Any]]:
        """Of a mixture its data sets, which lie beside its folder: "name", "share", "folder", "digest"."""
        return self.source.get("mixture", [])

    @property
    def stream(self) -> dict[str, Any] | None:
        """Where training text is not prepared, what its chunks are (see `chunks.py`); its split then has no shards."""
        return self.source.get("stream")

    def save(self, folder: str | Path) -> None:
        """Writes `manifest.json` at once as a whole."""
        data = self._stored()
        text = json.dumps({**data, "digest": digest(data)}, indent=1, sort_keys=True) + "\n"
        write_file(folder, MANIFEST, text.encode())

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Reads the manifest of a prepared data set.

        Raises:
            DamagedData: it is not as it was written.
            UserError: there is none, or this version does not know its format.
        """
        place = f"{folder}/{MANIFEST}"
        try:
            data = json.loads(read_file(folder, MANIFEST))
        except FileNotFoundError:
            raise UserError(f"{folder} holds no prepared data set (no {MANIFEST})") from None
        except (ValueError, RecursionError) as error:
            raise DamagedData(f"{place} is damaged ({error})") from None
        if not isinstance(data, dict):
            raise DamagedData(f"{place} is damaged (it is no JSON object)")
        written = data.pop("digest", None)  # older ones have none
        if written is not None and written != digest(data):
            raise DamagedData(f"{place} is damaged or was changed (its content does not have its digest {written})")
        if data.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{place} has format version {data.get('format_version')}, this version reads {FORMAT_VERSION}: prepare the data again"
            )
        try:
            splits = {
                name: Split(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])})
                for name, split in data.pop("splits").items()
            }
            shape = data.pop("image_shape")
            known = {f.name for f in fields(cls)}
            manifest = cls(
                splits=splits,
                image_shape=None if shape is None else tuple(shape),
                **{name: value for name, value in data.items() if name in known},
            )
            wrong = manifest._wrong()
        except (KeyError, TypeError, AttributeError, ValueError, UserError) as error:
            wrong = str(error)
        if wrong:
            raise DamagedData(f"{place} is damaged ({wrong})")
        return manifest

    def _wrong(self) -> str | None:
        """What cannot be in a manifest as it was written, of what reading relies on."""
        if self.kind not in KINDS or (self.kind == ArrayRows.kind) != (self.columns is not None):
            return f"it has rows of kind {self.kind!r}" + ("" if self.columns is None else " with columns")
        for part in self.mixture:
            if "/" in part["folder"] or part["folder"].startswith("."):
                return f"it names the folder {part['folder']}"
        for name, split in self.splits.items():
            if split.name != name or split.kind != self.kind:
                return f"its split {name} is called {split.name} and has {split.kind}"
            counts = (split.rows, split.tokens, split.row_length, split.rows_per_block, split.blocks_per_shard, split.lookahead)
            if not all(type(count) is int and count >= 0 for count in counts) or 0 in (split.rows_per_block, split.blocks_per_shard):
                return f"its split {name} has counts that cannot be"
            size = split.rows_per_block * split.blocks_per_shard
            expected = [(shard_name(name, i), min(size, split.rows - first)) for i, first in enumerate(range(0, split.rows, size))]
            if split.shards and [(shard.file, shard.rows) for shard in split.shards] != expected:
                return f"the shards of its split {name} do not have its {split.rows:,} rows"
        return None


def stream_rows(num_tokens: int, length: int) -> int:
    """Rows of a stream: windows of length + 1 ids that overlap by one, every id but the first once a target."""
    return max(1, -(-(num_tokens - 1) // length))


def shard_name(split: str, shard: int) -> str:
    return f"{split}-{shard:05d}.parquet"


# -------------------------------------------------------------------------------------------------- reading and writing


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
    if wanted and (TOKENIZER not in there or file_hash(folder, TOKENIZER)[1] != wanted):
        broken.append(TOKENIZER)
    return broken


def readable(folder: str) -> Manifest | None:
    """The manifest of a folder; None where there is none, or none that can be read."""
    try:
        return Manifest.load(folder) if MANIFEST in list_folder(folder) else None
    except UserError:
        return None
