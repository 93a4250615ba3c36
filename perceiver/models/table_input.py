"""Columns of a table as the input of a model: each number, position of a list, category, and token of a text is an input position.

Shapes: B batch, N input positions of all columns together, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.config.core import Config, UserError, spelled
from perceiver.config.data import TEXT_LENGTH
from perceiver.models.checks import check_sizes
from perceiver.models.initialize import Embedding
from perceiver.models.inputs import InputConfig
from perceiver.models.tensor_shapes import Shape, check_tensor

SCALAR = "scalar"
"""Shape of a column that has one number a row."""


CATEGORY = "category"
"""Shape of a column that has one of several values a row."""
_TEXT = "text:"
KERNEL = 5
"""Neighbouring tokens of a text that are seen together."""


def shape_of(text: str) -> tuple[int, ...]:
    """The shape of a column of numbers from its text: "scalar", "24", "72x7".

    Raises:
        ValueError: it is none of these.
    """
    return () if text == SCALAR else tuple(int(size) for size in text.split("x"))


def text_of(shape: tuple[int, ...]) -> str:
    """The inverse of `shape_of`."""
    return "x".join(map(str, shape)) or SCALAR


def text_shape(num_tokens: int) -> str:
    """The shape of a column of texts, of which this many tokens go in."""
    return f"{_TEXT}{num_tokens}"


@dataclass(frozen=True)
class Cells:
    """What a column has in a row, as the model takes it."""

    name: str
    kind: Literal["numbers", "category", "text"]
    positions: int
    """Input positions: of a text as many as it may have tokens."""
    channels: int = 1
    """Numbers of a position."""
    values: tuple[str, ...] = ()
    """The categories."""


class Categories(Config):
    """The values of a column of categories."""

    column: str = ""
    values: tuple[str, ...] = ()
    """In the order of their numbers, from 1; 0 is no value, or one that is none of them."""


class TableInput(InputConfig):
    """Columns of a table: a linear map of its own for each column of numbers, learned vectors for categories and for tokens of texts, and
    a learned vector for each position.
    """

    columns: tuple[str, ...] = ()
    """Columns of the table that go in, separated by spaces or commas; NAME=text, NAME=category and NAME=number say how one is read. None:
    all numbers, categories and texts that are no targets."""
    shapes: tuple[str, ...] = ()
    """Shape of each column's value in a row: scalar, 24 (a list of 24 numbers), 72x7 (72 lists of 7), category, text:256 (of at most 256
    tokens). None: as found in the data."""
    num_channels: int = 64
    """Channels of an input position."""
    text_length: int = TEXT_LENGTH
    """Tokens of a text that go in, at most: of a longer one the beginning."""
    vocab_size: int = 0
    """Number of token ids of texts: as the tokenizer (data.tokenizer) has them; 0 without texts."""
    categories: tuple[Categories, ...] = ()
    """Values of the columns of categories, as found in the data."""

    def build(self) -> nn.Module:
        return TableAdapter(self)

    def cells(self) -> list[Cells]:
        """What each column has: of numbers the last axis of two or more is one of channels."""
        values = {each.column: each.values for each in self.categories}
        found = []
        for name, text in zip(self.columns, self.shapes, strict=True):
            if text == CATEGORY:
                found.append(Cells(name, "category", 1, values=values[name]))
            elif text.startswith(_TEXT):
                found.append(Cells(name, "text", int(text.removeprefix(_TEXT))))
            else:
                shape = shape_of(text)
                channels = shape[-1] if len(shape) > 1 else 1
                found.append(Cells(name, "numbers", math.prod(shape) // channels, channels))
        return found

    def numbers(self) -> list[Cells]:
        """The columns of numbers."""
        return [cells for cells in self.cells() if cells.kind == "numbers"]

    def ids(self) -> list[Cells]:
        """The columns of categories and texts."""
        return [cells for cells in self.cells() if cells.kind != "numbers"]

    @property
    def has_cost_formulas(self) -> bool:  # type: ignore[override]
        """Steps of models with texts and categories are counted."""
        return not self.ids()

    def adapted_channels(self) -> int:
        return self.num_channels

    def num_positions(self) -> int:
        return sum(cells.positions for cells in self.cells())

    def num_text_ids(self) -> int | None:
        return self.vocab_size or None

    def batch_shape(self) -> Shape | None:
        return None if self.ids() else ("B", self._numbers())

    def check_batch(self, x: Any) -> None:
        if not self.ids():
            super().check_batch(x)
            return
        sizes = {"numbers": self._numbers(), "ids": sum(cells.positions for cells in self.ids())}
        if not isinstance(x, Mapping) or x.keys() != sizes.keys():
            what = sorted(x) if isinstance(x, Mapping) else type(x).__name__
            raise UserError(f"a model with {type(self).__name__} of texts or categories takes a mapping of numbers and ids, not {what}")
        for name, size in sizes.items():
            check_tensor(x[name], ("B", size), f"a model with {type(self).__name__} takes as {name}", whole_numbers=name == "ids")

    def qk_channels(self, num_latent_channels: int) -> int:
        return num_latent_channels

    def adapting_flops(self, num_positions: int) -> float:
        texts = sum(cells.positions for cells in self.cells() if cells.kind == "text")
        numbers = sum(2.0 * cells.positions * cells.channels * self.num_channels for cells in self.numbers())
        return numbers + 2.0 * texts * KERNEL * self.num_channels**2

    def _numbers(self) -> int:
        return sum(cells.positions * cells.channels for cells in self.numbers())

    def check(self, where: str) -> None:
        check_sizes(self, where, except_for="vocab_size")
        where = spelled(where)
        if len(self.shapes) != len(self.columns):
            raise UserError(
                f"{where}shapes has {len(self.shapes)} shapes for {len(self.columns)} {where}columns: leave both out, "
                "or give a shape for each column"
            )
        known = {each.column for each in self.categories}
        for name, text in zip(self.columns, self.shapes, strict=True):
            try:
                sizes = (1,) if text == CATEGORY else (int(text.removeprefix(_TEXT)),) if text.startswith(_TEXT) else shape_of(text)
                right = all(size >= 1 for size in sizes)
            except ValueError:
                right = False
            if not right:
                raise UserError(f"{where}shapes has {text!r} and must have scalar, sizes such as 24 or 72x7, category, or text:256")
            if text == CATEGORY and name not in known:
                raise UserError(f"{where}shapes has category for {name!r}, whose values {where}categories lacks: leave both out")
            if text.startswith(_TEXT) and not self.vocab_size:
                raise UserError(f"{where}shapes has {text} for {name!r}, and {where}vocab-size is 0 and must be that of the tokenizer")


class TableAdapter(nn.Module):
    """Cells of all columns to (B, N, C) and the mask of positions where nothing is: a number is missing (NaN), a text has ended.

    Takes the numbers of rows (B, numbers of a row); where there are categories or texts a mapping of "numbers" and "ids" (B, ids of a
    row): for each category its number (0: none), for each text its tokens, -1 after them. A text without tokens has one position.
    """

    def __init__(self, config: TableInput) -> None:
        super().__init__()
        self.cells = config.cells()
        self.columns = nn.ModuleList(nn.Linear(cells.channels, config.num_channels, bias=False) for cells in config.numbers())
        self.pos_embedding = Embedding(max(1, config.num_positions()), config.num_channels)
        kinds = {cells.kind for cells in self.cells}
        if "category" in kinds:
            found = [cells for cells in self.cells if cells.kind == "category"]
            self.categories = nn.ModuleList(Embedding(len(cells.values) + 1, config.num_channels) for cells in found)
        if "text" in kinds:
            self.txt_embedding = Embedding(config.vocab_size, config.num_channels)
            self.neighbours = nn.Linear(KERNEL * config.num_channels, config.num_channels)

    def reset_buffers(self) -> None:
        """Nothing: all is learned."""

    def forward(self, x: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        numbers, ids = (x, None) if isinstance(x, Tensor) else (x["numbers"].to(self.pos_embedding.weight.dtype), x["ids"])
        linears, categories = iter(self.columns), iter(getattr(self, "categories", ()))
        adapted, missing = [], []
        first = first_id = 0
        for cells in self.cells:
            if cells.kind == "numbers":
                values = numbers[:, first : first + cells.positions * cells.channels].unflatten(1, (cells.positions, cells.channels))
                first += cells.positions * cells.channels
                missing.append(values.isnan().any(-1))
                adapted.append(next(linears)(values.nan_to_num(0.0)))
                continue
            assert ids is not None
            own = ids[:, first_id : first_id + cells.positions]
            first_id += cells.positions
            ended = own < 0
            if cells.kind == "category":
                adapted.append(next(categories)(own.clamp(min=0)))
                missing.append(torch.zeros_like(ended))
            else:
                adapted.append(self._text(own.clamp(min=0), ended))
                missing.append(ended & (torch.arange(cells.positions, device=own.device) > 0))
        return torch.cat(adapted, 1) + self.pos_embedding.weight, torch.cat(missing, 1)

    def _text(self, ids: Tensor, ended: Tensor) -> Tensor:
        """Tokens (B, L) with their neighbours, (B, L, C)."""
        tokens = self.txt_embedding(ids).masked_fill(ended[..., None], 0.0)
        around = F.pad(tokens, (0, 0, KERNEL // 2, KERNEL // 2)).unfold(1, KERNEL, 1).flatten(2)
        return tokens + F.gelu(self.neighbours(around))
