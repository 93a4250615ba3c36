"""What each Ray Train worker runs, and the TorchTrainer that runs it: the one trainable, for jobs and for Ray Tune."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from perceiver.config import Experiment, UserError, from_dict, to_dict
from perceiver.data.shards import Manifest
from perceiver.tasks import build_task
from perceiver.training.batches import make_feed
from perceiver.training.checkpoint import load_model, write_json
from perceiver.training.parallel import World, join_world
from perceiver.training.run import NotFinite, Training, build_state, evaluate
from ray_jobs.ingest import read_with_ray
from ray_jobs.preflight import Resources

FAILURE = "failure.json"


class TrainingFailed(Exception):
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
    (run_folder / FAILURE).unlink(missing_ok=True)
    _fit(_train_worker, experiment, data_folder, run_folder, resources, say, {"stop_at": stop_at}, on_report)
    if (run_folder / FAILURE).exists():
        raise UserError((run_folder / FAILURE).read_text().strip().strip('"'))


def evaluate_checkpoint(
    experiment: Experiment, data_folder: str, run_folder: Path, resources: Resources, checkpoint: Path, output: Path
) -> None:
    """Evaluates a checkpoint on the validation split of prepared data and writes the metrics to `output` (JSON)."""
    settings = {"checkpoint": str(checkpoint), "output": str(output)}
    _fit(_evaluate_worker, experiment, data_folder, run_folder, resources, print, settings)


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
    # What Ray keeps of a run is rebuilt by every start: our own checkpoints say where to continue.
    ray_folder = run_folder / "ray"
    shutil.rmtree(ray_folder, ignore_errors=True)
    with Messages(say, on_report) as messages:
        trainer = TorchTrainer(
            function,
            train_loop_config={
                "experiment": to_dict(experiment),
                "data_folder": data_folder,
                "run_folder": str(run_folder),
                "threads": resources.threads_per_worker,
                "messages": messages.actor,
                **settings,
            },
            scaling_config=ScalingConfig(
                num_workers=resources.workers,
                use_gpu=resources.gpu,
                resources_per_worker={"CPU": resources.cpus_per_worker, **({"GPU": 1} if resources.gpu else {})},
            ),
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if resources.gpu else "gloo"),
            run_config=RunConfig(
                name=ray_folder.name,
                storage_path=str(run_folder),
                failure_config=FailureConfig(max_failures=experiment.run.max_failures),
            ),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise TrainingFailed(_describe(error)) from error


def _train_worker(config: dict[str, Any]) -> None:
    experiment, world, say = _enter(config)
    run_folder = Path(config["run_folder"])
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
            stop_at=config["stop_at"],
        )
        training.run()
    except (NotFinite, UserError) as error:
        # Raised by all workers alike, and again at every restart: end the run instead of restarting it.
        if world.rank == 0:
            write_json(run_folder / FAILURE, str(error))


def _evaluate_worker(config: dict[str, Any]) -> None:
    experiment, world, _ = _enter(config)
    task = build_task(experiment)
    manifest = Manifest.load(config["data_folder"])
    feed = make_feed(experiment, task, config["data_folder"], manifest.splits["val"], train=False)
    model = build_state(experiment, task, world).model
    load_model(config["checkpoint"], model)
    metrics, sums = evaluate(task, model, feed, world, read_with_ray)
    if world.rank == 0:
        counts = {name: value.tolist() for name, value in sums.items()}
        write_json(Path(config["output"]), {"metrics": metrics, "sums": counts})


def _enter(config: dict[str, Any]) -> tuple[Experiment, World, Callable[[str], None]]:
    """The worker's experiment, its world, and a way to talk to the driver."""
    torch.set_num_threads(config["threads"])
    device = get_device()
    actor = config["messages"]
    return from_dict(config["experiment"]), join_world(device), lambda text: actor.put.remote(text)


def _describe(error: Exception) -> str:
    """The workers' own errors, the first line of each."""
    failures = getattr(error, "worker_failures", {}) or {}
    lines = {str(f).strip().splitlines()[-1] if str(f).strip() else repr(f) for f in failures.values()}
    return "; ".join(sorted(lines)) or str(error)


@ray.remote(num_cpus=0)
class _Mailbox:
    def __init__(self) -> None:
        self._items: list[str | dict[str, float]] = []

    def put(self, item: str | dict[str, float]) -> None:
        self._items.append(item)

    def take(self) -> list[str | dict[str, float]]:
        items, self._items = self._items, []
        return items


class Messages:
    """Lines and reported metrics from workers to the driver, without the noise of Ray's log forwarding."""

    def __init__(
        self,
        say: Callable[[str], None],
        on_report: Callable[[dict[str, float]], None] | None = None,
        every: float = 0.5,
    ) -> None:
        self.actor = _Mailbox.remote()
        self._say = say
        self._on_report = on_report
        self._every = every
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._pump, daemon=True)

    def __enter__(self) -> Messages:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join(timeout=10)
        ray.kill(self.actor)

    def _pump(self) -> None:
        while True:
            ended = self._ended.is_set()
            for item in ray.get(self.actor.take.remote()):
                if isinstance(item, str):
                    self._say(item)
                elif self._on_report is not None:
                    self._on_report(item)
            if ended:
                return
            self._ended.wait(self._every)
