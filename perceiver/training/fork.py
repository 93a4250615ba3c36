"""Forks: runs that begin as another run was at one of its checkpoints, with weights, state of the optimizer and place in the order.

And longer runs: whether a run that is continued to a later end is the run that would have been so long from its start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from perceiver.checkpoints import CheckpointInfo, DamagedCheckpoint
from perceiver.config import Experiment, UserError, differences, flatten, spelled, to_dict, type_name
from perceiver.interop import comparison
from perceiver.runs import Parent, Run
from perceiver.training.checkpoint_files import check_files
from perceiver.training.init_from import check_finite, check_tokenizer, forked_checkpoint, forked_run
from perceiver.training.state import TrainState, load_state

AFRESH = "give --fork-weights-only to take the weights that fit and start optimizer, step and order afresh"
LENGTH = frozenset({"training.max_steps", "training.max_epochs"})
"""Fields of the identity that say how long a run is."""


@dataclass(frozen=True)
class Fork:
    """What a run is forked from: found, but not yet compared with it."""

    parent: Run
    checkpoint: CheckpointInfo
    experiment: Experiment
    """The parent's."""
    data: str
    """Digest of the data that the parent is trained on."""

    @property
    def origin(self) -> str:
        return f"run {self.parent.name}, step {self.checkpoint.step:,}"

    def check(self, experiment: Experiment) -> None:
        """Refuses an experiment that cannot go on with the parent's weights, optimizer and order.

        Raises:
            UserError: names the fields that differ.
        """
        changes = differences(_carried(self.experiment), _carried(experiment))
        if changes:
            raise UserError(f"{self.origin} cannot be forked with {'; '.join(changes)}: {AFRESH}")
        check_tokenizer(self.origin, self.parent, self.experiment, experiment)

    def check_data(self, digest: str, steps: int) -> None:
        """Refuses other data than the parent's, whose order would be another, and a length that is over at the start.

        Args:
            digest: of the data to train on.
            steps: the run's length.

        Raises:
            UserError: says which of both.
        """
        if digest != self.data:
            raise UserError(f"--data.source: the prepared data is not what {self.origin} was trained on, so it has another order: {AFRESH}")
        if steps <= self.checkpoint.step:
            raise UserError(
                f"{self.origin} is forked into a run of {steps:,} steps, which are over by then: give a larger --training.max-steps or "
                "--training.max-epochs (steps count on from the parent's), or an earlier step as --fork RUN@STEP"
            )

    def apply(self, state: TrainState) -> None:
        """Puts all of it into a state. Called by all workers.

        Raises:
            UserError: the optimizer's state is of other tensors, or a weight is not finite.
            DamagedCheckpoint: a file is damaged.
        """
        path = self.checkpoint.path
        check_files(path)
        try:
            load_state(path, state, checked=True)
        except DamagedCheckpoint as error:
            raise UserError(
                f"{self.origin} does not hold the optimizer's state for these settings of --optim ({error}): {AFRESH}"
            ) from None
        check_finite(self.origin, state.model, {name for name, _ in state.model.named_parameters()})

    def save(self, run: Run) -> None:
        """Notes it in the run's folder."""
        run.save_start(Parent.of(self.parent, self.checkpoint, whole=True), {"origin": self.origin})


def find_fork(experiment: Experiment, trust_code: bool = False) -> Fork | None:
    """What `training.fork` names, where all of it is to be carried over; else None.

    Args:
        trust_code: whether the parent's own code may run has been seen to already (by the driver).

    Raises:
        UserError: there is no such run or checkpoint.
    """
    training = experiment.training
    if training.fork is None or training.fork_weights_only:
        return None
    run, which = forked_run(training.fork, experiment.run.storage_path)
    code = run.code()
    if not trust_code:
        run.check_trust(code)
    trained, data = run.load(trust_code, install_code=not code.is_imported)
    return Fork(run, forked_checkpoint(run, which, trained.run.best_metric, training.fork), trained, data)


def resolved(experiment: Experiment, checkpoint: CheckpointInfo | None) -> Experiment:
    """The experiment whose workers all begin from this checkpoint, whatever the parent has saved meanwhile."""
    if checkpoint is None or experiment.training.fork is None:
        return experiment
    named, which = forked_run(experiment.training.fork, experiment.run.storage_path)
    place = experiment.training.fork.removesuffix(f"@{which}") if "://" in experiment.training.fork else str(named.folder)
    return replace(experiment, training=replace(experiment.training, fork=f"{place}@{checkpoint.step}"))


def _carried(experiment: Experiment) -> dict[str, Any]:
    """The fields that decide what weights, the optimizer's state and the order are, as they are typed."""
    identity = experiment.identity
    fields = {f"model.{name}": value for name, value in comparison.resolved_architecture(experiment.model).items()}
    fields |= {name: value for name, value in flatten(to_dict(experiment)).items() if name.startswith("model.") and name.endswith("freeze")}
    fields |= {name: value for name, value in identity.items() if name.startswith("data.")}
    fields["training.global_batch_size"] = experiment.training.global_batch_size
    fields["optim.groups"] = [group.pattern for group in experiment.optim.parsed_groups if group.freeze]  # without a state
    fields["optim.optimizer"] = type_name(type(experiment.optim.optimizer)).rpartition(":")[2].lower()
    return {f"--{spelled(name)}": value for name, value in fields.items()}


# ------------------------------------------------------------------------------------------------------------ longer runs


def is_extension(old: Experiment, new: Experiment) -> bool:
    """Whether two experiments differ in their lengths and in nothing else."""
    one, other = old.identity, new.identity
    changed = {name for name in one.keys() | other.keys() if one.get(name, ...) != other.get(name, ...)}
    return bool(changed) and changed <= LENGTH


def check_extension(run: Run, old: Experiment, new: Experiment, old_steps: int, new_steps: int, command: Callable[[int], str]) -> None:
    """Refuses to continue a run to another end where its steps so far are not those of a run of that length.

    Args:
        old, new: its experiment, and the one with the new length.
        old_steps, new_steps: lengths in steps.
        command: the command that forks it at a step in its place.

    Raises:
        UserError: it is shorter, it has been ended early, or the learning rate of steps that were taken would have been another.
    """
    changes = "; ".join(differences(old.identity, new.identity))
    if new_steps < old_steps:
        raise UserError(
            f"run {run.name} is {old_steps:,} steps long and can be continued to more, not to {new_steps:,} ({changes}): "
            "choose another --run.name"
        )
    checkpoints = run.checkpoints()
    taken = checkpoints[-1].step if checkpoints else 0
    if (reason := run.stopped()) is not None:
        raise UserError(f"run {run.name} was ended at step {taken:,} ({reason}), so no more steps follow: fork it: {command(taken)}")
    rates = ((old.optim.learning_rate(step, old_steps), new.optim.learning_rate(step, new_steps)) for step in range(taken))
    same = next((step for step, (before, after) in enumerate(rates) if before != after), taken)
    if same < taken:
        start = next((c.step for c in reversed(checkpoints) if c.step <= same), taken)
        schedule = type(new.optim.schedule).__name__.lower()
        raise UserError(
            f"run {run.name} was to be {old_steps:,} steps long, and with --optim.schedule {schedule} the learning rate from step {same:,} "
            f"on is another in a run of {new_steps:,} ({changes}): fork it: {command(start)}"
        )
