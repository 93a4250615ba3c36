"""Training of SentencePiece models: a sample of documents that does not depend on how the input is read, and the training.

The sample is the documents of smallest hash of (seed, text), as many as fill its size: each task finds those of its part of
the input, and the sample of the parts' samples is that of the whole. Equal documents count once. Knows no Ray.
"""

from __future__ import annotations

import hashlib
import heapq
import io
from collections.abc import Iterable, Iterator

import numpy as np
import sentencepiece

from perceiver.config import TokenizerTraining, UserError
from perceiver.data.pieces import Piece
from perceiver.data.preparation import splits_of
from perceiver.data.read_documents import read_documents
from perceiver.data.spans import Problems
from perceiver.data.tables import Columns

LONGEST = 1000
"""Characters of a line that the trainer is given at once (it leaves out what is longer than 4,192 bytes)."""
LARGEST_VOCABULARY = 1 << 16
"""Ids are stored as uint16."""
SPECIAL = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>"}
"""Special pieces with a place of their own in SentencePiece, by id from 0 on."""
CONTROL = ("<mask>", "<cls>", "<sep>")
"""The ids after these."""


class Sample:
    """The texts of smallest key: the shortest run of them, in the order of keys, that holds `max_bytes` bytes or more."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._size = 0
        self._heap: list[tuple[int, str, int]] = []  # (-key, text, bytes): the largest key first
        self._keys: set[int] = set()

    def add(self, key: int, text: str) -> None:
        if key in self._keys:
            return
        size = len(text.encode())
        heapq.heappush(self._heap, (-key, text, size))
        self._keys.add(key)
        self._size += size
        while self._size - self._heap[0][2] >= self._max_bytes:
            largest, _, size = heapq.heappop(self._heap)
            self._keys.discard(-largest)
            self._size -= size

    @property
    def size(self) -> int:
        """Bytes of the texts as UTF-8."""
        return self._size

    def items(self) -> list[tuple[int, str]]:
        """(key, text) in the order of keys."""
        return sorted((-key, text) for key, text, _ in self._heap)


def choose_pieces(pieces: list[Piece], max_bytes: int, seed: int) -> list[Piece]:
    """Pieces of about `max_bytes` input together (at least one), drawn without replacement."""
    chosen: list[Piece] = []
    size = 0
    for i in np.random.Generator(np.random.Philox(seed & (2**63 - 1))).permutation(len(pieces)):
        if chosen and size + pieces[i].size > max_bytes:
            break
        chosen.append(pieces[i])
        size += pieces[i].size
    return chosen


def sample_piece(piece: Piece, columns: Columns, skip: bool, val_fraction: float, max_bytes: int, seed: int) -> Sample:
    """The sample of one piece's training documents (of plain text: of its sections).

    Raises:
        UserError: a fault in the input.
    """
    sample, problems = Sample(max_bytes), Problems(skip)
    salt = (seed & (2**64 - 1)).to_bytes(8, "little")
    for span in piece.spans:
        for documents in read_documents(span, columns, problems):
            encoded = [text.encode() for text in documents.texts]
            for split, chosen in splits_of(span.file, encoded, val_fraction):
                for i in np.flatnonzero(chosen) if split == "train" else ():
                    key = hashlib.blake2b(encoded[i], digest_size=8, salt=salt).digest()
                    sample.add(int.from_bytes(key, "little"), documents.texts[i])
    return sample


def lines(texts: Iterable[str]) -> Iterator[str]:
    """What the trainer reads: the lines of all texts, long ones cut at blanks (or anywhere, where there is none)."""
    for text in texts:
        for line in text.splitlines():
            while len(line) > LONGEST:
                cut = line.rfind(" ", 1, LONGEST)
                yield line[: cut if cut > 0 else LONGEST]
                line = line[cut + 1 if cut > 0 else LONGEST :]
            if line.strip():
                yield line


def check_training(config: TokenizerTraining) -> None:
    """Checks what the configuration alone tells.

    Raises:
        UserError: the first field that cannot be right.
    """
    smallest = 256 + len(SPECIAL) + len(CONTROL) + 1
    if not smallest <= config.vocab_size <= LARGEST_VOCABULARY:
        raise UserError(
            f"vocab-size is {config.vocab_size} and must be from {smallest} (256 bytes, {smallest - 257} special pieces and a "
            f"piece) to {LARGEST_VOCABULARY:,}"
        )
    if not 0 < config.character_coverage <= 1:
        raise UserError(f"character-coverage is {config.character_coverage} and must be above 0 and at most 1")
    for name in ("sample_megabytes", "read_megabytes"):
        if getattr(config, name) < 1:
            raise UserError(f"{name.replace('_', '-')} is {getattr(config, name)} and must be at least 1")


def train_sentencepiece(texts: Iterable[str], config: TokenizerTraining) -> bytes:
    """A SentencePiece model. The same texts give the same bytes (one thread, for one version of sentencepiece).

    Text is taken as it is, without normalisation, and what has no piece is written as bytes: so ids give the text back
    exactly, and bits per byte mean what they mean for a model of bytes.

    Raises:
        UserError: a vocabulary that the text is too small for, or too small for the text's characters.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(texts), model_writer=model, vocab_size=config.vocab_size, model_type=config.model_type,
            character_coverage=config.character_coverage, num_threads=1, minloglevel=2,
            normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True,
            **{f"{name}_id": i for i, name in enumerate(SPECIAL)}, **{f"{name}_piece": piece for name, piece in SPECIAL.items()},
            control_symbols=list(CONTROL),
        )  # fmt: skip
    except RuntimeError as error:
        raise UserError(f"vocab-size is {config.vocab_size}: {_reason(str(error))}") from None
    return model.getvalue()


def _reason(error: str) -> str:
    """What is wrong with a vocabulary, from the trainer's own words."""
    if "too high" in error:
        return f"the sample has too little text for it, at most {error.rpartition('<=')[2].strip(' .')} is possible"
    if "required_chars" in error:
        needed = error.rpartition("chars.")[2].split(".")[0].strip()
        return f"the sample's characters alone need more ({needed}); lower character-coverage"
    return f"SentencePiece refused it ({error.splitlines()[0]})"
