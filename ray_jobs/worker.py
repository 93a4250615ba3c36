"""What each Ray Train worker runs, and the TorchTrainer that runs it: the one trainable, for jobs and for Ray Tune."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from perceiver.config import Experiment, UserError, from_dict, to_dict
from perceiver.data.manifest import Manifest
from perceiver.datasets import preprocess_command, with_prepared_tokenizer
from perceiver.extensions import Code, code_of
from perceiver.tasks import build_task
from perceiver.training.batches import make_val_feeds
from perceiver.training.callbacks import Callback
from perceiver.training.checkpoint import load_model, write_json
from perceiver.training.hooks import CallbackError
from perceiver.training.loop import StepResult
from perceiver.training.mirror import CHECKPOINTS, Mirror, fetch_run
from perceiver.training.parallel import World, join_world
from perceiver.training.run import NotFinite, Training, build_state, evaluate
from ray_jobs.cli import JobFailed
from ray_jobs.gauges import Gauges
from ray_jobs.ingest import DATA_CPUS, DataFault, read_with_ray
from ray_jobs.logs import send_progress
from ray_jobs.network import Network
from ray_jobs.preflight import Resources

logger = logging.getLogger(__name__)

FAILURE = "failure.json"
"""In a run's folder: why its last start failed for good; workers that are started again find it and end at once."""
PROGRAM_FAULTS = (TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError, ImportError, NotImplementedError)
"""Faults of the program or its files; what a lost worker or a broken connection raises is none of them."""
DATA_PATIENCE = 600.0
"""Seconds without data after which a worker gives up (the run then restarts from its last checkpoint)."""
Item = str | tuple[int, str] | dict[str, Any]
"""What workers send to the driver: a sign of life, a line with its level, or metrics."""
SIGN_OF_LIFE = ""
"""What a worker says when it begins: nobody waits for it any more."""
START_PATIENCE = 60.0
"""Seconds without a sign of the workers after which the driver says what they may be waiting for."""


class TrainingFailed(JobFailed):
    """A training that ended without a result: workers died more often than allowed."""


def train(
    experiment: Experiment,
    data_folder: str,
    run_folder: Path,
    resources: Resources,
    on_report: Callable[[dict[str, float]], None] | None = None,
    stop_at: int | None = None,
) -> bool:
    """Trains an experiment on Ray Train workers until it is finished, or to step `stop_at`.

    `on_report` is called in this process, in a thread, with the metrics of each validation.
    Workers that die are replaced, and training continues from the last checkpoint, `run.max_failures` times.
    At a first SIGINT or SIGTERM the workers save a checkpoint and end; a second one ends them at once.

    Returns:
        Whether it was interrupted so.

    Raises:
        UserError: the training cannot succeed (the loss is not a number).
        TrainingFailed: workers failed too often.
        KeyboardInterrupt: it was ended at once.
    """
    mirror = Mirror.of(experiment.run, run_folder)
    (run_folder / FAILURE).unlink(missing_ok=True)
    if mirror is not None:
        mirror.forget_failure()
    failed, interrupted = None, False
    try:
        interrupted = _fit(
            _train_worker, experiment, data_folder, run_folder, resources, {"stop_at": stop_at}, on_report, run_until_interrupted
        )
    except TrainingFailed as error:
        failed = error
    if mirror is not None:
        mirror.fetch(0)
    if (run_folder / FAILURE).exists():
        failure = json.loads((run_folder / FAILURE).read_text())
        raise (UserError if failure["users"] else TrainingFailed)(failure["reason"]) from failed
    if failed is not None:
        raise failed
    return interrupted


