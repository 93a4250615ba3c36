"""Where a fresh run's weights start from: another run's model or encoder, or weights of other projects.

What fits is decided by names, shapes and configurations before anything is loaded: a weight that is missing, left over or of
another shape is refused, and so is a configuration under which the same weights would be another function (heads, say).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor

from perceiver.checkpoints import CheckpointInfo, DamagedCheckpoint, read_marker
from perceiver.config import Experiment, ModelConfig, UserError, differences
from perceiver.config.optimization import averaged_of
from perceiver.data.tokenizers import load_tokenizer
from perceiver.extensions import trust
from perceiver.interop import comparison
from perceiver.interop.pretrained import is_hub_name, read_pretrained
from perceiver.runs import Parent, Run
from perceiver.training.checkpoint_files import check_files, stored_shapes
from perceiver.training.remote_copy import find_run
from perceiver.training.state import load_weights

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Start:
    """Initial weights that have been found and fit."""

    origin: str
    """Where they come from, for people."""
    loaded: tuple[str, ...]
    """Names of the model's weights that are taken from there."""
    new: tuple[str, ...]
    """Names of the model's other weights, which keep their random values."""
    unused: tuple[str, ...]
    """Names of weights there that the model does not take."""
    weights: dict[str, Tensor] | None = None
    """The weights themselves; None: they are in a checkpoint."""
    checkpoint: Path | None = None
    parent: Parent | None = None
    """The run that they are of; None: they are no run's."""

    def apply(self, model: nn.Module) -> None:
        """Puts the weights into a model, plain or sharded. Called by all workers; each takes its shards."""
        if self.checkpoint is not None:
            load_weights(self.checkpoint, model, self.loaded)
            check_finite(self.origin, model, self.loaded)
            return
        assert self.weights is not None
        weights = {name: self.weights[name] for name in self.loaded}
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=False))

    @property
    def of_run(self) -> CheckpointInfo | None:
        """The checkpoint that they are in."""
        return None if self.checkpoint is None else read_marker(self.checkpoint)

    def save(self, run: Run) -> None:
        """Writes into the run's folder what was loaded, what is new, and what was left."""
        run.save_start(self.parent, {"origin": self.origin, "loaded": self.loaded, "new": self.new, "unused": self.unused})

    def __str__(self) -> str:
        parts = [f"weights from {self.origin}: {len(self.loaded)} tensors loaded"]
        if self.new:
            parts.append(f"{len(self.new)} new ({_few(self.new)})")
        if self.unused:
            parts.append(f"{len(self.unused)} not needed ({_few(self.unused)})")
        return ", ".join(parts)


def check_finite(origin: str, model: nn.Module, names: Collection[str]) -> None:
    """Raises UserError where a worker's part of the loaded weights is not finite: a run that ended in NaN starts none."""
    for name, parameter in model.named_parameters():
        values = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if name in names and not bool(torch.isfinite(values).all()):
            raise UserError(f"{origin} has values in {name} that are not finite: choose another checkpoint of it")


def find_start(experiment: Experiment, shapes: Shapes, trust_code: bool = False) -> Start | None:
    """What a fresh run of the experiment starts from; None: from random weights.

    Args:
        shapes: names and (whole) shapes of the experiment's weights.
        trust_code: whether a run's own code may run has been seen to already (by the driver).

    Raises:
        UserError: there are no such weights, or they do not fit; says in what.
    """
    training = experiment.training
    for name, value in (("init-from", training.init_from), ("init-encoder-from", training.init_encoder_from)):
        if value is not None and not value.strip():
            raise UserError(f"--training.{name} is empty: give a run or weights, or leave it out to start from random weights")
    if training.init_from and training.init_encoder_from:
        raise UserError("training.init-from and training.init-encoder-from are both set: choose one")
    if training.fork is not None and training.fork_weights_only:
        return _weights_of_fork(experiment, shapes, trust_code)
    source = training.init_from or training.init_encoder_from
    if source is None:
        return None
    encoder_only = training.init_from is None
    if encoder_only and not experiment.model.encoder_fields:
        what = type(experiment.model).__name__
        raise UserError(f"training.init-encoder-from needs a model with an encoder of its own, such as Perceiver IO; {what} has none")
    origin, config, found, where = _find(source, training.init_checkpoint, experiment, trust_code)
    _check_architecture(origin, config, experiment.model, encoder_only)
    wanted = {name: tuple(shape) for name, shape in shapes.items() if not encoder_only or name.startswith("encoder.")}
    _check_shapes(origin, found, wanted, encoder_only)
    return Start(
        origin=origin,
        loaded=tuple(sorted(wanted)),
        new=tuple(sorted(shapes.keys() - wanted.keys())),
        unused=tuple(sorted(found.keys() - wanted.keys())),
        **where,
    )


def _weights_of_fork(experiment: Experiment, shapes: Shapes, trust_code: bool) -> Start:
    """Those weights of the run that is forked which are of the same name and shape here."""
    assert experiment.training.fork is not None
    run, which = forked_run(experiment.training.fork, experiment.run.storage_path)
    forked_checkpoint(run, which, run.load(trust_code)[0].run.best_metric, experiment.training.fork)
    origin, _, found, where = _find(str(run.folder), which, experiment, trust_code)
    fitting = {name for name, shape in shapes.items() if found.get(name) == tuple(shape)}
    if not fitting:
        raise UserError(f"--training.fork is {experiment.training.fork!r}, but {origin} has no weight of a name and shape of this model's")
    return Start(
        origin=origin,
        loaded=tuple(sorted(fitting)),
        new=tuple(sorted(shapes.keys() - fitting)),
        unused=tuple(sorted(found.keys() - fitting)),
        **where,
    )


