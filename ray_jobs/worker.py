"""What each Ray Train worker runs."""

from __future__ import annotations

import logging
import os
import time
import traceback
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.train.torch import get_device

from perceiver.config import Experiment, UserError, from_dict
from perceiver.data.manifest import Manifest
from perceiver.data.storage import NoStore
from perceiver.data_settings import DataSpec, OtherData
from perceiver.datasets import preprocess_command
from perceiver.extensions import Code
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.training.batches import ReadAll, val_loaders
from perceiver.training.callbacks import Callback
from perceiver.training.hooks import CallbackError
from perceiver.training.loop import StepResult
from perceiver.training.metrics import evaluate
from perceiver.training.not_finite import NotFinite
from perceiver.training.parallel import World, choose_arithmetic, join_world
from perceiver.training.remote_copy import RemoteCopy, fetch_run
from perceiver.training.run import Training, build_state
from perceiver.training.state import load_average, load_model
from ray_jobs.collector import beats_to
from ray_jobs.first_step import Begun, FirstStep
from ray_jobs.ingest import DataFault, read_with_ray
from ray_jobs.logs import send_progress
from ray_jobs.memory_check import is_out_of_memory, out_of_memory
from ray_jobs.messages import SIGN_OF_LIFE
from ray_jobs.metrics_export import MetricsExport
from ray_jobs.ray_env import draining_nodes
from ray_jobs.read_ahead import DATA_CPUS, DataShare
from ray_jobs.spares import Spare
from ray_jobs.watch import Steps, reporting

logger = logging.getLogger(__name__)
PROGRAM_FAULTS = (TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError, ImportError, NotImplementedError)
"""Faults of the program or its files; what a lost worker or a broken connection raises is none of them."""
MOST_KEPT = 1 << 16
"""Numbers of a sum that an evaluation keeps, at most: longer ones, such as counts of scores, serve its metrics alone."""
DATA_PATIENCE = 600.0
"""Seconds without data after which a worker gives up (the run then restarts from its last checkpoint)."""


def train_worker(config: dict[str, Any]) -> None:
    entered = time.time()
    Code(config["code"]).install()
    run = Run(Path(config["run_folder"]))
    remote = RemoteCopy.of(from_dict(config["experiment"]).run, run.folder)
    if remote is not None:
        remote.fetch(0)
    if run.failure() is not None:
        return
    experiment, world = _enter(config)
    steps = Steps()
    with _reporting(config, world, steps):
        first = FirstStep(Begun(config["begun"], config["asked_for"]), entered, config["messages"])
        _train(config, experiment, world, steps, run, remote, first)


def _train(
    config: dict[str, Any], experiment: Experiment, world: World, steps: Steps, run: Run, remote: RemoteCopy | None, first: FirstStep
) -> None:
    data_folder, mailbox = config["data_folder"], config["messages"]
    try:
        training = Training(
            experiment,
            build_task(experiment),
            data_folder,
            Manifest.load(data_folder),
            world,
            run.folder,
            _reader(config, world),
            [Reports(mailbox), MetricsExport(run.name), DataPatience(), Notice(), Interruption(mailbox), steps, first, *_spare(config)],
            config["stop_at"],
        )
        training.run()
    except DataFault as error:
        # One worker alone may meet it, while the others wait for its part of a step: they are ended by its error, and the reason
        # that is noted ends the run when they start again.
        _note_failure(run, remote, True, _with_repair(error, experiment))
        raise
    except CallbackError as error:  # as above
        _note_failure(run, remote, True, str(error))
        raise
    except NoStore:
        raise  # a broken connection: the run restarts
    except (NotFinite, UserError) as error:
        # Raised by all workers alike, and again at every restart: end the run instead of restarting it.
        if world.rank == 0:
            _note_failure(run, remote, True, str(error))
    except Exception as error:
        if is_out_of_memory(error):
            # No failure of a machine: the next start would need as much.
            _note_failure(run, remote, True, f"worker {world.rank}: {out_of_memory(experiment, error)}")
            raise
        if not isinstance(error, PROGRAM_FAULTS) or not dist.is_initialized():
            raise  # without a group: Ray has taken the workers down under this one, to start them again in another number
        # A restart would only raise it again; but maybe one worker alone raised it, and the others wait for that one.
        lines = traceback.format_exception(error)
        _note_failure(run, remote, False, f"worker {world.rank}:\n{''.join(lines)}")
        raise


