"""The section `training` of an experiment: what is trained."""

from __future__ import annotations

from typing import Literal

from perceiver.config.checks import check_positive
from perceiver.config.core import Config, UserError, spelled


class TrainingConfig(Config):
    """What is trained: batch, length, seed, precision."""

    global_batch_size: int = 128
    """Examples per optimizer step, over all workers and accumulation steps."""
    max_epochs: int | None = None
    """Length in epochs (passes over the training set)."""
    max_steps: int | None = None
    """Length in optimizer steps. With max-epochs also set, the training ends at whichever comes first."""
    seed: int = 0
    """Seed of initial weights, data order, masks, random shifts and dropout."""
    precision: Literal["fp32", "tf32", "bf16", "float8"] = "fp32"
    """fp32: full precision. tf32: products on GPUs round their inputs to 10 bits of mantissa; several times as fast. bf16: passes use
    bfloat16, updates fp32. float8: the same, but linear layers multiply in 8 bits (H100 and later)."""
    deterministic: bool = False
    """Use deterministic algorithms only, so that a run gives the same bits every time on GPUs as well; slower. On CPUs it always does."""
    skip_not_finite: int = 0
    """Number of steps with a NaN or infinite loss or gradient to skip before the run ends; 0: the first one ends it. Any other number
    makes every step wait for the device."""
    on_spike: Literal["ignore", "skip", "rollback"] = "ignore"
    """What to do when the loss of a step is far above the usual, or not finite. ignore: nothing; skip: leave out its update; rollback:
    return to the weights of the last good checkpoint. The last two make every step wait for the device."""
    spike_deviations: float = 8.0
    """A spike is a loss this many standard deviations above the median of the last 100 steps (estimated by their median deviation)."""
    max_spikes: int = 10
    """Number of spikes to answer in this way. The next one ends the run."""
    init_from: str | None = None
    """Start from the whole model of a run (its folder or name) or of other weights (a folder, a file, a name on the hub)."""
    init_encoder_from: str | None = None
    """Start from the encoder alone of a run or of other weights; the decoder is new."""
    init_checkpoint: str = "best"
    """Which checkpoint of that run: best, last, or a step."""
    fork: str | None = None
    """Start from a checkpoint of another run: RUN (its last one), RUN@best or RUN@STEP; short: --fork. Takes over weights, optimizer
    state, step count and place in the data order. Fields on which these do not depend may be changed."""
    fork_weights_only: bool = False
    """With --fork: take over only the weights that fit; optimizer, step count and data order start afresh. Short: --fork-weights-only."""

    @property
    def in_bf16(self) -> bool:
        """Whether forward and backward passes use bfloat16."""
        return self.precision in ("bf16", "float8")

    def check(self, where: str) -> None:
        check_positive(self, where, "global_batch_size", "max_steps", "max_epochs")
        if self.fork is not None and (other := next((n for n in ("init_from", "init_encoder_from") if getattr(self, n) is not None), None)):
            raise UserError(f"{where}fork and {spelled(where + other)} are both set: choose one")
        if self.fork_weights_only and self.fork is None:
            raise UserError(f"--{spelled(where)}fork-weights-only is True, but there is no fork: give --fork RUN")
        if self.max_steps is None and self.max_epochs is None:
            raise UserError(f"{where}max-steps and {where}max-epochs are both None: set one of them")
        if self.skip_not_finite < 0:
            raise UserError(f"{spelled(where)}skip-not-finite is {self.skip_not_finite} and must not be negative")
        if self.skip_not_finite and self.on_spike != "ignore":
            raise UserError(
                f"--{spelled(where)}skip-not-finite is {self.skip_not_finite} and --{spelled(where)}on-spike is {self.on_spike}: "
                "a loss that is not finite is a spike, so leave out skip-not-finite"
            )
        if not self.spike_deviations > 0:
            raise UserError(f"--{spelled(where)}spike-deviations is {self.spike_deviations} and must be above 0")
        if self.max_spikes < 0:
            raise UserError(f"--{spelled(where)}max-spikes is {self.max_spikes} and must not be negative")
        if self.seed < 0:
            raise UserError(f"{where}seed is {self.seed} and must not be negative")
