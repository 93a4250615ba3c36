"""How far a worker reads ahead: tasks at once and bytes, its fair share of what the cluster has for data.

Ray Data (2.60) divides the free CPUs by the executions that are open, an integer that becomes zero where there are more executions than
free CPUs, and takes half of the object store for each of them. Every worker has an execution of its own, and another one while it
validates. So its own division is switched off, and these are the limits: the same for all workers, whatever else is open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ray
from ray.data._internal.execution.backpressure_policy import ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, BackpressurePolicy

DATA_CPUS = 0.5
"""CPUs that a data task asks for."""
TASK_BYTES = 16 << 20
"""Small units are read several by one task, up to about this size: a task costs 30 to 60 ms whatever it does."""
MOST_BYTES = 512 << 20
"""Read ahead by one worker at most, however large the object store is."""
STORE_SHARE = 0.25
"""Of the object store, for what all workers read ahead of training; as much again for validation."""
_LIMIT = "perceiver.read_ahead"
"""Under this name the context of an execution holds its limit."""


@dataclass(frozen=True, kw_only=True)
class ReadAhead:
    """The limits of one execution."""

    tasks: int
    """Data tasks at once, running or waiting for a CPU."""
    bytes: int
    """Rows that are read and not taken yet, with those that the tasks will add."""

    def may_start(self, running: int, waiting_bytes: float, task_bytes: float) -> bool:
        """Whether one more task may start.

        Args:
            running: tasks that have begun.
            waiting_bytes: of rows that are read and not taken yet.
            task_bytes: of the rows of a task.
        """
        if running >= self.tasks:
            return False
        # Where one task is larger than the limit, one after the other: each begins when the rows before it are taken.
        return running + waiting_bytes == 0 or waiting_bytes + (running + 1) * task_bytes <= self.bytes


@dataclass(frozen=True, kw_only=True)
class DataShare:
    """What a job's workers have for their data tasks, all together."""

    others: float = 0.0
    """CPUs that other jobs of the cluster held when this one began."""
    cpus_per_worker: float = 1.0

    def of_a_worker(self, workers: int, cpus: float, store: float) -> ReadAhead:
        """A worker's limits: all have the same, at least one task.

        Args:
            workers: of this job.
            cpus: of the cluster.
            store: bytes of the cluster's object store.
        """
        room = min(MOST_BYTES, int(store * STORE_SHARE / workers))
        slots = self.slots(workers, cpus) // workers
        return ReadAhead(tasks=max(1, min(slots, room // TASK_BYTES)), bytes=room)

    def slots(self, workers: int, cpus: float) -> int:
        """Data tasks of all workers together that find a free CPU."""
        free = cpus - self.others - workers * self.cpus_per_worker
        return max(0, math.floor(free / DATA_CPUS + 1e-6))

    def here(self, workers: int) -> ReadAhead:
        """A worker's limits in the cluster as it is now."""
        total = ray.cluster_resources()
        return self.of_a_worker(workers, total.get("CPU", 0.0), total.get("object_store_memory", 0.0))


def tasks_of_an_epoch(num_bytes: int, workers: int) -> int:
    """Number of data tasks in which workers together read `num_bytes` once: at least one each."""
    return workers * max(1, -(-num_bytes // (workers * TASK_BYTES)))


class Bounded(BackpressurePolicy):  # type: ignore[misc]  # Ray's types are not followed
    """Starts the tasks of an execution within its limit, which its context holds; the only rule of such an execution."""

    def can_add_input(self, op: Any) -> bool:
        """Whether an operator may start a task."""
        limit, expected = self._data_context.get_config(_LIMIT)
        size = max(expected, op.metrics.average_bytes_outputs_per_task or 0.0)
        return bool(limit.may_start(op.num_active_tasks(), self._resource_manager.get_mem_op_outputs(op), size))


def set_limit(context: ray.data.DataContext, limit: ReadAhead, task_bytes: int) -> None:
    """Makes the executions that are begun with a context keep a limit; `task_bytes`: of the rows of a task, before one is measured."""
    context.op_resource_reservation_enabled = False
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [Bounded])
    context.set_config(_LIMIT, (limit, task_bytes))
