"""`python -m tuning.sweep SWEEP [--trials N ...] [--field value ...]`: trains a preset many times with different settings, with Ray Tune.

The same command continues a sweep that was stopped or killed.

Each trial is a training run as with `perceiver train`, in a run folder of its own. The folder of a sweep has its settings, the runs of
its trials, Ray Tune's state, and the results.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
from ray.tune.search.sample import Function

from perceiver.comparison import SEED
from perceiver.config import Experiment, UserError, check_folder_name, check_tree, home, to_dict
from perceiver.datasets import Dataset, with_tokenizer
from perceiver.disk import local_folder
from perceiver.extensions import code_of
from perceiver.runs import held
from perceiver.tasks.check import checked_task
from perceiver.terminal import CommandParser, filled, number_of, summary
from perceiver.training.meters import duration
from perceiver.training.run import total_steps
from perceiver.trust import trust
from ray_jobs.capacity import Capacity, plan_capacity
from ray_jobs.cli import main_entry, refuse_empty
from ray_jobs.logs import show_progress
from ray_jobs.overrides import UNDOTTED
from ray_jobs.preflight import check_best_metric, check_experiment
from ray_jobs.program import program
from ray_jobs.ray_env import connect
from ray_jobs.seeds import parse_seeds
from ray_jobs.train_checks import ready_callbacks
from tuning import report
from tuning.constraints import COSTS
from tuning.controller import handing_processes_on
from tuning.edits import Edit
from tuning.messages import leave_out_messages
from tuning.record import Record, StopDiverged
from tuning.schedulers import scheduler, search, slot
from tuning.settings import TUNE, check_folder, describe, forget_unbegun, settle
from tuning.space_texts import DOMAINS
from tuning.spaces import check_space, draw, grids
from tuning.sweeps import SWEEPS, Sweep, check_sweep, find_sweep, trial_experiment
from tuning.trial import run_trial
from tuning.trials import SETTINGS, TRIALS, data_of_trials, prune

logger = logging.getLogger("tuning.sweep")  # which __name__ is not where it is run as a program

SAMPLES = 8
"""Drawn of a space to try its functions."""
OPTIONS = {
    "trials": (int, "number of samples from the space, each with every combination of the grids"),
    "search": (str, "how samples are drawn: random, or optuna (an extra package)"),
    "scheduler": (
        str,
        "fifo: all trials run to the end; asha, hyperband: bad trials are stopped early; pbt: bad trials take over weights of good ones",
    ),
    "metric": (str, "validation metric of the task by which trials are compared"),
    "reports": (int, "number of validations in a whole training run, at which a scheduler can act"),
    "reduction": (int, "asha, hyperband: one of this number of trials continues at each rung"),
    "grace": (float, "asha: share of a whole training that every trial gets"),
    "perturb": (float, "pbt: share of a whole training between two exchanges"),
    "against": (str, "cost to weigh the metric against in the report, and to minimise with optuna: parameters, flops, memory, seconds"),
    "keep": (int, "number of best trials whose checkpoints are kept"),
    "seed": (int, "seed of the samples (the seed for training is training.seed)"),
}
"""Fields of a sweep that the command line can change, with their types and help."""


def main(argv: list[str]) -> int:
    argv = show_progress(argv)
    parser = CommandParser(prog=program("tuning.sweep"), description=summary(__doc__), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=filled(f"sweeps: {', '.join(SWEEPS)}, or file.py:function", "  "),
    )  # fmt: skip
    parser.add_argument("sweep", help="a sweep, or, with --space, an experiment")
    parser.add_argument(
        "--space", metavar="FIELD=DOMAIN", action="append", default=[],
        help='field to vary; may be repeated: "optim.lr=loguniform(1e-4,1e-2)"; domains: '
        f"{', '.join(DOMAINS)}. Or FILE.py:FUNCTION, which returns {{field: domain}}",
    )  # fmt: skip
    parser.add_argument(
        "--constraint", metavar="CONDITION", action="append", default=[],
        help=f'condition for trials, checked before they train: "parameters<=2e6"; of {", ".join(COSTS)} and fields',
    )  # fmt: skip
    parser.add_argument(
        "--seeds", help="number of seeds, or seeds separated by commas: each sample is trained with all of them and ranked by the mean"
    )
    parser.add_argument(
        "--warm-start", metavar="SWEEP", action="append", default=[],
        help="an earlier sweep, by name or folder, whose finished trials the search starts with (with --search optuna)",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true",
        help="continue an existing sweep, even with other settings: lists what has changed, keeps the trials that fit, and draws "
        "the rest again; never begins a new sweep",
    )  # fmt: skip
    parser.add_argument("--name", help="folder of the sweep; default: the sweep's name")
    parser.add_argument("--storage", help="folder of all sweeps; default: $PERCEIVER_HOME/sweeps")
    parser.add_argument("--concurrent", type=int, help="number of concurrent trials; default: as many as the cluster has room for")
    for option, kind in OPTIONS.items():
        parser.add_argument(f"--{option}", type=kind[0], help=kind[1])
    args, overrides = parser.parse_with_fields(argv, UNDOTTED)
    refuse_empty(args, ("sweep",))
    sweep = find_sweep(args.sweep, args.space)
    given = {option: getattr(args, option) for option in OPTIONS if getattr(args, option) is not None}
    sweep = replace(sweep, **given, overrides=(*sweep.overrides, *overrides), constraints=(*sweep.constraints, *args.constraint))
    if args.seeds is not None:
        sweep = replace(sweep, seeds=tuple(parse_seeds(args.seeds, sweep.experiment().training.seed)))
    if args.warm_start:
        sweep = replace(sweep, warm_start=tuple(earlier_sweep(text, args.storage) for text in args.warm_start))
    folder = sweep_folder(args.storage, args.name or args.sweep.rpartition(":")[2].replace("_", "-"))
    if args.resume and not (folder / SETTINGS).exists():
        raise UserError(f"--resume: there is no sweep in {folder} to continue")
    run_sweep(sweep, folder, args.concurrent, args.resume)
    return 0


def sweep_folder(storage: str | None, name: str) -> Path:
    """Where a sweep is kept.

    Raises:
        UserError: in an object store, which a sweep cannot be, or by a name that leads out of the storage.
    """
    if storage and "://" in storage:
        raise UserError(f"--storage is {storage} and must be a folder, one that all nodes share: sweeps are not kept in object stores")
    check_folder_name("--name", name)
    return local_folder("storage", storage or str(home() / "sweeps")) / name


def earlier_sweep(name: str, storage: str | None) -> str:
    """The folder of an earlier sweep, by itself or by its name in the storage.

    Raises:
        UserError: there is none.
    """
    for folder in (Path(name).expanduser(), sweep_folder(storage, name) if "/" not in name else None):
        if folder is not None and (folder / SETTINGS).exists():
            return str(folder.absolute())
    raise UserError(f"--warm-start is {name!r}, and there is no sweep of that name or folder")


def run_sweep(sweep: Sweep, folder: Path, concurrent: int | None = None, resume: bool = False) -> list[dict[str, Any]]:
    """Runs a sweep to its end, or continues it, and returns its trials, best first (see `tuning.trials.read_trials`).

    Args:
        sweep: what is run.
        folder: where it is kept.
        concurrent: trials at once; None: as many as the cluster has room for.
        resume: a sweep that is there may have had other settings: its trials count where they fit.

    Raises:
        UserError: a mistake in the sweep, another sweep in the same folder, or trials that the cluster has no room for.
        KeyboardInterrupt: it was interrupted; what is there so far is reported, and the same call continues.
    """
    check_values(sweep)
    if concurrent is not None and concurrent < 1:
        raise UserError(f"--concurrent is {concurrent} and must be at least 1")
    base = with_tokenizer(sweep.experiment())
    if base.parallel.min_workers is not None:
        raise UserError("a sweep's trials have a fixed number of workers: say --workers N")
    check_experiment(base)
    ready_callbacks(base)
    changes = check_folder(sweep, folder, resume)
    begun_on = data_of_trials(folder)
    dataset = Dataset.find_early(base, begun_on)
    if dataset is not None and begun_on is not None:
        dataset.warn_of_changes()
    # Ray Train frees what the workers of a stopped trial held by way of the dashboard's state service.
    with held(folder), connect(base.parallel, dashboard=True):
        if dataset is None:
            from ray_jobs.preprocess import prepare

            prepare(base)
            dataset = Dataset.find(base, begun_on)
        capacity = plan_capacity(base.parallel, concurrent)
        edit = settle(sweep, folder, changes)
        size = edit.size if edit is not None else sweep.size
        steps = total_steps(base, dataset.manifest.splits["train"].rows)
        length = "" if sweep.points else f"; {number_of(steps, 'step')} in a whole training"
        logger.info(f"sweep of {number_of(size, 'trial')} in {folder}: {capacity.why}{length}")
        started = time.monotonic()
        try:
            if edit is None or edit.new:
                fit(sweep, folder, base, capacity, steps, dataset.manifest.digest, edit)
        except Exception:
            forget_unbegun(folder)
            raise
        trials = report.write(folder)
        if sum(trial["status"] != "unfinished" for trial in trials) < size:
            raise KeyboardInterrupt  # Ray Tune has taken the signal, saved its state, and returned
        prune(folder, trials, sweep.keep)
    logger.info(f"finished after {duration(time.monotonic() - started)}")
    for line in report.table(trials, describe(sweep)):
        logger.info(line)
    return trials


def check_values(sweep: Sweep) -> None:
    """Checks the sweep and its values, as far as they are known: listed ones, and the ends of ranges.

    Raises:
        UserError: the first thing that cannot be right.
    """
    for name, allowed in {"search": ("random", "optuna"), "scheduler": ("fifo", "asha", "hyperband", "pbt")}.items():
        if getattr(sweep, name) not in allowed:
            raise UserError(f"{name} is {getattr(sweep, name)!r} and must be one of {', '.join(allowed)}")
    check_sweep(sweep)
    base = sweep.experiment()
    sections = [name.partition(".")[0] for name in sweep.space]

    def check(name: str, value: Any) -> None:
        experiment = trial_experiment(base, {name: value})
        if sections.count(name.partition(".")[0]) == 1:  # else what is wrong alone may be right with another field's value
            check_tree(experiment)

    check_space(sweep.space, check)
    _check_functions(sweep, base)
    for point in sweep.points:
        check_tree(trial_experiment(base, point))
    try:
        check_best_metric(replace(base, run=replace(base.run, best_metric=sweep.metric)), checked_task(base))
    except UserError as error:
        raise UserError(str(error).replace("run.best-metric", "metric of the sweep", 1)) from None


def _check_functions(sweep: Sweep, base: Experiment) -> None:
    """Draws a few samples where a space has functions: what one raises, or says that fits no field, would show in Ray Tune alone."""
    if not any(isinstance(domain, Function) for domain in sweep.space.values()):
        return
    random_state = np.random.RandomState(abs(sweep.seed))
    for combination in itertools.islice(grids(sweep.space), SAMPLES):
        for _ in range(SAMPLES):
            trial_experiment(base, draw(sweep.space, random_state, combination))


def fit(sweep: Sweep, folder: Path, base: Experiment, capacity: Capacity, steps: int, data: str, edit: Edit | None = None) -> None:
    """Runs the trials with Ray Tune, or those that are not over yet. Each change of the settings begins a state of Ray Tune's.

    Args:
        data: digest of the prepared data.
    """
    examples = steps * base.training.global_batch_size
    parallel = replace(base.parallel, cpus_per_worker=capacity.cpus_per_worker, threads_per_worker=capacity.threads_per_worker)
    trust(code := code_of(base))  # which this process has imported, by whatever name
    settings = {
        "experiment": to_dict(replace(base, parallel=parallel, callbacks=ready_callbacks(base))),
        "data": data,
        "code": dict(code.files),
        "reports": sweep.reports,
        "examples": examples,
        "population": sweep.scheduler == "pbt",
        "constraints": list(sweep.constraints),
        "trials": str(folder / TRIALS),
    }
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, settings=settings), tune.PlacementGroupFactory([slot(sweep, capacity.concurrent)])
    )
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(capacity.concurrent)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    leave_out_messages()
    # What has ended under earlier settings is known to a search as that of an earlier sweep is.
    searched = sweep if edit is None else replace(sweep, warm_start=(*sweep.warm_start, str(folder)))
    random.seed(sweep.seed)  # Ray's population-based training draws from here
    state = folder / (TUNE if edit is None else f"{TUNE}-{edit.number}")
    if tune.Tuner.can_restore(str(state)):
        logger.info("continuing the sweep")
        tuner = tune.Tuner.restore(str(state), trainable=trainable, param_space=param_space(sweep, edit), resume_unfinished=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=param_space(sweep, edit),
            tune_config=tune.TuneConfig(
                metric=sweep.metric,
                mode=sweep.mode,
                scheduler=scheduler(sweep, examples, folder, tuple(edit.kept) if edit is not None else ()),
                search_alg=search(searched, capacity.concurrent, edit),
                num_samples=number_of_samples(sweep, edit),
                max_concurrent_trials=None,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=state.name, storage_path=str(folder), callbacks=[Record(folder, sweep, steps, edit)], verbose=0, stop=StopDiverged(),
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )  # fmt: skip
    with handing_processes_on():
        tuner.fit()


def number_of_samples(sweep: Sweep, edit: Edit | None) -> int:
    """How often Ray Tune draws from `param_space`."""
    if edit is not None and edit.points is None:
        return edit.new
    return 1 if sweep.points or edit is not None else sweep.trials


def param_space(sweep: Sweep, edit: Edit | None = None) -> dict[str, Any]:
    """What Ray Tune draws from: the space, or listed values."""
    if edit is not None and edit.points is not None:
        return {"values": tune.grid_search([_whole(point) for point in edit.points])}
    if sweep.points:
        return {"values": tune.grid_search([{**point, **seed} for point in sweep.points for seed in _seeds(sweep)])}
    return {"values": {**sweep.space, **({SEED: tune.grid_search(list(sweep.seeds))} if sweep.seeds else {})}}


def _whole(point: dict[str, Any]) -> dict[str, Any]:
    """Values with tuples for lists, which Ray Tune would take apart."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in point.items()}


def _seeds(sweep: Sweep) -> list[dict[str, int]]:
    return [{SEED: seed} for seed in sweep.seeds] or [{}]


if __name__ == "__main__":
    main_entry(main)