def _spare(config: dict[str, Any]) -> list[Callback]:
    return [Spare(ray.train.get_context().get_local_world_size())] if config.get("spares") else []


def _with_repair(error: DataFault, spec: DataSpec) -> str:
    """A fault in the data, with what mends it."""
    if spec.data.prepare == "stream":
        return f"{error}: mend it and start again"
    return f"{error}: remove it and run `{preprocess_command(spec)}`"


def _note_failure(run: Run, remote: RemoteCopy | None, users: bool, reason: str) -> None:
    run.save_failure(users, reason)
    if remote is not None:
        remote.send_failure()


def evaluate_worker(config: dict[str, Any]) -> None:
    Code(config["code"]).install()
    experiment, world = _enter(config)
    with _reporting(config, world, Steps()):
        _evaluate(config, experiment, world)


def _evaluate(config: dict[str, Any], experiment: Experiment, world: World) -> None:
    data, training = from_dict(config["data"]), experiment.training
    task = experiment.task.build(experiment.model, data, training.seed)
    folder, size = config["data_folder"], experiment.parallel.micro_batch_size
    loaders = val_loaders(task, folder, Manifest.load(folder), data=data, training=training, micro_batch_size=size, numbered=True)
    model = build_state(experiment, task, world).model
    checkpoint = Path(config["checkpoint"])
    if config["origin"] is not None:  # this machine may not have it yet
        fetched = fetch_run(config["origin"])
        if fetched is None:
            raise FileNotFoundError(f"{config['origin']} is a run no longer")
        checkpoint = fetched.checkpoints_folder / checkpoint.name
    load_model(checkpoint, model)
    if config["averaged"]:
        load_average(checkpoint, model)
    examples: dict[str, dict[str, Any]] = {}
    try:
        metrics, sums, _ = evaluate(task, model, loaders, world, _reader(config, world), keep=examples.__setitem__)
    except DataFault as error:
        ray.get(config["messages"].put.remote({"fault": _with_repair(error, OtherData.of(experiment, data))}))
        raise
    if world.rank == 0:
        counts = {name: value.tolist() for name, value in sums.items() if value.size <= MOST_KEPT}
        ray.get(config["messages"].put.remote({"metrics": metrics, "sums": counts, "examples": examples}))


def _reader(config: dict[str, Any], world: World) -> ReadAll:
    """Reads by Ray Data tasks, within this worker's share of the cluster."""
    return partial(read_with_ray, share=DataShare(**config["data_share"]), workers=world.size)


def _enter(config: dict[str, Any]) -> tuple[Experiment, World]:
    """The worker's experiment and its world. What it logs goes to the driver from now on."""
    # Of this node's cores, which need not be those of the driver's.
    here = ray.train.get_context().get_local_world_size()
    torch.set_num_threads(config["threads"] or max(1, (os.cpu_count() or 1) // here))
    device = get_device()
    actor = config["messages"]
    actor.put.remote(SIGN_OF_LIFE)
    send_progress(lambda line: actor.put.remote(line))
    experiment = from_dict(config["experiment"])
    choose_arithmetic(experiment.training, device)
    return experiment, join_world(device, experiment.parallel.replicas)


def _reporting(config: dict[str, Any], world: World, steps: Steps) -> AbstractContextManager[None]:
    """Lets the driver know what this worker does, until it has done it."""
    node = ray.get_runtime_context().get_node_id()
    put = beats_to(config["messages"], world).put
    return reporting(lambda beat: put.remote(beat), world.rank, node, ray.util.get_node_ip_address(), steps)


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
    steps.
    """

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
    drains a node of Ray): once for every machine.

    One worker looks whether any node is being drained; only then all of them ask Ray Train, which answers when all do.
    """

    EVERY = 5.0
    """Seconds between two looks."""
    LONG = 60.0
    """Seconds for which all ask because of a node; it may be none of this run's."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._seen: dict[str, float] = {}
        self._next = time.monotonic() + self.EVERY

    def after_step(self, step: int, result: StepResult) -> None:
        now = time.monotonic()
        if self.training.world.rank > 0 or now < self._next:
            return
        self._next = now + self.EVERY
        for node in draining_nodes():
            self._seen.setdefault(node, now)
        if any(node not in self._known and now - since < self.LONG for node, since in self._seen.items()):
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
