"""Tokenizers of Hugging Face's library: its own ids, exact round trips, words, special tokens, and their training."""

import json
import pickle
import string
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from perceiver.config import DataConfig, UserError
from perceiver.data import huggingface_tokenizer
from perceiver.data.huggingface_tokenizer import HuggingFaceTokenizer
from perceiver.data.text import mask_words, word_ids
from perceiver.data.tokenizers import SentencePieceTokenizer, kept_file, load_tokenizer, tokenizer_is_there, tokenizer_of
from perceiver.data.train_huggingface import train_huggingface
from perceiver.data.train_tokenizer import train_sentencepiece
from ray_jobs.train_tokenizer import check
from tests.data.test_train_tokenizer import CONFIG, documents

TEXTS = [f"{text}, don't {text[:9]}!\n" for text in documents(120)]
KINDS = ("bpe", "wordpiece", "unigram")
ANY_TEXT = st.text(st.characters(codec="utf-8") | st.sampled_from(" \t\n\u00a0\u0301😀é'#▁"), max_size=40)


def config_of(kind: str):
    return replace(CONFIG, model_type=kind, vocab_size=420)


@pytest.fixture(scope="module")
def trained():
    return {kind: HuggingFaceTokenizer(train_huggingface(TEXTS, config_of(kind)), kind) for kind in KINDS}


@pytest.fixture(scope="module", params=KINDS)
def one(request, trained):
    return trained[request.param]


@settings(max_examples=60, deadline=None)
@given(ANY_TEXT)
def test_bytes_in_pairs_give_any_text_back(trained, text):
    tokenizer = trained["bpe"]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


@pytest.mark.parametrize("text", ["  two", "\tx\t", "a\r\n\n b ", "e\u0301\u0301", "👩‍👩‍👧 ok", "\u3000\u00a0", "\x00\x01", ""])
def test_blanks_marks_and_emoji_come_back(trained, text):
    assert trained["bpe"].decode(trained["bpe"].encode(text)) == text


@settings(max_examples=40, deadline=None)
@given(ANY_TEXT.filter(lambda text: "▁" not in text))
def test_a_unigram_model_gives_any_text_back_but_for_its_mark(trained, text):
    assert trained["unigram"].decode(trained["unigram"].encode(text)) == text


@settings(max_examples=40, deadline=None)
@given(st.lists(ANY_TEXT, max_size=5))
def test_a_batch_is_its_texts(one, texts):
    ids, lengths = one.encode_batch(texts)
    assert ids.dtype == np.uint16 and lengths.tolist() == [len(one.encode(text)) for text in texts]
    assert np.array_equal(ids, np.concatenate([np.zeros(0, np.uint16), *map(one.encode, texts)]))
    assert one.decode_batch(ids, lengths) == [one.decode(one.encode(text)) for text in texts]


def test_ids_are_the_librarys(one):
    library = tokenizers.Tokenizer.from_str(one.model.decode())
    for text in [*TEXTS[:20], "", "  x", "Ünknown 漢字"]:
        assert one.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids
    assert one.vocab_size == library.get_vocab_size() == 420
    assert one.fingerprint["sha256"] and one.fingerprint["name"] == "tokenizers"


def test_a_unigram_model_has_the_ids_of_sentencepiece(trained):
    theirs = SentencePieceTokenizer(train_sentencepiece(TEXTS, config_of("unigram")), "x")
    for text in [*TEXTS[:30], "", " ", "  two  blanks ", "a\n\nb", "Ünknown 漢字😀", "\tx"]:
        assert trained["unigram"].encode(text).tolist() == theirs.encode(text).tolist(), text
        assert trained["unigram"].encode_rest(text).tolist() == theirs.encode_rest(text).tolist(), text
    ours = trained["unigram"]
    assert [ours.pad_id, ours.bos_id, ours.eos_id, ours.mask_id, ours.cls_id, ours.sep_id] == [
        theirs.pad_id, theirs.bos_id, theirs.eos_id, theirs.mask_id, theirs.cls_id, theirs.sep_id,
    ]  # fmt: skip
    same = ours.words.flags == theirs.words.flags
    assert same.all(), np.flatnonzero(~same)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_texts_give_the_same_bytes(trained, kind):
    assert train_huggingface(TEXTS, config_of(kind)) == trained[kind].model


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from(string.ascii_lowercase[:12] + "  .,'\n😀"), min_size=1, max_size=60))
def test_words_are_unions_of_the_tokenizers_own(one, text):
    """Masks never cut one of the words that the tokenizer itself splits a text into (for which a line end ends none in a unigram model)."""
    if one.name == "unigram":
        text = text.replace("\n", " ")
    library = tokenizers.Tokenizer.from_str(one.model.decode())
    found = library.encode(text, add_special_tokens=False)
    ours = word_ids(np.array([found.ids], np.uint16).reshape(1, -1), one.words)[0]
    for (a, b), (mine, other) in zip(zip(found.word_ids, found.word_ids[1:], strict=False), zip(ours, ours[1:], strict=False), strict=True):
        assert mine == other or a != b
    if one.name == "wordpiece":
        assert [a == b for a, b in zip(found.word_ids, found.word_ids[1:], strict=False)] == (ours[1:] == ours[:-1]).tolist()


