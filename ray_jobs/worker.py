"""What each Ray Train worker runs, and the TorchTrainer that runs it: the one trainable, for jobs and for Ray Tune."""

from __future__ import annotations

import json
import os
import shutil
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
from perceiver.data.shards import Manifest
from perceiver.datasets import preprocess_command, with_prepared_tokenizer
from perceiver.extensions import Code, code_of
from perceiver.tasks import build_task
from perceiver.training.batches import make_val_feeds
from perceiver.training.checkpoint import load_model, write_json
from perceiver.training.mirror import CHECKPOINTS, Mirror, fetch_run
from perceiver.training.parallel import World, join_world
from perceiver.training.run import NotFinite, Training, build_state, evaluate
from ray_jobs.cli import JobFailed
from ray_jobs.gauges import Gauges
from ray_jobs.ingest import DATA_CPUS, DataFault, read_with_ray
from ray_jobs.network import Network
from ray_jobs.preflight import Resources

FAILURE = "failure.json"
"""In a run's folder: why its last start failed for good; workers that are started again find it and end at once."""
PROGRAM_FAULTS = (TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError, ImportError, NotImplementedError)
"""Faults of the program or its files; what a lost worker or a broken connection raises is none of them."""
DATA_PATIENCE = 600.0
"""Seconds without data after which a worker gives up (the run then restarts from its last checkpoint)."""
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
    say: Callable[[str], None],
    on_report: Callable[[dict[str, float]], None] | None = None,
    stop_at: int | None = None,
) -> None:
    """Trains an experiment on Ray Train workers until it is finished, or to step `stop_at`.

    `on_report` is called in this process, in a thread, with the metrics of each validation.
    Workers that die are replaced, and training continues from the last checkpoint, `run.max_failures` times.

    Raises:
        UserError: the training cannot succeed (the loss is not a number).
        TrainingFailed: workers failed too often.
    """
    mirror = Mirror.of(experiment.run, run_folder)
    (run_folder / FAILURE).unlink(missing_ok=True)
    if mirror is not None:
        mirror.forget_failure()
    failed = None
    try:
        _fit(_train_worker, experiment, data_folder, run_folder, resources, say, {"stop_at": stop_at}, on_report)
    except TrainingFailed as error:
        failed = error
    if mirror is not None:
        mirror.fetch(0)
    if (run_folder / FAILURE).exists():
        failure = json.loads((run_folder / FAILURE).read_text())
        raise (UserError if failure["users"] else TrainingFailed)(failure["reason"]) from failed
    if failed is not None:
        raise failed


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
        _fit(_evaluate_worker, experiment, data_folder, run_folder, resources, print, settings, results.append)
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
    say: Callable[[str], None],
    settings: dict[str, Any],
    on_report: Callable[[dict[str, float]], None] | None = None,
) -> None:
    if resources.min_workers:
        # After the loss of a node Ray first counts on what it had: it shall not wait a minute for that.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    # What Ray keeps of a run is rebuilt by every start: our own checkpoints say where to continue.
    ray_folder = run_folder / "ray"
    experiment = with_prepared_tokenizer(experiment, data_folder, Manifest.load(data_folder))
    shutil.rmtree(ray_folder, ignore_errors=True)
    with Messages(say, lambda: _why_no_workers(resources), on_report) as messages:
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
            trainer.fit()
        except SystemExit:
            # Ray Train's own handler of Ctrl-C ends its workers and then the process.
            raise KeyboardInterrupt from None
        except ray.train.TrainingFailedError as error:
            raise TrainingFailed(_describe(error)) from error


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
    experiment, world, say = _enter(config)
    data_folder = config["data_folder"]

    def report(metrics: dict[str, float]) -> None:
        ray.train.report(metrics)
        if world.rank == 0:
            config["messages"].put.remote(metrics)

    try:
        training = Training(
            experiment,
            build_task(experiment),
            data_folder,
            Manifest.load(data_folder),
            world,
            run_folder,
            read_with_ray,
            report=report,
            say=say,
            measured=Gauges(run_folder.name),
            stalled=lambda seconds: stalled(seconds, world.rank, say),
            notice=Notice(say if world.rank == 0 else lambda text: None),
            stop_at=config["stop_at"],
        )
        training.run()
    except DataFault as error:
        # One worker alone may meet it, while the others wait for its part of a step: they are ended by its error, and the reason
        # that is noted ends the run when they start again.
        _note_failure(run_folder, mirror, True, _with_repair(error, experiment))
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
    experiment, world, _ = _enter(config)
    task = build_task(experiment)
    manifest = Manifest.load(config["data_folder"])
    feeds = make_val_feeds(experiment, task, config["data_folder"], manifest)
    model = build_state(experiment, task, world).model
    checkpoint = Path(config["checkpoint"])
    if config["origin"] is not None:  # this machine may not have it yet
        checkpoint = fetch_run(config["origin"]) / CHECKPOINTS / checkpoint.name
    load_model(checkpoint, model)
    try:
        metrics, sums, _ = evaluate(task, model, feeds, world, read_with_ray)
    except DataFault as error:
        ray.get(config["messages"].put.remote({"fault": _with_repair(error, experiment)}))
        raise
    if world.rank == 0:
        counts = {name: value.tolist() for name, value in sums.items()}
        ray.get(config["messages"].put.remote({"metrics": metrics, "sums": counts}))


