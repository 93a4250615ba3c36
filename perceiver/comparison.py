"""Runs beside each other: in which fields, code and data they differ, what they reached at which cost, and whether that is chance.

Reads the files of the runs' folders; needs no PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from perceiver.checkpoints import CheckpointInfo, is_better
from perceiver.config import UserError, digest, flatten, nearest
from perceiver.evaluations import Evaluation, evaluations
from perceiver.runs import Run
from perceiver.significance import Difference, Group, bootstrap

if TYPE_CHECKING:
    import numpy as np

SEED = "training.seed"
AXES = ("step", "examples", "flops", "hours")
"""What a curve may be drawn over."""
LABELS = dict(zip(AXES, ("optimizer step", "examples", "FLOPs", "hours of training"), strict=True))
_IDENTITY = ("task", "model", "data", "optim", "training")
_NEVER_DIFFER = ("run.name", "run.storage", "data.root")
"""Fields that say where a run is and not what it is."""
_NOT_EVALUATED = "not evaluated on the same data: `perceiver evaluate` both, with the same --source or without any"


@dataclass(frozen=True)
class Point:
    """A value of a metric, and what had been spent by then."""

    step: int
    value: float
    examples: int
    flops: float | None
    """None: the run does not say what an example costs, as it was begun by a version before that was recorded."""
    hours: float | None
    """Of training, validations and checkpoints, without starts. None: not recorded."""


class ComparedRun:
    """A run, read for a comparison.

    Raises:
        UserError: its files are damaged.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.name = run, run.name
        content = run.saved()
        self.fields: dict[str, Any] = flatten(content["experiment"])
        self.digest = str(content.get("data", ""))
        self.version = str(content.get("version", ""))
        self.flops_per_example: float | None = content.get("flops_per_example")
        # One without records of its own (the mean of checkpoints) has what it was evaluated to.
        self.records = run.metrics() or [
            {"step": found.step, **found.metrics} for found in self.evaluations if found.digest == self.digest and not found.averaged
        ]
        self._curves: dict[str, list[Point]] = {}

    @cached_property
    def checkpoints(self) -> list[CheckpointInfo]:
        return self.run.checkpoints()

    @cached_property
    def higher_is_better(self) -> frozenset[str]:
        """Metrics of which higher values are better."""
        return frozenset().union(*(checkpoint.higher_is_better for checkpoint in self.checkpoints))

    @cached_property
    def code_digest(self) -> str:
        return self.run.code().digest

    @property
    def workers(self) -> int:
        return int(self.fields.get("parallel.workers") or 1)

    @property
    def identity(self) -> dict[str, Any]:
        """Fields that say what is trained."""
        return {name: value for name, value in self.fields.items() if name.partition(".")[0] in _IDENTITY and name != "data.root"}

    @cached_property
    def replicate_of(self) -> str:
        """The same for runs that differ in their seeds alone."""
        return digest([{k: v for k, v in self.identity.items() if k != SEED}, self.digest, self.code_digest])

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        return evaluations(self.run)

    @cached_property
    def _hours(self) -> list[tuple[int, float]]:
        """Hours of training by the end of steps, from the rates of the records: what lies between two of them, with validations."""
        found, hours, before = [], 0.0, 0
        for record in self.records:
            if not {"step_seconds", "goodput", "data_wait"} <= record.keys():
                continue
            computing = record["step_seconds"] * max(record["step"] - before, 1)
            share = record["goodput"]
            hours += (computing * (1 - record["data_wait"]) / share if share > 0 else computing) / 3600
            before = record["step"]
            found.append((before, hours))
        return found

    def curve(self, metric: str) -> list[Point]:
        """All values of a metric that are numbers."""
        if metric not in self._curves:
            self._curves[metric] = self._points(metric)
        return self._curves[metric]

    def _points(self, metric: str) -> list[Point]:
        batch, found, hours = int(self.fields.get("training.global_batch_size") or 0), [], iter(self._hours)
        spent, upcoming = None, next(hours, None)
        for record in self.records:
            step, value = record["step"], record.get(metric)
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                continue
            while upcoming is not None and upcoming[0] <= step:
                spent, upcoming = upcoming[1], next(hours, None)
            examples = step * batch
            flops = None if self.flops_per_example is None else examples * self.flops_per_example
            found.append(Point(step, float(value), examples, flops, spent))
        return found

    def best(self, metric: str) -> Point | None:
        """The best value of a metric, of equal ones the first."""
        best, higher = None, metric in self.higher_is_better
        for point in self.curve(metric):
            if best is None or is_better(point.value, best.value, higher):
                best = point
        return best

    def hours(self) -> float | None:
        """Hours of training so far."""
        return self._hours[-1][1] if self._hours else None


def read_runs(runs: Iterable[Run]) -> list[ComparedRun]:
    """Runs to compare.

    Raises:
        UserError: one is damaged; names it.
    """
    found = []
    for run in runs:
        try:
            found.append(ComparedRun(run))
        except UserError as error:
            raise UserError(f"run {run.folder} is damaged: {error}") from None
    return found