def test_words_of_byte_pairs_are_separated_by_white_space(trained):
    tokenizer = trained["bpe"]
    text = "don't  stop, now\tor never"
    ids = tokenizer.encode(text)
    numbers = word_ids(ids[None], tokenizer.words)[0]
    words = [tokenizer.decode(ids[numbers == number]) for number in range(numbers.max() + 1)]
    assert words == ["don't", "  stop,", " now", "\tor", " never"]


def test_an_end_of_word_mark_separates_words():
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "b</w>": 3, "a</w>": 4, "ab</w>": 5}
    model = tokenizers.models.BPE(vocabulary, [("a", "b</w>")], unk_token="<unk>", end_of_word_suffix="</w>")
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.decoder = tokenizers.decoders.BPEDecoder("</w>")
    tokenizer = HuggingFaceTokenizer(library.to_str().encode(), "suffix")
    ids = tokenizer.encode("ab ba aab")
    assert word_ids(ids[None], tokenizer.words)[0].tolist() == [0, 1, 1, 2, 2]
    assert tokenizer.decode(ids) == "ab ba aab"


def test_whole_words_are_masked(trained):
    tokenizer = trained["wordpiece"]
    row = tokenizer.encode(" ".join(TEXTS[:4]))[:120]
    inputs, labels = mask_words(row[None], tokenizer.words, mask_id=tokenizer.mask_id, probability=0.3, seed=0, epoch=0, rows=np.array([0]))
    numbers, chosen = word_ids(row[None], tokenizer.words)[0], labels[0] >= 0
    assert 0.1 < chosen.mean() < 0.6
    assert all(len(set(chosen[numbers == number])) == 1 for number in set(numbers))
    assert (inputs[0][~chosen] == row[~chosen]).all()


def test_names_of_special_tokens_are_text_unless_allowed(one):
    assert one.special_names
    for name in one.special_names:
        text = f"ab {name}cd{name} {name}"
        ids = one.encode(text)
        assert not one.words.special[ids].any() and len(ids)
        if one.name != "wordpiece":
            assert one.decode(ids) == text
    mask = "[MASK]" if one.name == "wordpiece" else "<mask>"
    reading = one.reading_special()
    number = tokenizers.Tokenizer.from_str(one.model.decode()).token_to_id(mask)
    assert number in reading.encode(f"ab {mask} cd").tolist()
    assert pickle.loads(pickle.dumps(reading)).encode(mask).tolist() == reading.encode(mask).tolist()


def test_special_ids_are_found_by_their_names(trained):
    names = {"bpe": "<pad> <s> </s> <mask> <cls> <sep>", "wordpiece": "[PAD] [BOS] [EOS] [MASK] [CLS] [SEP]"}
    for kind, expected in names.items():
        found = trained[kind]
        ids = [found.pad_id, found.bos_id, found.eos_id, found.mask_id, found.cls_id, found.sep_id]
        assert [found.decode(np.array([number]), skip_special=False) for number in ids] == expected.split()
        assert found.encode("ab", special=True)[[0, -1]].tolist() == [found.cls_id, found.sep_id]


def gpt2_like(trained) -> HuggingFaceTokenizer:
    """Byte-level BPE whose one special token is <|endoftext|>."""
    content = json.loads(trained["bpe"].model)
    content["added_tokens"] = [{**content["added_tokens"][0], "content": "<|endoftext|>"}]
    vocabulary = content["model"]["vocab"]
    for name in ("<s>", "</s>", "<mask>", "<cls>", "<sep>"):
        vocabulary[f"unused {name}"] = vocabulary.pop(name)
    vocabulary["<|endoftext|>"] = vocabulary.pop("<pad>")
    return HuggingFaceTokenizer(json.dumps(content).encode(), "gpt2")


def test_a_tokenizer_with_one_special_token_uses_it_for_all_borders(trained):
    found = gpt2_like(trained)
    assert [found.bos_id, found.eos_id, found.cls_id, found.sep_id] == [0, 0, 0, 0]
    assert found.mask_id is None and found.pad_id is None


