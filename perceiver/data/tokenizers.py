"""Tokenizers: UTF-8 bytes (the Perceiver's), SentencePiece models, and how any is found by its name. Ids are uint16 arrays."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import pyarrow.fs as pafs

from perceiver.config import DataConfig, UserError
from perceiver.data.huggingface_tokenizer import HuggingFaceTokenizer, hub_file
from perceiver.data.storage import open_folder, read_file, write_file
from perceiver.data.tokenizer_base import MOST_IDS, TOKENIZER, TOKENIZER_FILES, TOKENIZER_JSON, Tokenizer, WordTable

BLANK = "\u2581"
"""How SentencePiece writes a space."""
HUB = "hub:"
"""Begins the name of a tokenizer on the hub."""

PAD, BOS, EOS, MASK, CLS, SEP = range(6)
_SPECIAL = ("[PAD]", "[BOS]", "[EOS]", "[MASK]", "[CLS]", "[SEP]")
_OFFSET = len(_SPECIAL)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes: byte b has id b + 6; 0 .. 5 are [PAD] [BOS] [EOS] [MASK] [CLS] [SEP] (Perceiver IO, Section 4.1)."""

    vocab_size = 256 + _OFFSET
    special_names = _SPECIAL
    pad_id, bos_id, eos_id, mask_id, cls_id, sep_id = PAD, BOS, EOS, MASK, CLS, SEP
    fingerprint = {"name": "bytes", "vocab_size": vocab_size, "sha256": None}

    def __init__(self) -> None:
        special = np.arange(self.vocab_size) < _OFFSET
        blank = np.isin(np.arange(self.vocab_size), np.frombuffer(string.whitespace.encode(), np.uint8) + _OFFSET)
        self.words = WordTable(special, blank, blank)

    def encode_bytes(self, data: bytes | memoryview | np.ndarray) -> np.ndarray:
        """Ids of bytes, uint16."""
        return np.add(np.frombuffer(data, np.uint8), _OFFSET, dtype=np.uint16)

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = [text.encode() for text in texts]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return self.encode_bytes(b"".join(encoded)), lengths

    def reading_special(self) -> Tokenizer:
        return _MarkedBytes()

    def encode_with_special(self, text: str) -> np.ndarray:
        """Like `encode`, but names of special ids in the text ("[MASK]") become these ids. For prompts."""
        ids = self.encode(text)
        data = text.encode()
        keep = np.ones(len(ids), bool)
        for special, name in enumerate(_SPECIAL):
            start = data.find(name.encode())
            while start >= 0:
                ids[start] = special
                keep[start + 1 : start + len(name)] = False
                start = data.find(name.encode(), start + len(name))
        return ids[keep]

    def decode(self, ids: np.ndarray, skip_special: bool = True) -> str:
        ids = np.asarray(ids).astype(np.int64, copy=False)
        if len(ids) and not (0 <= ids.min() and ids.max() < self.vocab_size):
            raise ValueError(f"ids must lie in 0 .. {self.vocab_size - 1}")
        if skip_special:
            return _text((ids[ids >= _OFFSET] - _OFFSET).astype(np.uint8))
        lengths = np.ones(self.vocab_size, np.int64)
        lengths[:_OFFSET] = list(map(len, _SPECIAL))
        ends = np.cumsum(lengths[ids])
        result = np.empty(int(ends[-1]) if len(ids) else 0, np.uint8)
        is_byte = ids >= _OFFSET
        result[ends[is_byte] - 1] = ids[is_byte] - _OFFSET
        for special, name in enumerate(_SPECIAL):
            places = ends[ids == special][:, None] - len(name) + np.arange(len(name))
            result[places] = np.frombuffer(name.encode(), np.uint8)
        return _text(result)


class _MarkedBytes(ByteTokenizer):
    """Bytes, with special tokens read by their names."""

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = [self._plain.encode_with_special(text) for text in texts]
        return np.concatenate([np.zeros(0, np.uint16), *ids]), np.fromiter(map(len, ids), np.int64, len(ids))

    @property
    def _plain(self) -> ByteTokenizer:
        return _byte_tokenizer()


