"""Training of SentencePiece models: the sample, what the models can do, and the messages to a user."""

import random
from dataclasses import replace

import numpy as np
import pytest

from perceiver.config import DataConfig, TokenizerTraining, UserError
from perceiver.data.pieces import cut_pieces
from perceiver.data.sources import resolve
from perceiver.data.tables import Columns
from perceiver.data.text import word_ids
from perceiver.data.tokenizers import SentencePieceTokenizer
from perceiver.data.train_tokenizer import Sample, choose_pieces, lines, sample_piece, train_sentencepiece
from ray_jobs.train_tokenizer import check, main
from tests.support.jobs import Job
from tests.support.preparing import write_jsonl, write_parquet

CONFIG = TokenizerTraining(data=DataConfig(source="x"), vocab_size=400)


def documents(num: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 8))) for _ in range(500)]
    return [" ".join(rng.choices(words, k=rng.randint(5, 60))) for _ in range(num)]


def sample_of(source, piece_bytes: int, max_bytes: int, seed: int = 0) -> list[str]:
    """The sample of a source, its parts read one after the other."""
    sample = Sample(max_bytes)
    for piece in cut_pieces(resolve(DataConfig(source=str(source)), "tokens").files, piece_bytes):
        for key, text in sample_piece(piece, Columns(text="text", label=None), False, 0.05, max_bytes, seed).items():
            sample.add(key, text)
    return [text for _, text in sample.items()]


@pytest.fixture(scope="module")
def tokenizer():
    return SentencePieceTokenizer(train_sentencepiece(documents(300), CONFIG), "x")


def test_the_sample_does_not_depend_on_how_the_input_is_cut(tmp_path):
    texts = documents(400)
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts[:150]])
    write_jsonl(tmp_path / "b.jsonl.gz", [{"text": text} for text in texts[150:300]])
    write_parquet(tmp_path / "c.parquet", [{"text": text} for text in texts[250:]])  # 50 of them once more
    whole = sample_of(tmp_path, 1 << 30, 20_000)
    assert sample_of(tmp_path, 2_000, 20_000) == whole
    size = sum(len(text) for text in whole)
    assert size >= 20_000 > size - len(whole[-1]) and len(set(whole)) == len(whole)
    assert set(sample_of(tmp_path, 1 << 30, 20_000, seed=1)) != set(whole)
    everything = sample_of(tmp_path, 1 << 30, 1 << 30)
    assert set(everything) < set(texts), "documents held out for validation are left out"
    assert len(everything) > 0.9 * len(set(texts))


def test_pieces_are_drawn_by_the_seed_up_to_a_size(tmp_path):
    for i in range(10):
        write_jsonl(tmp_path / f"{i}.jsonl", [{"text": "x" * 1000}])
    pieces = cut_pieces(resolve(DataConfig(source=str(tmp_path)), "tokens").files, 1000)
    assert len(pieces) == 10
    chosen = choose_pieces(pieces, 4 * pieces[0].size, 3)
    assert len(chosen) == 4 and chosen == choose_pieces(pieces, 4 * pieces[0].size, 3)
    assert chosen != choose_pieces(pieces, 4 * pieces[0].size, 4) and len(choose_pieces(pieces, 1, 3)) == 1


def test_long_lines_are_cut_at_blanks_and_lose_nothing_else():
    text = " ".join(documents(200)) + "\n\n" + "x" * 2500
    cut = list(lines([text]))
    assert max(map(len, cut)) <= 1000
    assert " ".join(cut[:-3]) + "\n\n" + "".join(cut[-3:]) == text


def test_the_same_texts_give_the_same_bytes():
    assert train_sentencepiece(documents(100), CONFIG) == train_sentencepiece(documents(100), CONFIG)
    bpe = replace(CONFIG, model_type="bpe")
    assert train_sentencepiece(documents(100), bpe) == train_sentencepiece(documents(100), bpe)


@pytest.mark.parametrize("text", ["a b", "  two  blanks ", "née\n\tline\r\n", "<mask></s>", "\u4e2d\u6587 \U0001f600", ""])
def test_ids_give_any_text_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_model_has_the_special_pieces_that_tasks_ask_for(tokenizer):
    special = [
        tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id, tokenizer.cls_id, tokenizer.sep_id
    ]  # fmt: skip
    assert len(set(special)) == 6 and None not in special and tokenizer.words.special[special].all()
    assert tokenizer.vocab_size == 400
    assert not np.isin(tokenizer.encode("<mask> <pad> </s>"), special).any(), "text cannot name them"


def test_words_end_at_every_kind_of_white_space(tokenizer):
    ids = tokenizer.encode("net\nsea\ttea nit")
    assert word_ids(ids[None], tokenizer.words)[0].max() == 3


MISTAKES = {
    "no source": (replace(CONFIG, data=DataConfig()), "data.source is empty"),
    "too few ids": (replace(CONFIG, vocab_size=100), "vocab-size is 100"),
    "too many ids": (replace(CONFIG, vocab_size=70_000), "65,536"),
    "coverage": (replace(CONFIG, character_coverage=1.5), "character-coverage is 1.5"),
    "no sample": (replace(CONFIG, sample_megabytes=0), "sample-megabytes is 0"),
    "a field without a part": (replace(CONFIG, data=DataConfig(source="x", lanes=3)), "data.lanes has no part"),
}


@pytest.mark.parametrize("config, part", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_before_anything_is_read(config, part):
    with pytest.raises(UserError, match=part):
        check("out.model", config)


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    out = tmp_path / "thesis.txt"
    out.write_text("all of it")
    for path in (out, tmp_path):
        with pytest.raises(UserError, match="exists already"):
            check(str(path), replace(CONFIG, data=DataConfig(source="x")))
    with pytest.raises(UserError, match="OUT is empty"):
        check("", replace(CONFIG, data=DataConfig(source="x")))
    assert out.read_text() == "all of it"


def test_a_missing_file_name_is_named():
    with pytest.raises(UserError, match="must be the file to write"):
        main(["--vocab-size", "300"])


@pytest.mark.parametrize("size, part", [(5000, "at most [0-9]+ is possible"), (266, "lower character-coverage")])
def test_a_vocabulary_that_the_text_does_not_allow_is_named(size, part):
    texts = documents(100) if size > 300 else ["".join(map(chr, range(0x4E00, 0x4E80)))] * 10
    with pytest.raises(UserError, match=part):
        train_sentencepiece(texts, replace(CONFIG, vocab_size=size))


@pytest.mark.slow
def test_the_command_makes_the_same_bytes_twice_and_preprocess_takes_them(tmp_path):
    write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in documents(2000)])
    files = ("--data.source", str(tmp_path / "texts.jsonl"))
    made = []
    for name in ("a", "b"):
        out = tmp_path / name / "spiece.model"
        output = Job("ray_jobs.train_tokenizer", str(out), *files, "--vocab-size", "500", home=tmp_path / "home").finish()
        assert f"--data.tokenizer {out}" in output
        made.append(out.read_bytes())
        assert [path.name for path in out.parent.iterdir()] == ["spiece.model"]
    assert made[0] == made[1]
    output = Job("ray_jobs.preprocess", "clm-c4-small", *files, "--data.tokenizer", str(out), home=tmp_path / "home").finish()
    assert "prepared in" in output
    bad = Job("ray_jobs.train_tokenizer", str(tmp_path / "c"), "--data.source", str(tmp_path / "nowhere"), home=tmp_path / "home")
    assert bad.wait() == 2 and "error: data.source" in bad.output and not (tmp_path / "c").exists()
