"""Processes that stand ready with what a worker loads, so that a run which lost a worker trains again sooner.

Ray starts a process for each worker that it makes anew, which then loads PyTorch: on a busy machine the most of a restart. Each worker
therefore asks its machine, once it has trained for a while, for one more process of its own kind. Ray gives such a process to the next
worker that is made there, and ends it with the job.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray._private.utils import get_runtime_env_info, get_system_memory, get_used_memory
from ray.core.generated.common_pb2 import Language
from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest
from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub
from ray.runtime_env import RuntimeEnv

from perceiver.config import Experiment
from perceiver.training.callbacks import Callback
from perceiver.training.loop import StepResult

logger = logging.getLogger(__name__)

WORKERS = {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: "ray_jobs.on_workers.load"}
"""Environment of workers: their processes load what a worker needs before they have anything to do."""
TASKS = {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: "ray_jobs.on_workers.load_nothing"}
"""The same of the tasks that workers start. As it is another environment, these do not use up the processes that stand ready."""
AFTER = 30.0
"""Seconds from a worker's first step to its question: a short training never asks, and the start of a long one is not slowed."""
KEPT = 30 * 24 * 3600
"""Seconds for which a process stands ready at most. It ends with the job before."""
MEMORY = 1 << 30
"""Bytes that a process may need until it is used. Loaded, it holds some 0.4 GiB."""
FREE = 2 << 30
"""Bytes of a machine's memory that must stay free besides."""
PATIENCE = 30.0
"""Seconds within which a machine must answer."""


def wanted(experiment: Experiment) -> bool:
    """Whether a run's workers are to ask for processes that stand ready: not where it never restarts, nor in a trial of a sweep, which has
    many beside it, nor where the job's processes have a setup hook of the user's, whose place ours would take.
    """
    if not experiment.parallel.spare_workers or experiment.run.max_failures == 0:
        return False
    in_trial = ray.get_runtime_context().get_actor_id() is not None
    return not in_trial and WORKER_PROCESS_SETUP_HOOK_ENV_VAR not in os.environ and not _hook_of_job()


def _hook_of_job() -> bool:
    variables = ray.get_runtime_context().runtime_env.get("env_vars") or {}
    return WORKER_PROCESS_SETUP_HOOK_ENV_VAR in variables


def of_tasks() -> dict[str, str]:
    """Environment of the tasks that this process starts: `TASKS` where it is a worker of `WORKERS`."""
    return TASKS if os.environ.get(WORKER_PROCESS_SETUP_HOOK_ENV_VAR) == WORKERS[WORKER_PROCESS_SETUP_HOOK_ENV_VAR] else {}


class Spare(Callback):
    """Asks this worker's machine for a process that stands ready.

    Args:
        here: workers on this machine, which all ask.
    """

    def __init__(self, here: int) -> None:
        self._here = here
        self._at: float | None = None
        self._asked = False

    def after_step(self, step: int, result: StepResult) -> None:
        if self._asked:
            return
        now = time.monotonic()
        if self._at is None:
            self._at = now + AFTER
        elif now >= self._at:
            self._asked = True
            if get_system_memory() - get_used_memory() >= FREE + self._here * MEMORY:
                threading.Thread(target=_ask, name="spare", daemon=True).start()


def _ask() -> None:
    prestart(ray.get_runtime_context().get_runtime_env_string(), 1, KEPT)


def prestart(environment: str, number: int, seconds: int) -> None:
    """Asks this machine for processes that stand ready for workers or tasks of a runtime environment.

    Ray's way to do so is no public one: where a version of Ray has none, workers start as they always did.

    Args:
        environment: as Ray's core spells it.
        number: of processes.
        seconds: for which each waits at most.
    """
    try:
        with _machine() as channel:
            NodeManagerServiceStub(channel).PrestartWorkers(_request(environment, number, seconds), timeout=PATIENCE)
    except Exception as error:
        logger.debug("no process stands ready: %s", error)


def _machine() -> Any:
    """Channel to the raylet of this machine."""
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    return init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")


def _request(environment: str, number: int, seconds: int) -> PrestartWorkersRequest:
    info = get_runtime_env_info(RuntimeEnv.deserialize(environment))
    info.serialized_runtime_env = environment  # to the letter: by it Ray knows whose environment it is
    job = ray.JobID(bytes.fromhex(ray.get_runtime_context().get_job_id()))
    return PrestartWorkersRequest(
        language=Language.PYTHON, job_id=job.binary(), runtime_env_info=info, keep_alive_duration_secs=seconds, num_workers=number
    )