def forked_run(fork: str, storage: str) -> tuple[Run, str]:
    """The run that `training.fork` names, and which of its checkpoints: "last", "best" or a step.

    Raises:
        UserError: there is no such run.
    """
    if not fork.strip():
        raise UserError("--training.fork is empty: give a run, RUN or RUN@STEP (is a variable of the shell not set?)")
    if (run := find_run(fork, storage)) is not None:
        return run, "last"
    name, _, which = fork.rpartition("@")
    if name and (which in ("last", "best") or which.isdecimal()) and (run := find_run(name, storage)) is not None:
        return run, which
    raise UserError(
        f"--training.fork is {fork!r}: no run's folder and no name of a run in {storage} (RUN, RUN@best, RUN@last or RUN@STEP is right)"
    )


def forked_checkpoint(run: Run, which: str, metric: str, fork: str) -> CheckpointInfo:
    """The checkpoint of a run that `training.fork` names.

    Raises:
        UserError: there is none such; names the field, and those there are.
    """
    try:
        return run.checkpoint(which, metric)
    except DamagedCheckpoint:
        raise
    except UserError as error:
        raise UserError(f"--fork is {fork!r}: {error}") from None


def trust_start(experiment: Experiment) -> None:
    """Remembers that the user trusts the code of the run that the experiment starts from, if it does start from one."""
    training, storage = experiment.training, experiment.run.storage_path
    source = training.init_from or training.init_encoder_from
    run = forked_run(training.fork, storage)[0] if training.fork else find_run(source, storage) if source else None
    if run is not None:
        trust(run.code())


def _find(source: str, which: str, experiment: Experiment, trust_code: bool) -> tuple[str, ModelConfig, Shapes, dict[str, Any]]:
    """Origin, configuration and shapes of the weights, and where they are (fields of `Start`)."""
    storage = experiment.run.storage_path
    run = find_run(source, storage)
    if run is not None:
        code = run.code()
        if not trust_code:
            run.check_trust(code)
        # Of classes that this process has already, its own version is meant: they may have changed since that run.
        trained, _ = run.load(trust_code, install_code=not code.is_imported)
        if averaged_of(which)[1]:
            raise UserError(f"--training.init-checkpoint is {which!r}: export averaged weights and start from that folder")
        try:
            chosen = run.checkpoint(which, trained.run.best_metric)
        except DamagedCheckpoint:
            raise
        except UserError as error:
            raise UserError(f"--training.init-checkpoint is {which!r}: {error}") from None
        check_files(chosen.path)
        origin = f"run {run.name}, step {chosen.step:,}"
        check_tokenizer(origin, run, trained, experiment)
        return origin, trained.model, stored_shapes(chosen.path), {"checkpoint": chosen.path, "parent": Parent.of(run, chosen)}
    if not Path(source).expanduser().exists() and not is_hub_name(source):
        raise UserError(
            f"nothing to start from at {source!r}: it is no run's folder, no name of a run in {storage}, no file or folder of "
            "weights, and no name on the hub (owner/name)"
        )
    pretrained = read_pretrained(source)
    shapes = {name: tuple(tensor.shape) for name, tensor in pretrained.weights.items()}
    return pretrained.origin, pretrained.config, shapes, {"weights": pretrained.weights}


def check_tokenizer(origin: str, run: Run, trained: Experiment, experiment: Experiment) -> None:
    """Under another tokenizer the same weights would take every id for another piece of text, and nothing would show it."""
    copy, here = run.tokenizer_file, experiment.data.tokenizer
    there = str(copy) if copy.is_file() else trained.data.tokenizer
    if there != here and load_tokenizer(there).fingerprint != load_tokenizer(here).fingerprint:
        raise UserError(f"data.tokenizer is {here}, but {origin} was trained with another: give --data.tokenizer {there}")


def _check_architecture(origin: str, there: ModelConfig, here: ModelConfig, encoder_only: bool) -> None:
    old, new = comparison.resolved_architecture(there), comparison.resolved_architecture(here)
    old_encoder, new_encoder = (_of_encoder(flat, here.encoder_fields) for flat in (old, new))
    changes = differences(old_encoder, new_encoder) if encoder_only else differences(old, new)
    if not changes:
        return
    hint = ""
    if not encoder_only and here.encoder_fields and old_encoder == new_encoder:
        hint = "; its encoder fits: start from that alone with --init-encoder-from"
    what = "encoder" if encoder_only else "model"
    raise UserError(f"{origin} is another {what} than this experiment's ({'; '.join(changes)}){hint}")


def _of_encoder(flat: dict[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in flat.items() if name.startswith(fields)}


def _check_shapes(origin: str, found: Shapes, wanted: Shapes, encoder_only: bool) -> None:
    if missing := sorted(wanted.keys() - found.keys()):
        raise UserError(f"{origin} lacks weights of this model: {_few(missing)}")
    if left := sorted(found.keys() - wanted.keys()):
        if not encoder_only:
            raise UserError(f"{origin} has weights that this model has not: {_few(left)}")
    wrong = [f"{name} is {found[name]}, not {shape}" for name, shape in sorted(wanted.items()) if found[name] != shape]
    if wrong:
        raise UserError(f"{origin} has weights of other shapes than this model: {_few(wrong, '; ')}")


def _few(names: tuple[str, ...] | list[str], separator: str = ", ") -> str:
    """The first few names, and how many more there are."""
    more = len(names) - 4
    return separator.join(names[:4]) + (f" and {more} more" if more > 0 else "")
