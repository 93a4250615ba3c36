"""What the workers of a node report, sent to the driver together: of hundreds of workers it would else hear a hundred times a second."""

from __future__ import annotations

import threading
import time
import uuid
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from perceiver.training.parallel import World

DIRECTLY = 32
"""Up to this number of workers report to the driver themselves: a few messages a second."""
EVERY = 5.0
"""Seconds between two messages of a node."""


class Collector:
    """Gathers the newest report of each worker of a node, and sends all that are new.

    Args:
        mailbox: the driver's, whose `put_all` is called.
        every: seconds between two messages; 0: `send` is called by others.
    """

    def __init__(self, mailbox: Any, every: float = EVERY) -> None:
        self._mailbox = mailbox
        self._newest: dict[int, Any] = {}
        self._lock = threading.Lock()
        if every:
            threading.Thread(target=self._send_always, args=(every,), daemon=True).start()

    def put(self, beat: Any) -> None:
        """Takes a report of a worker, in the place of its last."""
        with self._lock:
            self._newest[beat.rank] = beat
        if beat.ended:
            self.send()

    def send(self) -> None:
        """Sends what came since the last time."""
        with self._lock:
            beats, self._newest = list(self._newest.values()), {}
        if beats:
            self._mailbox.put_all.remote(beats)

    def _send_always(self, every: float) -> None:
        while True:
            time.sleep(every)
            self.send()


def beats_to(mailbox: Any, world: World) -> Any:
    """The actor to which a worker sends its reports: the driver's mailbox, or where there are many workers its node's collector.

    Called on all workers alike.
    """
    if world.size <= DIRECTLY:
        return mailbox
    # Of this start alone: the collectors of workers that were lost end with them, but not at once.
    start = world.first(uuid.uuid4().hex if world.rank == 0 else None)
    node = ray.get_runtime_context().get_node_id()
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    options = {"name": f"reports-{start}-{node}", "namespace": "perceiver", "get_if_exists": True, "max_restarts": -1}
    return ray.remote(num_cpus=0)(Collector).options(scheduling_strategy=here, **options).remote(mailbox)
