"""What workers send to the driver, and its answer: lines, metrics, signs of life, an interruption."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

logger = logging.getLogger(__name__)
Item = str | tuple[int, str] | dict[str, Any]
"""What workers send to the driver: a sign of life, a line with its level, or metrics."""
SIGN_OF_LIFE = ""
"""What a worker says when it begins: nobody waits for it any more."""
START_PATIENCE = 60.0
"""Seconds without a sign of the workers after which the driver says what they may be waiting for."""


@ray.remote(num_cpus=0)
class _Mailbox:
    def __init__(self) -> None:
        self._items: list[Item] = []
        self._interrupted = False

    def put(self, item: Item) -> None:
        self._items.append(item)

    def take(self) -> list[Item]:
        items, self._items = self._items, []
        return items

    def interrupt(self) -> None:
        self._interrupted = True

    def is_interrupted(self) -> bool:
        return self._interrupted


class Messages:
    """Lines and reported metrics from workers to the driver, without the noise of Ray's log forwarding, and its interruption to them."""

    def __init__(
        self,
        why_silent: Callable[[], str],
        on_report: Callable[[dict[str, float]], None] | None = None,
        every: float = 0.5,
    ) -> None:
        # On this node: losing another machine must not lose the run's messages.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.actor = _Mailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]  # from Ray's decorator
        self.interrupted = False
        """Whether the workers have been asked to save and end."""
        self._alive = False
        self._why_silent = why_silent
        self._on_report = on_report
        self._every = every
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._pump, daemon=True)

    def __enter__(self) -> Messages:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join(timeout=60)
        ray.kill(self.actor)

    def interrupt(self, number: int, frame: object) -> None:
        """Handles a signal: a first one asks the workers, where there are any; else, and a second one, ends all at once."""
        if self.interrupted or not self._alive:
            raise KeyboardInterrupt
        self.interrupted = True
        logger.info("stopping: the step is finished and a checkpoint saved (Ctrl-C again stops at once)")

    def _pump(self) -> None:
        silent_since, passed_on = time.monotonic(), False
        while True:
            ended = self._ended.is_set()
            for item in ray.get(self.actor.take.remote()):
                self._alive = True
                if isinstance(item, tuple):
                    logger.log(*item)
                elif item != SIGN_OF_LIFE and self._on_report is not None:
                    self._on_report(item)
            if ended:
                return
            if self.interrupted and not passed_on:
                self.actor.interrupt.remote()
                passed_on = True
            if not self._alive and time.monotonic() - silent_since > START_PATIENCE:
                logger.warning("%s", self._why_silent())
                silent_since = time.monotonic()
            self._ended.wait(self._every)