def chosen_metric(runs: Sequence[ComparedRun], name: str | None) -> str:
    """The metric to compare by: of a name, with or without "val_", or that which the first run chooses its best checkpoint by.

    Raises:
        UserError: no run has it.
    """
    known = {key for run in runs for record in run.records for key in record if key != "step"}
    wanted = name or str(runs[0].fields.get("run.best_metric") or "val_loss")
    for candidate in (wanted, f"val_{wanted}"):
        if candidate in known:
            return candidate
    if name is None or not known:
        return wanted
    raise UserError(f"--metric {name}: no run has a metric of this name{nearest(name, known)}; there are {', '.join(sorted(known))}")


# ------------------------------------------------------------------------------------------------------ what is different


def different_fields(runs: Sequence[ComparedRun]) -> dict[str, list[Any]]:
    """Fields that are not the same in all runs, with the value of each run; None where a run has no such field."""
    names = dict.fromkeys(name for run in runs for name in run.fields if name not in _NEVER_DIFFER)
    rows = {name: [run.fields.get(name) for run in runs] for name in names}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def different_code(runs: Sequence[ComparedRun]) -> dict[str, list[str]]:
    """The files of code that differ from the first run's, by the names of runs; nothing for those with the same."""
    first = runs[0].run.code()
    return {
        run.name: first.differences(run.run.code()) for run in runs[1:] if run.code_digest != runs[0].code_digest
    }  # reads the files again only where they differ


# ------------------------------------------------------------------------------------------------------- whether it is real


def paired_differences(runs: Sequence[ComparedRun], metric: str) -> tuple[list[tuple[Difference | None, str]], str]:
    """Of each run after the first, what its metric is more than the first one's on the same examples, by a paired bootstrap.

    Returns:
        For each run the difference and the number of examples or, where there is none, why; and the name of the metric, which is that of
        the loss where `metric` is no mean over examples.
    """
    column = metric.removeprefix("val_").partition("/")[0]
    results: list[tuple[Difference | None, str]] = []
    tables: dict[str, dict[str, np.ndarray]] = {}
    chosen = [_comparable(runs[0], run) for run in runs[1:]]
    if not any(chosen):  # NumPy, which takes most of a comparison's time, is not needed
        return [(None, _NOT_EVALUATED)] * len(chosen), metric
    import numpy as np

    if not all(column in _examples(pair[number], tables) for pair in chosen if pair for number in (0, 1)):
        column = "loss"
    waiting: dict[str, list[tuple[int, Mapping[str, np.ndarray]]]] = {}
    for place, pair in enumerate(chosen):
        if pair is None:
            results.append((None, _NOT_EVALUATED))
            continue
        mine, others = (_examples(evaluation, tables) for evaluation in pair)
        if len(mine["targets"]) != len(others["targets"]) or not np.array_equal(mine["targets"], others["targets"]):
            results.append((None, "the same data in other pieces: their examples cannot be paired"))
            continue
        results.append((None, f"{len(mine['targets']):,} examples"))
        waiting.setdefault(str(pair[0].path), []).append((place, others))
    for path, group in waiting.items():
        base = tables[path]
        found = bootstrap(base["targets"], np.stack([others[column] - base[column] for _, others in group]))
        for (place, _), difference in zip(group, found, strict=True):
            results[place] = (difference, results[place][1])
    return results, f"val_{column}"


def grouped(runs: Sequence[ComparedRun], metric: str, by: str | None = None) -> list[Group]:
    """Runs by the value of a field or, without one, those that differ in their seeds alone; in the order of their first runs.

    Raises:
        UserError: no run has the field.
    """
    found: dict[str, list[ComparedRun]] = {}
    if by is not None:
        by = by.removeprefix("--").replace("-", "_")
        names = {name for run in runs for name in run.fields}
        if by not in names:
            raise UserError(f"--by {by}: no run has a field of this name{nearest(by, names)}")
    for run in runs:
        found.setdefault(run.replicate_of if by is None else f"{by} {run.fields.get(by)}", []).append(run)
    groups = []
    for key, members in found.items():
        best = [run.best(metric) for run in members]
        name = key if by is not None else members[0].name
        groups.append(Group(name, tuple(members), tuple(point.value for point in best if point is not None)))
    return groups


def _comparable(first: ComparedRun, second: ComparedRun) -> tuple[Evaluation, Evaluation] | None:
    """Evaluations of two runs on the same data with what each example adds: that of the run's own data, and the latest checkpoint's, and
    of averaged weights only where there is no other.
    """
    mine, others = (
        {each.digest: each for each in sorted(run.evaluations, key=lambda found: (not found.averaged, found.step)) if each.has_examples}
        for run in (first, second)
    )
    shared = sorted(mine.keys() & others.keys(), key=lambda found: (found != first.digest, found))
    return (mine[shared[0]], others[shared[0]]) if shared else None


def _examples(evaluation: Evaluation, kept: dict[str, dict[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    path = str(evaluation.path)
    if path not in kept:
        kept[path] = evaluation.examples()
    return kept[path]
