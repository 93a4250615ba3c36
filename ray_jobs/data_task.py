"""What runs in a data task: its process loads this file, and PyTorch only where a task's own code has a part in reading."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import pyarrow as pa
import ray
from ray import cloudpickle

from perceiver.config import UserError
from perceiver.data.chunks import SomePieces
from perceiver.data.pieces import Piece
from perceiver.data.reader import Reader
from perceiver.data.storage import NoStore
from ray_jobs.shipping import Shipped

FAULT = "fault"
"""The only column of a table that says why data could not be read."""
PIECES = "pieces"


class Rest:
    """The parts of a source's files that a task was not sent, in the object store: it gets them where it needs one after all."""

    def __init__(self, lists: Sequence[Sequence[Piece]]) -> None:
        self.counts = [len(pieces) for pieces in lists]
        self._stored = ray.put(Shipped(lists)) if any(lists) else None

    def fetch(self, number: int) -> Sequence[Piece]:
        return ray.get(self._stored).value[number]  # type: ignore[no-any-return]


def read_units(items: pa.Table, shipped: Shipped[Reader], rest: Rest | None = None) -> Iterator[pa.Table]:
    """The rows of units, which are given as plain data; or a table with a `FAULT`."""
    for item in items.to_pylist():
        reader, packed = shipped.value, item.pop(PIECES, None)
        if packed is not None and rest is not None:
            number, there = cloudpickle.loads(packed)
            counted = enumerate(rest.counts)
            reader = reader.with_pieces([SomePieces(n, there if i == number else {}, partial(rest.fetch, i)) for i, n in counted])
        try:
            yield reader.read(reader.unit_type(**item))
        except NoStore:
            raise  # a broken connection: the task is repeated
        except UserError as error:  # as data: Ray would wrap the exception in its own
            yield pa.table({FAULT: [str(error)]})
            return


def warm_up(with_tasks: bool) -> None:
    """Loads what a data task needs into the process that this runs in, as a task.

    Args:
        with_tasks: whether tasks have a part in reading.
    """
    if with_tasks:
        import perceiver.tasks  # noqa: F401
