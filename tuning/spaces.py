"""What the domains of a search space are: whether they can be drawn from, and what tells them apart."""

from __future__ import annotations

import ast
import hashlib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ray import tune
from ray.tune.search.sample import Categorical, Domain, Float, Function, Integer, LogUniform, Quantized

from perceiver.config import UserError, nearest

KINDS = "tune.uniform, tune.loguniform, tune.randint, tune.choice, tune.grid_search or another domain of Ray Tune"

DOMAINS: dict[str, Callable[..., Any]] = {
    "uniform": tune.uniform,
    "quniform": tune.quniform,
    "loguniform": tune.loguniform,
    "qloguniform": tune.qloguniform,
    "randint": tune.randint,
    "lograndint": tune.lograndint,
    "choice": lambda *values: tune.choice(_members(values)),
    "grid": lambda *values: tune.grid_search(_members(values)),
}
"""Domains that a command line may name."""
EXAMPLES = '"optim.lr=loguniform(1e-4,1e-2)", "optim.warmup-steps=choice(0,50,150)" or "training.seed=grid(0,1,2)"'


def parse_space(texts: Iterable[str]) -> dict[str, Any]:
    """A search space from a command line: FIELD=DOMAIN(VALUE,...), read as Python and never executed.

    Raises:
        UserError: a text that is none, a domain that is not known, or values that it does not take.
    """
    space: dict[str, Any] = {}
    for text in texts:
        field, equals, domain = text.partition("=")
        name = field.strip().removeprefix("--").replace("-", "_")
        if not equals or not re.fullmatch(r"[a-z_0-9]+(\.[a-z_0-9]+)+", name):
            raise UserError(f"--space {text!r} must be FILE.py:FUNCTION, or FIELD=DOMAIN(VALUE,...) as in {EXAMPLES}")
        if name in space:
            raise UserError(f"--space names {field.strip()} twice")
        space[name] = _parse_domain(text, domain)
    return space


def _parse_domain(text: str, domain: str) -> Any:
    try:
        call = ast.parse(domain.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.keywords:
            raise ValueError
        values = [argument.id if isinstance(argument, ast.Name) else ast.literal_eval(argument) for argument in call.args]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise UserError(f"--space {text!r} cannot be read: give FIELD=DOMAIN(VALUE,...) as in {EXAMPLES}") from None
    if call.func.id not in DOMAINS:
        raise UserError(
            f"--space {text!r}: there is no domain {call.func.id}{nearest(call.func.id, DOMAINS)}; there are {', '.join(DOMAINS)}"
        )
    try:
        return DOMAINS[call.func.id](*values)
    except (TypeError, ValueError) as error:
        raise UserError(f"--space {text!r}: {call.func.id} does not take these values ({error})") from None


def _members(values: tuple[Any, ...]) -> list[Any]:
    """The values of choice(1, 2, 3) or choice([1, 2, 3]); a sequence among several is one value."""
    return list(values[0]) if len(values) == 1 and isinstance(values[0], (list, tuple)) else list(values)


def check_space(space: Mapping[str, Any], fits: Callable[[str, Any], Any]) -> None:
    """Checks every domain of a space, with all of its values where they are listed, and else with the ends of its range.

    Args:
        fits: raises UserError for a field and a value that does not fit it.

    Raises:
        UserError: the first thing that cannot be right, naming the field.
    """
    for name, domain in space.items():
        for value in _values(name, domain):
            fits(name, value)


def described(domain: Any) -> Any:
    """A domain as JSON-ready data that is the same in every process: of a function its source stands for it."""
    if isinstance(domain, dict):
        return domain
    if isinstance(domain, Function):
        return f"Function {_source(domain.func)}"
    return f"{type(domain).__name__} {domain.domain_str} {_sampler(domain.sampler)}"


def _values(name: str, domain: Any) -> list[Any]:
    if isinstance(domain, dict):
        if set(domain) != {"grid_search"} or not isinstance(domain["grid_search"], (list, tuple)):
            raise UserError(f"{name} of the sweep's space is a mapping and must be {KINDS}")
        return _listed(name, domain["grid_search"])
    if not isinstance(domain, Domain):
        raise UserError(f"{name} of the sweep's space is {domain!r} and must be {KINDS}")
    if isinstance(domain, Categorical):
        return _listed(name, domain.categories)
    if not isinstance(domain, (Float, Integer)) or not all(map(math.isfinite, (domain.lower, domain.upper))):
        return []  # what a function or a normal distribution draws shows in the trials
    lower, upper = domain.lower, domain.upper
    if not lower < upper:
        raise UserError(
            f"{name} of the sweep's space is a range from {lower:g} to {upper:g} and must go from a lower value to a higher one"
        )
    if isinstance(_unwrapped(domain.sampler), LogUniform) and lower <= 0:
        raise UserError(f"{name} of the sweep's space is a logarithmic range from {lower:g} and must begin above 0")
    return [lower, upper - 1] if isinstance(domain, Integer) else [float(lower), float(upper)]


def _listed(name: str, values: Any) -> list[Any]:
    if not len(values):
        raise UserError(f"{name} of the sweep's space has no value to choose from")
    return list(values)


def _unwrapped(sampler: Any) -> Any:
    return sampler.sampler if isinstance(sampler, Quantized) else sampler


def _sampler(sampler: Any) -> str:
    return f"{_sampler(sampler.sampler)} in steps of {sampler.q}" if isinstance(sampler, Quantized) else str(sampler)


def _source(function: Callable[..., Any]) -> str:
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):  # typed in, or not written in Python
        text = getattr(function, "__qualname__", type(function).__name__)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
