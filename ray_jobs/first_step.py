"""What passes between a command and the first step of its training: processes that are started early, and where the seconds went."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
from ray.data._internal.stats import get_or_create_stats_actor
from ray.train.v2._internal.constants import (
    DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
    RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR,
    get_env_vars_to_propagate,
)

from perceiver.training.callbacks import Callback
from perceiver.training.loop import StepResult
from ray_jobs.data_task import warm_up
from ray_jobs.ray_env import own_processes
from ray_jobs.read_ahead import DATA_CPUS
from ray_jobs.spares import TASKS, WORKERS, prestart

logger = logging.getLogger(__name__)
WAITED = 120
"""Seconds for which a process that is started early waits for its worker."""
MOST_PROCESSES = 16
"""That are started early: the others start when there is more to read."""


def start_early(tasks: int, with_tasks: bool, workers: int, spares: bool) -> list[ray.ObjectRef]:
    """Starts what the first step needs while Ray Train's controller starts: processes of data tasks with their imports, the two actors
    that Ray Data has in every cluster, and, where the cluster is this machine, the workers' processes with theirs.

    Args:
        tasks: data tasks that find a free CPU.
        with_tasks: whether the training's task has a part in reading (`warm_up`).
        workers: of the training.
        spares: whether their environment is that of processes which can stand ready (`ray_jobs.spares`).

    Returns:
        What the caller cancels when the training has ended: a full cluster may not have run it.
    """
    if spares and own_processes():
        prestart(_environment(WORKERS), workers, WAITED)
    get_or_create_stats_actor()
    get_or_create_autoscaling_coordinator()
    environment = _environment(TASKS if spares else {})
    task = ray.remote(num_cpus=DATA_CPUS, max_retries=0, runtime_env=json.loads(environment))(warm_up)
    account = json.loads(task._serialized_base_runtime_env_info)
    task._serialized_base_runtime_env_info = json.dumps(account | {"serializedRuntimeEnv": environment})
    task = task.options(scheduling_strategy="SPREAD")
    return [task.remote(with_tasks) for _ in range(min(tasks, MOST_PROCESSES))]


def _environment(variables: Mapping[str, str]) -> str:
    """The runtime environment that Ray Train's controller gives to its workers, or these to their tasks.

    Processes serve those whose environments agree to the letter: it is spelled as Ray's core does where it adds variables to those of the
    worker or actor which starts another.
    """
    handed_on = {RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE} | get_env_vars_to_propagate()
    return json.dumps({"env_vars": handed_on | dict(variables)}, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class Begun:
    """When what happened, in seconds since the epoch, by the clock of the machine where it did."""

    command: float
    workers: float
    """When the workers were asked for."""


class FirstStep(Callback):
    """Says after the first step how long it took to come to it, where it is not that of workers which replace others."""

    def __init__(self, begun: Begun, entered: float, mailbox: Any) -> None:
        self._begun, self._entered, self._built = begun, entered, entered
        self._mailbox = mailbox
        self._start: ray.ObjectRef | None = None

    def on_start(self, training: Any) -> None:
        self._built = time.time()
        if training.world.rank == 0:
            self._start = self._mailbox.start.remote()

    def after_step(self, step: int, result: StepResult) -> None:
        start, self._start = self._start, None
        if start is None or not ray.wait([start], timeout=0)[0] or not _is_first(start):
            return
        begun, now = self._begun, time.time()
        logger.info(
            f"first step after {now - begun.command:.1f} s: {begun.workers - begun.command:.1f} until Ray was there and all was checked, "
            f"{self._entered - begun.workers:.1f} until the workers ran, {self._built - self._entered:.1f} for model and checkpoint, "
            f"{now - self._built:.1f} for the first batch and the step"
        )


def _is_first(start: ray.ObjectRef) -> bool:
    try:
        return bool(ray.get(start) == 1)
    except ray.exceptions.RayError:  # the mailbox was lost, and with it the count
        return False
