"""Packing, windows, words and masking on arrays of ids."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perceiver.data.text import IGNORE, count_words, join_documents, mask_words, truncate, windows, word_ids
from perceiver.data.tokenizers import CLS, EOS, MASK, SEP, ByteTokenizer

BYTES = ByteTokenizer()


def stream_of(texts: list[str], before=None, after=None) -> np.ndarray:
    ids, lengths = BYTES.encode_batch(texts)
    whole = np.ones(len(texts), bool)
    return join_documents(ids, lengths, whole, whole, before, after)


def test_joined_documents_are_the_references(shared):
    pipeline = json.loads((shared / "golden" / "text_pipeline.json").read_text())["pipeline"]
    for name, length, before, after in (
        ("clm", 13, None, None), ("clm_add_eos_token", 13, None, EOS), ("clm_add_special_tokens", 13, CLS, SEP),
        ("mlm_add_special_tokens", 12, CLS, SEP),
    ):  # fmt: skip
        for split, texts in pipeline["documents"].items():
            stream = stream_of(texts, before, after)
            for i, row in enumerate(pipeline[name][split]):
                assert stream[i * length : (i + 1) * length].tolist() == row["input_ids"]


def test_shifted_windows_are_the_references(shared):
    shift = json.loads((shared / "golden" / "text_pipeline.json").read_text())["pipeline"]["random_shift"]
    block = np.array([shift["record_0"], shift["record_1"]], np.uint16)
    assert windows(block, shift["shift"])[0].tolist()[:-1] == shift["expected"]


@given(parts=st.lists(st.tuples(st.text("ab ", max_size=6), st.booleans(), st.booleans()), max_size=6))
@settings(max_examples=100, deadline=None)
def test_marks_stand_where_documents_begin_and_end(parts):
    ids, lengths = BYTES.encode_batch([text for text, _, _ in parts])
    begins, complete = (np.array([part[i] for part in parts], bool) for i in (1, 2))
    expected = [token for text, begin, end in parts for token in ([CLS] * begin + BYTES.encode(text).tolist() + [SEP] * end)]
    assert join_documents(ids, lengths, begins, complete, CLS, SEP).tolist() == expected
    assert join_documents(ids, lengths, begins, complete).tolist() == ids.tolist()


@given(
    num=st.integers(1, 6), length=st.integers(1, 9), shift=st.integers(0, 8),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_windows_of_any_shift_follow_the_stream(num, length, shift):
    block = np.arange((num + 1) * length, dtype=np.uint16).reshape(num + 1, length)
    if shift >= length:
        with pytest.raises(ValueError):
            windows(block, shift)
        return
    result = windows(block, shift)
    assert result.shape == (num, length + 1)
    for i, window in enumerate(result):
        assert window.tolist() == list(range(i * length + shift, i * length + shift + length + 1))


@given(texts=st.lists(st.text("ab", max_size=9), max_size=5), limit=st.integers(0, 6))
@settings(max_examples=50, deadline=None)
def test_truncation_keeps_the_beginnings(texts, limit):
    ids, lengths = truncate(*BYTES.encode_batch(texts), limit)
    assert BYTES.decode_batch(ids, lengths) == [text[:limit] for text in texts]


@given(text=st.text("ab \n\t", max_size=40))
@settings(max_examples=100, deadline=None)
def test_words_are_counted_as_split_does(text):
    assert count_words(text.encode()) == len(text.split())


def test_words_do_not_reach_across_documents():
    ids = stream_of(["end", "start one"], CLS, SEP)[None]
    numbers = word_ids(ids, BYTES.words)[0]
    assert numbers.tolist() == [-1, 0, 0, 0, -1, -1, 1, 1, 1, 1, 1, 2, 2, 2, 2, -1]


# -------------------------------------------------------------------------------------------------------------- masking

TEXT = "Whole words are chosen, with the space before them; some are short and others considerably longer. " * 20


def masked(**settings):
    ids = np.tile(BYTES.encode(TEXT, special=True)[:1024], (64, 1))
    rows = np.arange(64)
    kwargs = {"mask_id": MASK, "probability": 0.15, "seed": 0, "epoch": 0, "rows": rows} | settings
    return ids, *mask_words(ids, BYTES.words, **kwargs)


def test_masking_has_the_right_proportions():
    words = chosen = masked_words = random_words = same = 0
    for seed in range(5):
        ids, inputs, labels = masked(seed=seed)
        numbers = word_ids(ids, BYTES.words)
        first = (np.diff(numbers, axis=1, prepend=-2) != 0) & (numbers >= 0)
        selected = labels != IGNORE
        words += first.sum()
        chosen += (first & selected).sum()
        masked_words += (first & selected & (inputs == MASK)).sum()
        same += (first & selected & (inputs == ids)).sum()
        random_words += (first & selected & (inputs != ids) & (inputs != MASK)).sum()
    within(chosen, words, 0.15)
    within(masked_words, chosen, 0.8)
    within(random_words, chosen, 0.1)
    within(same, chosen, 0.1)


def within(count: int, of: int, p: float) -> None:
    """Four standard errors, and the chance that a random id is the old one or [MASK] (1/262 each of 10%)."""
    assert abs(count / of - p) < 4 * (p * (1 - p) / of) ** 0.5 + 0.001


def test_all_ids_of_a_word_share_its_fate():
    ids, inputs, labels = masked()
    numbers = word_ids(ids, BYTES.words)
    selected = labels != IGNORE
    for row in range(8):
        for word in range(numbers[row].max() + 1):
            places = numbers[row] == word
            assert selected[row, places].all() or not selected[row, places].any()
            at_mask = inputs[row, places] == MASK
            assert at_mask.all() or at_mask.sum() <= 1  # one random id in 262 is [MASK]


def test_labels_hold_the_original_ids_and_nothing_else_changes():
    ids, inputs, labels = masked()
    selected = labels != IGNORE
    assert np.array_equal(labels[selected], ids[selected])
    assert np.array_equal(inputs[~selected], ids[~selected])
    assert not selected[ids < 6].any()


def test_random_ids_cover_the_vocabulary_evenly():
    counts = np.zeros(262)
    for epoch in range(40):
        ids, inputs, labels = masked(epoch=epoch)
        random = (labels != IGNORE) & (inputs != ids) & (inputs != MASK)
        counts += np.bincount(inputs[random], minlength=262)
    assert inputs.max() < 262 and (counts > 0).mean() > 0.95
    rare = [i for i in range(262) if i != MASK and i not in set(BYTES.encode(TEXT).tolist())]
    assert abs(counts[rare] - counts[rare].mean()).max() < 5 * counts[rare].mean() ** 0.5


def test_masks_depend_on_seed_epoch_and_row_alone():
    ids, inputs, labels = masked()
    part = mask_words(ids[10:20], BYTES.words, mask_id=MASK, probability=0.15, seed=0, epoch=np.zeros(10, int), rows=np.arange(10, 20))
    assert np.array_equal(part[0], inputs[10:20]) and np.array_equal(part[1], labels[10:20])
    for change in ({"seed": 1}, {"epoch": 1}, {"rows": np.arange(64) + 64}):
        assert not np.array_equal(masked(**change)[2], labels)


def test_tokens_are_masked_one_by_one_where_told():
    ids, _, labels = masked(whole_words=False)
    within((labels != IGNORE).sum(), (ids >= 6).sum(), 0.15)
    numbers = word_ids(ids, BYTES.words)
    inside = numbers[:, 1:] == numbers[:, :-1]
    differs = ((labels[:, 1:] != IGNORE) != (labels[:, :-1] != IGNORE)) & inside
    within(differs.sum(), inside.sum(), 2 * 0.15 * 0.85)


def test_ids_that_are_no_text_are_never_chosen():
    valid = np.zeros((64, 1024), bool)
    valid[:, :100] = True
    _, _, labels = masked(valid=valid, probability=0.9)
    assert (labels[:, 100:] == IGNORE).all() and (labels[:, :100] != IGNORE).any()
