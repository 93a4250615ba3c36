"""Tells of workers that were lost: Ray Train's controller, in which this runs, replaces them without a word to the user."""

from __future__ import annotations

import logging
import re
from typing import Any

from ray.train import UserCallback

_REASONS = (
    # Ray adds a list of what may have ended a process, memory among it.
    (r"worker unexpectedly exits", "its process ended, or was ended"),
    (r"out of memory|low on memory|memory monitor|memory usage threshold", "the machine had no memory left"),
    (r"placement group was removed", "Ray took its place in the cluster away"),
    (r"node (was|has been) (terminated|lost)|node died|node is dead|nodediederror", "its machine was lost"),
    (r"worker process has died|actor died unexpectedly", "its process ended, or was ended"),
    (r"gloo/transport|ncclremoteerror", "its connection to another worker broke"),
)
"""What Ray says of a lost worker, and what it means. The first that fits counts."""


class SayRestarts(UserCallback):
    """Sends a line to the driver for each loss that the run restarts after.

    Args:
        mailbox: where the driver takes lines from (`ray_jobs.mailbox.Mailbox`).
        max_failures: after as many losses the run restarts; after another one it ends. Negative: it always restarts.
    """

    def __init__(self, mailbox: Any, max_failures: int) -> None:
        self._mailbox, self._max, self._count = mailbox, max_failures, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._count += 1
        if 0 <= self._max < self._count:
            return  # the command ends with the reason
        lost = "; ".join(f"worker {rank}: {reason_of(error)}" for rank, error in sorted(worker_exceptions.items()))
        of = f" of {self._max} that are allowed" if self._max >= 0 else ""
        self._mailbox.put.remote((logging.WARNING, f"{lost}; the run restarts from its last checkpoint (failure {self._count}{of})"))


def reason_of(error: Exception) -> str:
    """Why a worker was lost, in a few words."""
    text = str(error).strip()
    for pattern, reason in _REASONS:
        if re.search(pattern, text, re.IGNORECASE):
            return reason
    return text.splitlines()[-1] if text else type(error).__name__
