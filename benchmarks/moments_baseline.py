"""What moments say of the shapes of `points-shapes`: logistic regression on the moments of each cloud.

    python -m benchmarks.moments_baseline [--degree 4]

Features are the means of all monomials of a cloud's coordinates up to the degree, and of the powers of their distances from the centre.
Takes less than a minute on one core.
"""

import argparse
from itertools import combinations_with_replacement

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.data.made import SHAPES, Shapes


def read(split: str, degree: int) -> tuple[Tensor, Tensor]:
    """Moments of each cloud (clouds, features), and labels (clouds,)."""
    features, labels = [], []
    for example in Shapes().examples(split, 0):
        points = example["points"].astype(np.float64)
        distance = np.linalg.norm(points, axis=1)
        axes = [axis for n in range(1, degree + 1) for axis in combinations_with_replacement(range(3), n)]
        features.append([points[:, list(a)].prod(1).mean() for a in axes] + [(distance**n).mean() for n in range(1, degree + 1)])
        labels.append(example["label"])
    return torch.tensor(features, dtype=torch.float64), torch.tensor(labels)


def accuracy(degree: int) -> tuple[float, float]:
    """Of the training and of the validation clouds."""
    (train, labels), (val, truth) = read("train", degree), read("val", degree)
    mean, scale = train.mean(0), train.std(0)
    train, val = ((each - mean) / scale for each in (train, val))
    model = nn.Linear(train.shape[1], len(SHAPES), dtype=torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(model(train), labels) + 1e-5 * model.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        found = [float((model(x).argmax(1) == y).double().mean()) for x, y in ((train, labels), (val, truth))]
    return found[0], found[1]


def main() -> None:
    """Prints the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--degree", type=int, default=4, help="highest degree of the moments")
    degree = parser.parse_args().degree
    print("moments up to degree {}: accuracy {:.4f} in training, {:.4f} in validation".format(degree, *accuracy(degree)))


if __name__ == "__main__":
    main()
