"""The TorchTrainer that runs workers: the one trainable, for jobs and for Ray Tune."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig

from perceiver.config import Experiment, UserError, to_dict
from perceiver.data.manifest import Manifest, Split
from perceiver.data_settings import OtherData
from perceiver.datasets import Dataset, with_prepared_tokenizer
from perceiver.extensions import code_of
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.terminal import number_of
from perceiver.training.batches import own_steps
from perceiver.training.remote_copy import RemoteCopy
from ray_jobs.cli import JobFailed
from ray_jobs.first_step import start_early
from ray_jobs.messages import Messages
from ray_jobs.on_workers import evaluate_worker, train_worker
from ray_jobs.preflight import Resources
from ray_jobs.ray_env import held
from ray_jobs.read_ahead import DataShare, tasks_of_an_epoch
from ray_jobs.rendezvous import Network
from ray_jobs.restarts import SayRestarts, reason_of
from ray_jobs.scale import poll_seconds
from ray_jobs.spares import WORKERS, wanted
from ray_jobs.trainer import Trainer


class TrainingFailed(JobFailed):
    """A training that ended without a result: workers died more often than allowed."""


class ClusterLost(TrainingFailed):
    """The cluster that it ran on is gone."""


def train(
    experiment: Experiment,
    data_folder: str,
    trained: Run,
    resources: Resources,
    on_report: Callable[[dict[str, float]], None] | None = None,
    stop_at: int | None = None,
    begun: float | None = None,
) -> bool:
    """Trains an experiment on Ray Train workers until it is finished, or to step `stop_at`.

    `on_report` is called in this process, in a thread, with the metrics of each validation.
    `begun`: when the command began, in seconds since the epoch.
    Workers that die are replaced, and training continues from the last checkpoint, `run.max_failures` times.
    At a first SIGINT or SIGTERM the workers save a checkpoint and end; a second one ends them at once.

    Returns:
        Whether it was interrupted so.

    Raises:
        UserError: the training cannot succeed (the loss is not a number).
        TrainingFailed: workers failed too often.
        KeyboardInterrupt: it was ended at once.
    """
    remote = RemoteCopy.of(experiment.run, trained.folder)
    trained.forget_failure()
    if remote is not None:
        remote.forget_failure()
    failed, interrupted = None, False
    manifest = Manifest.load(data_folder)
    experiment = with_prepared_tokenizer(experiment, data_folder, manifest)
    settings = {"stop_at": stop_at, "begun": begun or time.time(), "spares": wanted(experiment)}
    try:
        split = manifest.splits["train"]
        interrupted = _fit(train_worker, experiment, data_folder, split, trained, resources, settings, on_report, run_until_interrupted)
    except TrainingFailed as error:
        failed = error
    if remote is not None:
        remote.fetch(0)
    failure = trained.failure()
    if failure is not None:
        raise (UserError if failure["users"] else TrainingFailed)(failure["reason"]) from failed
    if failed is not None:
        raise failed
    return interrupted


def evaluate_checkpoint(
    experiment: Experiment,
    dataset: Dataset[OtherData],
    trained: Run,
    resources: Resources,
    checkpoint: Path,
    origin: str | None = None,
    averaged: bool = False,
) -> dict[str, Any]:
    """Evaluates a checkpoint of an experiment on the validation split of prepared data.

    Returns its "metrics", the "sums" that they are made from, and what each of the "examples" adds to these, by the names of data sets
    ("" of the only one).

    `origin`: URI of the run in an object store, from which workers on other machines get the checkpoint. `averaged`: evaluate its averaged
    weights.
    """
    results: list[dict[str, Any]] = []
    read = with_prepared_tokenizer(dataset.experiment, dataset.folder, dataset.manifest)
    settings = {"data": to_dict(read.data), "checkpoint": str(checkpoint), "origin": origin, "averaged": averaged}
    try:
        split = dataset.manifest.splits["val"]
        _fit(evaluate_worker, experiment, dataset.folder, split, trained, resources, settings, results.append)
    except TrainingFailed:
        if faults := [result["fault"] for result in results if "fault" in result]:
            raise UserError(faults[0]) from None
        raise
    return results[-1]


def _fit(
    function: Callable[[dict[str, Any]], None],
    experiment: Experiment,
    data_folder: str,
    split: Split,
    trained: Run,
    resources: Resources,
    settings: dict[str, Any],
    on_report: Callable[[dict[str, float]], None] | None = None,
    run: Callable[[Callable[[], Any], Messages], None] = lambda fit, messages: fit(),
) -> bool:
    """Runs a function on workers, which read a split; whether it was interrupted.

    `run` calls the given function, which waits for their end.
    """
    if resources.min_workers:
        # After the loss of a node Ray first counts on what it had: it must not wait a minute for that.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    if (seconds := poll_seconds(resources.workers)) > 2:  # Ray's own interval, at which 512 workers would be asked 256 times a second
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", f"{seconds:g}")
    # What Ray keeps of a run is rebuilt by every start: our own checkpoints say where to continue.
    shutil.rmtree(trained.ray_folder, ignore_errors=True)
    stall = 60 * experiment.run.stall_minutes
    share = DataShare(others=held("CPU"), cpus_per_worker=resources.cpus_per_worker)
    # An elastic run starts with as many workers as find room: nothing may be in their way.
    slots = share.slots(resources.workers, ray.cluster_resources().get("CPU", 0.0))
    tasks = min(slots, tasks_of_an_epoch(split.rows * split.bytes_per_row, resources.workers))
    reading = bool(own_steps(build_task(experiment)))
    early = [] if resources.min_workers else start_early(tasks, reading, resources.workers, settings.get("spares", False))
    with Messages(lambda: _why_no_workers(resources), on_report, stall=stall) as messages:
        trainer = Trainer(
            function,
            train_loop_config={
                "experiment": to_dict(experiment),
                "code": dict(code_of(experiment).files),
                "data_folder": data_folder,
                "run_folder": str(trained.folder),
                "threads": resources.threads_per_worker,
                "data_share": asdict(share),
                "asked_for": time.time(),
                "messages": messages.actor,
                **settings,
            },
            scaling_config=ScalingConfig(
                num_workers=(resources.min_workers, resources.workers) if resources.min_workers else resources.workers,
                elastic_resize_monitor_interval_s=experiment.parallel.resize_seconds,
                use_gpu=resources.gpu,
                resources_per_worker={"CPU": resources.cpus_per_worker, **({"GPU": 1} if resources.gpu else {})},
            ),
            torch_config=Network(backend="cpu:gloo,cuda:nccl" if resources.gpu else "gloo"),
            run_config=RunConfig(
                name=trained.name,  # Ray's own metrics and logs are tagged with it
                storage_path=str(trained.ray_folder),
                failure_config=FailureConfig(max_failures=experiment.run.max_failures),
                callbacks=[SayRestarts(messages.actor, experiment.run.max_failures)],
                worker_runtime_env={"env_vars": WORKERS} if settings.get("spares") else None,
            ),
        )
        try:
            run(trainer.fit, messages)
        except ClusterLost:
            raise
        except SystemExit:
            # Ray Train's own handler of Ctrl-C ends its workers and then the process.
            raise KeyboardInterrupt from None
        except ray.train.TrainingFailedError as error:
            raise TrainingFailed(_describe(error)) from error
        except ray.exceptions.RayError as error:
            raise TrainingFailed(_describe_controller(error)) from error
        finally:
            if messages.lost is None:
                for ref in early:
                    ray.cancel(ref)
    return messages.interrupted


def run_until_interrupted(fit: Callable[[], Any], messages: Messages) -> None:
    """Waits for a training; at a first SIGINT or SIGTERM its workers are asked to save and end, at a second it is left as it is.

    In the main thread Ray Train would answer a Ctrl-C itself, and end the workers at once; in another one signals are not ours.
    """
    if threading.current_thread() is not threading.main_thread():
        fit()
        return
    errors: list[BaseException] = []

    def fit_here() -> None:
        try:
            fit()
        except BaseException as error:  # raised again by whoever waits
            errors.append(error)

    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, messages.interrupt) for number in numbers}
    thread = threading.Thread(target=fit_here, name="training", daemon=True)
    try:
        thread.start()
        while thread.is_alive():
            thread.join(0.5)  # with a limit, so that signals are heard
            if messages.lost is not None:
                raise ClusterLost(f"{messages.lost}; the same command continues from the last checkpoint")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
    if errors:
        raise errors[0]


def _why_no_workers(resources: Resources) -> str:
    free = ray.available_resources()
    wanted = number_of(resources.cpus_per_worker, "CPU") + (" and a GPU" if resources.gpu else "")
    least = resources.min_workers or resources.workers
    return (
        f"still waiting for {number_of(least, 'worker')} with {wanted}{' each' if least > 1 else ''}; free in the cluster: "
        f"{number_of(free.get('CPU', 0.0), 'CPU')}, {number_of(free.get('GPU', 0.0), 'GPU')} (`ray status` shows who holds the others)"
    )


def _describe_controller(error: ray.exceptions.RayError) -> str:
    """Ray Train's controller is an actor; where it is lost, nobody replaces workers any more."""
    if isinstance(error, ray.exceptions.RayActorError):
        return (
            "Ray Train's controller, a process that starts and replaces workers, ended; the same command continues from the last checkpoint"
        )
    first = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"Ray failed ({first}); the same command continues from the last checkpoint"


def _describe(error: ray.train.TrainingFailedError) -> str:
    """Why it failed for good: what became of the workers, or of the controller while it started them."""
    if isinstance(error, ray.train.ControllerError):
        return f"{reason_of(error.controller_failure)}; the same command continues from the last checkpoint"
    failures = getattr(error, "worker_failures", {}) or {}
    return "; ".join(sorted({reason_of(failure) for failure in failures.values()})) or reason_of(error)
