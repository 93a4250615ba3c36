"""`python -m tuning.sweep SWEEP [--trials N ...] [--field value ...]`: trains a preset many times with different settings, by Ray Tune.

The same command continues a sweep that was stopped or killed.

Each trial is a training as `perceiver train` runs it, in a run folder of its own. The folder of a sweep holds its settings, the runs of
its trials, Ray Tune's state, and the results.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shlex
import shutil
import time
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ray import tune

import perceiver
from perceiver.comparison import SEED
from perceiver.config import Experiment, UserError, check_folder_name, check_tree, differences, digest, flatten, home, to_dict
from perceiver.datasets import Dataset, with_tokenizer
from perceiver.disk import write_json
from perceiver.extensions import code_of
from perceiver.runs import held
from perceiver.terminal import CommandParser, number_of, summary
from perceiver.training.meters import duration
from perceiver.training.run import total_steps
from perceiver.trust import trust
from ray_jobs.capacity import Capacity, plan_capacity
from ray_jobs.cli import main_entry, refuse_empty
from ray_jobs.logs import show_progress
from ray_jobs.overrides import UNDOTTED
from ray_jobs.preflight import check_experiment
from ray_jobs.program import program
from ray_jobs.ray_env import connect
from ray_jobs.seeds import parse_seeds
from ray_jobs.train_checks import check_free, ready_callbacks
from tuning import report
from tuning.constraints import COSTS
from tuning.record import Record, StopDiverged
from tuning.schedulers import scheduler, search, slot
from tuning.spaces import DOMAINS, check_space, described
from tuning.sweeps import SWEEPS, Sweep, check_sweep, find_sweep, trial_experiment
from tuning.trial import VALUES, run_trial
from tuning.trials import SETTINGS, TRIALS, prune

logger = logging.getLogger("tuning.sweep")  # which __name__ is not where it is run as a program

TUNE = "tune"
"""In a sweep's folder: Ray Tune's state."""
LATER = ("constraints", "against", "seeds", "warm_start")
"""Fields of a sweep that it describes only where they are set."""
FIRST_VERSION = "0.1.0"
"""Of this package: its sweeps do not say which version began them."""
OPTIONS = {
    "trials": (int, "samples of the space, each with every combination of its grids"),
    "search": (str, "how samples are drawn: random, or optuna (an extra package)"),
    "scheduler": (
        str,
        "fifo: all trials run to the end; asha, hyperband: bad ones are stopped early; pbt: bad ones take over good ones' weights",
    ),
    "metric": (str, "what is compared: a validation metric of the task"),
    "reports": (int, "validations of a whole training: the moments at which a scheduler can act"),
    "against": (str, "what the report sets the metric against, and optuna searches by besides: parameters, flops, memory, seconds"),
    "keep": (int, "best trials whose checkpoints are kept"),
    "seed": (int, "seed of the samples (that of the trainings is training.seed)"),
}
"""Fields of a sweep that the command line can change, with their types and help."""


def main(argv: list[str]) -> int:
    argv = show_progress(argv)
    parser = CommandParser(prog=program("tuning.sweep"), description=summary(__doc__), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"sweeps: {', '.join(SWEEPS)}, or file.py:function",
    )  # fmt: skip
    parser.add_argument("sweep", help="a sweep, or with --space an experiment")
    parser.add_argument(
        "--space", metavar="FIELD=DOMAIN", action="append", default=[],
        help='what is varied, once for each field: "optim.lr=loguniform(1e-4,1e-2)"; domains: '
        f"{', '.join(DOMAINS)}. Or FILE.py:FUNCTION, which returns {{field: domain}}",
    )  # fmt: skip
    parser.add_argument(
        "--constraint", metavar="CONDITION", action="append", default=[],
        help=f'what trials must keep to, refused before they train: "parameters<=2e6"; of {", ".join(COSTS)} and fields',
    )  # fmt: skip
    parser.add_argument("--seeds", help="a number of seeds, or seeds with commas: each sample is trained under all, and ranked by the mean")
    parser.add_argument(
        "--warm-start", metavar="SWEEP", action="append", default=[],
        help="an earlier sweep, by its name or folder, whose finished trials the search knows from the start (with --search optuna)",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="continue the sweep that is there, and never begin another one")
    parser.add_argument("--name", help="folder of the sweep; default: the sweep's name")
    parser.add_argument("--storage", help="folder of all sweeps; default: $PERCEIVER_HOME/sweeps")
    parser.add_argument("--concurrent", type=int, help="trials at once; default: as many as the cluster has room for")
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
    run_sweep(sweep, folder, args.concurrent)
    return 0


def sweep_folder(storage: str | None, name: str) -> Path:
    """Where a sweep is kept.

    Raises:
        UserError: in an object store, which a sweep cannot be, or by a name that leads out of the storage.
    """
    if storage and "://" in storage:
        raise UserError(f"--storage is {storage} and must be a folder, one that all nodes share: sweeps are not kept in object stores")
    check_folder_name("--name", name)
    return ((Path(storage).expanduser() if storage else home() / "sweeps") / name).absolute()


def earlier_sweep(name: str, storage: str | None) -> str:
    """The folder of an earlier sweep, by itself or by its name in the storage.

    Raises:
        UserError: there is none.
    """
    for folder in (Path(name).expanduser(), sweep_folder(storage, name) if "/" not in name else None):
        if folder is not None and (folder / SETTINGS).exists():
            return str(folder.absolute())
    raise UserError(f"--warm-start is {name!r}, and there is no sweep of that name or folder")


def run_sweep(sweep: Sweep, folder: Path, concurrent: int | None = None) -> list[dict[str, Any]]:
    """Runs a sweep to its end, or continues it, and returns its trials, best first (see `tuning.trials.read_trials`).

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
    check_folder(sweep, folder)
    dataset = Dataset.find_early(base)
    # Ray Train frees what the workers of a stopped trial held by way of the dashboard's state service.
    with held(folder), connect(base.parallel, dashboard=True):
        if dataset is None:
            from ray_jobs.preprocess import prepare

            prepare(base)
            dataset = Dataset.find(base)
        capacity = plan_capacity(base.parallel, concurrent)
        write_json(folder / SETTINGS, {**describe(sweep), "version": perceiver.__version__})
        steps = total_steps(base, dataset.manifest.splits["train"].rows)
        length = "" if sweep.points else f"; {number_of(steps, 'step')} in a whole training"
        logger.info(f"sweep of {number_of(sweep.size, 'trial')} in {folder}: {capacity.why}{length}")
        started = time.monotonic()
        fit(sweep, folder, base, capacity, steps)
        trials = report.write(folder)
        if sum(trial["status"] != "running" for trial in trials) < sweep.size:
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
    for point in sweep.points:
        trial_experiment(base, point)


