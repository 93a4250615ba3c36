"""Texts with classes that are longer than the model takes: cut and counted, split, or refused."""

import numpy as np
import pytest

from perceiver.config import DataConfig, UserError
from perceiver.data.shards import read_block
from perceiver.data.text import split_long
from perceiver.datasets import data_folder
from ray_jobs import preprocess
from tests.support.logged import logged
from tests.support.preparing import experiment, serially, write_jsonl

TEXTS = ["ab", "abcdefgh" * 3, "", "0123456789", "x" * 25, "y" * 20]
LIMIT = 10


def rows_of(tmp_path, monkeypatch, how, **more):
    """The rows of both splits as texts with labels, the manifest, and what was said."""
    serially(monkeypatch)
    for split in ("train", "val"):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)])
        with open(tmp_path / f"{split}.jsonl", "a") as file:
            file.write(f'{{"text": "{split}", "label": 1}}\n')
    chosen = experiment("txt-clf-imdb-all", tmp_path / how, f"{tmp_path}/*.jsonl", LIMIT + 2, long_texts=how, **more)
    with logged() as lines:
        manifest = preprocess.prepare(chosen)
    split = manifest.splits["train"]
    blocks = [read_block(data_folder(chosen), split, block) for block in range(split.num_blocks)]
    rows = [row for block in blocks for row in zip(block["tokens"].to_pylist(), block["label"].to_pylist(), strict=True)]
    return [(bytes(i - 6 for i in ids).decode(), label) for ids, label in rows], manifest, lines


def test_what_is_cut_is_counted(tmp_path, monkeypatch):
    rows, manifest, lines = rows_of(tmp_path, monkeypatch, "cut")
    assert rows == [(text[:LIMIT], i % 2) for i, text in enumerate(TEXTS)] + [("train", 1)]
    assert manifest.stats["long_texts"]["train"] == {"texts": 3, "tokens": 86, "lost": 39}
    assert "  long: 3 of 7 train documents have more than 10 tokens: 39 of 86 tokens (45.3%) are lost" in lines


def test_parts_of_a_long_text_are_rows_of_its_class_and_nothing_is_lost(tmp_path, monkeypatch):
    rows, manifest, lines = rows_of(tmp_path, monkeypatch, "split")
    expected = [(text[first : first + LIMIT], i % 2) for i, text in enumerate(TEXTS) for first in range(0, max(len(text), 1), LIMIT)]
    assert rows == [*expected, ("train", 1)]
    assert manifest.stats["long_texts"]["train"] == {"texts": 3, "tokens": 86, "lost": 0}
    assert "  long: 3 of 7 train documents have more than 10 tokens: they are split" in lines
    assert manifest.splits["train"].documents == 7 and manifest.stats["labels"]["train"] == [5, 7]


@pytest.mark.parametrize("stride", [None, 4, 10])
def test_parts_of_a_long_text_overlap_by_the_stride_and_reach_its_end(tmp_path, monkeypatch, stride):
    rows, manifest, lines = rows_of(tmp_path, monkeypatch, "stride", text_stride=stride)
    expected, step = [], stride or LIMIT // 2
    for i, text in enumerate(TEXTS):
        first = 0
        while True:
            expected.append((text[first : first + LIMIT], i % 2))
            if first + LIMIT >= len(text):
                break
            first += step
    assert rows == [*expected, ("train", 1)]
    assert manifest.stats["long_texts"]["train"] == {"texts": 3, "tokens": 86, "lost": 0}
    assert f"  long: 3 of 7 train documents have more than 10 tokens: their parts begin {step} tokens after each other" in lines


def test_a_stride_that_would_lose_tokens_or_has_no_use_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--data.text-stride is 11 and must be at most 10"):
        rows_of(tmp_path, monkeypatch, "stride", text_stride=11)
    with pytest.raises(UserError, match="--data.text-stride is 4, and --data.long-texts is cut: give stride"):
        DataConfig(text_stride=4).check("data.")


def test_a_long_text_is_refused_by_its_beginning(tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match="a text has 24 tokens, and the model takes 10 .*abcdefgh.*: --data.long-texts cut, split or stride"
    ):
        rows_of(tmp_path, monkeypatch, "refuse")


@pytest.mark.parametrize("limit", [1, 3, 7])
def test_parts_have_all_ids_and_but_the_last_are_full(limit):
    lengths = np.array([0, 1, limit, limit + 1, 3 * limit, 20])
    parts, sizes = split_long(lengths, limit)
    assert sizes.sum() == lengths.sum() and sizes.max() <= limit and len(sizes) == parts.sum()
    groups = np.split(sizes, np.cumsum(parts)[:-1])
    assert [int(group.sum()) for group in groups] == lengths.tolist()
    assert all((group[:-1] == limit).all() for group in groups)
