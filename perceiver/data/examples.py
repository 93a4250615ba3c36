"""A data source that is code: a function or class of the user's that yields examples, in any number of parts.

    def series(split):                      # --data.source weather.py:series, or package.weather:series
        rng = np.random.default_rng({"train": 0, "val": 1}[split])
        for _ in range(1000):
            yield {"past": ..., "future": ...}

An example is a mapping from the names of the rows' columns to their values: of arrays those that the task reads, of text
`data.text_column` and, for classification, `data.label_column`. Reading a part twice must give the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from perceiver.config import UserError
from perceiver.extensions import code_of_modules, is_reference, load_object, place_of
from perceiver.trust import trust

COMPARED = 4
"""Examples of a part that are read twice before a preparation, to see whether they are the same."""

Example = Mapping[str, Any]


class ExampleSource(ABC):
    """A data source in parts, which are read in parallel. Named like a function: `--data.source weather.py:Series`.

    A class is made without arguments, in each process that reads from it.
    """

    splits: ClassVar[tuple[str, ...]] = ("train", "val")
    """Splits that it has. Without "val", `data.val_fraction` of the examples is held out, by a hash of their content."""

    class_names: ClassVar[tuple[str, ...]] = ()
    """Names of the classes that its labels are numbers of, for models whose number of classes is that of the data."""

    def parts(self, split: str) -> int:
        """In how many parts a split is read. The same examples in the same order give the same data set in any number of parts."""
        return 1

    @abstractmethod
    def examples(self, split: str, part: int) -> Iterable[Example]:
        """The examples of a part, from 0 to `parts(split)` - 1. Random choices must be seeded: each call yields the same."""

    def fingerprint(self) -> str | None:
        """What stands for the content: prepared data is made again where it changes. None: the source code."""
        return None


class _FunctionSource(ExampleSource):
    """A function `name(split)` as a source of one part."""

    def __init__(self, function: Callable[[str], Iterable[Example] | None]) -> None:
        self._function = function

    def examples(self, split: str, part: int) -> Iterable[Example]:
        return self._function(split) or ()


def is_code(source: str) -> bool:
    """Whether a data source is named as package.module:name or path/file.py:name."""
    return is_reference(source) and not source.startswith("hub:")


def name_of(source: str) -> str:
    """MODULE:NAME of a source that is code, the same for a file and for the module that it is imported as."""
    place, _, name = source.rpartition(":")
    return f"{Path(place).stem if place.endswith('.py') else place}:{name}"


@dataclass(frozen=True, kw_only=True)
class ExamplePart:
    """A part of a source that is code: what takes the place of a file."""

    target: Any
    """The function, class or object that was named."""
    name: str
    read: str
    """The split of the source that it belongs to."""
    part: int
    split: str = ""
    """"train", "val", or "hash": each example goes where its hash says."""

    format = "examples"
    compressed = False
    size = 0
    labels_path = None

    @property
    def place(self) -> str:
        """What messages call it: the call that yields it."""
        if _is_function(self.target):
            return f"{self.name}({self.read!r})"
        return f"{self.name}.examples({self.read!r}, {self.part})"

    def examples(self) -> Iterator[Example]:
        """Its examples, read from the first on.

        Raises:
            UserError: the code fails: with file and line.
        """
        try:
            yield from _opened(self.target).examples(self.read, self.part)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self.place} fails: {place_of(error)}") from error

    def fingerprint(self) -> str:
        """What stands for the content of the whole source.

        Raises:
            UserError: `fingerprint` fails or returns no text.
        """
        method = getattr(_opened(self.target), "fingerprint", None)
        found = None
        if method is not None:
            found = _asked(f"{self.name}.fingerprint()", method)
            if found is not None and not (isinstance(found, str) and found):
                raise UserError(f"{self.name}.fingerprint() returns {found!r} and must return a text that is not empty, or None")
        return found or f"code:{code_of_modules([self.name.rpartition(':')[0]]).digest}"


def find_parts(source: str, field: str) -> tuple[list[ExamplePart], list[ExamplePart]]:
    """The parts of a source for training, and those for validation: none where its "val" split is missing or empty.

    Raises:
        UserError: it cannot be imported, is no source, or fails.
    """
    name = name_of(source)
    target = load_object(source, field)
    trust(code_of_modules([name.rpartition(":")[0]]))
    opened = _opened(target) if _is_source(target) else None
    if opened is None:
        raise UserError(
            f"{field} {source} is a {type(target).__name__} and must be a function of the split that yields examples, or a class with a "
            "method examples(split, part), such as an ExampleSource"
        )
    splits = tuple(getattr(opened, "splits", ExampleSource.splits))
    if unknown := [split for split in splits if split not in ExampleSource.splits]:
        raise UserError(f"{name}.splits has {unknown[0]!r}: the splits are train and val")
    found: dict[str, list[ExamplePart]] = {"train": [], "val": []}
    for split in splits:
        count = _asked(f"{name}.parts({split!r})", partial(opened.parts, split)) if hasattr(opened, "parts") else 1
        if type(count) is not int or count < 1:
            raise UserError(f"{name}.parts({split!r}) returns {count!r} and must return a whole number of at least 1")
        found[split] = [ExamplePart(target=target, name=name, read=split, part=part) for part in range(count)]
    if not any(next(part.examples(), None) is not None for part in found["val"]):
        found["val"] = []
    return found["train"], found["val"]


def check_repeatable(parts: Iterable[ExamplePart]) -> None:
    """Reads the first examples of the first part of each split twice.

    Raises:
        UserError: they differ.
    """
    firsts = {(part.name, part.read): part for part in parts if part.part == 0}
    for part in firsts.values():
        once, again = (list(islice(part.examples(), COMPARED)) for _ in range(2))
        for number, (first, second) in enumerate(zip(once, again, strict=False)):
            if (name := _difference(first, second)) is not None:
                raise UserError(
                    f"{part.place} yields other examples when it is read again (example {number}: {name} differs): its random choices must "
                    "be seeded, by np.random.default_rng(0) say"
                )
        if len(once) != len(again):
            raise UserError(
                f"{part.place} yields {len(once)} examples, and {len(again)} when it is read again: each call must yield the same"
            )


def _difference(first: Any, second: Any) -> str | None:
    """The name of a value that differs between two examples."""
    if not isinstance(first, Mapping) or not isinstance(second, Mapping):
        return None  # reported by whoever makes rows of them
    for name in first:
        one, other = np.asarray(first[name]), np.asarray(second.get(name))
        if one.dtype != other.dtype or one.shape != other.shape or one.tobytes() != other.tobytes():
            return str(name)
    return None


def _is_source(target: Any) -> bool:
    return hasattr(target, "examples") or _is_function(target)


def _is_function(target: Any) -> bool:
    return callable(target) and not isinstance(target, type) and not hasattr(target, "examples")


def _opened(target: Any) -> Any:
    if _is_function(target):
        return _FunctionSource(target)
    return _asked(f"{target.__module__}:{target.__name__}()", target) if isinstance(target, type) else target


def _asked(what: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} fails: {place_of(error)}") from error
