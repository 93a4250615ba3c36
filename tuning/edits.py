"""Sweeps whose settings change after they began: which of their trials still count, and what is drawn anew.

A trial that has ended counts where its values lie in the new space and it keeps to the new constraints. One that was interrupted and fits
is continued by the first new trial of the same values. Any other is set aside with its run, and may count again after another change.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune.search.sample import Function

from perceiver.comparison import SEED
from perceiver.config import Experiment, UserError, differences, flatten, to_dict
from perceiver.disk import read_json, write_json
from perceiver.terminal import number_of
from tuning.constraints import Refused, refuse
from tuning.replicates import sample_of
from tuning.spaces import draw, grids, holds, plain
from tuning.sweeps import Sweep, trial_experiment
from tuning.trial import VALUES, WAITING
from tuning.trials import TRIALS, Trial, read_events, read_trials

logger = logging.getLogger(__name__)

ASIDE = "aside"
"""In a sweep's folder: runs of trials that do not fit its settings any more."""
EDIT = "edit"
"""In a sweep's settings: what was made of its trials when they changed last."""
FIXED = {
    "preset": "trials would be of another experiment",
    "experiment": "trials would be of another experiment",
    "overrides": "trials would be trained or measured in another way",
    "reports": "trials would be measured at other steps",
}
"""Settings that new trials must share with those that are there, and what would come of another value."""
Values = dict[str, Any]
"""Values of the fields that are varied; with seeds that of the seed, too."""


@dataclass(frozen=True)
class Edit:
    """What a change of settings made of a sweep's trials."""

    number: int
    """How often the settings have changed."""
    kept: dict[str, Values]
    """Trials that count, with their values of the fields that are varied now."""
    waiting: dict[str, Values]
    """Trials that were interrupted and continue."""
    aside: dict[str, str]
    """Trials that do not fit, and why."""
    points: list[Values] | None
    """Values of the trials that are still to run; None: the search draws `new` of them."""
    new: int
    """How many trials are still to run."""
    first: int
    """Number of the first of them."""

    @property
    def size(self) -> int:
        """How many trials there will be."""
        return len(self.kept) + self.new

    def lines(self) -> list[str]:
        """What became of the trials that were there, for a person."""
        lines = [f"kept: {number_of(len(self.kept), 'trial')}" + (f" ({_some(self.kept)})" if self.kept else "")]
        if self.waiting:
            lines.append(f"continued: {number_of(len(self.waiting), 'interrupted trial')} ({_some(self.waiting)})")
        lines += [f"set aside: {name} ({why})" for name, why in self.aside.items()]
        lines.append(f"drawn from the space as it is now: {number_of(self.new - len(self.waiting), 'trial')}")
        return lines


def read_edit(settings: Mapping[str, Any]) -> Edit | None:
    """What the last change of a sweep's settings made of its trials; None: there was none."""
    found = settings.get(EDIT)
    return None if found is None else Edit(**found)


def check_edit(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    before: Experiment | None,
    now: Experiment,
    name: str,
    trained: Sequence[str] | None = None,
) -> None:
    """Refuses changes with which the trials that are there and new ones could not be compared.

    Args:
        old, new: settings, as they are saved.
        before, now: what trials vary; `before` is None where the old one cannot be made any more.
        name: of the sweep.
        trained: how the experiments differ, field by field; None: not known.

    Raises:
        UserError: names the setting, and what to do.
    """
    other = f"choose another --name (with --search optuna --warm-start {name} it would know what was found here)"
    for field, why in FIXED.items():
        if old.get(field) == new.get(field) or (field == "overrides" and before is not None and _same_but_for_machines(before, now)):
            continue
        if field == "experiment" and trained:
            raise UserError(f"--resume: what the sweep trains has changed ({'; '.join(trained)}), so that {why}: {other}")
        raise UserError(f"--resume: {field} of the sweep was {old.get(field)!r} and is {new.get(field)!r}, so that {why}: {other}")
    if "pbt" in (old["scheduler"], new["scheduler"]):
        raise UserError(f"--resume: trials of the scheduler pbt change their values while they train, and fit no other settings: {other}")


def _same_but_for_machines(before: Experiment, now: Experiment) -> bool:
    changed = differences(flatten(to_dict(before)), flatten(to_dict(now)))
    return all(line.startswith("parallel.") for line in changed)


def plan_edit(folder: Path, sweep: Sweep, number: int) -> Edit:
    """What becomes of a sweep's trials under other settings. Nothing is changed yet: that is `arrange`.

    Args:
        folder: of the sweep.
        sweep: with the new settings.
        number: how often they have changed, with this time.
    """
    base = sweep.experiment()
    kept: dict[str, Values] = {}
    waiting: dict[str, Values] = {}
    aside: dict[str, str] = {}
    fields: Values = plain(flatten(to_dict(base)))
    for trial in (trial for place in (TRIALS, WAITING, ASIDE) for trial in read_trials(folder, place)):
        values, why = _fitting(trial, sweep, fields)
        ended = trial["status"] != "unfinished"
        if not why and trial["costs"]:
            try:
                refuse(sweep.constraints, trial_experiment(base, values), trial["costs"])
                ended = ended and trial["status"] != "refused"  # of a constraint that holds no more: it can be trained now
            except Refused as error:
                why = "" if trial["status"] == "refused" else str(error)
        if why:
            aside[trial["trial"]] = why
        else:
            (kept if ended else waiting)[trial["trial"]] = values
    points = _missing(sweep, kept, waiting, np.random.RandomState([abs(sweep.seed), number]))
    if points is None:  # a search draws
        new = max(0, sweep.size - len(kept))
    else:
        new = len(points)
        wanted = [plain(point) for point in points]
    for name in list(waiting):
        if len(waiting) > new if points is None else waiting[name] not in wanted:
            del waiting[name]
            aside[name] = f"there are {number_of(len(kept), 'trial')} that have ended, and no more are asked for"
    numbers = [int(found[1]) for name in _names(folder) if (found := re.fullmatch(r"trial-(\d+)", name))]
    return Edit(number, kept, waiting, aside, points, new, max(numbers, default=-1) + 1)


