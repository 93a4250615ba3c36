"""What Ray Train's workers are given to run: functions that load what they need there.

Ray Train's controller loads the function's module before it starts workers, and needs nothing of it.
"""

from contextlib import suppress
from typing import Any


def train_worker(config: dict[str, Any]) -> None:
    """See `ray_jobs.worker.train_worker`."""
    from ray_jobs import worker

    worker.train_worker(config)


def evaluate_worker(config: dict[str, Any]) -> None:
    """See `ray_jobs.worker.evaluate_worker`."""
    from ray_jobs import worker

    worker.evaluate_worker(config)


def load() -> None:
    """Loads what a worker needs into a process that stands ready (`ray_jobs.spares`). A fault is left for the worker to meet, where it is
    reported.
    """
    with suppress(Exception):
        import torch._dynamo  # noqa: F401  # which every optimizer loads

        import ray_jobs.worker  # noqa: F401


def load_nothing() -> None:
    """The same for processes of tasks, which load what they need when they have something to do."""
