"""What workers send to the driver, and where it waits until it is taken: in a process of its own, which loads nothing else.

The driver and all workers wait for this process to be there: PyTorch, which it does not need, would be most of its start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray


@dataclass(frozen=True)
class Beat:
    """What a worker reports."""

    rank: int
    pid: int
    node: str
    """Ray's id of its node."""
    host: str
    step: int
    """Optimizer steps taken."""
    place: str
    """The line of this package that it is at."""
    together: bool
    """Whether it waits for the other workers there."""
    ended: bool = False
    """Whether its function has returned: nothing more is expected of it."""


Item = str | tuple[int, str] | dict[str, Any] | Beat
"""What workers send to the driver: a sign of life, a line with its level, metrics, or a report of what they do."""


@ray.remote(num_cpus=0)
class Mailbox:
    """Keeps what is sent until it is taken, and whether the workers were asked to end."""

    def __init__(self) -> None:
        self._items: list[Item] = []
        self._interrupted = False
        self._started = 0

    def start(self) -> int:
        """Counts a start of the workers; which one it is, the first: 1."""
        self._started += 1
        return self._started

    def put(self, item: Item) -> None:
        self._items.append(item)

    def put_all(self, items: list[Item]) -> None:
        self._items += items

    def take(self) -> list[Item]:
        items, self._items = self._items, []
        return items

    def interrupt(self) -> None:
        self._interrupted = True

    def is_interrupted(self) -> bool:
        return self._interrupted
