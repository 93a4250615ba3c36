"""Tokenizers of Hugging Face's library `tokenizers`: a file tokenizer.json, local or of a model on the hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
import string
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np

from perceiver.config import UserError
from perceiver.data.hub import why_unreachable
from perceiver.data.tokenizer_base import MOST_IDS, TOKENIZER_JSON, Tokenizer, WordTable

_BLANK = string.whitespace
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How a piece is written that stands for one byte."""
_NAMES = {
    "pad": ("[PAD]", "<pad>", "<|pad|>", "<|padding|>"),
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
    "bos": ("<s>", "[BOS]", "<bos>", "<|bos|>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>", "[CLS]", "<cls>"),
    "eos": ("</s>", "[EOS]", "<eos>", "<|eos|>", "<|end_of_text|>", "<|endoftext|>", "[SEP]", "<sep>"),
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
}
"""How special tokens are named, the commonest first."""


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json. What it does to text (normalisation, splitting, pieces) is its own; marks around texts, padding and cutting are
    the platform's. A tokenizer without [CLS] and [SEP] has its ids for the begin and the end of a text in their place.

    The name of a special token in a text is text, unless `reading_special`. Pickles with its file's content.
    """

    file = TOKENIZER_JSON

    def __init__(self, model: bytes, name: str, reads_special: bool = False) -> None:
        """Raises UserError where `model` is no tokenizer.json or has more than 65,536 ids."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a data task has one core; the library would take all
        import tokenizers

        self.model, self.name, self._reads_special = model, name, reads_special
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(model.decode())
            content: dict[str, Any] = json.loads(model)
        except Exception as error:  # the library raises bare exceptions
            raise UserError(f"data.tokenizer {name} is no {TOKENIZER_JSON} of Hugging Face ({str(error).splitlines()[0]})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = not reads_special
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if not 0 < self.vocab_size <= MOST_IDS:
            raise UserError(f"data.tokenizer {name} has {self.vocab_size:,} ids, and from 1 to {MOST_IDS:,} can be stored")
        self.fingerprint = {"name": "tokenizers", "vocab_size": self.vocab_size, "sha256": hashlib.sha256(model).hexdigest()}
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content: number for number, token in sorted(added.items()) if token.special}
        self.special_names = tuple(special)
        found = {role: next((special[name] for name in names if name in special), None) for role, names in _NAMES.items()}
        self.pad_id, self.mask_id, self.bos_id, self.eos_id = (found[role] for role in ("pad", "mask", "bos", "eos"))
        self.cls_id = self.bos_id if found["cls"] is None else found["cls"]
        self.sep_id = self.eos_id if found["sep"] is None else found["sep"]
        unknown = content["model"].get("unk_token")
        is_special = np.zeros(self.vocab_size, bool)
        is_special[[number for name, number in special.items() if name != unknown and number != content["model"].get("unk_id")]] = True
        texts = {number: token.content for number, token in added.items()}
        self.words = _word_table(self.vocab_size, vocabulary, texts, is_special, content)
        first = self.encode("a")
        self._puts_blank = _marks_blanks(content) and len(first) > 0 and bool(self.words.flags[first[0]] & WordTable.STARTS_BLANK)

    def __reduce__(self) -> tuple:
        return type(self), (self.model, self.name, self._reads_special)

    def reading_special(self) -> Tokenizer:
        return type(self)(self.model, self.name, True)

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = [found.ids for found in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        if not self._reads_special:
            for number, text in enumerate(texts):
                if any(name in text for name in self.special_names) and self.words.special[ids[number]].any():
                    ids[number] = self._as_text(text)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), np.uint16, int(lengths.sum())), lengths

    def _as_text(self, text: str) -> list[int]:
        """Ids of a text with names of special tokens that the model takes for pieces (unigram models do): they are cut in two."""
        names = sorted(self.special_names, key=len, reverse=True)
        first, *rest = re.split("|".join(f"(?<={re.escape(name[:1])})(?={re.escape(name[1:])})" for name in names), text)
        ids = self._tokenizer.encode(first, add_special_tokens=False).ids
        for part in rest:
            ids = ids + self.encode_rest(part).tolist()
        return [number for number in ids if not self.words.special[number]]

    def encode_rest(self, text: str) -> np.ndarray:
        if not self._puts_blank:
            return self.encode(text)
        # A blank goes before what is encoded: a line end, which is no part of any word, takes it.
        before, ids = self.encode("\n"), self.encode("\n" + text)
        return ids[len(before) :] if np.array_equal(ids[: len(before)], before) else self.encode(text)

    def decode(self, ids: np.ndarray, skip_special: bool = True) -> str:
        ids = np.asarray(ids).astype(np.int64)
        if len(ids) and not (0 <= ids.min() and ids.max() < self.vocab_size):
            raise ValueError(f"ids must lie in 0 .. {self.vocab_size - 1}")
        if skip_special:
            ids = ids[~self.words.special[ids]]
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def _word_table(
    size: int, vocabulary: Mapping[str, int], added: Mapping[int, str], special: np.ndarray, content: Mapping[str, Any]
) -> WordTable:
    """What the pieces say about words, by the tokenizer's own marks.

    Words are as in all tokenizers separated by white space, where the pieces have it: as bytes (GPT-2's way), as a mark (SentencePiece's),
    or as an end of words. Where white space is not kept (BERT's way) all that is not marked as continuing a word begins one.
    """
    starts, blank, ends = (np.zeros(size, bool) for _ in range(3))
    model = content["model"]
    parts = _part_types(content)
    as_bytes, mark = "ByteLevel" in parts, _metaspace(content)
    suffix, prefix = model.get("end_of_word_suffix") or "", model.get("continuing_subword_prefix") or ""
    letters = {char: chr(byte) for byte, char in _byte_letters().items()}
    for piece, number in vocabulary.items():
        if number in added:
            text = added[number]
        elif as_bytes:
            text = "".join(letters.get(char, char) for char in piece)
        elif found := _BYTE.fullmatch(piece):
            text = chr(int(found[1], 16))
        else:
            text = piece.replace(mark, " ") if mark else piece
        starts[number] = text[:1] in _BLANK if text else False
        blank[number] = bool(text) and not text.strip(_BLANK)
        if suffix:
            ends[number] = piece.endswith(suffix)
        elif not as_bytes and not mark:  # white space is in no piece
            starts[number] = not (prefix and piece.startswith(prefix))
    return WordTable(special, starts, blank, ends if suffix else None)


