"""The state of a training, and how it, or the model alone, is read from a checkpoint."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from perceiver.checkpoints import (
    read_marker,
)
from perceiver.config import UserError
from perceiver.config.optimization import AVERAGED
from perceiver.training.average import Average, begin_average
from perceiver.training.checkpoint_files import check_files, read_tensors, stored_names

AVERAGE = "average"
"""Name of the averaged weights among a checkpoint's tensors."""


@dataclass
class TrainState:
    """All that training changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    average: Average | None = None
    """Averaged weights; None: none are kept."""


def state_tensors(state: TrainState, model: dict[str, Any], optimizer: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds: without the optimizer's settings (weight decay, betas, ...), which are the experiment's."""
    average = {} if state.average is None else {AVERAGE: state.average}
    return {"model": model, "optimizer": {"state": optimizer["state"]}, **average}


def load_state(path: str | Path, state: TrainState, checked: bool = False) -> None:
    """Loads a checkpoint into a state whose model and optimizer are built and sharded, on any number of workers.

    Args:
        checked: the files' hashes have just been checked.

    Raises:
        DamagedCheckpoint: a file is damaged; on all workers alike.
    """
    path = Path(path)
    if not checked:
        check_files(path)
    settings = [{k: v for k, v in group.items() if k != "params"} for group in state.optimizer.param_groups]
    model, optimizer = get_state_dict(state.model, state.optimizer)
    tensors = state_tensors(state, model, optimizer)
    if averages := state.average is not None and not has_average(path):
        del tensors[AVERAGE]  # a fork of a run without one begins it
    read_tensors(path, tensors)
    set_state_dict(state.model, state.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    for group, own in zip(state.optimizer.param_groups, settings, strict=True):
        group.update(own)
    if averages:
        state.average = begin_average(state.model)
    state.step = read_marker(path).step


def load_model(path: str | Path, model: nn.Module) -> None:
    """Loads the model alone from a checkpoint: sharded over the workers, or plain in one process without any.

    Raises:
        DamagedCheckpoint: a file is damaged; on all workers alike.
    """
    check_files(Path(path))
    weights = get_model_state_dict(model)
    read_tensors(Path(path), {"model": weights})
    set_model_state_dict(model, weights, options=StateDictOptions(strict=True))


def load_average(path: str | Path, model: nn.Module) -> None:
    """Puts the averaged weights of a checkpoint in the place of its own, which `load_model` has loaded.

    Raises:
        UserError: it has none.
    """
    if not has_average(path):
        raise UserError(f"checkpoint {Path(path).name} has no averaged weights (its run has no --optim.ema-decay): leave out {AVERAGED}")
    average = begin_average(model)
    read_tensors(Path(path), {AVERAGE: average})
    set_model_state_dict(model, average, options=StateDictOptions(strict=False))


def has_average(path: str | Path) -> bool:
    """Whether a checkpoint holds averaged weights."""
    return any(name.startswith(f"{AVERAGE}.") for name in stored_names(Path(path)))


def load_weights(path: str | Path, model: nn.Module, names: Collection[str]) -> None:
    """Loads some of the model's weights from a checkpoint whose files have been checked, and leaves the others as they are;
    otherwise as `load_model`.
    """
    weights = {name: value for name, value in get_model_state_dict(model).items() if name in names}
    read_tensors(Path(path), {"model": weights})
    set_model_state_dict(model, weights, options=StateDictOptions(strict=False))
