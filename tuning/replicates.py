"""Sweeps whose samples are trained under several seeds each: they are ranked by the mean over their seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from perceiver.comparison import SEED
from perceiver.significance import Group, welch

Trial = dict[str, Any]
"""See `tuning.trials.read_trials`."""


def sample_of(trial: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's values without its seed."""
    return {name: value for name, value in trial["values"].items() if name != SEED}


def is_default(trial: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a trial has the preset's own values of all fields that are varied, but for those that functions draw."""
    drawn = {name for name, domain in settings["space"].items() if str(domain).startswith("Function ")}
    own, values = settings["default"], sample_of(trial)
    return bool(own.keys() - drawn) and all(_plain(values.get(name)) == _plain(value) for name, value in own.items() if name not in drawn)


def _plain(value: Any) -> Any:
    """A value as files have it, in which a sequence is a list."""
    return list(value) if isinstance(value, tuple) else value


def samples(trials: Sequence[Trial]) -> list[list[Trial]]:
    """The trials by their samples, in the order in which the samples come first."""
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        found.setdefault(json.dumps(sample_of(trial), sort_keys=True), []).append(trial)
    return list(found.values())


def ranked(trials: Sequence[Trial], settings: Mapping[str, Any]) -> list[Trial]:
    """Trials by the mean over the seeds of their sample, best first; samples whose seeds have not all ended come after the others."""
    sign, wanted = (-1 if settings["mode"] == "max" else 1), len(settings["seeds"])

    def place(sample: list[Trial]) -> tuple[bool, bool, float]:
        values = _values(sample)
        return not values, len(values) < wanted, sign * sum(values) / len(values) if values else 0.0

    return [trial for sample in sorted(samples(trials), key=place) for trial in sample]


def rows(trials: Sequence[Trial], settings: Mapping[str, Any]) -> list[list[Any]]:
    """A table of the samples, after its header: place, mean, standard deviation, 95% t-interval, seeds, values of the fields."""
    fields = sorted({field for trial in trials for field in sample_of(trial)})
    found: list[list[Any]] = [["", f"mean {settings['metric']}", "std", "95% t-interval", "seeds", *fields]]
    for number, sample in enumerate(samples(trials), 1):
        values, own = _values(sample), sample_of(sample[0])
        group = Group("", (), tuple(values))
        spread = ["", "", ""]
        if values:
            spread = [f"{group.mean:.4f}", "", ""]
        if len(values) > 1:
            spread[1:] = [f"{group.deviation:.4f}", f"{group.mean - group.margin:.4f} to {group.mean + group.margin:.4f}"]
        found.append([number, *spread, f"{len(values)} of {len(settings['seeds'])}", *(own.get(field) for field in fields)])
    return found


def gain(trials: Sequence[Trial], settings: Mapping[str, Any]) -> tuple[str, bool | None]:
    """The best sample against the preset's own values, by their means over seeds; and whether it is better. None: not known."""
    found = samples(trials)
    default = next((sample for sample in found if is_default(sample[0], settings)), None)
    if default is None or not _values(default):
        return "the preset's own values were not among the trials, or have no result", None
    if default is found[0]:
        return "no sample is better than the preset's own values, by the mean over seeds", False
    best, own = Group("", (), tuple(_values(found[0]))), Group("", (), tuple(_values(default)))
    better = best.mean > own.mean if settings["mode"] == "max" else best.mean < own.mean
    text = (
        f"over {len(settings['seeds'])} seeds the best sample has a mean {settings['metric']} of {best.mean:.4f}, the preset's own values "
        f"{own.mean:.4f}: {'better' if better else 'not better'}"
    )
    if (difference := welch(best, own)) is not None:
        interval = f"95% interval {difference.low:+.4f} to {difference.high:+.4f}"
        text += (
            f" (difference {difference.value:+.4f}, {interval}, p {difference.p:.2g}; as of a sample chosen in advance, not of the "
            f"best of {len(found)})"
        )
    return text, better


def _values(sample: Sequence[Trial]) -> list[float]:
    return [trial["value"] for trial in sample if trial["value"] is not None and trial["status"] == "finished"]
