"""Outputs of any kind: numbers or logits for many queries, an embedding, several named heads.

Shapes: B batch, N input positions, C channels of an input position, M output queries, Q channels of a query.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.config.core import UserError, spelled
from perceiver.models.checks import check_sizes
from perceiver.models.outputs import ModelSizes, OutputConfig, OutputQueries, PartedQueries
from perceiver.models.position import coordinate_features, fourier_features


class ArrayOutput(OutputConfig):
    """Numbers for each of many queries: classes of positions (segmentation, tagging), reconstruction, a forecast."""

    has_cost_formulas: ClassVar[bool] = False

    num_outputs: int = 1
    """Numbers, or logits, that each query is answered with."""
    ask_by: Literal["learned", "grid", "coordinates", "features", "input"] = "learned"
    """learned: num_queries learned vectors; grid: Fourier features of a grid's points; coordinates: the same of points that the batch has
    as "query", (B, M, axes), from -1 to 1; features: what the batch has as "query"; input: the adapted input itself."""
    num_queries: int = 1
    """Of learned: M."""
    grid: tuple[int, ...] = ()
    """Of grid: its sizes."""
    num_features: int = 1
    """Of coordinates: axes; of features: numbers of a query."""
    num_frequency_bands: int = 16
    """Of grid and coordinates: Fourier bands per axis."""
    resolution: int = 32
    """Of coordinates: points along an axis that differ in it."""
    num_query_channels: int = 64
    """Channels of the queries; those of the input where it is asked by itself."""

    def asks_input(self, model: ModelSizes) -> bool:
        return self.ask_by == "input"

    def queries(self, model: ModelSizes) -> OutputQueries:
        channels = model.input.adapted_channels() if self.ask_by == "input" else self.num_query_channels
        learned = self.num_queries if self.ask_by == "learned" else 0
        return OutputQueries(num_learned=learned, num_channels=channels, num_outputs=self.num_outputs)

    def num_asked(self, model: ModelSizes) -> int | None:
        """M; None: as many as the batch has."""
        if self.ask_by == "input" and model.input.text_limits() is None:
            return model.input.num_positions()
        return {"learned": self.num_queries, "grid": math.prod(self.grid)}.get(self.ask_by)

    def build_queries(self, model: ModelSizes) -> nn.Module | None:
        return None if self.ask_by in ("learned", "input") else PositionQueries(self)

    def ask(self, learned: Any, x: Any, adapted: Any, positions: Tensor | None) -> Tensor:
        return adapted if self.ask_by == "input" else super().ask(learned, x, adapted, positions)

    def ask_in_parts(self, learned: Any, x: Any, adapted: Any, positions: Tensor | None) -> Tensor | PartedQueries:
        if not isinstance(learned, PositionQueries):
            return self.ask(learned, x, adapted, positions)
        return PartedQueries(learned.shape(x), lambda part: learned(x, None, part))

    def check(self, where: str) -> None:
        where = spelled(where)
        check_sizes(self, where)
        if (self.ask_by == "grid") != bool(self.grid) or min(self.grid, default=1) < 1:
            raise UserError(f"{where}grid is {self.grid} and must have sizes of at least 1 for {where}ask-by grid, and none otherwise")


class PositionQueries(nn.Module):
    """Queries from positions or features, projected."""

    table: Tensor | None

    def __init__(self, config: ArrayOutput) -> None:
        super().__init__()
        self.config = config
        axes = {"grid": len(config.grid), "coordinates": config.num_features}.get(config.ask_by, 0)
        self.linear = nn.Linear(axes * (2 * config.num_frequency_bands + 1) or config.num_features, config.num_query_channels)
        self.register_buffer("table", fourier_features(config.grid, config.num_frequency_bands) if config.grid else None, persistent=False)

    def reset_buffers(self) -> None:
        """Computes the table of the grid anew, in place (after `to_empty`)."""
        if self.table is not None:
            self.table.copy_(fourier_features(self.config.grid, self.config.num_frequency_bands, self.table.device))

    def shape(self, x: Any) -> tuple[int, int, int]:
        """(B or 1, M, channels) of the queries of a batch."""
        size, number = (1, self.table.shape[0]) if self.table is not None else x["query"].shape[:2]
        return size, number, self.linear.out_features

    def forward(self, x: Any, adapted: Any, part: slice = slice(None)) -> Tensor:
        config = self.config
        if self.table is not None:
            found = self.table[None, part]
        elif config.ask_by == "coordinates":
            points = x["query"][:, part].float()
            found = coordinate_features(points, (config.resolution,) * config.num_features, config.num_frequency_bands)
        else:
            found = x["query"][:, part]
        return self.linear(found.to(self.linear.weight.dtype))


class EmbeddingOutput(OutputConfig):
    """A vector of length 1 for the whole input: what a learned query collects from the latents."""

    has_cost_formulas: ClassVar[bool] = False

    num_outputs: int = 128
    """Numbers of the vector."""
    num_query_channels: int = 128
    """Channels of the query."""

    def queries(self, model: ModelSizes) -> OutputQueries:
        return OutputQueries(num_learned=1, num_channels=self.num_query_channels, num_outputs=self.num_outputs)

    def answer(self, decoded: Tensor, model: ModelSizes) -> Tensor:
        """(B, numbers)."""
        return F.normalize(decoded.squeeze(1), dim=-1)

    def check(self, where: str) -> None:
        check_sizes(self, where)


class HeadsOutput(OutputConfig):
    """Several named outputs of the same latents; the model returns a mapping by their names."""

    has_cost_formulas: ClassVar[bool] = False
    head_per_query: ClassVar[bool] = False

    names: tuple[str, ...] = ()
    """Names of the outputs."""
    heads: tuple[OutputConfig, ...] = ()
    """The outputs, in the order of their names."""

    def asks_input(self, model: ModelSizes) -> bool:
        return any(head.asks_input(model) for head in self.heads)

    def queries(self, model: ModelSizes) -> OutputQueries:
        found = [head.queries(model) for head in self.heads]
        return OutputQueries(num_learned=0, num_channels=max(q.num_channels for q in found), num_outputs=sum(q.num_outputs for q in found))

    def numbers_of_queries(self, model: ModelSizes) -> list[int | None]:
        """M of each output; None: as many as the batch has."""
        return [head.num_asked(model) if isinstance(head, ArrayOutput) else head.queries(model).num_learned or None for head in self.heads]

    def build_queries(self, model: ModelSizes) -> nn.Module | None:
        return JoinedQueries(self, model)

    def build_head(self, model: ModelSizes) -> nn.Module | None:
        return NamedHeads(self, model)

    def answer(self, decoded: Any, model: ModelSizes) -> Any:
        return {name: head.answer(decoded[name], model) for name, head in zip(self.names, self.heads, strict=True)}

    def check_model(self, model: ModelSizes) -> None:
        for name, head in zip(self.names, self.heads, strict=True):
            head.check_model(model)
            if head.queries(model).tied:
                raise UserError(f"model.output.heads has {name!r}, whose matrix is the token embedding: give it num-query-channels")
        if sum(number is None for number in self.numbers_of_queries(model)) > 1:
            raise UserError("model.output.heads has several outputs whose number of queries is that of the batch, and one is possible")

    def check(self, where: str) -> None:
        where = spelled(where)
        if not self.heads or len(self.names) != len(self.heads) or len(set(self.names)) != len(self.heads):
            raise UserError(f"{where}names has {list(self.names)} for {len(self.heads)} heads: give each a name of its own")
        if wrong := [name for name in self.names if not name or "." in name]:
            raise UserError(f"{where}names has {wrong[0]!r} and must have names without a dot")


class JoinedQueries(nn.Module):
    """The queries of all outputs, each filled up to common channels by a learned vector of its own."""

    def __init__(self, config: HeadsOutput, model: ModelSizes) -> None:
        super().__init__()
        self.heads, common = dict(zip(config.names, config.heads, strict=True)), config.queries(model).num_channels
        self.learned, self.modules_of, self.own = nn.ParameterDict(), nn.ModuleDict(), nn.ParameterDict()
        for name, head in self.heads.items():
            queries = head.queries(model)
            if queries.num_learned:
                self.learned[name] = nn.Parameter(torch.empty(queries.num_learned, queries.num_channels))
            elif (module := head.build_queries(model)) is not None:
                self.modules_of[name] = module
            if queries.num_channels < common:
                self.own[name] = nn.Parameter(torch.empty(1, common - queries.num_channels))

    def forward(self, x: Any, adapted: Any) -> Tensor:
        found = []
        for name, head in self.heads.items():
            source = self.learned[name] if name in self.learned else self.modules_of[name] if name in self.modules_of else None
            queries = head.ask(source, x, adapted, None)
            if name in self.own:
                queries = torch.cat([queries, self.own[name].expand(*queries.shape[:2], -1)], dim=-1)
            found.append(queries)
        size = max(queries.shape[0] for queries in found)
        return torch.cat([queries.expand(size, -1, -1) for queries in found], dim=1)


class NamedHeads(nn.Module):
    """Decoded queries (B, M, Q) to a mapping of each output's own (B, its M, its numbers)."""

    def __init__(self, config: HeadsOutput, model: ModelSizes) -> None:
        super().__init__()
        self.numbers, channels = config.numbers_of_queries(model), config.queries(model).num_channels
        self.outputs = nn.ModuleDict(
            {
                name: head.build_head(model) or nn.Linear(channels, head.queries(model).num_outputs)
                for name, head in zip(config.names, config.heads, strict=True)
            }
        )

    def forward(self, decoded: Tensor) -> dict[str, Tensor]:
        rest = decoded.shape[1] - sum(number or 0 for number in self.numbers)
        sizes = [rest if number is None else number for number in self.numbers]
        parts = decoded.split(sizes, dim=1)
        return {name: output(part) for (name, output), part in zip(self.outputs.items(), parts, strict=True)}
