"""What the domains of a search space are: whether they can be drawn from, and what tells them apart."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from ray import tune
from ray.tune.search.sample import Categorical, Domain, Float, Function, Integer, LogUniform, Normal, Quantized
from ray.tune.search.variant_generator import generate_variants

from perceiver.config import UserError
from tuning.space_texts import RANGES, DomainText, check_range, members, read_space

KINDS = "tune.uniform, tune.loguniform, tune.randint, tune.choice, tune.grid_search or another domain of Ray Tune"

MAKERS: dict[str, Callable[..., Any]] = {
    **{name: getattr(tune, name) for name in RANGES},
    "choice": lambda *values: tune.choice(members(values)),
    "grid": lambda *values: tune.grid_search(members(values)),
}
"""Ray Tune's domains by the names that a command line may give."""


def parse_space(texts: Iterable[str]) -> dict[str, Any]:
    """A search space from a command line: FIELD=DOMAIN(VALUE,...), as Ray Tune's domains.

    Raises:
        UserError: a text that is none, a domain that is not known, or values that it does not take.
    """
    return {name: _domain(read) for name, read in read_space(texts).items()}


def _domain(read: DomainText) -> Any:
    try:
        return MAKERS[read.domain](*read.values)
    except (TypeError, ValueError) as error:
        raise UserError(f"--space {read.text!r}: {read.domain} does not take these values ({error})") from None


def check_space(space: Mapping[str, Any], fits: Callable[[str, Any], Any]) -> None:
    """Checks every domain of a space, with all of its values where they are listed, and else with the ends of its range.

    Args:
        fits: raises UserError for a field and a value that does not fit it.

    Raises:
        UserError: the first thing that cannot be right, naming the field.
    """
    for name, domain in space.items():
        for value in _values(name, domain):
            try:
                fits(name, value)
            except UserError as error:
                if isinstance(domain, Float) and str(error).endswith(" must be int"):
                    raise UserError(
                        f"{error}: randint, qrandint and lograndint draw whole numbers, up to the last value without it"
                    ) from None
                raise


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
    check_range(name, lower, upper, isinstance(_unwrapped(domain.sampler), LogUniform))
    if not isinstance(domain, Integer):
        return [float(lower), float(upper)]
    in_steps = isinstance(domain.sampler, Quantized) and domain.sampler.q > 1  # then Ray Tune draws the last value, too
    return [lower, upper if in_steps else upper - 1]


def _listed(name: str, values: Any) -> list[Any]:
    if not len(values):
        raise UserError(f"{name} of the sweep's space has no value to choose from")
    return list(values)


def _unwrapped(sampler: Any) -> Any:
    return sampler.sampler if isinstance(sampler, Quantized) else sampler


def _sampler(sampler: Any) -> str:
    if isinstance(sampler, Quantized):
        return f"{_sampler(sampler.sampler)} in steps of {sampler.q}"
    return f"Normal of {sampler.mean} and {sampler.sd}" if isinstance(sampler, Normal) else str(sampler)


def _source(function: Callable[..., Any]) -> str:
    """What tells a function from others in every process: its source, and the plain values that it takes from around it."""
    return hashlib.sha256(_text(function).encode()).hexdigest()[:16]


def _text(function: Any) -> str:
    if isinstance(function, partial):
        return f"{_text(function.func)} {_known(function.args)} {_known(function.keywords)}"
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        if inspect.isroutine(function) or isinstance(function, type):  # typed in, or not written in Python
            return str(function.__qualname__)
        return f"{_text(type(function))} {_known(vars(function) if hasattr(function, '__dict__') else {})}"  # an object that is called
    cells = getattr(function, "__closure__", None)
    return f"{text} {_known(inspect.getclosurevars(function).nonlocals)}" if cells else text


def _known(value: Any) -> str:
    """A value as text; of what is no plain data its class alone, as its own text may hold its address in memory."""
    return json.dumps(value, sort_keys=True, default=lambda member: _text(member) if callable(member) else type(member).__qualname__)


def grids(space: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the values of a space's grids; one that is empty where it has none."""
    listed = {name: domain["grid_search"] for name, domain in space.items() if isinstance(domain, dict)}
    return (dict(zip(listed, chosen, strict=True)) for chosen in itertools.product(*listed.values()))


def draw(space: Mapping[str, Any], random_state: np.random.RandomState, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """One sample of a space, as Ray Tune draws it.

    Args:
        space: dotted field -> domain.
        random_state: draws.
        fixed: values of some of the fields; at least of those that are grids.

    Raises:
        UserError: a function of the space fails; it names the field.
    """
    mixed = {**space, **fixed}
    functions = {name: domain for name, domain in mixed.items() if isinstance(domain, Function)}
    rest = {name: value for name, value in mixed.items() if name not in functions}
    _, spec = next(generate_variants({"config": {"values": rest}}, random_state=random_state))
    values: dict[str, Any] = spec["config"]["values"]
    for name, domain in functions.items():  # when all else is drawn, as Ray Tune does it
        values[name] = called(name, domain, values)
    return {name: values[name] for name in mixed}


def called(name: str, domain: Function, values: Mapping[str, Any]) -> Any:
    """What the function of a field says where the other fields have the given values.

    Raises:
        UserError: it fails; the field is named.
    """
    try:
        return domain.func({"values": dict(values)}) if domain.pass_config else domain.func()
    except Exception as error:
        with suppress(Exception):
            return domain.sample(config={"values": dict(values)})  # which knows functions that are written as Ray Tune once had them
        raise UserError(
            f"the function of {name} in the sweep's space fails with {type(error).__name__}: {error}; it is given the values of the other "
            f'fields by their names: tune.sample_from(lambda config: config["values"]["{next(iter(values), "optim.lr")}"])'
        ) from error


def holds(domain: Any, value: Any, values: Mapping[str, Any]) -> bool:
    """Whether a value can come from a domain.

    Args:
        domain: of a field.
        value: of that field.
        values: those of all fields, on which a function's value may depend.
    """
    if isinstance(domain, dict):
        return plain(value) in map(plain, domain["grid_search"])
    if isinstance(domain, Categorical):
        return plain(value) in map(plain, domain.categories)
    if isinstance(domain, Function):
        try:
            return plain(called("", domain, values)) == plain(value)
        except UserError:  # it asks for what a trial of another space does not have
            return False
    if not isinstance(domain, (Float, Integer)) or isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    quantized = isinstance(domain.sampler, Quantized)
    if quantized and abs(value / domain.sampler.q - round(value / domain.sampler.q)) > 1e-6:
        return False
    last = domain.upper - 1 if isinstance(domain, Integer) and not quantized else domain.upper
    return bool(domain.lower <= value <= last) and (isinstance(domain, Float) or value == int(value))


def plain(value: Any) -> Any:
    """A value as it is read from JSON, in which a sequence is a list."""
    return json.loads(json.dumps(value))
