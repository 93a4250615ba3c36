"""What is started early, and what is said of the time to the first step."""

from types import SimpleNamespace

import pytest
import ray
from ray.train.v2._internal.constants import (
    DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
    RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR,
    get_env_vars_to_propagate,
)

from perceiver.config import ParallelConfig
from ray_jobs import first_step
from ray_jobs.first_step import Begun, FirstStep, _environment
from ray_jobs.ray_env import connect
from ray_jobs.spares import TASKS, WORKERS
from tests.support.logged import logged


class Mailbox:
    """Counts starts, as the driver's does."""

    def __init__(self, before):
        self.count = before
        self.start = SimpleNamespace(remote=self._start)

    def _start(self):
        self.count += 1
        return self.count


@pytest.mark.parametrize(("rank", "before", "lines"), [(0, 0, 1), (1, 0, 0), (0, 1, 0)])
def test_the_first_worker_says_once_where_the_time_went_and_those_that_replace_others_do_not(rank, before, lines, monkeypatch):
    clock = iter([112.0, 115.5])
    monkeypatch.setattr(first_step.time, "time", lambda: next(clock, 1000.0))
    monkeypatch.setattr(first_step.ray, "wait", lambda refs, timeout: (refs, []))
    monkeypatch.setattr(first_step.ray, "get", lambda ref: ref)
    callback = FirstStep(Begun(command=100.0, workers=103.0), 110.0, Mailbox(before))
    callback.on_start(SimpleNamespace(world=SimpleNamespace(rank=rank)))
    with logged() as said:
        callback.after_step(1, None)
        callback.after_step(2, None)
    assert len(said) == lines
    if lines:
        assert said[0].startswith("first step after 15.5 s: 3.0 until Ray was there and all was checked, 7.0 until the workers ran, 2.0 ")


@ray.remote(num_cpus=0)
class Worker:
    """As Ray Train starts one."""

    def environments(self) -> tuple[str, str]:
        """Its own, and that of a task which it starts."""
        task = ray.remote(num_cpus=0)(lambda: ray.get_runtime_context().get_runtime_env_string())
        return ray.get_runtime_context().get_runtime_env_string(), ray.get(task.options(runtime_env={"env_vars": TASKS}).remote())


@ray.remote(num_cpus=0)
class Controller:
    """As Ray Train starts one, and starts workers."""

    def environments(self) -> tuple[str, str]:
        worker = Worker.options(runtime_env={"env_vars": get_env_vars_to_propagate() | WORKERS}).remote()
        return ray.get(worker.environments.remote())


@pytest.mark.slow
def test_what_is_started_early_has_the_environment_of_workers_and_of_their_tasks_to_the_letter():
    """Ray uses no process that was started for another one: all of it would be started again."""
    with connect(ParallelConfig()):
        variables = {RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE}
        controller = Controller.options(runtime_env={"env_vars": variables | get_env_vars_to_propagate()}).remote()
        assert ray.get(controller.environments.remote()) == (_environment(WORKERS), _environment(TASKS))
