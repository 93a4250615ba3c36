"""The mean of a run's checkpoints, as a run of its own (stochastic weight averaging, arXiv 1803.05407)."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from perceiver.checkpoints import MARKER, CheckpointInfo, checkpoint_name, marker_content
from perceiver.config import UserError
from perceiver.config.optimization import raw_metric
from perceiver.data.storage import write_file
from perceiver.runs import Parent, Run
from perceiver.terminal import number_of
from perceiver.training.checkpoint_files import ShardWriter, all_tensors, check_files
from perceiver.training.state import AVERAGE

MODEL = "model."
"""Begins the names of a checkpoint's weights."""


def save_mean(run: Run, chosen: Sequence[CheckpointInfo], target: Run) -> CheckpointInfo:
    """Writes a run whose one checkpoint has the mean of some checkpoints' weights, in float64, beside the last one's optimizer.

    It has the experiment, code and tokenizer of the run and counts as finished: it is evaluated, exported and forked as any other. Averaged
    weights (`optim.ema_decay`) are left out.

    Args:
        run: what is averaged.
        chosen: its checkpoints, oldest first.
        target: the folder to make, which must not be there.

    Raises:
        UserError: the folder exists.
        DamagedCheckpoint: a file of a checkpoint is damaged.
    """
    if target.folder.exists():
        raise UserError(f"--name is {target.name!r}, and {target.folder} exists: choose another")
    for checkpoint in chosen:
        check_files(checkpoint.path)
    tensors = {name: tensor for name, tensor in all_tensors(chosen[-1].path).items() if not name.startswith(f"{AVERAGE}.")}
    tensors |= mean_weights([checkpoint.path for checkpoint in chosen])
    trained, _ = run.load(install_code=False)
    folder = target.checkpoints_folder / checkpoint_name(chosen[-1].step)
    writer = ShardWriter(folder, 0)
    target.checkpoints_folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process is what is meant
        dcp.save(tensors, storage_writer=writer, no_dist=True)
    made = CheckpointInfo(folder, chosen[-1].step, {}, files=writer.files)
    write_file(folder, MARKER, marker_content(made))
    target.save_start(Parent.of(run, chosen[-1]), {"mean_of_steps": ", ".join(str(checkpoint.step) for checkpoint in chosen)})
    if run.code_folder.is_dir():
        shutil.copytree(run.code_folder, target.code_folder)
    for file in run.tokenizer_files:
        if file.is_file():
            shutil.copy2(file, target.folder)
    target.save(run.saved())
    # An average of its own would begin where a fork of this run does.
    section = replace(trained.run, name=target.name, best_metric=raw_metric(trained.run.best_metric))
    target.change_experiment(replace(trained, optim=replace(trained.optim, ema_decay=None), run=section))
    target.save_result({"step": made.step}, f"it is the mean of {number_of(len(chosen), 'checkpoint')}")
    return made


def mean_weights(paths: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of checkpoints' weights, of each in the type that it has; what is no floating-point number is the last one's."""
    sums: dict[str, Tensor] = {}
    last: dict[str, Tensor] = {}
    for path in paths:
        last = all_tensors(path, MODEL)
        for name, tensor in last.items():
            if tensor.is_floating_point():
                sums[name] = sums[name] + tensor if name in sums else tensor.to(torch.float64)
    return last | {name: (total / len(paths)).to(last[name].dtype) for name, total in sums.items()}
