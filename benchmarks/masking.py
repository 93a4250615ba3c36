"""Examples a second that one CPU core tokenizes and masks for masked language modelling.

    python -m benchmarks.masking [--tokenizer bytes|MODEL] [--batch-size 32] [--seconds 2] [--text FILE.txt]

Measured are the tokenizer, whole-word and token masking alone, and the whole `collate` of the task `mlm-imdb` (windows of 2,048
ids in, tensors out), each in one thread. To compare: the collator of krasserm/perceiver-io 0.11 takes 2.9 ms an example in one
process and its tokenizer reads 0.98 MB/s (measured by its own code on another CPU: absolute times hold only there).
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from perceiver.data.columns import fixed_column
from perceiver.data.manifest import Split
from perceiver.data.text import mask_words
from perceiver.data.tokenizers import load_tokenizer
from perceiver.presets import mlm_imdb
from perceiver.tasks import build_task

LENGTH = 2048
REFERENCE_MS = 2.9
REFERENCE_MB = 0.98


def english_like(num_bytes: int) -> str:
    """Words of random letters whose lengths are those of English."""
    rng = np.random.default_rng(0)
    lengths = rng.choice(np.arange(1, 13), num_bytes // 5, p=np.array([3, 17, 21, 16, 11, 9, 8, 6, 4, 3, 1, 1]) / 100)
    letters = rng.integers(97, 123, int(lengths.sum() + len(lengths)), dtype=np.uint8)
    letters[np.cumsum(lengths + 1) - 1] = 32
    return letters.tobytes().decode()


def rate(work: Callable[[int], object], seconds: float) -> float:
    """Calls of `work` a second of processor time: what else runs on the machine takes none of it."""
    work(0)
    start, calls = time.process_time(), 0
    while time.process_time() - start < seconds:
        calls += 1
        work(calls)
    return calls / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="bytes")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--text", type=Path, help="a text file; without it, random words")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, size = load_tokenizer(args.tokenizer), args.batch_size
    text = args.text.read_text() if args.text else english_like(4_000_000)
    documents = [text[i : i + 2000] for i in range(0, min(len(text), 2_000_000), 2000)]
    num_bytes = sum(len(d.encode()) for d in documents)
    tokenized = rate(lambda i: tokenizer.encode_batch(documents), args.seconds) * num_bytes / 1e6
    print(f"tokenizer                 {tokenized:10.1f} MB/s   {tokenized / REFERENCE_MB:6.0f} x the reference")

    ids, _ = tokenizer.encode_batch([text])
    windows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    num = len(windows) // size
    assert num > 0, f"the text must have at least {size} windows of {LENGTH} tokens"
    if tokenizer.mask_id is None:
        return
    for name, whole in (("whole-word masking", True), ("token masking", False)):

        def mask(i: int, whole: bool = whole) -> object:
            first = i % num * size
            rows = np.arange(first, first + size)
            return mask_words(
                windows[rows[0] : rows[-1] + 1], tokenizer.words, mask_id=tokenizer.mask_id, probability=0.15, seed=0, epoch=i,
                rows=rows, whole_words=whole,
            )  # fmt: skip

        show(name, rate(mask, args.seconds) * size)
    experiment = mlm_imdb()
    experiment = replace(experiment, data=replace(experiment.data, tokenizer=args.tokenizer))
    task = build_task(experiment)
    split = Split(
        name="train", kind="tokens", rows=len(windows), tokens=windows.size + 1, bytes=windows.size, words=0, documents=1,
        row_length=LENGTH, rows_per_block=256, blocks_per_shard=1, lookahead=1, shards=(),
    )  # fmt: skip
    epoch = pa.array(np.zeros(size, np.int64))
    tables = [
        pa.table(
            {
                "tokens": fixed_column(windows[i : i + size]),
                "length": pa.array(np.full(size, LENGTH)),
                "row": pa.array(np.arange(i, i + size)),
                "epoch": epoch,
            }  # fmt: skip
        )
        for i in range(0, num * size, size)
    ]
    show("collate of mlm-imdb", rate(lambda i: task.collate(tables[i % num], size, split, True, i), args.seconds) * size)


def show(name: str, examples: float) -> None:
    times = examples * REFERENCE_MS / 1000
    print(f"{name:26}{examples:10,.0f} examples/s   {1000 / examples:.3f} ms each   {times:6.0f} x the reference")


if __name__ == "__main__":
    main()
