"""Golden vectors of the text pipeline; see tests/support/golden.py. Each check returns what is wrong."""

import json
from pathlib import Path

import numpy as np

from perceiver.config import Constant, Cosine, OptimConfig
from perceiver.data.text import join_documents, windows, word_ids
from perceiver.data.tokenizers import CLS, EOS, SEP, ByteTokenizer

BYTES = ByteTokenizer()


def check_tokenizer(folder: Path) -> list[str]:
    """Ids, words (which positions share one, not their numbers) and decoded text of all strings."""
    vectors = json.loads((folder / "text_tokenizer.json").read_text())
    wrong = []
    for case in vectors["strings"]:
        found = {
            "ids": BYTES.encode_with_special(case["text"]).tolist(),
            "ids_with_special_tokens": BYTES.encode(case["text"], special=True).tolist(),
            "word_ids": _words(case["ids"]),
            "word_ids_with_special_tokens": _words(case["ids_with_special_tokens"]),
            "decoded_ids": _tidy(BYTES.decode(np.array(case["ids"]), skip_special=False)),
            "decoded_with_special_tokens_skipped": _tidy(BYTES.decode(np.array(case["ids_with_special_tokens"]))),
        }
        if min(case["ids"], default=6) < 6:
            # Names of special tokens inside a text stay text in ours, unless asked for.
            del found["ids_with_special_tokens"]
        for name, value in found.items():
            expected = _grouping(case[name]) if "word_ids" in name else case[name]
            if value != expected:
                wrong.append(f"{name} of {case['text']!r}")
    return wrong


def _words(ids: list[int]) -> list[int | None]:
    words = word_ids(np.array([ids], np.int64).reshape(1, -1), BYTES.words)[0]
    return _grouping([None if word == -1 else word for word in words.tolist()])


def _grouping(words: list[int | None]) -> list[int | None]:
    """Words numbered in the order of their first position (the reference leaves numbers out); None: no word."""
    numbers: dict[int, int] = {}
    return [None if word is None else numbers.setdefault(word, len(numbers)) for word in words]


def _tidy(text: str) -> str:
    """What the reference's decoding does to a text, and thereby loses."""
    for mark in (".", "?", "!", ","):
        text = text.replace(f" {mark}", mark)
    text = text.replace(" ' ", "'")
    for ending in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {ending}", ending)
    return text


def check_pipeline(folder: Path) -> list[str]:
    """Windows of joined documents, shifted windows, and learning rates (until the schedule's end, where ours stays)."""
    vectors = json.loads((folder / "text_pipeline.json").read_text())
    pipeline, wrong = vectors["pipeline"], []
    length = pipeline["max_seq_len"]
    for name, size, before, after in (
        ("clm", length + 1, None, None),
        ("clm_add_eos_token", length + 1, None, EOS),
        ("clm_add_special_tokens", length + 1, CLS, SEP),
        ("mlm_add_special_tokens", length, CLS, SEP),
    ):
        for split, texts in pipeline["documents"].items():
            ids, lengths = BYTES.encode_batch(texts)
            whole = np.ones(len(texts), bool)
            stream = join_documents(ids, lengths, whole, whole, before, after)
            for i, row in enumerate(pipeline[name][split]):
                if stream[i * size : (i + 1) * size].tolist() != row["input_ids"]:
                    wrong.append(f"{name}, {split}, row {i}")
    shift = pipeline["random_shift"]
    block = np.array([shift["record_0"], shift["record_1"]], np.uint16)
    if windows(block, shift["shift"])[0].tolist()[:-1] != shift["expected"]:
        wrong.append("random_shift")
    for name, factors in vectors["lr_factor_at_step"].items():
        function, _, arguments = name.removesuffix(")").partition("(")
        values = dict(argument.split("=") for argument in arguments.split(", "))
        total_steps = int(values.get("training_steps", 10**9))
        config = OptimConfig(
            lr=1.0,
            warmup_steps=int(values["warmup_steps"]),
            schedule=Cosine(min_lr_fraction=float(values.get("min_fraction", 0))) if function.startswith("cosine") else Constant(),
        )
        for step, factor in factors.items():
            if int(step) <= total_steps and abs(config.learning_rate(int(step), total_steps) - factor) > 1e-9:
                wrong.append(f"{name} at step {step}")
    return wrong