def _part_types(content: Mapping[str, Any]) -> set[str]:
    """Types of the parts that split a text and put it together again."""
    found: set[str] = set()
    parts = [content.get(name) for name in ("pre_tokenizer", "decoder")]
    while parts:
        part = parts.pop()
        if part is not None:
            found.add(part["type"])
            parts += part.get("pretokenizers", []) + part.get("decoders", [])
    return found


def _metaspace(content: Mapping[str, Any]) -> str:
    """The mark that stands for a space in pieces; "": none does."""
    parts = [content.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    while parts:
        part = parts.pop()
        if part is None:
            continue
        if part["type"] == "Metaspace":
            return part.get("replacement", "\u2581")
        if part["type"] == "Replace" and part.get("content") == " ":
            return part["pattern"].get("String", "")
        parts += part.get("pretokenizers", []) + part.get("decoders", []) + part.get("normalizers", [])
    return ""


def _marks_blanks(content: Mapping[str, Any]) -> bool:
    """Whether white space is in the pieces."""
    return "ByteLevel" in _part_types(content) or bool(_metaspace(content))


@lru_cache(maxsize=1)
def _byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in pieces of bytes (GPT-2, Radford et al. 2019): printable ones for themselves, the others in
    their order for those from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@lru_cache(maxsize=16)
def hub_file(name: str) -> str:
    """The local copy of the tokenizer.json of a model on the hub, fetched where it is not there yet.

    Args:
        name: NAME or NAME@REVISION, a branch, tag or commit; without one that of today.

    Raises:
        UserError: there is no such model or revision, it has no tokenizer.json, or the hub cannot be reached and it was not fetched before.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    model, _, revision = name.partition("@")
    what = f"data.tokenizer is hub:{name}"
    try:
        return hf_hub_download(model, TOKENIZER_JSON, revision=revision or None, local_files_only=why_unreachable() is not None)
    except LocalEntryNotFoundError:  # before EntryNotFoundError, of which it is a kind
        raise UserError(
            f"{what}: the hub cannot be reached and it was not fetched before: fetch it where there is a network, or give the path of its "
            f"{TOKENIZER_JSON}"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{what}: the model has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise UserError(f"{what}: the hub has no such model, or it needs a login (`hf auth login`)") from None
    except EntryNotFoundError:
        raise UserError(f"{what}: the model has no {TOKENIZER_JSON}; a SentencePiece model of it is given by its path") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{what}, which cannot be fetched ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