def _enter(config: dict[str, Any]) -> tuple[Experiment, World, Callable[[str], None]]:
    """The worker's experiment, its world, and a way to talk to the driver."""
    torch.set_num_threads(config["threads"])
    device = get_device()
    actor = config["messages"]
    actor.put.remote(SIGN_OF_LIFE)
    experiment = from_dict(config["experiment"])
    return experiment, join_world(device, experiment.parallel.replicas), lambda text: actor.put.remote(text)


class Notice:
    """Whether a machine of this run is about to be taken away (a spot machine's notice, or anything else that drains a node of
    Ray): once for every machine, on all workers alike, which must all ask equally often."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._known: set[str] = set()

    def __call__(self) -> bool:
        info = ray.train.get_preemption_info()
        new = set(info.preempted_node_ids) - self._known if info else set()
        if new:
            self._known |= new
            self._say(f"notice that {len(new)} of the run's machines will go: checkpoint")
        return bool(new)


def stalled(seconds: float, rank: int, say: Callable[[str], None]) -> None:
    """Says why data does not come, and gives up after DATA_PATIENCE.

    Raises:
        RuntimeError: no data for DATA_PATIENCE.
    """
    free, total = ray.available_resources().get("CPU", 0.0), ray.cluster_resources().get("CPU", 0.0)
    text = f"worker {rank} has waited {seconds:.0f} s for data: {free:g} of the cluster's {total:g} CPUs are free"
    if free < DATA_CPUS:
        text += f", and a data task needs {DATA_CPUS:g}: lower --parallel.cpus-per-worker or --workers, or wait for other jobs"
    if seconds > DATA_PATIENCE:
        raise RuntimeError(text)
    say(text)


def _describe(error: Exception) -> str:
    """The workers' own errors, the first line of each."""
    failures = getattr(error, "worker_failures", {}) or {}
    lines = {str(f).strip().splitlines()[-1] if str(f).strip() else repr(f) for f in failures.values()}
    return "; ".join(sorted(lines)) or str(error)


@ray.remote(num_cpus=0)
class _Mailbox:
    def __init__(self) -> None:
        self._items: list[str | dict[str, Any]] = []

    def put(self, item: str | dict[str, Any]) -> None:
        self._items.append(item)

    def take(self) -> list[str | dict[str, Any]]:
        items, self._items = self._items, []
        return items


class Messages:
    """Lines and reported metrics from workers to the driver, without the noise of Ray's log forwarding."""

    def __init__(
        self,
        say: Callable[[str], None],
        why_silent: Callable[[], str],
        on_report: Callable[[dict[str, float]], None] | None = None,
        every: float = 0.5,
    ) -> None:
        # On this node: a machine that is lost shall not take the run's messages along.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.actor = _Mailbox.options(scheduling_strategy=here).remote()
        self._say = say
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

    def _pump(self) -> None:
        silent_since: float | None = time.monotonic()
        while True:
            ended = self._ended.is_set()
            for item in ray.get(self.actor.take.remote()):
                silent_since = None
                if isinstance(item, str):
                    if item != SIGN_OF_LIFE:
                        self._say(item)
                elif self._on_report is not None:
                    self._on_report(item)
            if ended:
                return
            if silent_since is not None and time.monotonic() - silent_since > START_PATIENCE:
                self._say(self._why_silent())
                silent_since = time.monotonic()
            self._ended.wait(self._every)
