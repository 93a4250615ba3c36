"""What Ray Train's workers are given to run: functions that load what they need there.

Ray Train's controller loads the function's module before it starts workers, and needs nothing of it.
"""

from typing import Any


def train_worker(config: dict[str, Any]) -> None:
    """See `ray_jobs.worker.train_worker`."""
    from ray_jobs import worker

    worker.train_worker(config)


def evaluate_worker(config: dict[str, Any]) -> None:
    """See `ray_jobs.worker.evaluate_worker`."""
    from ray_jobs import worker

    worker.evaluate_worker(config)
