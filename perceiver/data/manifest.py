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

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from perceiver.config import UserError, digest
from perceiver.data import flow_rows, media_rows  # noqa: F401  (their kinds make themselves known)
from perceiver.data.rows import KINDS, ArrayRows, RowKind, rows_of
from perceiver.data.storage import read_file, write_file

FORMAT_VERSION = 1
"""Who raises it also adds it to `prepare_settings`, so that data sets of the old format are not found any more."""
MANIFEST = "manifest.json"
COUNTS = ("rows", "tokens", "bytes", "words", "documents")
"""What is counted in a split."""
SPLITS = ("train", "val")


class DamagedData(UserError):
    """Prepared data that is missing or not as it was written: the message names the file."""


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
    """Ids of the stream (with those that fill up a performance's rows), or of all documents as stored; 0 for images and arrays."""
    bytes: int
    """Bytes of the text as UTF-8 (without ids that mark documents), of the pixels, of the events, or of the arrays."""
    words: int
    """Words of the text, separated by ASCII whitespace; notes of performances."""
    documents: int
    """Documents (or images, performances, examples) that it was made from."""
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
        return self.stored.bytes_per_row or (2 * self.tokens or self.bytes) // max(self.rows, 1) + 8

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
    the splits are different files; "empty_documents": how many documents have no ids, by split, where there are any;
    "held_out": "by class" or "by group", where validation was chosen so; "repeated": how many rows have the content of another one
    ("by class"); "groups": how many there are ("by group");
    "duplicates": how many rows were left out because another one has their content, by split;
    "fitted": how many sounds were cut, and how many filled up with silence, by split;
    "long_texts": how many documents are longer than a row, by split, tokens of all, and how many of these are lost.
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
        if self.kind not in KINDS or KINDS[self.kind].has_columns != (self.columns is not None):
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
    """The file of a shard."""
    return f"{split}-{shard:05d}.parquet"
