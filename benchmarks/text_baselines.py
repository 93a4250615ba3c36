"""What a language model has to beat: bits per byte of the validation text under simple models and compressors.

    python -m benchmarks.text_baselines TRAIN_FILE VAL_FILE [--out results.json]

Unigram and bigram models of bytes are counted on the training text (add-one smoothing) and measured on the validation text;
gzip and xz compress the validation text alone, and after the training text (what the training text saves it).
"""

import argparse
import gzip
import json
import lzma
from pathlib import Path

import numpy as np


def read(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def unigram(train: bytes, val: bytes) -> float:
    """Bits per byte of `val` under byte frequencies of `train`."""
    counts = np.bincount(np.frombuffer(train, np.uint8), minlength=256) + 1.0
    return float(-np.log2(counts / counts.sum())[np.frombuffer(val, np.uint8)].mean())


def bigram(train: bytes, val: bytes) -> float:
    """Bits per byte of `val` under frequencies of pairs of bytes in `train`."""
    ids = np.frombuffer(train, np.uint8).astype(np.int64)
    counts = np.bincount(ids[:-1] * 256 + ids[1:], minlength=256 * 256).reshape(256, 256) + 1.0
    bits = -np.log2(counts / counts.sum(1, keepdims=True))
    ids = np.frombuffer(val, np.uint8).astype(np.int64)
    return float(bits[ids[:-1], ids[1:]].mean())


def compressed(compress, train: bytes, val: bytes) -> tuple[float, float]:
    """Bits per byte of `val` alone, and of `val` after `train`."""
    alone = len(compress(val))
    after = len(compress(train + val)) - len(compress(train))
    return 8 * alone / len(val), 8 * after / len(val)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("val", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    train, val = read(args.train), read(args.val)
    results = {"bytes": {"train": len(train), "val": len(val)}, "unigram": unigram(train, val), "bigram": bigram(train, val)}
    for name, compress in (("gzip -9", lambda d: gzip.compress(d, 9)), ("xz -9", lambda d: lzma.compress(d, preset=9))):
        results[name], results[f"{name} after train"] = compressed(compress, train, val)
    for name, value in results.items():
        if name != "bytes":
            print(f"{name:<22}{value:8.4f} bits per byte")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
