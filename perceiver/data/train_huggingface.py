"""Training of tokenizers that Hugging Face's library reads: byte-level BPE, WordPiece, and a unigram model, each as a tokenizer.json.

The same texts give the same bytes. The library's own trainers do so for BPE alone: that of WordPiece numbers the letters inside words in
the order of a hash table, so they are numbered before; its unigram trainer adds up numbers in such an order, so SentencePiece's is used.
"""

from __future__ import annotations

import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from perceiver.config import TokenizerTraining, UserError
from perceiver.data.train_tokenizer import train_sentencepiece

logger = logging.getLogger(__name__)

_BYTES_SPECIAL = ("<pad>", "<s>", "</s>", "<mask>", "<cls>", "<sep>")
"""Special tokens of byte-level BPE, by id from 0 on. Nothing is unknown to it."""
_WORDPIECE_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[BOS]", "[EOS]")
_INSIDE = "##"
"""Begins a piece inside a word (BERT)."""
_BLANK = "\u2581"


def train_huggingface(texts: Sequence[str], config: TokenizerTraining) -> bytes:
    """The content of a tokenizer.json.

    - bpe: byte pair encoding of UTF-8 bytes (GPT-2): any text comes back exactly.
    - wordpiece: pieces of words, split at white space and punctuation (BERT, with case and accents): white space is not kept, and
      words with letters outside of `character_coverage` are [UNK].
    - unigram: the ids of the SentencePiece model that the same texts give: any text comes back exactly, but for U+2581.

    Raises:
        UserError: a vocabulary that the text is too small for, or too small for the text's characters.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    makers = {"bpe": _byte_level_bpe, "wordpiece": _wordpiece, "unigram": _unigram}
    made = makers[config.model_type](texts, config)
    size = made.get_vocab_size()
    if size < config.vocab_size:
        raise UserError(f"vocab-size is {config.vocab_size}: the sample has too little text for it, at most {size} is possible")
    return (made.to_str(pretty=True) + "\n").encode()


def _byte_level_bpe(texts: Sequence[str], config: TokenizerTraining) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size, special_tokens=list(_BYTES_SPECIAL), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(_shown(texts), trainer, length=len(texts))
    return made


def _wordpiece(texts: Sequence[str], config: TokenizerTraining) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    letters = _letters(texts, config.character_coverage)
    special, inside = list(_WORDPIECE_SPECIAL), [f"{_INSIDE}{letter}" for letter in letters]
    if (needed := len(special) + 2 * len(letters)) >= config.vocab_size:
        raise UserError(f"vocab-size is {config.vocab_size}: the sample's characters alone need more ({needed}); lower character-coverage")

    def tokenizer(model: models.WordPiece) -> Any:
        found = Tokenizer(model)
        found.normalizer = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False)
        found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        found.decoder = decoders.WordPiece(prefix=_INSIDE)
        return found

    learning = tokenizer(models.WordPiece(unk_token=special[1]))
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocab_size, special_tokens=[*special, *inside], initial_alphabet=letters, limit_alphabet=len(letters),
        continuing_subword_prefix=_INSIDE, show_progress=False,
    )  # fmt: skip
    learning.train_from_iterator(_shown(texts), trainer, length=len(texts))
    vocabulary = learning.get_vocab()
    made = tokenizer(models.WordPiece(vocabulary, unk_token=special[1], continuing_subword_prefix=_INSIDE))
    made.add_special_tokens(special)
    marks = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=marks)
    return made


def _letters(texts: Sequence[str], coverage: float) -> list[str]:
    """The commonest characters of words that are together the given share of all, sorted."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    known = {letter: n for letter, n in counts.items() if not letter.isspace() and not unicodedata.category(letter).startswith("C")}
    chosen, seen, total = [], 0, sum(known.values())
    for letter, count in sorted(known.items(), key=lambda item: (-item[1], item[0])):
        if seen >= coverage * total:
            break
        chosen.append(letter)
        seen += count
    return sorted(chosen)


def _unigram(texts: Sequence[str], config: TokenizerTraining) -> Any:
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    processor = sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece(_shown(texts), config))
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.vocab_size())]
    made = Tokenizer(models.Unigram(pieces, unk_id=processor.unk_id(), byte_fallback=True))
    # SentencePiece puts a blank before each text, whether it begins with one or not, which Metaspace by itself would not.
    made.normalizer = normalizers.Sequence([normalizers.Prepend(_BLANK), normalizers.Replace(" ", _BLANK)])
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_BLANK, prepend_scheme="never")
    made.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    made.add_special_tokens([piece for i, (piece, _) in enumerate(pieces) if processor.is_control(i) or processor.is_unknown(i)])
    return made


def _shown(texts: Sequence[str]) -> Iterator[str]:
    """The texts, with a line of progress after each tenth."""
    tenth = max(1, len(texts) // 10)
    for number, text in enumerate(texts, 1):
        yield text
        if number % tenth == 0:
            logger.info(f"  documents {number:,}/{len(texts):,}")
