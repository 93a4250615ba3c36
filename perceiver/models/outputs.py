"""Outputs of Perceiver IO: configurations that say what is asked of the latents and what becomes of the answers.

An output of your own is a subclass of `OutputConfig`, in a file of yours.

Shapes: B batch, N input positions, C channels of an input position, M output queries, Q channels of a query.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from perceiver.config.core import Config, UserError
from perceiver.models.checks import check_sizes
from perceiver.models.inputs import FlowInput, InputConfig, TextInput


class ModelSizes(Protocol):
    """What an output may know of its model; `PerceiverIOConfig` is one."""

    @property
    def num_latents(self) -> int: ...

    @property
    def num_latent_channels(self) -> int: ...

    @property
    def input(self) -> InputConfig: ...


@dataclass(frozen=True, kw_only=True)
class OutputQueries:
    """Output queries and what becomes of them."""

    num_learned: int
    """Learned queries; 0: the queries come from elsewhere."""
    num_channels: int
    """Q, channels of the queries."""
    num_outputs: int
    """Channels of the output: classes, vocabulary, ..."""
    tied: bool = False
    """Whether the output matrix is the token embedding."""
    per_position: bool = False
    """Whether each position of the input has its query, so that some may be decoded and others not."""


class PartedQueries:
    """Queries that are made when they are decoded, part by part, so that they are never there all at once. Called, it makes all.

    Args:
        shape: (B or 1, M, Q).
        make: makes those of a slice of M, (B or 1, m, Q).
    """

    def __init__(self, shape: tuple[int, int, int], make: Callable[[slice], Tensor]) -> None:
        self.shape, self.make = shape, make

    def __call__(self) -> Tensor:
        return self.make(slice(None))

    def split(self, size: int, dim: int = 1) -> list[Callable[[], Tensor]]:
        """Functions that make `size` queries each, the last one what is left."""
        assert dim == 1
        return [partial(self.make, slice(first, first + size)) for first in range(0, self.shape[1], size)]


class OutputConfig(Config):
    """What comes out of a Perceiver IO: base class of all outputs."""

    head_per_query: ClassVar[bool] = True
    """Whether the head answers each query by itself, so that queries can be decoded in parts with their head."""
    head_takes_input: ClassVar[bool] = False
    """Whether the head is given the model's input besides, which says how many queries are whose."""
    has_cost_formulas: ClassVar[bool] = True
    """Whether the package's closed formulas for FLOPs and memory hold; otherwise steps are counted."""

    def asks_input(self, model: ModelSizes) -> bool:
        """Whether queries may be made from the adapted input."""
        return not self.queries(model).num_learned

    @abstractmethod
    def queries(self, model: ModelSizes) -> OutputQueries:
        """Number and channels of the queries, and channels of the output."""
        raise NotImplementedError(f"{type(self).__name__} needs a method queries(model) that returns OutputQueries")

    def number_of_classes(self) -> int | None:
        """How many classes it gives, by default its field `num_classes`; None: it has none."""
        return getattr(self, "num_classes", None)

    def build_queries(self, model: ModelSizes) -> nn.Module | None:
        """A module that makes queries of the batch: takes what the model's input takes and the adapted input (B, N, C), returns
        (B, M, Q). None: `ask` does without.
        """
        return None

    def build_head(self, model: ModelSizes) -> nn.Module | None:
        """A module from decoded queries (B, M, Q) to outputs (B, M, outputs); None: a linear map with bias."""
        return None

    def ask(self, learned: Any, x: Any, adapted: Any, positions: Tensor | None) -> Tensor:
        """The queries (B or 1, M, Q).

        Args:
            learned: the learned queries (num_learned, Q), or the module of `build_queries`.
            x: the model's input as the batch has it.
            adapted: the adapted input (B, N, C).
            positions: numbers of the queries to decode (B, M); None: all.
        """
        if callable(learned):
            return learned(x, adapted)
        return learned[None] if positions is None else learned[positions]

    def ask_in_parts(self, learned: Any, x: Any, adapted: Any, positions: Tensor | None) -> Tensor | PartedQueries:
        """As `ask`; where the queries can be made part by part, an object that does so: see `PartedQueries`."""
        return self.ask(learned, x, adapted, positions)

    def answer(self, decoded: Tensor, model: ModelSizes) -> Tensor:
        """The model's output, of (B, M, outputs)."""
        return decoded

    def check_model(self, model: ModelSizes) -> None:
        """Checks that the output can be that of the model.

        Raises:
            UserError: it needs another input, say.
        """


