"""`perceiver train EXPERIMENT --seeds 5`: the same training under several seeds, each a run of its own, and one table of them."""

from __future__ import annotations

import logging
import math
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from perceiver.config import Experiment, UserError
from perceiver.runs import Run
from ray_jobs.program import STARTED_AS, started_as

logger = logging.getLogger(__name__)
OPTION = "--seeds"
MOST = 1000
"""Replicates of one command."""
CONFIDENCE = 0.95


def take_seeds(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of `--seeds` on a command line (None: it is not there), and the other words.

    Raises:
        UserError: there is no value.
    """
    rest, value = [], None
    words = iter(argv)
    for word in words:
        name, equals, given = word.partition("=")
        if name != OPTION:
            rest.append(word)
            continue
        value = given if equals else next(words, "")
        if not value.strip() or value.startswith("--"):
            raise UserError(f"{OPTION} has no value: give a number of seeds ({OPTION} 5), or the seeds ({OPTION} 0,1,7)")
    return value, rest


def parse_seeds(value: str, first: int) -> list[int]:
    """The seeds that `--seeds` names: N seeds from `first` on, or those of a list with commas.

    Raises:
        UserError: it is neither.
    """
    parts = [part.strip() for part in value.split(",")]
    if "," in value and parts[-1] == "":  # "7," is the seed 7 alone
        parts.pop()
    if not parts or not all(part.isascii() and part.isdecimal() for part in parts):
        raise UserError(f"{OPTION} is {value!r} and must be a number of seeds ({OPTION} 5), or seeds with commas ({OPTION} 0,1,7)")
    numbers = [int(part) for part in parts]
    seeds = numbers if "," in value else list(range(first, first + min(numbers[0], MOST + 1)))
    if not 1 <= len(seeds) <= MOST:
        raise UserError(f"{OPTION} is {value!r} and must name 1 to {MOST} seeds")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{OPTION} is {value!r} and names a seed twice")
    return seeds


def replicate(experiment: Experiment, seed: int) -> Experiment:
    """The experiment under a seed, as a run of its own."""
    return replace(
        experiment,
        training=replace(experiment.training, seed=seed),
        run=replace(experiment.run, name=f"{experiment.run_name}-seed-{seed}"),
    )


def run_of(made: Experiment) -> Run:
    """The run of a replicate."""
    return Run(Path(made.run.storage_path).expanduser().absolute() / made.run_name)


def train_seeds(
    experiment: Experiment,
    seeds: Sequence[int],
    train: Callable[[Experiment], Mapping[str, float]],
    baselines: Callable[[], Mapping[str, float]],
    at_once: int = 1,
) -> bool:
    """Trains under each seed and logs a table of the results; whether all came to their end.

    Runs that are finished are not trained again. One that fails after it has begun costs its own line alone.

    Args:
        train: trains one experiment to its end; called by several threads where `at_once` is more than 1.
        baselines: what metrics are without training; asked for at the end.
        at_once: trainings side by side.

    Raises:
        UserError: a mistake that would end every training, as the first that meets it says.
    """
    begun: list[int] = []

    def one(seed: int) -> Mapping[str, float] | str:
        made = replicate(experiment, seed)
        begun.append(seed)
        logger.info(f"seed {seed} ({len(begun)} of {len(seeds)})")
        try:
            return train(made)
        except Exception as error:
            if run_of(made).failure() is None:
                raise
            logger.warning(f"seed {seed} failed: {error}")
            return str(error)

    results: dict[int, Mapping[str, float] | str] = {}
    if at_once == 1:
        for seed in seeds:
            results[seed] = one(seed)
    else:
        with ThreadPoolExecutor(at_once) as pool:
            waiting = {seed: pool.submit(one, seed) for seed in seeds}
            try:
                for seed, future in waiting.items():
                    results[seed] = future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    for line in table(results, baselines()):
        logger.info(line)
    return not any(isinstance(result, str) for result in results.values())


class Processes:
    """Trainings as processes of their own, which join one cluster: several at once, each as its own command would run it.

    While it is open, Ctrl-C and SIGTERM are handed on to them, and each saves a checkpoint.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        """Args:
        words: arguments of `ray_jobs.train` without a seed and a name, which are added to them.
        environment: of the processes.
        """
        self._words, self._environment = tuple(words), {**environment, STARTED_AS: started_as()}
        self._running: set[subprocess.Popen[str]] = set()
        self._signal: int | None = None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def train(self, made: Experiment) -> Mapping[str, float]:
        """Trains one replicate to its end; its lines are logged behind its seed.

        Raises:
            KeyboardInterrupt: it was interrupted.
            UserError: its process ended without a result; says why.
        """
        if self._signal is not None:
            raise KeyboardInterrupt
        seed = made.training.seed
        command = [sys.executable, "-m", "ray_jobs.train", *self._words, f"--training.seed={seed}", f"--run.name={made.run_name}"]
        # A session of its own: a terminal would send Ctrl-C to all of them besides, and a second one ends a training at once.
        process = subprocess.Popen(
            command, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip
        self._running.add(process)
        last = ""
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip():
                    last = line.rstrip()
                    logger.info(f"seed {seed}: {last}")
            status = process.wait()
        finally:
            self._running.discard(process)
        result = run_of(made).result()
        if self._signal is not None and result is None:
            raise KeyboardInterrupt
        if status or result is None:
            raise UserError(last.removeprefix("error: ").removeprefix("failed: ") or f"its process ended with status {status}")
        return result

    def _hand_on(self, number: int, _: object) -> None:
        self._signal = number
        for process in tuple(self._running):
            process.send_signal(number)


@dataclass(frozen=True)
class Spread:
    """A metric over several seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Standard deviation of the sample; NaN of a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def margin(self) -> float:
        """Half the width of Student's interval of the mean; NaN of a single value."""
        if len(self.values) < 2:
            return math.nan
        from scipy.stats import t

        return float(t.ppf((1 + CONFIDENCE) / 2, len(self.values) - 1)) * self.deviation / math.sqrt(len(self.values))


def table(results: Mapping[int, Mapping[str, float] | str], baselines: Mapping[str, float]) -> list[str]:
    """Lines of a table: a row for each seed, mean, standard deviation and interval of each metric, and what is reached without training."""
    done = {seed: result for seed, result in results.items() if not isinstance(result, str)}
    names = [name for name in dict.fromkeys(name for result in done.values() for name in result) if name != "step"]
    rows = [["seed", "step", *names]]
    for seed, result in results.items():
        if isinstance(result, str):
            rows.append([str(seed), "failed", *("" for _ in names)])
        else:
            rows.append([str(seed), f"{int(result['step']):,}", *(_number(result.get(name, math.nan)) for name in names)])
    spreads = [Spread(tuple(v for result in done.values() if math.isfinite(v := result.get(name, math.nan)))) for name in names]
    if len(done) > 1:
        many = [spread if len(spread.values) > 1 else None for spread in spreads]
        rows.append(["mean", "", *("" if s is None else _number(s.mean) for s in many)])
        rows.append(["std", "", *("" if s is None else _number(s.deviation) for s in many)])
        intervals = ("" if s is None else f"{_number(s.mean - s.margin)} to {_number(s.mean + s.margin)}" for s in many)
        rows.append([f"{CONFIDENCE:.0%} t-interval", "", *intervals])
    if any(name in baselines for name in names):
        rows.append(["baseline", "", *(_number(baselines[name]) if name in baselines else "" for name in names)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _number(value: float) -> str:
    return f"{value:,.4g}"
