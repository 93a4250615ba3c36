"""Small pictures for TensorBoard and the run folder, drawn with Pillow."""

from __future__ import annotations

import numpy as np


def confusion_matrix(counts: np.ndarray, names: tuple[str, ...], cell: int = 36) -> np.ndarray:
    """A confusion matrix as a picture: rows are true classes, columns predictions, shades the shares of a row.

    Args:
        counts: (classes, classes), counts[i, j] examples of class i predicted as j.

    Returns:
        uint8 (height, width, 3).
    """
    from PIL import Image, ImageDraw

    longest, title = max(len(name) for name in names), "true (rows) / predicted (columns)"
    num, left, top = len(names), 16 + 7 * longest, 40
    if num <= 20:
        cell = max(cell, 8 + 7 * longest)  # few classes: their names are written out above the columns, too
    image = Image.new("RGB", (max(left + num * cell + 8, 12 + 6 * len(title)), top + num * cell + 8), "white")
    draw = ImageDraw.Draw(image)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    for i, name in enumerate(names):
        draw.text((left + i * cell + 4, top - 14), name[: cell // 6], fill="black")
        draw.text((4, top + i * cell + cell // 3), name, fill="black")
        for j in range(num):
            shade = int(255 * (1 - shares[i, j]))
            x, y = left + j * cell, top + i * cell
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=(shade, shade, 255), outline=(220, 220, 220))
            if counts[i, j]:
                draw.text((x + 4, y + cell // 3), f"{int(counts[i, j])}", fill="white" if shade < 128 else "black")
    draw.text((4, 2), title, fill="black")
    return np.asarray(image)


def curves(series: dict[str, list[tuple[float, float]]], title: str, size: tuple[int, int] = (640, 360)) -> np.ndarray:
    """Lines over steps as a picture, one colour a series. Returns uint8 (height, width, 3)."""
    from PIL import Image, ImageDraw

    width, height = size
    left, right, top, bottom = 64, 16, 40, 32
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    points = [point for line in series.values() for point in line]
    xs, ys = [p[0] for p in points] or [0.0], [p[1] for p in points] or [0.0]
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)
    x_span, y_span = (x_high - x_low) or 1, (y_high - y_low) or 1
    draw.text((8, 6), title, fill="black")
    for i in range(5):
        y = height - bottom - i * (height - top - bottom) / 4
        draw.line((left, y, width - right, y), fill=(230, 230, 230))
        draw.text((6, y - 6), f"{y_low + i * y_span / 4:.4g}", fill="black")
        x = left + i * (width - left - right) / 4
        draw.text((x - 10, height - bottom + 8), f"{x_low + i * x_span / 4:.4g}", fill="black")
    colours = [(31, 90, 200), (220, 90, 20), (30, 150, 60), (150, 50, 160)]
    for number, (name, line) in enumerate(series.items()):
        colour = colours[number % len(colours)]
        place = [
            (
                left + (x - x_low) / x_span * (width - left - right),
                height - bottom - (y - y_low) / y_span * (height - top - bottom),
            )
            for x, y in line
        ]
        if len(place) > 1:
            draw.line(place, fill=colour, width=2)
        draw.text((left + 110 * number, 22), f"- {name}", fill=colour)
    return np.asarray(image)
