"""Objects of a user's own classes for processes that do not have his files: they travel with the source code that they need."""

from __future__ import annotations

import pickletools
import sys
from typing import Any, Generic, TypeVar

from ray import cloudpickle

from perceiver.extensions import Code, code_of_modules, is_outside

T = TypeVar("T")


class Shipped(Generic[T]):
    """A value that can be sent to any process of the cluster: `Shipped(value)` there has the same `value`.

    What Ray pickles names classes by their module, which another machine may not have. The modules that a pickle names are found in
    it, and their source files go along.
    """

    def __init__(self, value: T) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        data = cloudpickle.dumps(self.value)
        return _unpack, (dict(code_of_modules(_modules_in(data)).files), data)


def _unpack(files: dict[str, str], data: bytes) -> Shipped[Any]:
    Code(files).install()
    return Shipped(cloudpickle.loads(data))


def _modules_in(data: bytes) -> set[str]:
    """Names of modules from outside this project and the installed packages that a pickle speaks of."""
    strings = {argument for _, argument, _ in pickletools.genops(data) if isinstance(argument, str)}
    return {name for name in strings if name in sys.modules and is_outside(sys.modules[name])}
