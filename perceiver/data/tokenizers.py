"""Tokenizers: UTF-8 bytes (the Perceiver's), and SentencePiece models. Ids are uint16 arrays."""

from __future__ import annotations

import hashlib
import string
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import pyarrow.fs as pafs

from perceiver.config import UserError
from perceiver.data.storage import open_folder, read_file

BLANK = "\u2581"
"""How SentencePiece writes a space."""
TOKENIZER = "tokenizer.model"
"""Copy of the SentencePiece model in a prepared data set and in a run."""

PAD, BOS, EOS, MASK, CLS, SEP = range(6)
_SPECIAL = ("[PAD]", "[BOS]", "[EOS]", "[MASK]", "[CLS]", "[SEP]")
_OFFSET = len(_SPECIAL)


class WordTable:
    """What each id says about words: bits in `flags`, uint8 (vocab_size,). White space belongs to the word after it."""

    SPECIAL = np.uint8(1)
    """The id belongs to no word."""
    STARTS_BLANK = np.uint8(2)
    """Its text starts with white space."""
    ALL_BLANK = np.uint8(4)
    """Its text is white space only."""

    def __init__(self, special: np.ndarray, starts_blank: np.ndarray, all_blank: np.ndarray) -> None:
        """From three boolean arrays (vocab_size,)."""
        bits = zip((self.SPECIAL, self.STARTS_BLANK, self.ALL_BLANK), (special, starts_blank, all_blank), strict=True)
        self.flags = np.bitwise_or.reduce([np.where(has, bit, np.uint8(0)) for bit, has in bits])
        self.special = special


class Tokenizer(ABC):
    """Text to ids and back."""

    vocab_size: int
    pad_id: int | None
    bos_id: int | None
    eos_id: int | None
    """Also marks the end of a document in a stream."""
    mask_id: int | None
    cls_id: int | None
    sep_id: int | None
    fingerprint: dict[str, Any]
    """Kind, vocabulary size and hash of the model (None for bytes), not its file's name: equal models are one tokenizer."""
    words: WordTable

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts without special ones, joined: uint16 (sum of lengths,); lengths: int64 (len(texts),)."""

    @abstractmethod
    def decode(self, ids: np.ndarray, skip_special: bool = True) -> str:
        """Text of ids. Special ids are left out, or written by name. Bytes that are no UTF-8 become U+FFFD."""

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Ids of a text, uint16; `special`: between [CLS] and [SEP]."""
        ids, _ = self.encode_batch([text])
        return np.concatenate([[self.cls_id], ids, [self.sep_id]]).astype(np.uint16) if special else ids

    def encode_rest(self, text: str) -> np.ndarray:
        """Ids of a text that continues another, uint16."""
        return self.encode(text)

    def decode_batch(self, ids: np.ndarray, lengths: np.ndarray, skip_special: bool = True) -> list[str]:
        """Texts of joined ids, the inverse of `encode_batch`."""
        ends = np.cumsum(lengths)
        return [self.decode(ids[end - n : end], skip_special) for n, end in zip(lengths, ends, strict=True)]


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes: byte b has id b + 6; 0 .. 5 are [PAD] [BOS] [EOS] [MASK] [CLS] [SEP] (Perceiver IO, Section 4.1)."""

    vocab_size = 256 + _OFFSET
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


def _text(data: np.ndarray) -> str:
    return data.tobytes().decode("utf-8", errors="replace")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (Kudo and Richardson, 2018). It may normalise text, so that decoding differs from it.

    Pickles with its model, so that tasks on other machines need no file.
    """

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
        if self.vocab_size > 2**16:
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
    """The tokenizer of `data.tokenizer`: "bytes", or the path or URI of a SentencePiece model.

    Raises:
        UserError: there is no such file, or it is no SentencePiece model.
    """
    if name == "bytes":
        return _byte_tokenizer()
    info = _file_info(name)
    if info.type != pafs.FileType.File:
        raise UserError(f'data.tokenizer is {name}: it must be "bytes" or the path of a SentencePiece model, which is not there')
    return _load_sentencepiece(name, info.size, info.mtime_ns)


def tokenizer_is_there(name: str) -> bool:
    """Whether `load_tokenizer` would find its file."""
    return name == "bytes" or _file_info(name).type == pafs.FileType.File


def _file_info(name: str) -> pafs.FileInfo:
    filesystem, path = open_folder(name)
    return filesystem.get_file_info(path)


@lru_cache(maxsize=1)
def _byte_tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@lru_cache(maxsize=4)
def _load_sentencepiece(name: str, size: int, mtime_ns: int) -> SentencePieceTokenizer:
    folder, _, file = name.rpartition("/")
    return SentencePieceTokenizer(read_file(folder or ("/" if name.startswith("/") else "."), file), file)
