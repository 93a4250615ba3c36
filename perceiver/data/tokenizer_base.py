"""What a tokenizer is: text to ids and back, its special ids, and what each id says about words."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from perceiver.config import UserError

TOKENIZER = "tokenizer.model"
"""Copy of the SentencePiece model in a prepared data set, a run, or an exported model."""
TOKENIZER_JSON = "tokenizer.json"
"""The same of a tokenizer of Hugging Face's library."""
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_JSON)
MOST_IDS = 1 << 16
"""Ids are stored as uint16."""


class WordTable:
    """What each id says about words: bits in `flags`, uint8 (vocab_size,). White space belongs to the word after it."""

    SPECIAL = np.uint8(1)
    """The id belongs to no word."""
    STARTS_BLANK = np.uint8(2)
    """Its text starts with white space, or a mark of the tokenizer says that a word begins with it."""
    ALL_BLANK = np.uint8(4)
    """Its text is white space only."""

    ENDS_WORD = np.uint8(8)
    """The id after it begins a word, whatever that is."""

    def __init__(self, special: np.ndarray, starts_blank: np.ndarray, all_blank: np.ndarray, ends_word: np.ndarray | None = None) -> None:
        """From boolean arrays (vocab_size,)."""
        bits = [(self.SPECIAL, special), (self.STARTS_BLANK, starts_blank), (self.ALL_BLANK, all_blank)]
        if ends_word is not None:
            bits.append((self.ENDS_WORD, ends_word))
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
    file: ClassVar[str | None] = None
    """Name of the file that it is kept under, in data sets, runs and exported models; None: it has none."""
    model: bytes
    """Content of that file."""
    special_names: tuple[str, ...] = ()
    """Names of its special tokens."""

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

    def reading_special(self) -> Tokenizer:
        """The same tokenizer, for which the name of a special token in a text is that token (`data.special_tokens`).

        Raises:
            UserError: it cannot do so.
        """
        raise UserError("--data.special-tokens is tokens, which bytes and a tokenizer.json alone can read: leave it out")

    def encode_rest(self, text: str) -> np.ndarray:
        """Ids of a text that continues another, uint16."""
        return self.encode(text)

    def decode_batch(self, ids: np.ndarray, lengths: np.ndarray, skip_special: bool = True) -> list[str]:
        """Texts of joined ids, the inverse of `encode_batch`."""
        ends = np.cumsum(lengths)
        return [self.decode(ids[end - n : end], skip_special) for n, end in zip(lengths, ends, strict=True)]
