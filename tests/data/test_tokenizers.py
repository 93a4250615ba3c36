"""Tokenizers: the reference's byte ids, exact round trips, SentencePiece models."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perceiver.config import UserError
from perceiver.data.text import word_ids
from perceiver.data.tokenizers import ByteTokenizer, SentencePieceTokenizer, load_tokenizer

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads((shared / "golden" / "text_tokenizer.json").read_text())


@pytest.fixture(scope="module")
def pieces(shared):
    return load_tokenizer(str(shared / "data" / "sentencepiece" / "spiece.model"))


def test_byte_ids_are_the_references(golden):
    special = golden["special_ids"]
    ours = {"pad": BYTES.pad_id, "bos": BYTES.bos_id, "eos": BYTES.eos_id, "mask": BYTES.mask_id, "cls": BYTES.cls_id}
    assert {**ours, "sep": BYTES.sep_id} == special and BYTES.vocab_size == golden["vocab_size"]
    for case in golden["strings"]:
        ids = BYTES.encode_with_special(case["text"])
        assert ids.dtype == np.uint16 and ids.tolist() == case["ids"]
        if not (ids < 6).any():
            assert BYTES.encode(case["text"]).tolist() == case["ids"]
            assert BYTES.encode(case["text"], special=True).tolist() == case["ids_with_special_tokens"]


def test_byte_text_comes_back_exactly(golden):
    for case in golden["strings"]:
        ids = np.array(case["ids"])
        assert BYTES.decode(ids, skip_special=False) == case["text"]
        skipped = BYTES.decode(np.array(case["ids_with_special_tokens"]))
        tidied = skipped.replace(" .", ".").replace(" !", "!")  # the reference does so, and thereby loses text
        assert tidied == case["decoded_with_special_tokens_skipped"]


def test_words_are_the_references(golden):
    for case in golden["strings"]:
        for ids, expected in (("ids", "word_ids"), ("ids_with_special_tokens", "word_ids_with_special_tokens")):
            ours = word_ids(np.array([case[ids]], np.int64).reshape(1, -1), BYTES.words)[0]
            assert same_grouping(ours.tolist(), case[expected])


def same_grouping(ours: list[int], theirs: list[int | None]) -> bool:
    """Whether the same neighbours share a word; the numbers themselves differ (the reference skips some)."""
    if [n == -1 for n in ours] != [n is None for n in theirs]:
        return False
    pairs = zip(zip(ours, ours[1:], strict=False), zip(theirs, theirs[1:], strict=False), strict=True)
    return all((a == b) == (c == d) for (a, b), (c, d) in pairs if a != -1 and b != -1)


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=8))
@settings(max_examples=100, deadline=None)
def test_batches_of_bytes_round_trip(texts):
    ids, lengths = BYTES.encode_batch(texts)
    assert ids.dtype == np.uint16 and lengths.tolist() == [len(text.encode()) for text in texts]
    assert ids.tolist() == [byte + 6 for text in texts for byte in text.encode()]
    assert BYTES.decode_batch(ids, lengths) == texts


def test_special_names_in_texts_stay_text():
    assert BYTES.decode(BYTES.encode("a[MASK]b"), skip_special=True) == "a[MASK]b"
    assert BYTES.encode("[MASK]").min() >= 6


def test_bytes_that_are_no_text_are_marked():
    assert BYTES.decode(np.array([0xC3 + 6, ord("a") + 6])) == "\ufffda"
    with pytest.raises(ValueError, match=r"0 \.\. 261"):
        BYTES.decode(np.array([262]))


def test_sentencepiece_ids_are_the_models(pieces):
    assert pieces.vocab_size == 32_000
    assert pieces.encode("The quick brown fox, Perceiver.").tolist() == [
        32,
        2049,
        3442,
        17,
        13894,
        19,
        2427,
        1138,
        150,
        2013,
        9,
    ]
    named = (pieces.bos_id, pieces.eos_id, pieces.cls_id, pieces.sep_id, pieces.pad_id, pieces.mask_id)
    assert named == (1, 2, 3, 4, 5, 6)
    ids, lengths = pieces.encode_batch(["one text", "", "and another"])
    assert pieces.decode_batch(ids, lengths) == ["one text", "", "and another"]
    assert pieces.decode(pieces.encode("two words", special=True), skip_special=False) == "<cls>two words<sep>"


def test_sentencepiece_words_begin_with_their_space(pieces):
    ids = pieces.encode("The Perceiver, again")
    words = word_ids(ids[None], pieces.words)[0]
    groups = [pieces.decode(ids[words == n]) for n in range(words.max() + 1)]
    assert groups == ["The", "Perceiver,", "again"]


def test_a_pickled_sentencepiece_tokenizer_needs_no_file(pieces):
    copy = pickle.loads(pickle.dumps(pieces))
    assert copy.fingerprint == pieces.fingerprint and copy.encode("a fox").tolist() == pieces.encode("a fox").tolist()


def test_what_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "no.model").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"no.model is not a SentencePiece model"):
        load_tokenizer(str(tmp_path / "no.model"))
    with pytest.raises(UserError, match='must be "bytes" or the path of a SentencePiece model'):
        load_tokenizer("byte")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        SentencePieceTokenizer(b"", "empty")
