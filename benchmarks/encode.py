"""`python -m benchmarks.encode SOURCE [TOKENIZER ...]`: MB/s at which tokenizers turn texts into ids, and back, on one core.

SOURCE is a file of text, or a table with a column "text". Without TOKENIZER (`bytes`, paths, hub:NAME): bytes, and tokenizers of
`--vocab-size` ids of every kind, trained on the text. Beside each tokenizer.json stands the library alone (`encode_batch`, ids as lists).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from perceiver.config import DataConfig, TokenizerTraining
from perceiver.data.read_documents import read_documents
from perceiver.data.sources import resolve
from perceiver.data.spans import Problems, Span
from perceiver.data.tables import Columns
from perceiver.data.tokenizers import load_tokenizer
from perceiver.data.train_huggingface import train_huggingface
from perceiver.data.train_tokenizer import train_sentencepiece


def texts_of(source: str, megabytes: float) -> list[str]:
    found, size = [], 0
    for file in resolve(DataConfig(source=source), "tokens").files:
        for documents in read_documents(Span(file, 0, 1 << 62), Columns(text="text", label=None), Problems(skip=True)):
            for text in documents.texts:
                found.append(text)
                size += len(text.encode())
                if size >= megabytes * 1e6:
                    return found
    return found


def best(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def trained(texts: list[str], vocab_size: int, folder: Path) -> list[str]:
    config = TokenizerTraining(data=DataConfig(), vocab_size=vocab_size)
    names = []
    for kind in ("bpe", "wordpiece", "unigram"):
        path = folder / f"{kind}.json"
        path.write_bytes(train_huggingface(texts, replace(config, model_type=kind)))
        names.append(str(path))
    (folder / "unigram.model").write_bytes(train_sentencepiece(texts, config))
    return ["bytes", *names, str(folder / "unigram.model")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("tokenizers", nargs="*")
    parser.add_argument("--megabytes", type=float, default=4)
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts = texts_of(args.source, args.megabytes)
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts):,} texts, {size:.1f} MB")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.tokenizers or trained(texts, args.vocab_size, Path(folder)):
            print(measured(name, texts, size, args.repeats), flush=True)


def measured(name: str, texts: list[str], megabytes: float, repeats: int) -> str:
    tokenizer = load_tokenizer(name)
    ids, lengths = tokenizer.encode_batch(texts)
    encode = megabytes / best(lambda: tokenizer.encode_batch(texts), repeats)
    decode = megabytes / best(lambda: tokenizer.decode_batch(ids, lengths), 1)
    per_id = megabytes * 1e6 / len(ids)
    line = f"{Path(name).name:<16} {per_id:5.2f} bytes an id  encode {encode:7.1f} MB/s  decode {decode:7.1f} MB/s"
    if tokenizer.file != "tokenizer.json":
        return line
    import tokenizers

    library = tokenizers.Tokenizer.from_str(tokenizer.model.decode())
    alone = megabytes / best(lambda: library.encode_batch(texts, add_special_tokens=False), repeats)
    return f"{line}  library alone {alone:7.1f} MB/s"


if __name__ == "__main__":
    main()