def _fitting(trial: Trial, sweep: Sweep, base: Mapping[str, Any]) -> tuple[Values, str]:
    """A trial's values of the fields that are varied now, and why it does not fit them; "": it does."""
    had = trial["values"]
    now = {SEED, *sweep.space} if sweep.seeds else set(sweep.space)
    if sweep.points:
        now = {name for point in sweep.points for name in point} | ({SEED} if sweep.seeds else set())
    if gone := [name for name in had if name not in now and plain(had[name]) != base[name]]:
        return had, f"{gone[0]} is {had[gone[0]]!r} there, and no longer varied"
    values = {name: had.get(name, base[name]) for name in [*(name for name in had if name in now), *sorted(now - had.keys())]}
    if sweep.seeds and values[SEED] not in sweep.seeds:
        return values, f"its seed {values[SEED]} is none of {', '.join(map(str, sweep.seeds))}"
    if sweep.points:
        return values, "" if sample_of({"values": values}) in _samples(sweep.points) else "it is none of the points"
    if _is_default(values, sweep, base):
        return values, ""
    outside = [name for name, domain in sweep.space.items() if not holds(domain, values[name], values)]
    return values, f"{outside[0]} is {values[outside[0]]!r} there, which the space does not have now" if outside else ""


def _is_default(values: Mapping[str, Any], sweep: Sweep, base: Mapping[str, Any]) -> bool:
    """Whether values are the preset's own, which are tried first wherever the space is."""
    own = [name for name, domain in sweep.space.items() if not isinstance(domain, Function)]
    rest = [name for name in sweep.space if name not in own]
    return (
        bool(own) and not sweep.has_grid and all(values[name] == base[name] for name in own)
        and all(holds(sweep.space[name], values[name], values) for name in rest)
    )  # fmt: skip


def _missing(
    sweep: Sweep, kept: Mapping[str, Values], waiting: Mapping[str, Values], random_state: np.random.RandomState
) -> list[Values] | None:
    """Values of the trials that a sweep still lacks, interrupted ones first; None: its search draws them."""
    if sweep.search == "optuna":
        return None
    done = [plain(values) for values in kept.values()]
    if sweep.points:
        return [point for point in _seeded(sweep, sweep.points) if plain(point) not in done]
    base = plain(flatten(to_dict(sweep.experiment())))
    begun: list[Values] = []
    drawn: list[Values] = []
    for combination in grids(sweep.space):

        def of_grid(values: Values, chosen: Values = combination) -> bool:
            return all(plain(values[name]) == plain(value) for name, value in chosen.items())

        ended, left = (list(filter(of_grid, found.values())) for found in (kept, waiting))
        if sweep.seeds:  # a sample is one trial for each seed: those that a sample lacks come first
            samples = _samples([*ended, *left])
            begun += [values for values in _seeded(sweep, samples) if plain(values) not in done]
        else:
            samples = [*ended, *left[: max(0, sweep.trials - len(ended))]]
            begun += samples[len(ended) :]
        for place in range(sweep.trials - len(samples)):
            own: Values = {}
            if not place and not sweep.has_grid and not any(_is_default(values, sweep, base) for values in samples):
                own = {name: value for name, value in sweep.default().items() if not isinstance(sweep.space[name], Function)}
            drawn += _seeded(sweep, [draw(sweep.space, random_state, {**combination, **own})])
    return begun + drawn


def _seeded(sweep: Sweep, samples: Sequence[Mapping[str, Any]]) -> list[Values]:
    """Each sample under each seed of a sweep."""
    return [{**sample, **({SEED: seed} if sweep.seeds else {})} for sample in samples for seed in sweep.seeds or (0,)]


def _samples(trials: Sequence[Mapping[str, Any]]) -> list[Values]:
    """The values of trials without their seeds, each once."""
    found: list[Values] = []
    for values in trials:
        if (sample := plain(sample_of({"values": values}))) not in found:
            found.append(sample)
    return found


def _names(folder: Path) -> set[str]:
    """Names that trials of a sweep have or had."""
    there = {path.name for place in (TRIALS, WAITING, ASIDE) for path in (folder / place).glob("*")}
    return there | {event["trial"] for event in read_events(folder)}


def arrange(folder: Path, edit: Edit) -> None:
    """Moves the runs of trials to where they belong. Done again after an interruption it comes to the same."""
    places = {**dict.fromkeys(edit.kept, TRIALS), **dict.fromkeys(edit.waiting, WAITING), **dict.fromkeys(edit.aside, ASIDE)}
    for name, place in places.items():
        for other in (TRIALS, WAITING, ASIDE):
            if other != place and (folder / other / name).exists():
                (folder / place).mkdir(exist_ok=True)
                os.rename(folder / other / name, folder / place / name)
    for place, trials in ((TRIALS, edit.kept), (WAITING, edit.waiting)):
        for name, values in trials.items():
            path = folder / place / name / VALUES
            if path.exists() and read_json(path) != plain(values):
                write_json(path, values)


def _some(names: Mapping[str, Any]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")
