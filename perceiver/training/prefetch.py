"""A worker's batches made ahead of time in a thread, and moved to the device; begun while the model is still being built."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from perceiver.training.batches import Batch, Loader, ReadAll
from perceiver.training.parallel import World


class Prefetch:
    """Iterates over `source` in a thread, `depth` items ahead, and measures the seconds its consumer waited.

    An error in the source is raised at the consumer. `close` ends the thread at its next item. After every
    `STALL_SECONDS` of waiting for one item, `stalled` is called with the seconds waited.
    """

    _END = object()
    STALL_SECONDS = 30.0

    def __init__(
        self,
        source: Iterable[list[Batch]],
        device: torch.device,
        depth: int = 2,
        stalled: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.wait_seconds = 0.0
        self.stalled = stalled
        self._source = source
        self._device = device
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            start = time.perf_counter()
            item = self._next(start)
            self.wait_seconds += time.perf_counter() - start
            if item is self._END:
                return
            if isinstance(item, BaseException):
                raise item
            yield [{k: v.to(self._device, non_blocking=True) for k, v in batch.items()} for batch in item]

    def _next(self, start: float) -> Any:
        while True:
            try:
                return self._queue.get(timeout=self.STALL_SECONDS)
            except queue.Empty:
                self.stalled(time.perf_counter() - start)

    def close(self) -> None:
        """Ends the thread; what it had made is dropped."""
        self._stopped.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue

    def _fill(self) -> None:
        try:
            for item in self._source:
                if self._device.type == "cuda":
                    item = [{k: v.pin_memory() for k, v in batch.items()} for batch in item]
                self._queue.put(item)
                if self._stopped.is_set():
                    break
            self._queue.put(self._END)
        except BaseException as error:  # handed to the consumer, who raises it
            self._queue.put(error)
        finally:  # what the source holds open (reads ahead) ends here, not when somebody happens to drop it
            if hasattr(self._source, "close"):
                self._source.close()


class HeadStart:
    """A training's batches, whose reading may begin before it is certain from which step on they are needed."""

    def __init__(self, loader: Loader, read_all: ReadAll, world: World) -> None:
        self._loader, self._read_all, self._world = loader, read_all, world
        self._begun: tuple[tuple[int, int], Prefetch] | None = None

    def begin(self, start: int, stop: int) -> None:
        """Begins to read the steps start .. stop - 1."""
        self._begun = (start, stop), self._open(start, stop)

    def take(self, start: int, stop: int, stalled: Callable[[float], None]) -> Prefetch:
        """The batches of these steps: those that were begun, or others where they are not the same. Whoever takes them closes them."""
        begun, self._begun = self._begun, None
        if begun is not None and begun[0] != (start, stop):
            begun[1].close()
            begun = None
        batches = begun[1] if begun is not None else self._open(start, stop)
        batches.stalled = stalled
        return batches

    def close(self) -> None:
        """Ends what was begun and is not taken."""
        if self._begun is not None:
            self._begun[1].close()
            self._begun = None

    def _open(self, start: int, stop: int) -> Prefetch:
        return Prefetch(self._loader.steps(self._read_all, self._world.rank, self._world.size, start, stop), self._world.device)