def test_cutting_and_padding_that_a_file_asks_for_is_left_to_the_platform(trained):
    library = tokenizers.Tokenizer.from_str(trained["bpe"].model.decode())
    library.enable_truncation(4)
    library.enable_padding(length=50)
    found = HuggingFaceTokenizer(library.to_str().encode(), "x")
    assert found.encode(TEXTS[0]).tolist() == trained["bpe"].encode(TEXTS[0]).tolist()


def test_a_pickled_tokenizer_needs_no_file(one):
    again = pickle.loads(pickle.dumps(one))
    assert again.encode(TEXTS[0]).tolist() == one.encode(TEXTS[0]).tolist() and again.fingerprint == one.fingerprint


def test_a_file_a_folder_and_their_faults(trained, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(trained["bpe"].model)
    (tmp_path / "other-name.txt").write_bytes(trained["bpe"].model)
    for name in ("", "tokenizer.json", "other-name.txt"):
        found = load_tokenizer(str(tmp_path / name))
        assert found.fingerprint == trained["bpe"].fingerprint and tokenizer_is_there(str(tmp_path / name))
    assert kept_file(["x", "tokenizer.json"]) == "tokenizer.json" and kept_file(["x"]) is None
    (tmp_path / "bad.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match=r"data\.tokenizer bad\.json is no tokenizer\.json of Hugging Face"):
        load_tokenizer(str(tmp_path / "bad.json"))
    with pytest.raises(UserError, match=r"tokenizer\.json, which is not there \(one on the hub: hub:bert/base\)"):
        load_tokenizer("bert/base")
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(70_000)}, "0"))
    with pytest.raises(UserError, match="has 70,000 ids, and from 1 to 65,536 can be stored"):
        HuggingFaceTokenizer(library.to_str().encode(), "large")


def test_special_tokens_are_read_where_the_data_says_so(trained, tmp_path):
    (tmp_path / "t.json").write_bytes(trained["bpe"].model)
    data = DataConfig(tokenizer=str(tmp_path / "t.json"))
    assert tokenizer_of(replace(data, special_tokens="tokens")).encode("<mask>").tolist() == [3]
    assert len(tokenizer_of(data).encode("<mask>")) > 1
    assert tokenizer_of(DataConfig(special_tokens="tokens")).encode("a[MASK]").tolist() == [ord("a") + 6, 3]
    (tmp_path / "t.model").write_bytes(train_sentencepiece(TEXTS, config_of("unigram")))
    with pytest.raises(UserError, match=r"--data\.special-tokens is tokens, which bytes and a tokenizer\.json alone can read"):
        tokenizer_of(replace(data, tokenizer=str(tmp_path / "t.model"), special_tokens="tokens"))


def test_the_hubs_copy_is_used_and_its_absence_said(trained, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    (tmp_path / "tokenizer.json").write_bytes(trained["bpe"].model)
    asked = []

    def fetched(model, file, revision=None, local_files_only=False):
        asked.append((model, file, revision, local_files_only))
        if model == "owner/away":
            raise LocalEntryNotFoundError("No network.")
        if model == "owner/none":
            raise EntryNotFoundError("no")
        return str(tmp_path / file)

    huggingface_tokenizer.hub_file.cache_clear()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetched)
    monkeypatch.setattr(huggingface_tokenizer, "why_unreachable", lambda: "no network")
    assert load_tokenizer("hub:owner/name@v1").fingerprint == trained["bpe"].fingerprint
    assert asked == [("owner/name", "tokenizer.json", "v1", True)]
    with pytest.raises(UserError, match=r"hub:owner/away: the hub cannot be reached and it was not fetched before: fetch it where"):
        load_tokenizer("hub:owner/away")
    with pytest.raises(UserError, match=r"hub:owner/none: the model has no tokenizer\.json"):
        load_tokenizer("hub:owner/none")
    assert not tokenizer_is_there("hub:owner/away")
    huggingface_tokenizer.hub_file.cache_clear()


def test_what_cannot_be_trained_is_said(tmp_path):
    with pytest.raises(UserError, match="vocab-size is 60000: the sample has too little text for it, at most"):
        train_huggingface(TEXTS, replace(config_of("bpe"), vocab_size=60_000))
    letters = ["".join(map(chr, range(0x4E00, 0x4E00 + 300)))]
    with pytest.raises(UserError, match="vocab-size is 420: the sample's characters alone need more .* lower character-coverage"):
        train_huggingface(letters, config_of("wordpiece"))
    with pytest.raises(UserError, match=r"model-type is wordpiece, .* it must end in \.json"):
        check(str(tmp_path / "x.model"), config_of("wordpiece"))
