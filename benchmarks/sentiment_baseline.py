"""What a bag of words reaches on sentiment: logistic regression on which words occur in a review.

    python -m benchmarks.sentiment_baseline FOLDER [--words 30000] [--cut 254 [--tokenizer MODEL]]

FOLDER holds IMDb's train.parquet and test.parquet (columns text, label). With --cut N, reviews are cut to N bytes, or pieces
of a SentencePiece model, as a model sees them that reads no more. A tenth of the training reviews chooses the weight decay; the
test reviews are used once. Takes a minute on one core.
"""

import argparse
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.data.tokenizers import load_tokenizer

WORD = re.compile(r"[a-z0-9']+")
DECAYS = (1e-6, 1e-5, 1e-4)


def read(path: Path, cut: int | None, tokenizer: str) -> tuple[list[set[str]], Tensor]:
    """The words of each review, and the labels (N,)."""
    table = pq.read_table(path, columns=["text", "label"])
    texts = table["text"].to_pylist()
    if cut is not None:
        model = load_tokenizer(tokenizer)
        texts = [model.decode(model.encode(text)[:cut]) for text in texts]
    return [set(WORD.findall(text.lower())) for text in texts], torch.from_numpy(table["label"].to_numpy().astype(np.float32))


def encode(documents: list[set[str]], index: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Ids of the known words of all documents, one after the other, and where each document begins."""
    ids = [sorted(index[word] for word in words if word in index) for words in documents]
    offsets = np.cumsum([0, *map(len, ids)])[:-1]
    return torch.from_numpy(np.concatenate(ids)), torch.from_numpy(offsets)


def fit(bags: tuple[Tensor, Tensor], labels: Tensor, num_words: int, decay: float) -> nn.EmbeddingBag:
    """Weights of the words, by L-BFGS on the mean logistic loss + decay |w|^2. A word's weight counts once a review."""
    model = nn.EmbeddingBag(num_words + 1, 1, mode="sum")
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(logits(model, bags), labels) + decay * model.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return model


def logits(model: nn.EmbeddingBag, bags: tuple[Tensor, Tensor]) -> Tensor:
    return model(*bags)[:, 0] + model.weight[-1, 0]


def accuracy(model: nn.EmbeddingBag, bags: tuple[Tensor, Tensor], labels: Tensor) -> float:
    with torch.no_grad():
        return ((logits(model, bags) > 0) == labels.bool()).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--words", type=int, default=30_000, help="the most frequent words of the training reviews")
    parser.add_argument("--cut", type=int, help="number of tokens that reviews are cut to")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, or the path of a SentencePiece model")
    args = parser.parse_args()
    documents, labels = read(args.folder / "train.parquet", args.cut, args.tokenizer)
    test_documents, test_labels = read(args.folder / "test.parquet", args.cut, args.tokenizer)
    counts = Counter(word for words in documents for word in words)
    index = {word: number for number, (word, _) in enumerate(counts.most_common(args.words))}

    held_out = torch.from_numpy(np.random.default_rng(0).random(len(documents)) < 0.1)
    parts = {
        name: (encode([d for d, chosen in zip(documents, mask.tolist(), strict=True) if chosen], index), labels[mask])
        for name, mask in (("train", ~held_out), ("held out", held_out))
    }
    scores = {d: accuracy(fit(*parts["train"], len(index), d), *parts["held out"]) for d in DECAYS}
    decay = max(scores, key=scores.get)
    model = fit(encode(documents, index), labels, len(index), decay)
    result = accuracy(model, encode(test_documents, index), test_labels)
    unit = "bytes" if args.tokenizer == "bytes" else "pieces"
    cut = f"the first {args.cut} {unit} of" if args.cut else "whole"
    print(f"{len(index):,} words of {cut} reviews, weight decay {decay:g} (held out: {scores[decay]:.4f})")
    print(f"test accuracy {result:.4f} on {len(test_documents):,} reviews, trained on {len(documents):,}")


if __name__ == "__main__":
    main()
