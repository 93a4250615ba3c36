"""Panels with lines, points, bars and logarithmic axes, drawn with Pillow: what reports of sweeps need of a plot library."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Point = tuple[float, float]

GREY: Colour = (150, 150, 150)
PALETTE: tuple[Colour, ...] = (
    (31, 90, 200), (220, 90, 20), (30, 150, 60), (150, 50, 160), (200, 40, 60), (20, 150, 160), (120, 90, 40), (90, 90, 90),
)  # fmt: skip

_LEFT, _RIGHT, _TOP, _BOTTOM = 96, 18, 46, 56
_FONT = ImageFont.load_default(13)


@dataclass
class Panel:
    """One pair of axes. Things are added in data units; `draw` finds the axes' ranges."""

    title: str
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    log_y: bool = False
    size: tuple[int, int] = (640, 400)
    lines: list[tuple[list[Point], Colour, int]] = field(default_factory=list)
    points: list[tuple[list[Point], Colour]] = field(default_factory=list)
    bars: list[tuple[float, float, float, Colour]] = field(default_factory=list)
    labels: list[tuple[str, Colour]] = field(default_factory=list)
    y_names: list[str] = field(default_factory=list)
    """Names of rows 0, 1, ... instead of numbers at the y axis."""
    x_names: list[str] = field(default_factory=list)
    """Names of columns 0, 1, ... instead of numbers at the x axis."""

    def line(self, points: Iterable[Point], colour: Colour, width: int = 2) -> None:
        self.lines.append((self._finite(points), colour, width))

    def dots(self, points: Iterable[Point], colour: Colour) -> None:
        self.points.append((self._finite(points), colour))

    def bar(self, row: float, start: float, end: float, colour: Colour) -> None:
        """A horizontal bar from x = start to x = end in a row."""
        self.bars.append((row, start, end, colour))

    def label(self, text: str, colour: Colour) -> None:
        self.labels.append((text, colour))

    def draw(self) -> Image.Image:
        """The panel as an RGB picture."""
        image = Image.new("RGB", self.size, "white")
        draw = ImageDraw.Draw(image)
        width, height = self.size
        lines = max((name.count("\n") + 1 for name in self.x_names), default=0)
        bottom = max(_BOTTOM, 14 + 17 * lines) + 18 * (-(-len(self.labels) // 4))
        drawn = [points for points, _, _ in self.lines] + [points for points, _ in self.points]
        everything = [p for points in drawn for p in points]
        everything += [(x, row + d) for row, start, end, _ in self.bars for x, d in ((start, -0.5), (end, 0.5))]
        left = max([_LEFT, *(16 + draw.textlength(name, font=_FONT) for name in self.y_names)])
        x_at = _Axis([p[0] for p in everything], self.log_x, left, width - _RIGHT)
        y_at = _Axis([p[1] for p in everything], self.log_y, height - bottom, _TOP)
        self._frame(draw, x_at, y_at)
        for row, start, end, colour in self.bars:
            top, low = sorted((y_at(row - 0.35), y_at(row + 0.35)))
            draw.rectangle((x_at(start), top, max(x_at(end), x_at(start) + 1), low), fill=colour)
        for points, colour, line_width in self.lines:
            if len(points) > 1:
                draw.line([(x_at(x), y_at(y)) for x, y in points], fill=colour, width=line_width)
        for points, colour in self.points:
            for x, y in points:
                draw.ellipse((x_at(x) - 4, y_at(y) - 4, x_at(x) + 4, y_at(y) + 4), fill=colour, outline="white")
        for number, (text, colour) in enumerate(self.labels):
            x, y = 12 + number % 4 * (width - 12) // 4, height - bottom + 48 + 18 * (number // 4)
            draw.line((x, y + 8, x + 14, y + 8), fill=colour, width=3)
            draw.text((x + 20, y), text, fill="black", font=_FONT)
        return image

    def _frame(self, draw: ImageDraw.ImageDraw, x_at: _Axis, y_at: _Axis) -> None:
        draw.text((8, 6), self.title, fill="black", font=_FONT)
        draw.text((8, 25), self.y_label, fill=(90, 90, 90), font=_FONT)
        half = draw.textlength(self.x_label, font=_FONT) / 2
        draw.text(((x_at.start + x_at.end) / 2 - half, y_at.start + 24), self.x_label, fill=(90, 90, 90), font=_FONT)
        columns: list[tuple[float, str]] = list(enumerate(self.x_names))
        for x, text in columns or [(x, number(x)) for x in x_at.ticks()]:
            draw.line((x_at(x), y_at.start, x_at(x), y_at.end), fill=(232, 232, 232))
            half = max(draw.textlength(line, font=_FONT) for line in text.split("\n")) / 2
            left = max(2, min(x_at(x) - half, self.size[0] - 2 * half - 2))  # nothing is cut off at the edges
            draw.text((left, y_at.start + 6), text, fill="black", align="center", font=_FONT)
        rows: list[tuple[float, str]] = list(enumerate(self.y_names))
        for y, text in rows or [(y, number(y)) for y in y_at.ticks()]:
            draw.line((x_at.start, y_at(y), x_at.end, y_at(y)), fill=(232, 232, 232))
            draw.text((x_at.start - 8 - draw.textlength(text, font=_FONT), y_at(y) - 8), text, fill="black", font=_FONT)
        draw.line((x_at.start, y_at.end, x_at.start, y_at.start, x_at.end, y_at.start), fill=GREY)

    def _finite(self, points: Iterable[Point]) -> list[Point]:
        return [
            (float(x), float(y))
            for x, y in points
            if math.isfinite(x) and math.isfinite(y) and (x > 0 or not self.log_x) and (y > 0 or not self.log_y)
        ]


class _Axis:
    """Data to pixels."""

    def __init__(self, values: Sequence[float], log: bool, start: float, end: float) -> None:
        self._scale: Callable[[float], float] = math.log10 if log else float
        self._log, self.start, self.end = log, start, end
        scaled = [self._scale(v) for v in values] or [0.0, 1.0]
        low, high = min(scaled), max(scaled)
        margin = (high - low) * 0.04 or abs(high) * 0.05 or 0.5
        self._low, self._high = low - margin, high + margin

    def __call__(self, value: float) -> float:
        share = (self._scale(value) - self._low) / (self._high - self._low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers in the axis' range, three to seven; on a logarithmic axis 1, 2 and 5 of each power of ten, or the powers alone."""
        if self._log:
            powers = range(math.floor(self._low), math.ceil(self._high) + 1)
            fine = [m * 10.0**p for p in powers for m in (1, 2, 5) if self._low <= math.log10(m * 10.0**p) <= self._high]
            return fine if len(fine) <= 8 else [10.0**p for p in powers if self._low <= p <= self._high]
        rough = (self._high - self._low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
        return [i * step for i in range(math.ceil(self._low / step), math.floor(self._high / step) + 1)]


def number(value: float) -> str:
    """A number short enough for an axis."""
    return f"{value:.3g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def stack(panels: Sequence[Image.Image], columns: int = 1) -> Image.Image:
    """Pictures beside and below each other."""
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    width = max(sum(p.width for p in row) for row in rows)
    image = Image.new("RGB", (width, sum(max(p.height for p in row) for row in rows)), "white")
    y = 0
    for row in rows:
        x = 0
        for panel in row:
            image.paste(panel, (x, y))
            x += panel.width
        y += max(p.height for p in row)
    return image


def save(image: Image.Image, path: Path) -> None:
    """Writes a PNG whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    image.save(temporary, format="PNG")
    temporary.replace(path)