class TextOutput(OutputConfig):
    """One learned query per position; logits over the vocabulary."""

    num_query_channels: int | None = None
    """Channels of the queries; None: as the token embedding, whose matrix is then also the output matrix (tied)."""

    def queries(self, model: ModelSizes) -> OutputQueries:
        text = model.input
        assert isinstance(text, TextInput)
        return OutputQueries(
            num_learned=text.max_seq_len,
            num_channels=self.num_query_channels or text.num_channels,
            num_outputs=text.vocab_size,
            tied=self.num_query_channels is None,
            per_position=True,
        )

    def ask(self, learned: Any, x: Any, adapted: Any, positions: Tensor | None) -> Tensor:
        return learned[None, : x.shape[1]] if positions is None else learned[positions]

    def check_model(self, model: ModelSizes) -> None:
        _needs(self, model, TextInput)

    def check(self, where: str) -> None:
        check_sizes(self, where)


class ClassOutput(OutputConfig):
    """Learned queries and a linear head to classes."""

    num_classes: int = 10
    """Number of classes; 0: as many as the data has."""
    num_queries: int = 1
    """Number of learned output queries."""
    num_query_channels: int = 128
    """Channels of the output queries."""

    def queries(self, model: ModelSizes) -> OutputQueries:
        return OutputQueries(num_learned=self.num_queries, num_channels=self.num_query_channels, num_outputs=self.num_classes)

    def answer(self, decoded: Tensor, model: ModelSizes) -> Tensor:
        """Logits (B, classes), or (B, queries, classes) if there are several queries."""
        # A copy, not a view: FSDP hangs its hook for the backward pass on what the model returns.
        return decoded.squeeze(1).clone() if decoded.shape[1] == 1 else decoded

    def check(self, where: str) -> None:
        check_sizes(self, where, except_for="num_classes" if self.num_classes == 0 else "")


class ValueOutput(OutputConfig):
    """A learned query with a linear head to numbers: predicted values, or a logit for each of several labels."""

    num_values: int = 1
    """Numbers that come out."""
    num_query_channels: int = 128
    """Channels of the output query."""

    def queries(self, model: ModelSizes) -> OutputQueries:
        return OutputQueries(num_learned=1, num_channels=self.num_query_channels, num_outputs=self.num_values)

    def answer(self, decoded: Tensor, model: ModelSizes) -> Tensor:
        """(B, values)."""
        return decoded.squeeze(1).clone()  # a copy, not a view, as of ClassOutput

    def check(self, where: str) -> None:
        check_sizes(self, where)


class FlowOutput(OutputConfig):
    """The adapted input itself as queries; two flow channels per pixel."""

    rescale_factor: float = 100.0
    """The output is divided by this number."""

    def queries(self, model: ModelSizes) -> OutputQueries:
        return OutputQueries(num_learned=0, num_channels=model.input.adapted_channels(), num_outputs=2)

    def ask(self, learned: Any, x: Any, adapted: Any, positions: Tensor | None) -> Tensor:
        return adapted

    def answer(self, decoded: Tensor, model: ModelSizes) -> Tensor:
        """Flow in pixels, (B, height, width, 2)."""
        assert isinstance(model.input, FlowInput)
        return decoded.unflatten(1, model.input.image_shape) / self.rescale_factor  # no view, as of ClassOutput

    def check_model(self, model: ModelSizes) -> None:
        _needs(self, model, FlowInput)

    def check(self, where: str) -> None:
        check_sizes(self, where)


def _needs(output: OutputConfig, model: ModelSizes, needed: type[InputConfig]) -> None:
    if not isinstance(model.input, needed):
        raise UserError(
            f"model.output is {type(output).__name__}, which needs model.input to be {needed.__name__}, not {type(model.input).__name__}"
        )
