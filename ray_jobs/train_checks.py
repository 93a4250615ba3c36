"""What is checked before a training starts, and before a cluster, a worker or a device is held."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from perceiver.checkpoints import CheckpointInfo
from perceiver.config import CallbackConfig, Experiment, UserError, differences, home
from perceiver.data.files import real_place
from perceiver.data.manifest import Manifest
from perceiver.data.sources import is_path
from perceiver.datasets import with_tokenizer
from perceiver.disk import local_folder, read_json
from perceiver.experiments import field_words
from perceiver.run_files import CHECKPOINTS, CURVE, EXPERIMENT, RECORD_FOLDERS, RECORDS
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.tasks.check_calls import tried
from perceiver.terminal import number_of
from perceiver.training.batches import make_val_loaders
from perceiver.training.check_callbacks import check_callbacks
from perceiver.training.fork import Fork, check_extension, find_fork, is_extension
from perceiver.training.init_from import Start, find_start, forked_run
from perceiver.training.optim import described_groups
from perceiver.training.run import total_steps
from ray_jobs.preflight import check_experiment
from ray_jobs.program import program

logger = logging.getLogger(__name__)


def ready_callbacks(experiment: Experiment) -> tuple[CallbackConfig, ...]:
    """The experiment's callbacks as workers get them.

    Raises:
        UserError: one of them cannot work here, or does not keep its contract.
    """
    ready = tuple(tried(callback, "ready", f"callbacks.{number}.") for number, callback in enumerate(experiment.callbacks))
    check_callbacks(ready)
    return ready


def in_its_order(experiment: Experiment, trained: Run) -> Experiment:
    """The experiment with the order that a run of it, or the run that it is forked from, began with, where the command names none.

    Runs of versions before 0.2 had another.
    """
    data, training = experiment.data, experiment.training
    if data.lanes is not None or data.shuffle_window_blocks is not None:
        return experiment
    if trained.exists:
        of = trained
    elif training.fork is not None and not training.fork_weights_only:
        of = forked_run(training.fork, experiment.run.storage_path)[0]
    else:
        return experiment
    begun = of.load(install_code=False)[0].data
    return replace(experiment, data=replace(data, lanes=begun.lanes, shuffle_window_blocks=begun.shuffle_window_blocks))


def with_sources_of(experiment: Experiment, old: Experiment, trained: Run) -> Experiment:
    """An experiment whose sources are spelled as a run has them, where they are the same files: FOLDER/, ./FOLDER and its absolute path.

    For comparisons alone: where the run was begun, a relative path began in another folder.

    Args:
        old: the run's experiment.
    """
    record = trained.provenance_file
    begun_in = str(read_json(record).get("folder", "")) if record.is_file() else ""
    same: dict[str, Any] = {}
    for name in ("source", "val_source"):
        before, now = getattr(old.data, name), getattr(experiment.data, name)
        if before and now and before != now and is_path(before) and is_path(now) and "://" not in before + now:
            if real_place(os.path.join(begun_in, os.path.expanduser(before))) == real_place(os.path.expanduser(now)):
                same[name] = before
    return replace(experiment, data=replace(experiment.data, **same)) if same else experiment


def check_run(experiment: Experiment, trained: Run) -> dict[str, float] | None:
    """What there is under the run's name: the result of a finished run, or None.

    Raises:
        UserError: a run of another experiment; names the differences.
    """
    if not trained.exists:
        names = (*RECORDS, *RECORD_FOLDERS, CHECKPOINTS, CURVE, *(path.name for path in trained.tokenizer_files))
        check_free(trained.folder, EXPERIMENT, "--run.name", names)
        return None
    old, _ = trained.load(install_code=False)
    changes = differences(old.identity, with_sources_of(experiment, old, trained).identity)
    if changes:
        raise UserError(
            f"run {experiment.run_name!r} in {trained.folder.parent} is another experiment ({'; '.join(changes)}): "
            "choose another --run.name, or the same settings"
        )
    return trained.result()


def is_longer(experiment: Experiment, trained: Run) -> bool:
    """Whether the run under this name is the same but for its length."""
    if not trained.exists:
        return False
    old, _ = trained.load(install_code=False)
    return is_extension(old, with_sources_of(experiment, old, trained))


def check_longer(experiment: Experiment, trained: Run, manifest: Manifest, steps: int) -> None:
    """Refuses another length where the steps so far are not those of a run of that length; see `check_extension`.

    Raises:
        UserError: says why, and the command that forks the run in its place.
    """
    old, _ = trained.load(install_code=False)
    experiment = with_sources_of(experiment, old, trained)
    old_steps = total_steps(old, manifest.splits["train"].rows)

    def command(step: int) -> str:
        lengths = {name: (getattr(old.training, name), getattr(experiment.training, name)) for name in ("max_steps", "max_epochs")}
        changed = {f"training.{name}": new for name, (before, new) in lengths.items() if new != before}
        words = [word for name, value in changed.items() for word in field_words(name, value)]
        place = trained.folder if Path(experiment.run.storage_path) != home() / "runs" else trained.name
        return shlex.join([*program("ray_jobs.train").split(), "--fork", f"{place}@{step}", "--name", f"{trained.name}-longer", *words])

    epoch = -(-manifest.splits["train"].rows // experiment.training.global_batch_size)
    old, new = (replace(run, optim=run.optim.in_steps(epoch)) for run in (old, experiment))
    check_extension(trained, old, new, old_steps, steps, command)


def check_fork(experiment: Experiment, trained: Run, checkpoints: list[CheckpointInfo]) -> Fork | None:
    """What a fresh run is forked from, with all but the length compared; None: it is no fork, or is continued.

    Raises:
        UserError: there is no such run, or its weights, optimizer or order cannot be carried over.
    """
    if experiment.training.fork is None or checkpoints:
        return None
    parent, _ = forked_run(experiment.training.fork, experiment.run.storage_path)
    if parent.folder == trained.folder:
        raise UserError(f"--run.name is {trained.name!r}, the run that is forked: a fork is a run of its own, give it another name")
    fork = find_fork(experiment)
    if fork is not None:
        fork.check(experiment)
    return fork


def check_name(experiment: Experiment) -> None:
    """Refuses an experiment whose run is another one's already; see `check_run`."""
    experiment = with_tokenizer(experiment)
    check_experiment(experiment)
    trained = Run(local_folder("run.storage", experiment.run.storage_path) / experiment.run_name)
    if not is_longer(experiment, trained):
        check_run(experiment, trained)


