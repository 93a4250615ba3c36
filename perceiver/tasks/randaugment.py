"""Random changes of photos whose every choice is given: a random part, scaled; a mirror; RandAugment (arXiv 1909.13719).

The pixels are changed by torchvision.transforms.v2.functional; its own random transforms draw from a generator that the whole process
shares, and here a choice is a function of the seed, the epoch and the row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor


class _Functional:
    """torchvision's functions, loaded with the first of them: it loads PyTorch's compiler, which takes seconds."""

    def __getattr__(self, name: str) -> Any:
        from torchvision.transforms.v2 import functional

        return getattr(functional, name)


T = _Functional()
TRIES = 10
"""Random parts that are tried before the middle is taken."""
CROP_DRAWS = 4 * TRIES
"""Draws that `random_part` takes."""
OP_DRAWS = 2
"""Draws that each operation of `randaugment` takes."""
MOST_MAGNITUDE = 10


def random_part(height: int, width: int, draws: np.ndarray, min_area: float) -> tuple[int, int, int, int]:
    """A random part of a picture, as of Inception: of a random area and a random shape from 3:4 to 4:3.

    Args:
        draws: (CROP_DRAWS,) in [0, 1).
        min_area: smallest share of the picture's area.

    Returns:
        Top, left, height, width.
    """
    low, high = math.log(3 / 4), math.log(4 / 3)
    for area, shape, down, right in draws.reshape(TRIES, 4).astype(np.float64).tolist():
        size, ratio = height * width * (min_area + area * (1 - min_area)), math.exp(low + shape * (high - low))
        part_width, part_height = round(math.sqrt(size * ratio)), round(math.sqrt(size / ratio))
        if 0 < part_width <= width and 0 < part_height <= height:
            return int(down * (height - part_height + 1)), int(right * (width - part_width + 1)), part_height, part_width
    ratio = min(max(width / height, 3 / 4), 4 / 3)  # the largest part in the middle with a shape that is allowed
    part_width, part_height = min(width, max(round(height * ratio), 1)), min(height, max(round(width / ratio), 1))
    return (height - part_height) // 2, (width - part_width) // 2, part_height, part_width


def randaugment(image: Tensor, draws: np.ndarray, magnitude: float) -> Tensor:
    """A picture after some operations of RandAugment, drawn with replacement.

    Args:
        image: uint8 (channels, height, width).
        draws: (OP_DRAWS * operations,) in [0, 1): for each which one it is, and its direction.
        magnitude: from 0 to 10, of all of them; as torchvision's with 11 bins.
    """
    for which, direction in draws.reshape(-1, OP_DRAWS).tolist():
        name = OPERATIONS[int(which * len(OPERATIONS))]
        image = operation(image, name, magnitude / MOST_MAGNITUDE * (1 if direction < 0.5 else -1))
    return image


def operation(image: Tensor, name: str, strength: float) -> Tensor:
    """One operation, its strength from -1 to 1 (of those without a direction, its absolute value counts)."""
    return _FUNCTIONS[name](image, strength)


def _affine(image: Tensor, translate: list[float], shear: list[float], center: list[float] | None) -> Tensor:
    return T.affine(image, angle=0.0, translate=[int(t) for t in translate], scale=1.0, shear=shear, center=center)


def _degrees(slope: float) -> float:
    return math.degrees(math.atan(slope))


_FUNCTIONS: dict[str, Callable[[Tensor, float], Any]] = {
    "Identity": lambda image, s: image,
    "ShearX": lambda image, s: _affine(image, [0, 0], [_degrees(0.3 * s), 0.0], [0, 0]),
    "ShearY": lambda image, s: _affine(image, [0, 0], [0.0, _degrees(0.3 * s)], [0, 0]),
    "TranslateX": lambda image, s: _affine(image, [150 / 331 * image.shape[-1] * s, 0], [0.0, 0.0], None),
    "TranslateY": lambda image, s: _affine(image, [0, 150 / 331 * image.shape[-2] * s], [0.0, 0.0], None),
    "Rotate": lambda image, s: T.rotate(image, angle=30 * s),
    "Brightness": lambda image, s: T.adjust_brightness(image, 1 + 0.9 * s),
    "Color": lambda image, s: T.adjust_saturation(image, 1 + 0.9 * s),
    "Contrast": lambda image, s: T.adjust_contrast(image, 1 + 0.9 * s),
    "Sharpness": lambda image, s: T.adjust_sharpness(image, 1 + 0.9 * s),
    "Posterize": lambda image, s: T.posterize(image, bits=int(round(8 - 4 * abs(s)))),
    "Solarize": lambda image, s: T.solarize(image, threshold=255 * (1 - abs(s))),
    "AutoContrast": lambda image, s: T.autocontrast(image),
    "Equalize": lambda image, s: T.equalize(image),
}
OPERATIONS = tuple(_FUNCTIONS)


def mixed(images: np.ndarray, draws: np.ndarray, mixup: float, cutmix: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Neighbours of a batch mixed: MixUp (arXiv 1710.09412) as weighted means, or CutMix (arXiv 1905.04899), a part of one in the other.

    Neighbours are pictures 0 and 1, 2 and 3, ... So a picture's partner does not depend on how a batch is shared among workers, as long
    as each of their parts has an even number of pictures; one without a neighbour stays as it is.

    Args:
        images: uint8 (n, height, width, channels).
        draws: (n, 5) in [0, 1): of each picture, with which share the partner comes in (as a quantile), whether by MixUp or CutMix, and
            for CutMix the place of the part.
        mixup: alpha of MixUp's share, Beta(alpha, alpha); 0: none.
        cutmix: the same of CutMix. With both, each takes half of the pictures.

    Returns:
        The pictures; the share of each picture's own class, float32 (n,); and the number of its partner, int64 (n,).
    """
    from scipy.stats import beta

    n, height, width, _ = images.shape
    partners = np.arange(n)
    pairs = n // 2 * 2
    partners[:pairs] ^= 1
    shares, result = np.ones(n, np.float32), images.copy()
    by_cutmix = draws[:, 1] < (0.5 if mixup and cutmix else 1.0 if cutmix else 0.0)
    alphas = np.where(by_cutmix, cutmix, mixup)
    quantiles = beta.ppf(draws[:, 0].astype(np.float64), alphas, alphas)
    for i in range(pairs):
        share, other = quantiles[i], images[partners[i]]
        if by_cutmix[i]:
            part_height, part_width = (int(size * math.sqrt(1 - share)) for size in (height, width))
            middle_y, middle_x = int(draws[i, 2] * height), int(draws[i, 3] * width)
            top, left = max(middle_y - part_height // 2, 0), max(middle_x - part_width // 2, 0)
            bottom, right = min(middle_y - part_height // 2 + part_height, height), min(middle_x - part_width // 2 + part_width, width)
            result[i, top:bottom, left:right] = other[top:bottom, left:right]
            shares[i] = 1 - (bottom - top) * (right - left) / (height * width)
        else:
            weight = np.float32(share)
            result[i], shares[i] = np.rint(weight * images[i] + (1 - weight) * other), weight
    return result, shares, partners