def evaluate_checkpoint(
    experiment: Experiment,
    data_folder: str,
    run_folder: Path,
    resources: Resources,
    checkpoint: Path,
    origin: str | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint on the validation split of prepared data: its metrics, and the sums that they are made from.

    `origin`: URI of the run in an object store, from which workers on other machines get the checkpoint.
    """
    results: list[dict[str, Any]] = []
    settings = {"checkpoint": str(checkpoint), "origin": origin}
    try:
        _fit(_evaluate_worker, experiment, data_folder, run_folder, resources, settings, results.append)
    except TrainingFailed:
        if faults := [result["fault"] for result in results if "fault" in result]:
            raise UserError(faults[0]) from None
        raise
    return results[-1]


def _fit(
    function: Callable[[dict[str, Any]], None],
    experiment: Experiment,
    data_folder: str,
    run_folder: Path,
    resources: Resources,
    settings: dict[str, Any],
    on_report: Callable[[dict[str, float]], None] | None = None,
    run: Callable[[Callable[[], Any], Messages], None] = lambda fit, messages: fit(),
) -> bool:
    """Runs a function on workers; whether it was interrupted. `run` calls the given function, which waits for their end."""
    if resources.min_workers:
        # After the loss of a node Ray first counts on what it had: it must not wait a minute for that.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    # What Ray keeps of a run is rebuilt by every start: our own checkpoints say where to continue.
    ray_folder = run_folder / "ray"
    experiment = with_prepared_tokenizer(experiment, data_folder, Manifest.load(data_folder))
    shutil.rmtree(ray_folder, ignore_errors=True)
    with Messages(lambda: _why_no_workers(resources), on_report) as messages:
        trainer = TorchTrainer(
            function,
            train_loop_config={
                "experiment": to_dict(experiment),
                "code": dict(code_of(experiment).files),
                "data_folder": data_folder,
                "run_folder": str(run_folder),
                "threads": resources.threads_per_worker,
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
                name=run_folder.name,  # Ray's own metrics and logs are tagged with it
                storage_path=str(ray_folder),
                failure_config=FailureConfig(max_failures=experiment.run.max_failures),
            ),
        )
        try:
            run(trainer.fit, messages)
        except SystemExit:
            # Ray Train's own handler of Ctrl-C ends its workers and then the process.
            raise KeyboardInterrupt from None
        except ray.train.TrainingFailedError as error:
            raise TrainingFailed(_describe(error)) from error
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
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
    if errors:
        raise errors[0]


def _why_no_workers(resources: Resources) -> str:
    free = ray.available_resources()
    wanted = f"{resources.cpus_per_worker:g} CPUs" + (" and a GPU" if resources.gpu else "")
    return (
        f"still waiting for {resources.min_workers or resources.workers} workers with {wanted} each; free in the cluster: "
        f"{free.get('CPU', 0.0):g} CPUs, {free.get('GPU', 0.0):g} GPUs (`ray status` tells who holds the others)"
    )


def _train_worker(config: dict[str, Any]) -> None:
    Code(config["code"]).install()
    run_folder = Path(config["run_folder"])
    mirror = Mirror.of(from_dict(config["experiment"]).run, run_folder)
    if mirror is not None:
        mirror.fetch(0)
    if (run_folder / FAILURE).exists():
        return
    experiment, world = _enter(config)
    data_folder, mailbox = config["data_folder"], config["messages"]
    try:
        training = Training(
            experiment,
            build_task(experiment),
            data_folder,
            Manifest.load(data_folder),
            world,
            run_folder,
            read_with_ray,
            [Reports(mailbox), Gauges(run_folder.name), DataPatience(), Notice(), Interruption(mailbox)],
            config["stop_at"],
        )
        training.run()
    except DataFault as error:
        # One worker alone may meet it, while the others wait for its part of a step: they are ended by its error, and the reason
        # that is noted ends the run when they start again.
        _note_failure(run_folder, mirror, True, _with_repair(error, experiment))
        raise
    except CallbackError as error:  # as above
        _note_failure(run_folder, mirror, True, str(error))
        raise
    except (NotFinite, UserError) as error:
        # Raised by all workers alike, and again at every restart: end the run instead of restarting it.
        if world.rank == 0:
            _note_failure(run_folder, mirror, True, str(error))
    except PROGRAM_FAULTS as error:
        if not dist.is_initialized():
            raise  # Ray has taken the group of workers down under this one, to start it again in another size
        # A restart would only raise it again; but maybe one worker alone raised it, and the others wait for that one.
        lines = traceback.format_exception(error)
        _note_failure(run_folder, mirror, False, f"worker {world.rank}:\n{''.join(lines)}")
        raise


def _with_repair(error: DataFault, experiment: Experiment) -> str:
    """A fault in the data, with what mends it."""
    if experiment.data.prepare == "stream":
        return f"{error}: mend it and start again"
    return f"{error}: remove it and run `{preprocess_command(experiment)}`"


def _note_failure(run_folder: Path, mirror: Mirror | None, users: bool, reason: str) -> None:
    write_json(run_folder / FAILURE, {"users": users, "reason": reason})
    if mirror is not None:
        mirror.send(FAILURE)


def _evaluate_worker(config: dict[str, Any]) -> None:
    Code(config["code"]).install()
    experiment, world = _enter(config)
    task = build_task(experiment)
    manifest = Manifest.load(config["data_folder"])
    feeds = make_val_feeds(experiment, task, config["data_folder"], manifest)
    model = build_state(experiment, task, world).model
    checkpoint = Path(config["checkpoint"])
    if config["origin"] is not None:  # this machine may not have it yet
        fetched = fetch_run(config["origin"])
        if fetched is None:
            raise FileNotFoundError(f"{config['origin']} is a run no longer")
        checkpoint = fetched / CHECKPOINTS / checkpoint.name
    load_model(checkpoint, model)
    try:
        metrics, sums, _ = evaluate(task, model, feeds, world, read_with_ray)
    except DataFault as error:
        ray.get(config["messages"].put.remote({"fault": _with_repair(error, experiment)}))
        raise
    if world.rank == 0:
        counts = {name: value.tolist() for name, value in sums.items()}
        ray.get(config["messages"].put.remote({"metrics": metrics, "sums": counts}))


def _enter(config: dict[str, Any]) -> tuple[Experiment, World]:
    """The worker's experiment and its world. What it logs goes to the driver from now on."""
    torch.set_num_threads(config["threads"])
    device = get_device()
    actor = config["messages"]
    actor.put.remote(SIGN_OF_LIFE)
    send_progress(lambda line: actor.put.remote(line))
    experiment = from_dict(config["experiment"])
    return experiment, join_world(device, experiment.parallel.replicas)


class Reports(Callback):
    """Reports every validation, with the last training metrics, to Ray Train and to the driver."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._logged: dict[str, float] = {}

    def after_log(self, step: int, metrics: dict[str, float]) -> None:
        self._logged = metrics

    def after_validation(self, step: int, metrics: dict[str, float]) -> None:
        report = {"step": step, **self._logged, **metrics}
        ray.train.report(report)
        if self.training.world.rank == 0:
            self._mailbox.put.remote(report)


class Interruption(Callback):
    """Pauses the training when the driver is interrupted. The answer to one question is not waited for, but looked for after later
    steps."""

    EVERY = 1.0
    """Seconds from an answer to the next question."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._answer: ray.ObjectRef | None = None
        self._next = 0.0

    def after_step(self, step: int, result: StepResult) -> None:
        if self.training.world.rank > 0:
            return
        if self._answer is None:
            if time.monotonic() >= self._next:
                self._answer = self._mailbox.is_interrupted.remote()
            return
        if not ray.wait([self._answer], timeout=0)[0]:
            return
        try:
            if ray.get(self._answer):
                self.training.pause()
        except ray.exceptions.RayError:
            pass  # the driver is not there to be interrupted, or its mailbox is lost: training continues
        self._answer, self._next = None, time.monotonic() + self.EVERY


class Notice(Callback):
    """Asks for a checkpoint when a machine of this run is about to be taken away (a spot machine's notice, or anything else that
    drains a node of Ray): once for every machine. Ray answers when all workers ask."""

    EVERY = 5.0
    """Seconds between two questions."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._next = time.monotonic() + self.EVERY

    def after_step(self, step: int, result: StepResult) -> None:
        if self.training.world.rank == 0 and time.monotonic() >= self._next:
            self._next = time.monotonic() + self.EVERY
            self.training.meet()

    def on_meeting(self, step: int) -> None:
        info = ray.train.get_preemption_info()
        new = set(info.preempted_node_ids) - self._known if info else set()
        if new:
            self._known |= new
            self.training.save()
            if self.training.world.rank == 0:
                logger.info("notice that %d of the run's machines will go: checkpoint", len(new))


class DataPatience(Callback):
    """Says why data does not come, and gives up after DATA_PATIENCE."""

    def while_waiting(self, seconds: float) -> None:
        """Raises RuntimeError after too long."""
        free, total = ray.available_resources().get("CPU", 0.0), ray.cluster_resources().get("CPU", 0.0)
        rank = self.training.world.rank
        text = f"worker {rank} has waited {seconds:.0f} s for data: {free:g} of the cluster's {total:g} CPUs are free"
        if free < DATA_CPUS:
            text += f", and a data task needs {DATA_CPUS:g}: lower --parallel.cpus-per-worker or --workers, or wait for other jobs"
        if seconds > DATA_PATIENCE:
            raise RuntimeError(text)
        logger.warning("%s", text)


def _describe(error: Exception) -> str:
    """The workers' own errors, the first line of each."""
    failures = getattr(error, "worker_failures", {}) or {}
    lines = {str(f).strip().splitlines()[-1] if str(f).strip() else repr(f) for f in failures.values()}
    return "; ".join(sorted(lines)) or str(error)


@ray.remote(num_cpus=0)
class _Mailbox:
    def __init__(self) -> None:
        self._items: list[Item] = []
        self._interrupted = False

    def put(self, item: Item) -> None:
        self._items.append(item)

    def take(self) -> list[Item]:
        items, self._items = self._items, []
        return items

    def interrupt(self) -> None:
        self._interrupted = True

    def is_interrupted(self) -> bool:
        return self._interrupted


class Messages:
    """Lines and reported metrics from workers to the driver, without the noise of Ray's log forwarding, and its interruption to them."""

    def __init__(
        self,
        why_silent: Callable[[], str],
        on_report: Callable[[dict[str, float]], None] | None = None,
        every: float = 0.5,
    ) -> None:
        # On this node: losing another machine must not lose the run's messages.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.actor = _Mailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]  # from Ray's decorator
        self.interrupted = False
        """Whether the workers have been asked to save and end."""
        self._alive = False
        self._why_silent = why_silent
        self._on_report = on_report
        self._every = every
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._pump, daemon=True)

    def __enter__(self) -> Messages:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join(timeout=60)
        ray.kill(self.actor)

    def interrupt(self, number: int, frame: object) -> None:
        """Handles a signal: a first one asks the workers, where there are any; else, and a second one, ends all at once."""
        if self.interrupted or not self._alive:
            raise KeyboardInterrupt
        self.interrupted = True
        logger.info("stopping: the step is finished and a checkpoint saved (Ctrl-C again stops at once)")

    def _pump(self) -> None:
        silent_since, passed_on = time.monotonic(), False
        while True:
            ended = self._ended.is_set()
            for item in ray.get(self.actor.take.remote()):
                self._alive = True
                if isinstance(item, tuple):
                    logger.log(*item)
                elif item != SIGN_OF_LIFE and self._on_report is not None:
                    self._on_report(item)
            if ended:
                return
            if self.interrupted and not passed_on:
                self.actor.interrupt.remote()
                passed_on = True
            if not self._alive and time.monotonic() - silent_since > START_PATIENCE:
                logger.warning("%s", self._why_silent())
                silent_since = time.monotonic()
            self._ended.wait(self._every)
