"""A whole training on one worker: build, continue, train, validate, save, record. The same with Ray and without."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from perceiver.config import Experiment, to_dict
from perceiver.config.optimization import averaged_metric
from perceiver.costs.devices import peak_flops
from perceiver.data.balance import BalancedOrder, described
from perceiver.data.manifest import Manifest
from perceiver.data.storage import list_folder, read_file, write_file
from perceiver.data.tokenizers import kept_file
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.terminal import number_of
from perceiver.training.average import averaged, begin_average
from perceiver.training.batches import ReadAll, make_train_loader, make_val_loaders, read_here
from perceiver.training.callbacks import MEET, PAUSE, SAVE, STOP, Callback, TrainingView
from perceiver.training.checkpoint import Checkpointer
from perceiver.training.fork import find_fork
from perceiver.training.grad_norms import measured_gradients
from perceiver.training.hooks import Callbacks, read_states
from perceiver.training.init_from import find_start
from perceiver.training.loop import StepResult, add_to, agree, fit
from perceiver.training.meters import Meter
from perceiver.training.metrics import evaluate
from perceiver.training.not_finite import Finiteness, NotFinite
from perceiver.training.optim import build_optimizer, freeze
from perceiver.training.parallel import World, build_sharded
from perceiver.training.prefetch import HeadStart
from perceiver.training.profiling import watching
from perceiver.training.record import Recorder
from perceiver.training.remote_copy import RemoteCopy
from perceiver.training.spikes import SETTLED, LossSpikes, Spikes
from perceiver.training.state import TrainState
from perceiver.version import installed_version

if TYPE_CHECKING:
    from perceiver.tasks.base import Task

Result = TypeVar("Result")


def total_steps(experiment: Experiment, rows: int) -> int:
    """Optimizer steps of a training on `rows` rows: the shorter of max_steps and max_epochs."""
    training = experiment.training
    epoch = -(-rows // training.global_batch_size)
    limits = [training.max_steps, training.max_epochs and training.max_epochs * epoch]
    return min(limit for limit in limits if limit is not None)


class Training:
    """One worker's part of a training.

    Args:
        experiment: what to train.
        task: its task.
        data_folder, manifest: the prepared data.
        world: this process among the workers.
        run_folder: where the run is kept.
        read_all: how data is read (in this process, or by Ray Data).
        callbacks: those of the job that runs the training, besides the experiment's own.
        stop_at: end with a validation and a checkpoint at this step, to be continued later; None: at the last.
    """

    def __init__(
        self,
        experiment: Experiment,
        task: Task,
        data_folder: str,
        manifest: Manifest,
        world: World,
        run_folder: Path,
        read_all: ReadAll,
        callbacks: Sequence[Callback] = (),
        stop_at: int | None = None,
    ) -> None:
        self.experiment, self.task, self.world, self.run_folder, self.read_all = experiment, task, world, run_folder, read_all
        self.train_feed = make_train_loader(experiment, task, data_folder, manifest)
        self.val_feeds = make_val_loaders(experiment, task, data_folder, manifest)
        self.total_steps = total_steps(experiment, self.train_feed.split.rows)
        self.remote = RemoteCopy.of(experiment.run, run_folder)
        if self.remote is not None:
            self.remote.fetch()
        self.head_start = HeadStart(self.train_feed, read_all, world)
        if read_all is not read_here and experiment.training.fork is None:
            checkpoints = Run(run_folder).checkpoints()
            begin = checkpoints[-1].step if checkpoints else 0
            self.head_start.begin(begin, max(begin, min(self.total_steps, stop_at or self.total_steps)))
        self.state = build_state(experiment, task, world)
        self.checkpointer = Checkpointer(
            Run(run_folder).checkpoints_folder,
            experiment.run.keep_checkpoints,
            experiment.run.best_metric,
            task.higher_is_better,
            world.rank,
            self.remote,
            lambda step, path: self.callbacks.call("after_checkpoint", step, path),
            experiment.run.keep_best,
        )
        resumed = self.checkpointer.resume(self.state)
        if resumed is None and Run(run_folder).checkpoints_folder.exists():
            self.state = build_state(experiment, task, world)  # a damaged checkpoint may have been loaded in part
        if resumed is None:
            self._begin()
        self.view = TrainingView(experiment, task, self.state, world, run_folder, self.total_steps)
        self.callbacks = Callbacks(self.view, [*callbacks, *watching(experiment.run)], experiment.callbacks)
        saved = read_states(resumed.path) if resumed else {}
        self.callbacks.load_states(saved.get("callbacks", ()))
        self.stopped: str | None = saved.get("stopped")
        """Why a callback has ended the training before its last step."""
        limit, order = experiment.training.skip_not_finite, self.train_feed.order
        self.finiteness = Finiteness(run_folder, order, world, limit, saved.get("skipped", []))
        self.spikes = Spikes(run_folder, order, world, experiment.training, saved.get("spikes", {}))
        self.stop_step = self.state.step if self.stopped else min(self.total_steps, stop_at or self.total_steps)
        unit, per_example = task.throughput_unit()
        self.recorder = Recorder(run_folder, self.state.step, self.total_steps, unit, world.rank == 0)
        self.gradients = measured_gradients(experiment, self.train_feed.order, world, Run(run_folder))
        batch = experiment.training.global_batch_size
        peak = peak_flops(world.device)
        self.meter_settings: dict[str, Any] = {
            "total_steps": self.total_steps,
            "units_per_step": batch * per_example,
            "flops_per_step": batch * task.flops_per_example(),
            "peak": peak and peak * world.size,
        }
        self.val_metrics = resumed.metrics if resumed else {}
        """Of the last validation; of the checkpoint that this continues from, until there is one."""
        self._sums: dict[str, torch.Tensor] = {}
        self._went_back = -1
        """The last step at which the weights returned to a checkpoint: they are saved at once, as no other state leads to them."""

    def _begin(self) -> None:
        """Brings a fresh run to what it starts from: another run, or weights of others."""
        shapes = {name: p.shape for name, p in self.state.model.named_parameters()}
        run = Run(self.run_folder)
        if (fork := find_fork(self.experiment, trust_code=True)) is not None:
            fork.apply(self.state)
            if self.world.rank == 0:
                fork.save(run)
        elif (start := find_start(self.experiment, shapes, trust_code=True)) is not None:
            start.apply(self.state.model)
            if self.state.average is not None:
                self.state.average = begin_average(self.state.model)
            if self.world.rank == 0:
                start.save(run)

    def run(self) -> dict[str, float]:
        """Trains to the end and returns the last metrics.

        Raises:
            NotFinite: the loss is not a number; on all workers alike.
            LossSpikes: the loss has had too many spikes; on all workers alike.
            CallbackError: a callback of the experiment failed; maybe on this worker alone.
        """
        try:
            self.callbacks.call("on_start", self.view)
            self._announce()
            self._train()
            self.checkpointer.close()
            metrics = self._finish()
        except BaseException as error:
            self.head_start.close()
            if isinstance(error, (NotFinite, LossSpikes)):  # of all workers alike: what they are saving is good, and is waited for
                self.checkpointer.close()
            self.callbacks.end(self.state.step, self.val_metrics, error)
            raise
        self.callbacks.end(self.state.step, self.val_metrics, None)
        self.recorder.close()
        if self.remote is not None and self.world.rank == 0:
            self.remote.send_records()
        return metrics

    def validate(self) -> dict[str, float]:
        """Validates and returns the metrics, named val_..."""
        limit, model = self.experiment.run.val_batches, self.state.model
        metrics, sums, split = evaluate(self.task, model, self.val_feeds, self.world, self.read_all, limit)
        if self.state.average is not None:
            with averaged(self.state.average, model):
                others, _, _ = evaluate(self.task, model, self.val_feeds, self.world, self.read_all, limit)
            metrics |= {averaged_metric(name): value for name, value in others.items()}
        if metrics:
            samples = self.task.samples(model, sums, split)
            self.recorder.samples(self.state.step, samples)
            self.callbacks.call("after_samples", self.state.step, samples)
        return metrics

    def _announce(self) -> None:
        order = self.train_feed.order
        if isinstance(order, BalancedOrder):
            names = getattr(self.task, "class_names", None)
            self.recorder.say(f"balanced classes: {described(np.bincount(order.copies.labels).tolist(), names, order.copies.most)}")
        step, epoch = self.state.step, self.train_feed.order.steps_per_epoch
        begin = f"continuing from step {step:,}" if step else "starting"
        workers = f"{number_of(self.world.size, 'worker')} ({self.world.device.type})"
        self.recorder.say(
            f"{begin}: {number_of(self.total_steps, 'step')} of {number_of(self.experiment.training.global_batch_size, 'example')}, "
            f"{self.total_steps / epoch:.3g} epochs of {number_of(self.train_feed.split.rows, 'example')}, on {workers}"
        )

    def _train(self) -> None:
        step, experiment = self.state.step, self.experiment
        batches = self.head_start.take(step, self.stop_step, lambda seconds: self.callbacks.call("while_waiting", seconds))
        self.meter = Meter(wait_seconds=lambda: batches.wait_seconds, step=step, **self.meter_settings)
        try:
            fit(
                experiment.optim.in_steps(self.train_feed.order.steps_per_epoch), experiment.training.seed, self.task, self.state, batches,
                self.world, self.total_steps, self._after_step, self.view.take_requests, experiment.training.skip_not_finite > 0,
                self.gradients, spikes=self.spikes if self.spikes.active else None,
            )  # fmt: skip
        finally:
            batches.close()

    def _after_step(self, result: StepResult) -> bool:
        """Whether the training ends here."""
        step, run = self.state.step, self.experiment.run
        self.finiteness.add(step, result)
        if result.skipped:
            self.recorder.say(f"step {step:,} is skipped: its loss or gradient was not finite")
        elif result.spike:
            self._answer_spike(step)
        else:
            add_to(self._sums, {"loss": result.loss_sum, "targets": result.targets.double() / self.world.size, **result.sums})
        requests = result.requests
        self.callbacks.call("after_step", step, result)
        if MEET in requests:
            self.callbacks.call("on_meeting", step)
        last = step == self.stop_step or STOP in requests
        checkpoint = last or step % run.checkpoint_every == 0 or self._went_back == step or not requests.isdisjoint((PAUSE, SAVE))
        validation = last or step % run.val_every == 0
        if (checkpoint or validation or step % run.log_every == 0) and self._sums:
            self._log(result)
        measured: dict[str, float] = {}  # metrics go with the weights that they were measured on, and no others
        if validation:
            measured = self._apart(self._validate)
            checkpoint = self.checkpointer.is_best(measured) or checkpoint
        if checkpoint or validation:
            # A request that this checkpoint's state already holds as made would be lost if the run continued from here.
            requests |= agree(self.world, self.view.take_requests())
            checkpoint = checkpoint or not requests.isdisjoint((STOP, PAUSE, SAVE))
        if STOP in requests and step < self.total_steps:
            if not validation:
                measured = self._apart(self._validate)
            self.stopped = self.world.first(self.view.reason)
            self.recorder.say(f"ended at step {step:,}: {self.stopped}")
        if checkpoint:
            self.finiteness.check_weights(step, self.state.model)
            self.recorder.to_disk()
            self._apart(lambda: self.checkpointer.save(self.state, measured, self._more()))
        self.checkpointer.poll()
        return not requests.isdisjoint((STOP, PAUSE))

    def _answer_spike(self, step: int) -> None:
        """Leaves out the step's update, or returns to a good checkpoint, from which training continues with the rows of the next step."""
        back_to = None
        if self.spikes.goes_back:
            back_to = self._apart(lambda: self.checkpointer.go_back(self.state, step - SETTLED))
            self.state.step = step
            self._went_back = -1 if back_to is None else step
        self.recorder.say(self.spikes.add(step, None if back_to is None else back_to.step))

    def _more(self) -> dict[str, Any] | None:
        """What a checkpoint holds besides model and optimizer: why the training ended early, the states of callbacks."""
        states, skipped = self.callbacks.states(), self.finiteness.skipped
        parts = {"skipped": skipped, "spikes": self.spikes.state()}
        content = {"stopped": self.stopped, "callbacks": states, **{name: part for name, part in parts.items() if part}}
        return content if len(content) > 2 or states or self.stopped else None

    def _log(self, result: StepResult) -> None:
        norm = result.grad_norm
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        metrics = {**self._losses(), "lr": result.lr}
        if not result.skipped and not result.spike:  # else the norms are those of no update
            metrics["grad_norm"] = norm.item()
            metrics |= self.gradients.metrics(result.gradients)
        self.finiteness.check(self.state.step, metrics["loss"], metrics.get("grad_norm", 0.0))
        metrics |= self.meter.report(self.state.step)
        metrics["checkpoint_seconds"] = self.checkpointer.blocked_seconds
        self.recorder.metrics(self.state.step, metrics)
        self.recorder.progress(self.state.step, metrics)
        self.callbacks.call("after_log", self.state.step, metrics)

    def _losses(self) -> dict[str, float]:
        """The loss since the last log line, "loss", and that of each source of a mixture with any target in it, "loss/SOURCE"."""
        names = sorted(self._sums)
        sizes = [self._sums[name].numel() for name in names]
        together = self.world.all_sum(torch.cat([self._sums[name].view(-1) for name in names])).cpu()
        self._sums = {}
        sums = dict(zip(names, together.split(sizes), strict=True))
        losses = {"loss": (sums["loss"] / sums["targets"].clamp(min=1)).item()}
        if "source_loss" in sums:
            sources = [part.name for part, _ in self.val_feeds]
            found = zip(sources, sums["source_loss"].tolist(), sums["source_targets"].tolist(), strict=True)
            losses |= {f"loss/{source}": loss / targets for source, loss, targets in found if targets}
        return losses

    def _validate(self) -> dict[str, float]:
        self.val_metrics = self.validate()
        if self.val_metrics:
            self.recorder.metrics(self.state.step, self.val_metrics)
        text = "  ".join(f"{name} {value:.4f}" for name, value in self.val_metrics.items())
        self.recorder.say(f"step {self.state.step:,}: {text or 'the validation data has no target, so nothing is measured'}")
        self.callbacks.call("after_validation", self.state.step, dict(self.val_metrics))
        return self.val_metrics

    def _apart(self, action: Callable[[], Result]) -> Result:
        start = time.perf_counter()
        result = action()
        self.meter.exclude(time.perf_counter() - start)
        return result

    def _finish(self) -> dict[str, float]:
        metrics = {"step": self.state.step, **self.val_metrics}
        if self.world.rank == 0 and (self.stopped is not None or self.state.step == self.total_steps):
            Run(self.run_folder).save_result(metrics, self.stopped)
        return metrics


def build_state(experiment: Experiment, task: Task, world: World) -> TrainState:
    """Model and optimizer, sharded over the workers, with initial weights."""
    with torch.device("meta"):
        model = task.build_model()
    freeze(model, experiment.optim)
    model = build_sharded(model, world, experiment.parallel, experiment.training, model.layers())
    average = None if experiment.optim.ema_decay is None else begin_average(model)
    return TrainState(model, build_optimizer(model, experiment.optim), average=average)


def save_experiment(run: Run, experiment: Experiment, manifest: Manifest, data_folder: str) -> None:
    """Writes what a run is: its resolved configuration, the data it is trained on, its length on it and what an example costs, the version
    of this package, a copy of the data's tokenizer.
    """
    if (manifest.tokenizer or {}).get("sha256") is not None:
        name = kept_file(list_folder(data_folder))
        assert name is not None  # or the data were not whole
        write_file(run.folder, name, read_file(data_folder, name))
    content = {
        "experiment": to_dict(experiment),
        "data": manifest.digest,
        "steps": total_steps(experiment, manifest.splits["train"].rows),
        "flops_per_example": build_task(experiment).flops_per_example(),
        "version": installed_version(),
    }
    run.save(content)
