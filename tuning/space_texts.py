"""Search spaces of a command line as texts, read and checked before Ray Tune is loaded."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from perceiver.catalog import CATALOG
from perceiver.config import Experiment, UserError, flatten, nearest, to_dict

RANGES = {
    "uniform": 2,
    "quniform": 3,
    "loguniform": 2,
    "qloguniform": 3,
    "randint": 2,
    "qrandint": 3,
    "lograndint": 2,
}
"""Domains between a first and a last value, and the number of values that each needs; the third is the step."""
DOMAINS = (*RANGES, "choice", "grid")
"""Domains that a command line may name."""
EXAMPLES = '"optim.lr=loguniform(1e-4,1e-2)", "optim.warmup-steps=choice(0,50,150)" or "training.seed=grid(0,1,2)"'


@dataclass(frozen=True)
class DomainText:
    """What a text says of a field: "optim.lr=loguniform(1e-4,1e-2)"."""

    text: str
    domain: str
    """One of `DOMAINS`."""
    values: tuple[Any, ...]


def read_space(texts: Iterable[str]) -> dict[str, DomainText]:
    """A search space from a command line: FIELD=DOMAIN(VALUE,...), read as Python and never executed.

    Raises:
        UserError: a text that is none, or a domain that is not known.
    """
    space: dict[str, DomainText] = {}
    for text in texts:
        field, equals, domain = text.partition("=")
        name = field.strip().removeprefix("--").replace("-", "_")
        if not equals or not re.fullmatch(r"[a-z_0-9]+(\.[a-z_0-9]+)+", name):
            raise UserError(f"--space {text!r} must be FILE.py:FUNCTION, or FIELD=DOMAIN(VALUE,...) as in {EXAMPLES}")
        if name in space:
            raise UserError(f"--space names {field.strip()} twice")
        space[name] = _read_domain(text, domain)
    return space


def _read_domain(text: str, domain: str) -> DomainText:
    try:
        call = ast.parse(domain.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.keywords:
            raise ValueError
        values = [argument.id if isinstance(argument, ast.Name) else ast.literal_eval(argument) for argument in call.args]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise UserError(f"--space {text!r} cannot be read: give FIELD=DOMAIN(VALUE,...) as in {EXAMPLES}") from None
    if call.func.id not in DOMAINS:
        raise UserError(
            f"--space {text!r}: there is no domain {call.func.id}; there are {', '.join(DOMAINS)}{nearest(call.func.id, DOMAINS)}"
        )
    return DomainText(text, call.func.id, tuple(values))


def members(values: tuple[Any, ...]) -> list[Any]:
    """The values of choice(1, 2, 3) or choice([1, 2, 3]); a sequence among several is one value."""
    return list(values[0]) if len(values) == 1 and isinstance(values[0], (list, tuple)) else list(values)


def check_names(names: Iterable[str], experiment: Experiment) -> None:
    """Whether fields exist and can be varied.

    Raises:
        UserError: names the first that does not.
    """
    fields = flatten(to_dict(experiment))
    for name in names:
        if name not in fields:
            raise UserError(f"field {name} of the sweep's space does not exist{nearest(name, fields)}")
        if name.startswith(("run.", "parallel.workers")):
            raise UserError(f"field {name} cannot be varied: it is no part of what is trained")


def check_range(name: str, lower: float, upper: float, logarithmic: bool) -> None:
    """Whether a range goes from a lower value to a higher one, and above 0 where it is logarithmic.

    Raises:
        UserError: names the field.
    """
    if not lower < upper:
        raise UserError(
            f"{name} of the sweep's space is a range from {lower:g} to {upper:g} and must go from a lower value to a higher one"
        )
    if logarithmic and lower <= 0:
        raise UserError(f"{name} of the sweep's space is a logarithmic range from {lower:g} and must begin above 0")


def check_line(arguments: Sequence[str]) -> None:
    """What a command line `perceiver sweep EXPERIMENT --space FIELD=DOMAIN ...` tells of its space, as far as it can be known without Ray.

    Args:
        arguments: what is typed after the command. Spaces in files, and experiments that are no presets, are left to the sweep.

    Raises:
        UserError: a text that is no domain, a field that does not exist, or a value that does not fit it.
    """
    spaces = [
        word.partition("=")[2] if word.startswith("--space=") else arguments[place + 1]
        for place, word in enumerate(arguments)
        if word.startswith("--space=") or (word == "--space" and place + 1 < len(arguments))
    ]
    if {"-h", "--help"} & set(arguments) or not all("=" in text for text in spaces):
        return
    read = read_space(spaces)
    for name, domain in read.items():
        _check_values(name, domain)
    if not read or arguments[0] not in CATALOG:
        return
    # Here and not above: experiments take PyTorch, which no mistake in the texts alone needs.
    from perceiver.experiments import field_words, find_experiment
    from ray_jobs.overrides import override

    experiment = override(find_experiment(arguments[0]), _changes(arguments), "tuning.sweep")
    check_names(read, experiment)
    for name, domain in read.items():
        for value in members(domain.values) if domain.domain not in RANGES else ():
            override(experiment, field_words(name, value), "tuning.sweep")


def _check_values(name: str, domain: DomainText) -> None:
    """Whether there are as many values as the domain takes, of which ranges have numbers."""
    needed = RANGES.get(domain.domain)
    if needed is None:
        if not members(domain.values):
            raise UserError(f"{name} of the sweep's space has no value to choose from")
        return
    numbers = [value for value in domain.values if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)]
    if len(numbers) != len(domain.values) or len(numbers) < needed:
        step = ", and the step between them" if needed == 3 else ""
        raise UserError(f"--space {domain.text!r}: {domain.domain} needs {needed} numbers: the first and the last value{step}")
    check_range(name, numbers[0], numbers[1], "log" in domain.domain)


def _changes(arguments: Sequence[str]) -> list[str]:
    """The words of a command line that change fields with a dot in their names, each with its values."""
    changes: list[str] = []
    for place, word in enumerate(arguments):
        if word.startswith("--") and "." in word.partition("=")[0]:
            changes += [word, *takewhile(lambda value: not value.startswith("--"), arguments[place + 1 :])]
    return changes