def check_free(folder: Path, mark: str, field: str, names: Collection[str] | None = None) -> None:
    """Refuses a folder without `mark` that already has files of these names (None: any): a run or a sweep would write over them.

    Raises:
        UserError: names what is there.
    """
    if not folder.exists():
        return
    found = [path.name for path in folder.iterdir()] if folder.is_dir() else [folder.name]
    there = sorted(name for name in found if (name in names if names else not name.startswith(".")))
    if there:
        shown = ", ".join(there[:5]) + (f" and {len(there) - 5} more" if len(there) > 5 else "")
        raise UserError(f"{folder} has no {mark} but holds other files ({shown}): choose another {field}")


def check_start(experiment: Experiment, checkpoints: list[CheckpointInfo]) -> Start | None:
    """What a fresh run starts from, found and compared before anything is held; None for random weights or a continued run.

    Raises:
        UserError: nothing is there or it does not fit, or a frozen encoder has nothing to start from.
    """
    if checkpoints:
        return None
    with torch.device("meta"):
        model = build_task(experiment).build_model()
    start = find_start(experiment, {name: tuple(p.shape) for name, p in model.named_parameters()})
    if start is None and getattr(getattr(experiment.model, "encoder", None), "freeze", False):
        raise UserError(
            "model.encoder.freeze is on, so the encoder must come from somewhere: --init-encoder-from RUN (a masked language "
            "model's, say) or weights"
        )
    return start


def check_validation(experiment: Experiment, data_folder: str, manifest: Manifest) -> None:
    """Refuses validation data of which nothing can be measured, as far as its size tells.

    Raises:
        UserError: there is none.
    """
    for part, loader in make_val_loaders(experiment, build_task(experiment), data_folder, manifest):
        split = loader.split
        if split.rows < 1 or (split.stored.is_stream and split.tokens < 2):
            source = f" of {part.name}" if part.name else ""
            raise UserError(
                f"the validation data{source} in {data_folder} has no target, so no metric could be measured: give more data with "
                "--data.val-source"
            )


def check_data(trained: Run, manifest: Manifest) -> None:
    """Refuses to continue a run on data that has changed since it began.

    Raises:
        UserError: the prepared data is not that of the run's start.
    """
    if trained.exists and trained.load(install_code=False)[1] != manifest.digest:
        raise UserError(f"the prepared data has changed since {trained.folder} began: choose another --run.name")


def warn_of_warmup(experiment: Experiment, manifest: Manifest) -> None:
    """Says so where a run ends before its learning rate has risen to what is given, or where it rises twice."""
    rows = manifest.splits["train"].rows
    steps, optim = total_steps(experiment, rows), experiment.optim
    in_steps = optim.in_steps(-(-rows // experiment.training.global_batch_size))
    warmup = in_steps.warmup_steps
    if 0 < warmup < steps and (begins := in_steps.schedule.factor(0, steps - warmup)) < 0.5:
        logger.warning(
            f"optim.schedule {type(optim.schedule).__name__.lower()} begins at {begins:g} of optim.lr and rises by itself, after a warm-up "
            f"of {number_of(warmup, 'step')}: --optim.warmup-steps 0 leaves the warm-up out"
        )
    if warmup >= steps:
        given = f"steps is {warmup:,}" if optim.warmup_epochs is None else f"epochs is {optim.warmup_epochs:g} ({warmup:,} steps)"
        logger.warning(f"optim.warmup-{given}, but the run has {steps:,} steps: the learning rate never reaches optim.lr")


def say_groups(experiment: Experiment) -> None:
    """Says how many parameters each of optim.groups names."""
    if experiment.optim.groups:
        with torch.device("meta"):
            model = build_task(experiment).build_model()
        for line in described_groups(model, experiment.optim):
            logger.info(f"optim.groups: {line}")