def check_folder(sweep: Sweep, folder: Path) -> None:
    """Refuses another sweep in the same folder, and one whose experiment another version of this package took for another one.

    Raises:
        UserError: names the differences.
    """
    path = folder / SETTINGS
    if not path.exists():
        check_free(folder, SETTINGS, "--name")
    else:
        there, wanted = json.loads(path.read_text()), json.loads(json.dumps(describe(sweep)))
        version = there.pop("version", FIRST_VERSION)
        if version != perceiver.__version__ and there | {"experiment": None} == wanted | {"experiment": None} and there != wanted:
            raise UserError(
                f"{folder} holds a sweep that version {version} began, and in version {perceiver.__version__} its trials would be of "
                "another experiment: choose another --name, or continue it with the version that began it"
            )
        changes = differences(flatten(there), flatten(wanted))
        if changes and not any((folder / TRIALS).glob(f"*/{VALUES}")):
            # It ended before its first trial: by a mistake in its space, say, which is mended now.
            logger.info(f"no trial of the sweep in {folder} had begun: it is replaced ({'; '.join(changes)})")
            shutil.rmtree(folder / TUNE, ignore_errors=True)
            return
        if changes:
            # What follows from other changes is left out where there are any.
            changes = [line for line in changes if not line.startswith(("default.", "experiment:", "mode:"))] or changes
            raise UserError(
                f"{folder} holds another sweep ({'; '.join(changes)}): choose another --name (with --search optuna --warm-start "
                f"{folder.name} it knows what was found here), or the settings as they were"
            )


def describe(sweep: Sweep) -> dict[str, Any]:
    """A sweep as JSON-ready data: what makes it the same sweep."""
    plain = {f.name: getattr(sweep, f.name) for f in fields(sweep) if f.name not in ("space", "points", "overrides")}
    space = {name: described(domain) for name, domain in sweep.space.items()}
    # Sweeps of before these were there are the same without them.
    plain = {name: value for name, value in plain.items() if value or name not in LATER}
    identity = sweep.experiment().identity
    return {**plain, "mode": sweep.mode, "space": space, "points": list(map(dict, sweep.points)), "default": sweep.default(),
            "experiment": digest(identity), "overrides": shlex.join(sweep.overrides)}  # fmt: skip


def fit(sweep: Sweep, folder: Path, base: Experiment, capacity: Capacity, steps: int) -> None:
    """Runs the trials with Ray Tune, or those that are not over yet."""
    examples = steps * base.training.global_batch_size
    parallel = replace(base.parallel, cpus_per_worker=capacity.cpus_per_worker, threads_per_worker=capacity.threads_per_worker)
    trust(code := code_of(base))  # which this process has imported, by whatever name
    settings = {
        "experiment": to_dict(replace(base, parallel=parallel, callbacks=ready_callbacks(base))),
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
    # The preset's values need not be in the space; a failed trial is one line of `Record`, its traceback in error.txt below `tune`.
    logging.getLogger("ray.tune.search.variant_generator").setLevel(logging.ERROR)
    logging.getLogger("ray.tune.execution.tune_controller").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="Consider boosting PBT")
    random.seed(sweep.seed)  # Ray's population-based training draws from here
    state = folder / TUNE
    if tune.Tuner.can_restore(str(state)):
        logger.info("continuing the sweep")
        tuner = tune.Tuner.restore(str(state), trainable=trainable, param_space=param_space(sweep), resume_unfinished=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=param_space(sweep),
            tune_config=tune.TuneConfig(
                metric=sweep.metric,
                mode=sweep.mode,
                scheduler=scheduler(sweep, examples, folder),
                search_alg=search(sweep, capacity.concurrent),
                num_samples=1 if sweep.points else sweep.trials,
                max_concurrent_trials=None,
            ),
            run_config=tune.RunConfig(
                name=state.name, storage_path=str(folder), callbacks=[Record(folder, sweep, steps)], verbose=0, stop=StopDiverged(),
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )  # fmt: skip
    tuner.fit()


def param_space(sweep: Sweep) -> dict[str, Any]:
    if sweep.points:
        return {"values": tune.grid_search([{**point, **seed} for point in sweep.points for seed in _seeds(sweep)])}
    return {"values": {**sweep.space, **({SEED: tune.grid_search(list(sweep.seeds))} if sweep.seeds else {})}}


def _seeds(sweep: Sweep) -> list[dict[str, int]]:
    return [{SEED: seed} for seed in sweep.seeds] or [{}]


if __name__ == "__main__":
    main_entry(main)