def _text(data: np.ndarray) -> str:
    return data.tobytes().decode("utf-8", errors="replace")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (Kudo and Richardson, 2018). It may normalise text, so that decoding differs from it.

    Pickles with its model, so that tasks on other machines need no file.
    """

    file = TOKENIZER

    def __init__(self, model: bytes, name: str) -> None:
        """Raises UserError where `model` is not a SentencePiece model or has more than 65,536 ids."""
        import sentencepiece

        self.model, self.name = model, name
        self._processor = processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = bool(model) and processor.LoadFromSerializedProto(model)
        except RuntimeError:
            loaded = False
        if not loaded:
            raise UserError(f"data.tokenizer {name} is not a SentencePiece model")
        self.vocab_size = processor.vocab_size()
        if self.vocab_size > MOST_IDS:
            raise UserError(f"data.tokenizer {name} has {self.vocab_size} ids; at most 65,536 can be stored")
        self.fingerprint = {
            "name": "sentencepiece",
            "vocab_size": self.vocab_size,
            "sha256": hashlib.sha256(model).hexdigest(),
        }
        self.pad_id, self.mask_id = self._find("<pad>", "[PAD]"), self._find("<mask>", "[MASK]")
        self.cls_id, self.sep_id = self._find("<cls>", "[CLS]", "<s>"), self._find("<sep>", "[SEP]", "</s>")
        self.bos_id, self.eos_id = self._find("<s>", "[BOS]"), self._find("</s>", "<eod>", "[EOS]")
        pieces = [self._text(i) for i in range(self.vocab_size)]
        unknown = processor.unk_id()
        special = [processor.is_control(i) or i in self._special_ids() for i in range(self.vocab_size)]
        self.words = WordTable(
            np.array(special) & (np.arange(self.vocab_size) != unknown),
            np.array([piece.startswith(BLANK) for piece in pieces]),
            np.array([set(piece) == {BLANK} for piece in pieces]),
        )

    def __reduce__(self) -> tuple:
        return type(self), (self.model, self.name)

    def _text(self, piece: int) -> str:
        """A piece as it is written in the model; white space that a byte piece stands for as a blank."""
        name = self._processor.id_to_piece(piece)
        return BLANK if self._processor.is_byte(piece) and chr(int(name[3:5], 16)) in string.whitespace else name

    def _find(self, *names: str) -> int | None:
        unknown = self._processor.unk_id()
        return next((i for name in names if (i := self._processor.piece_to_id(name)) != unknown), None)

    def _special_ids(self) -> set[int | None]:
        return {self.pad_id, self.mask_id, self.cls_id, self.sep_id, self.bos_id, self.eos_id}

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = self._processor.encode(list(texts), out_type=int, num_threads=1)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), np.uint16, int(lengths.sum())), lengths

    def encode_rest(self, text: str) -> np.ndarray:
        # Models put a blank before what they encode: a line end, which is no part of any piece, takes it.
        before, ids = self.encode("\n"), self.encode("\n" + text)
        return ids[len(before) :] if np.array_equal(ids[: len(before)], before) else ids

    def decode(self, ids: np.ndarray, skip_special: bool = True) -> str:
        ids = np.asarray(ids).astype(np.int64)
        if len(ids) and not (0 <= ids.min() and ids.max() < self.vocab_size):
            raise ValueError(f"ids must lie in 0 .. {self.vocab_size - 1}")
        special = self.words.special[ids]
        if skip_special or not special.any():
            return self._processor.decode(ids[~special].tolist())
        borders = np.flatnonzero(np.diff(special, prepend=not special[0], append=not special[-1]))
        runs = (ids[a:b].tolist() for a, b in zip(borders[:-1], borders[1:], strict=True))
        return "".join(
            "".join(map(self._processor.id_to_piece, run)) if self.words.special[run[0]] else self._processor.decode(run) for run in runs
        )


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of `data.tokenizer`: "bytes"; the path or URI of a SentencePiece model, of a tokenizer.json or of a folder with one;
    or that of a model on the hub, "hub:NAME" or "hub:NAME@REVISION".

    Raises:
        UserError: there is no such file, it is no tokenizer, or the hub cannot be reached and it was not fetched before.
    """
    if name == "bytes":
        return _byte_tokenizer()
    path = hub_file(name.removeprefix(HUB)) if name.startswith(HUB) else _path_of(name)
    info = _file_info(path)
    if info.type != pafs.FileType.File:
        hint = f" (one on the hub: {HUB}{name})" if name.count("/") == 1 and not name.endswith((".model", ".json")) else ""
        raise UserError(
            f'data.tokenizer is {name}: it must be "bytes" or the path of a SentencePiece model or a {TOKENIZER_JSON}, '
            f"which is not there{hint}"
        )
    return _load(path, name if name.startswith(HUB) else path.rpartition("/")[2], info.size, info.mtime_ns)


def tokenizer_of(data: DataConfig) -> Tokenizer:
    """The tokenizer by which the texts of an experiment become ids: `data.tokenizer`, as `data.special_tokens` says.

    Raises:
        UserError: see `load_tokenizer`; or it cannot read special tokens in a text.
    """
    tokenizer = load_tokenizer(data.tokenizer)
    return tokenizer.reading_special() if data.special_tokens == "tokens" else tokenizer


def tokenizer_is_there(name: str) -> bool:
    """Whether `load_tokenizer` would find its file."""
    if name.startswith(HUB):
        try:
            return bool(hub_file(name.removeprefix(HUB)))
        except UserError:
            return False
    return name == "bytes" or _file_info(_path_of(name)).type == pafs.FileType.File


def kept_file(names: Collection[str]) -> str | None:
    """Of the names of a folder's files that of its tokenizer; None where there is none."""
    return next((name for name in TOKENIZER_FILES if name in names), None)


def keep_tokenizer(tokenizer: Tokenizer | None, folder: Any) -> None:
    """Writes a tokenizer's file, where it has one, into a folder (a path or URI)."""
    if tokenizer is not None and tokenizer.file is not None:
        write_file(folder, tokenizer.file, tokenizer.model)


def missing(data: DataConfig, tokenizer: Tokenizer, what: str, names: str) -> UserError:
    """The error that a tokenizer lacks a special token: what is missing, how it is usually named, and what there is."""
    there = ", ".join(tokenizer.special_names[:12]) or "none"
    return UserError(f"data.tokenizer {data.tokenizer} has no {what} ({names}); its special tokens: {there}")


def _path_of(name: str) -> str:
    """The file that a path or URI names: a folder's tokenizer.json."""
    return f"{name.rstrip('/')}/{TOKENIZER_JSON}" if _file_info(name).type == pafs.FileType.Directory else name


def _file_info(name: str) -> pafs.FileInfo:
    filesystem, path = open_folder(name)
    return filesystem.get_file_info(path)


@lru_cache(maxsize=1)
def _byte_tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@lru_cache(maxsize=4)
def _load(path: str, name: str, size: int, mtime_ns: int) -> Tokenizer:
    folder, _, file = path.rpartition("/")
    model = read_file(folder or ("/" if path.startswith("/") else "."), file)
    if model.lstrip()[:1] == b"{":
        return HuggingFaceTokenizer(model, name)
    return SentencePieceTokenizer(model, name)
