"""Ray Tune's schedulers and search algorithms, as the trials of a sweep need them.

Time is counted in examples, so that batch sizes can be compared. A trial at its last report is left alone: it ends by itself, with
its result written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, HyperBandScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.sample import Function

from perceiver.runs import Run
from tuning.edits import Edit
from tuning.spaces import plain
from tuning.sweeps import Sweep
from tuning.trial import run_name
from tuning.trials import TRIALS, read_events

PAUSING = ("hyperband", "pbt")
"""Schedulers that pause trials to let others catch up: all trials have to be known to them from the start."""
HEAD = "node:__internal_head__"
"""A resource of which every Ray cluster has 1."""
MOST_PAUSING = 30
"""Largest number of trials at once where trials are paused: Ray Train takes 0.001 of HEAD for each training."""


class ToTheEnd(TrialScheduler):
    """A scheduler without a word on last reports."""

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self.CONTINUE if result["last"] else super().on_trial_result(controller, trial, result)


class Asha(ToTheEnd, ASHAScheduler):
    """Asynchronous successive halving (arXiv 1810.05934). In a sweep that continues it receives again what trials have reported."""

    def __init__(self, folder: Path, earlier: Sequence[str] = (), **settings: Any) -> None:
        """Args:
        folder: of the sweep.
        earlier: trials that ended before its settings changed, by which the others are measured, too.
        settings: of Ray Tune's scheduler.
        """
        super().__init__(**settings)
        self._folder, self._earlier = folder, list(earlier)

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        while self._earlier:
            self._add_earlier(controller, self._earlier.pop(0))
        super().on_trial_add(controller, trial)
        if not trial.has_reported_at_least_once:
            return
        for event in read_events(self._folder):
            if event["event"] == "report" and event["trial"] == run_name(trial.trial_id):
                reported = {"examples": event["examples"], self._metric: event["value"]}
                ASHAScheduler.on_trial_result(self, controller, trial, reported)

    def _add_earlier(self, controller: Any, name: str) -> None:
        ended = SimpleNamespace(trial_id=name)
        super().on_trial_add(controller, ended)
        run = Run(self._folder / TRIALS / name)
        measured = {record["step"]: record[self._metric] for record in run.metrics() if record.get(self._metric) is not None}
        for event in read_events(self._folder):
            if event["event"] == "report" and event["trial"] == name and event["step"] in measured:
                reported = {"examples": event["examples"], self._metric: measured[event["step"]]}
                ASHAScheduler.on_trial_result(self, controller, ended, reported)


class Population(ToTheEnd, PopulationBasedTraining):
    """Population-based training (arXiv 1711.09846)."""

    def _checkpoint_or_exploit(self, trial: Any, controller: Any, upper: list, lower: list) -> None:
        # Ray saves winners alone. Whoever reports first is none yet, and a loser that reports after it would find nothing to take over.
        super()._checkpoint_or_exploit(trial, controller, upper if trial in lower else [*upper, trial], lower)


class HyperBand(ToTheEnd, HyperBandScheduler):
    """HyperBand (arXiv 1603.06560). In a sweep that continues it makes its brackets anew of the trials that are left."""

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        if not trial.is_finished():  # its bracket would wait for it
            super().on_trial_add(controller, trial)

    def _process_bracket(self, controller: Any, bracket: Any) -> str:
        action = super()._process_bracket(controller, bracket)
        bracket.is_being_processed = False  # Ray leaves it on, and the others would wait for a trial that fails later
        return action


def scheduler(sweep: Sweep, examples: int, folder: Path, earlier: Sequence[str] = ()) -> Any:
    """The scheduler of a sweep in a folder, whose whole trainings take the given number of examples; `earlier`: see `Asha`."""
    match sweep.scheduler:
        case "asha":
            return Asha(
                folder, earlier, time_attr="examples", max_t=examples + 1, grace_period=max(1, int(sweep.grace * examples)),
                reduction_factor=sweep.reduction,
            )  # fmt: skip
        case "hyperband":
            # Its brackets follow from the longest training in units of the shortest.
            return HyperBand(time_attr="reports", max_t=sweep.reports, reduction_factor=sweep.reduction, stop_last_trials=False)
        case "pbt":
            return Population(
                time_attr="examples", perturbation_interval=max(1, int(sweep.perturb * examples)),
                hyperparam_mutations={"values": dict(sweep.space)}, quantile_fraction=0.25 if sweep.trials >= 4 else 0.5,
            )  # fmt: skip
    return FIFOScheduler()


def slot(sweep: Sweep, concurrent: int) -> dict[str, float]:
    """What a trial asks Ray for, besides what its workers do, so that no more than `concurrent` run.

    Where trials are paused the search does not limit them, as it counts the paused ones; a share of HEAD does of which one more
    would not fit. Ray counts in ten-thousandths and cuts off what is below: half of one more says which one is meant.
    """
    if sweep.scheduler not in PAUSING:
        return {"CPU": 0.001}
    return {HEAD: (10_000 // (min(concurrent, MOST_PAUSING) + 1) + 1.5) / 10_000}


def search(sweep: Sweep, concurrent: int, edit: Edit | None = None) -> Any:
    """What draws the samples. The first is the preset's own values, so that a sweep says what it gained; what a function draws is drawn for
    these, too. After a change of the settings it is what was interrupted, and what has ended is known to the search.
    """
    own = {name: value for name, value in sweep.default().items() if not isinstance(sweep.space[name], Function)}
    first = [] if sweep.points or sweep.has_grid or not own else [{"values": own}]
    if edit is not None:
        there = [*edit.kept.values(), *edit.waiting.values()]
        first = [{"values": values} for values in edit.waiting.values()] + [point for point in first if plain(point["values"]) not in there]
    if sweep.search == "optuna":
        from tuning.optuna_search import Optuna

        algorithm = Optuna(sweep, [point["values"] for point in first])
        return algorithm if sweep.scheduler in PAUSING else ConcurrencyLimiter(algorithm, max_concurrent=concurrent)
    at_once = 0 if sweep.scheduler in PAUSING else concurrent  # 0: no limit but that of `slot`
    # With seeds a sample is drawn once and trained under each of them. After a change all values are listed.
    generator = BasicVariantGenerator(
        points_to_evaluate=first if edit is None else [], random_state=sweep.seed, max_concurrent=at_once,
        constant_grid_search=bool(sweep.seeds),
    )  # fmt: skip
    generator._total_samples = edit.first if edit is not None else 0  # by which it numbers trials: no new one is called as an earlier one
    return generator
