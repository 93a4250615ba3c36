"""Optuna's search as Ray Tune runs it, for one objective or two, and with what earlier sweeps found. Loaded where it is asked for."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from ray.tune.search.optuna import OptunaSearch

from perceiver.config import flatten
from perceiver.runs import Run
from tuning.pareto import cost
from tuning.sweeps import Sweep
from tuning.trials import Trial, read_settings, read_trials

logger = logging.getLogger(__name__)
SECONDS = "time_total_s"
"""What Ray Tune calls the seconds of a trial."""
PREFIX = "values/"
"""Before the name of each field, as Optuna knows it: a trial's configuration is {"values": {field: value}}."""


class Optuna(OptunaSearch):
    """TPE (tree-structured Parzen estimator) over a sweep's space, for the metric alone or for the metric and its cost.

    Two objectives are optimized at once (Optuna's multi-objective TPE), so that samples go where trials are not beaten. Finished
    trials of earlier sweeps are added to the study before the first sample is drawn.
    """

    def __init__(self, sweep: Sweep, first: Sequence[Mapping[str, Any]]) -> None:
        """Args:
        sweep: what is searched.
        first: values that are tried before any others.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=sweep.seed)
        points = [{f"{PREFIX}{name}": value for name, value in point.items()} for point in first]
        names, modes = objectives(sweep)
        chosen: dict[str, Any] = {} if len(names) == 1 else {"metric": names, "mode": modes}
        super().__init__(sampler=sampler, points_to_evaluate=points or None, **chosen)
        self._sweep = sweep

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        # Ray Tune knows one metric, that of its schedulers.
        known = {} if not isinstance(self._metric, list) else {"metric": self._metric, "mode": self._mode}
        done = super().set_search_properties(**{"metric": metric, "mode": mode, "config": config, **known}, **spec)
        if done:
            tell(self._ot_study, self._space, self._sweep)
        return done


def objectives(sweep: Sweep) -> tuple[list[str], list[str]]:
    """What a sweep's search looks at: names of results, and whether each is to be small (min) or large (max)."""
    costs = [SECONDS if name == "seconds" else name for name in sweep.objectives[1:]]
    return [sweep.metric, *costs], [sweep.mode, *("min" for _ in costs)]


def tell(study: optuna.Study, space: Mapping[str, Any], sweep: Sweep) -> None:
    """Tells a study the finished trials of a sweep's earlier ones that lie in its space, and logs how many these are."""
    for folder in map(Path, sweep.warm_start):
        added, outside, trials = 0, 0, read_trials(folder)
        for trial in trials:
            values = _results(trial, sweep)
            if trial["status"] != "finished" or values is None:
                continue
            try:
                study.add_trial(optuna.trial.create_trial(params=_parameters(trial, space), distributions=dict(space), values=values))
            except (TypeError, ValueError):  # a value that the space does not have
                outside += 1
            else:
                added += 1
        logger.info(
            f"{added} of the {len(trials)} trials of {folder.name} are known to the search"
            + (f" ({outside} lie outside of the space)" if outside else "")
        )
        lengths = {trial["examples"] for trial in trials if trial["status"] == "finished"}
        if added and read_settings(folder)["preset"] != sweep.preset:
            logger.warning(f"the trials of {folder.name} are of {read_settings(folder)['preset']}, and these of {sweep.preset}")
        if added and len(lengths) > 1:
            logger.warning(f"the trials of {folder.name} are of different lengths: their results are compared all the same")


def _results(trial: Trial, sweep: Sweep) -> list[float] | None:
    """A trial's last value of each objective, as Ray Tune would tell it; None: it has not all of them."""
    measured = [record[sweep.metric] for record in Run(Path(trial["run"])).metrics() if sweep.metric in record]
    values = [measured[-1] if measured else None, *(cost(trial, name) for name in sweep.objectives[1:])]
    found = [float(value) for value in values if value is not None and math.isfinite(value)]
    return found if len(found) == len(values) else None


def _parameters(trial: Trial, space: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's values of the fields of a space; of those that its sweep did not vary, what its configuration has."""
    fields = flatten(Run(Path(trial["run"])).saved()["experiment"])
    names = {name: name.removeprefix(PREFIX) for name in space}
    values = {name: trial["values"].get(field, fields.get(field)) for name, field in names.items()}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
