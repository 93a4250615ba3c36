"""Processes that stand ready for workers: when they are asked for, that they replace lost ones, and that none outlives its run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

from perceiver.config import ParallelConfig, RunConfig
from ray_jobs import spares
from tests.faults.cluster import Cluster
from tests.support.jobs import QUICK, Job
from tests.support.small import image_experiment


class Context:
    """Of a driver, or of an actor."""

    def __init__(self, actor: str | None = None, variables: dict[str, str] | None = None) -> None:
        self.get_actor_id = lambda: actor
        self.runtime_env = {"env_vars": variables} if variables else {}


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    monkeypatch.delenv(WORKER_PROCESS_SETUP_HOOK_ENV_VAR, raising=False)
    monkeypatch.setattr(ray, "get_runtime_context", Context)


def test_a_training_by_command_has_them_unless_it_never_restarts_or_says_no():
    plain = image_experiment()
    assert spares.wanted(plain)
    assert not spares.wanted(replace(plain, run=RunConfig(max_failures=0)))
    assert not spares.wanted(replace(plain, parallel=ParallelConfig(spare_workers=False)))


def test_a_trial_has_none(monkeypatch):
    monkeypatch.setattr(ray, "get_runtime_context", lambda: Context(actor="ab12"))
    assert not spares.wanted(image_experiment())


def test_a_setup_hook_of_the_users_keeps_its_place(monkeypatch):
    monkeypatch.setattr(ray, "get_runtime_context", lambda: Context(variables={WORKER_PROCESS_SETUP_HOOK_ENV_VAR: "mine.hook"}))
    assert not spares.wanted(image_experiment())
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    monkeypatch.setenv(WORKER_PROCESS_SETUP_HOOK_ENV_VAR, "mine.hook")
    assert not spares.wanted(image_experiment()) and spares.of_tasks() == {}


def test_tasks_of_such_workers_are_of_another_environment(monkeypatch):
    for name, value in spares.WORKERS.items():
        monkeypatch.setenv(name, value)
    assert spares.of_tasks().keys() == spares.WORKERS.keys() and spares.of_tasks() != spares.WORKERS


@pytest.mark.parametrize(("free", "times"), [(4 << 30, 1), ((4 << 30) - 1, 0)])
def test_a_worker_asks_once_where_there_is_memory_for_all_of_its_machine(free, times, monkeypatch):
    asked = []
    monkeypatch.setattr(spares, "_ask", lambda: asked.append(1))
    monkeypatch.setattr(spares, "get_system_memory", lambda: free + (9 << 30))
    monkeypatch.setattr(spares, "get_used_memory", lambda: 9 << 30)
    now = [0.0]
    monkeypatch.setattr(spares.time, "monotonic", lambda: now[0])
    spare = spares.Spare(here=2)
    for seconds in range(100):
        now[0] = float(seconds)
        spare.after_step(seconds, None)
        for thread in spares.threading.enumerate():
            if thread.name == "spare":
                thread.join()
        assert len(asked) == (times if seconds >= spares.AFTER else 0)


def test_a_machine_that_cannot_be_asked_disturbs_no_training(monkeypatch):
    def broken():
        raise RuntimeError("no such thing")

    monkeypatch.setattr(spares, "_machine", broken)
    spares.prestart('{"env_vars":{}}', 1, spares.KEPT)


LOADS = """
import torch
asked = []
places = (torch._C, "_cuda_getDeviceCount"), (torch.cuda, "is_available"), (torch.cuda, "device_count"), (torch.cuda, "_lazy_init")
for module, name in places:
    setattr(module, name, lambda *args, name=name: asked.append(name))
from ray_jobs.on_workers import load
load()
import sys
print("ray_jobs.worker" in sys.modules, asked)
"""


def test_a_process_that_stands_ready_has_looked_for_no_gpu():
    """Ray says which are its own when it becomes a worker; CUDA would go on with those that it has counted before."""
    done = subprocess.run([sys.executable, "-c", LOADS], capture_output=True, text=True, check=True)
    assert done.stdout == "True []\n"


def ready(cluster: Cluster) -> set[int]:
    """Processes of a cluster that stand ready: idle, of workers' environment, with PyTorch loaded."""
    found = set()
    for pid in cluster.job.pids("ray::IDLE"):
        try:
            process = Path("/proc") / str(pid)
            if "=ray_jobs.on_workers.load\0" in (process / "environ").read_text() and "libtorch" in (process / "maps").read_text():
                found.add(pid)
        except OSError:
            continue  # it ended meanwhile
    return found


@pytest.mark.slow
def test_lost_workers_are_replaced_by_processes_that_stood_ready_and_none_is_left_after_the_run(tmp_path):
    cluster = Cluster(tmp_path / "cluster")
    try:
        words = [*QUICK, "--training.max-steps", "100000", "--run.max-failures", "1", "--name", "ready"]
        job = Job("ray_jobs.train", "quickstart", *words, home=tmp_path, RAY_ADDRESS=cluster.address)
        run = tmp_path / "runs" / "ready"
        job.wait_for_step(run, 20)
        end = time.monotonic() + spares.AFTER + 120
        while len(standing := ready(cluster)) < 2:
            assert job.process.poll() is None and time.monotonic() < end, job.output
            time.sleep(0.5)
        os.kill(cluster.job.pids("ray::RayTrainWorker")[0], signal.SIGKILL)
        while "continuing from step" not in job.output:
            assert job.process.poll() is None and time.monotonic() < end + 60, job.output
            time.sleep(0.5)
        assert set(cluster.job.pids("ray::RayTrainWorker")) == standing
        job.process.send_signal(signal.SIGINT)
        assert job.wait(60) == 130
        end = time.monotonic() + 60
        while cluster.job.pids("ray::IDLE") and time.monotonic() < end:
            time.sleep(0.5)
        assert cluster.job.pids("ray::IDLE") == []
    finally:
        cluster.close()
