"""How language models write: how tokens are chosen, how long texts become; also as words of a command line."""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from perceiver.config import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 1.0
    """0 takes the most likely token; otherwise logits are divided by it and a token is drawn."""
    top_k: int | None = None
    """Sample only from the k most likely tokens."""
    top_p: float | None = None
    """Sample only from the fewest tokens that have this probability together (arXiv 1904.09751)."""
    seed: int | None = None
    """Of the drawing; None: drawn by torch's own generator."""

    def check(self) -> None:
        """Raises UserError where a value is out of range."""
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature!r} and must be 0 (greedy) or a finite number above it")
        if self.top_k is not None and (not is_whole(self.top_k) or self.top_k < 1):
            raise UserError(f"top_k is {self.top_k!r} and must be a whole number, at least 1")
        if self.top_p is not None and (not _is_number(self.top_p) or not 0 < self.top_p <= 1):
            raise UserError(f"top_p is {self.top_p!r} and must be above 0 and at most 1")
        if self.seed is not None and (not is_whole(self.seed) or not 0 <= self.seed < 2**63):
            raise UserError(f"seed is {self.seed!r} and must be a whole number from 0 to 2**63 - 1")


DEFAULT_SAMPLING = Sampling()
"""Draws from the model's own distribution."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(Sampling):
    """How a text is continued: what `TrainedModel.generate`, `predict` and the command line have in common."""

    max_new_tokens: int = 200
    """A continuation's greatest length in tokens; the end of the document ends it before."""
    num_latents: int | None = None
    """Prompt tokens that start as latents, 1 .. max_latents; None: as many as there are."""
    stop: tuple[str, ...] = ()
    """Strings that end a continuation and do not belong to it."""

    @property
    def sampling(self) -> Sampling:
        """The part that chooses a token."""
        return Sampling(**{field.name: getattr(self, field.name) for field in fields(Sampling)})

    def check(self) -> None:
        super().check()
        check_stop(self.stop)


def check_stop(stop: Sequence[str]) -> None:
    """Raises UserError where strings that are to end a continuation are none."""
    if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
        raise UserError("stop must be a list of strings that are not empty")


def add_generation_options(parser: ArgumentParser, defaults: GenerationOptions, top_k_help: str) -> None:
    """Adds the options of generation to a command line."""
    shown = "(default: %(default)s)"
    seed = "a different one each time" if defaults.seed is None else "%(default)s"
    group = parser.add_argument_group("generation")
    group.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens, help=f"length of continuations in tokens {shown}")
    group.add_argument("--temperature", type=float, default=defaults.temperature, help=f"0 always takes the most likely token {shown}")
    group.add_argument("--top-k", type=int, help=top_k_help)
    group.add_argument("--top-p", type=float, help="sample only from the smallest set of most likely tokens with this total probability")
    group.add_argument("--num-latents", type=int, help="number of prompt tokens that start as latents (default: as many as possible)")
    group.add_argument("--stop", nargs="+", default=(), metavar="TEXT", help="strings that end a continuation")
    group.add_argument("--seed", type=int, default=defaults.seed, help=f"seed of the sampling (default: {seed})")


def given_generation_options(args: Namespace) -> dict[str, Any]:
    """The options that `add_generation_options` has parsed, by their names."""
    return {field.name: getattr(args, field.name) for field in fields(GenerationOptions)} | {"stop": tuple(args.stop)}


@contextmanager
def named_as_typed() -> Iterator[None]:
    """Names the fields in messages about options as the command line does (--top-k, not top_k)."""
    try:
        yield
    except UserError as error:
        name, _, rest = str(error).partition(" ")
        raise UserError(f"--{name.replace('_', '-')} {rest}") from None


def is_whole(value: object) -> bool:
    """Whether a value is a whole number (True and False are none)."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return is_whole(value) or isinstance(value, (float, np.floating))
