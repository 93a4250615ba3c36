"""`python -m ray_jobs.train PRESET [--field value ...]`: trains an experiment on Ray, or continues it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from perceiver import provenance
from perceiver.checkpoints import CheckpointInfo, best_of
from perceiver.config import Experiment, UserError, to_dict
from perceiver.data.components import Component
from perceiver.data.manifest import Manifest
from perceiver.data.storage import write_file
from perceiver.datasets import Dataset, with_tokenizer
from perceiver.disk import local_folder
from perceiver.experiments import command_words
from perceiver.extensions import code_of
from perceiver.plots import png, training_curves
from perceiver.prepared_folders import what_changed
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.tasks.baselines import Baseline
from perceiver.tasks.check import check_guess, checked_task
from perceiver.terminal import number_of
from perceiver.training.fork import resolved
from perceiver.training.meters import duration
from perceiver.training.profiling import check_profile, check_snapshot
from perceiver.training.remote_copy import RemoteCopy
from perceiver.training.run import save_experiment, total_steps
from perceiver.trust import trust
from ray_jobs import BEGUN
from ray_jobs.capacity import ONE, Capacity, most_at_once
from ray_jobs.cli import Interrupted, main_entry, naming_words, parse_experiment
from ray_jobs.logs import log_file, show_progress
from ray_jobs.memory_check import check_float8, check_precision
from ray_jobs.preflight import check_experiment, plan_resources, say_cpu_precision
from ray_jobs.program import program
from ray_jobs.ray_env import joining
from ray_jobs.recomputation import fit_memory
from ray_jobs.seeds import Processes, parse_seeds, replicate, run_of, take_seeds, train_seeds
from ray_jobs.train_checks import (
    check_data,
    check_fork,
    check_longer,
    check_name,
    check_run,
    check_start,
    check_validation,
    in_its_order,
    is_longer,
    ready_callbacks,
    say_groups,
    warn_of_warmup,
)

logger = logging.getLogger("ray_jobs.train")  # which __name__ is not where it is run as a program


def main(argv: list[str]) -> int:
    typed, argv = argv, show_progress(argv)
    allow_changed_code = "--allow-changed-code" in argv
    given, words = take_seeds([word for word in argv if word != "--allow-changed-code"])
    experiment = parse_experiment(words, "ray_jobs.train")
    if given is None:
        with naming_words(words):
            run(experiment, allow_changed_code=allow_changed_code, argv=typed)
        return 0
    seeds = parse_seeds(given, experiment.training.seed)
    for seed in seeds:  # all before the first: a name that is taken is known now
        check_name(replicate(experiment, seed))

    def baselines() -> dict[str, float]:
        dataset = Dataset.find(experiment)
        return {name: found.value for name, found in build_task(dataset.measured()).baselines(dataset.parts).items()}

    def train(made: Experiment) -> dict[str, float]:
        return run(made, allow_changed_code=allow_changed_code, argv=typed)

    with naming_words(words), room_for_seeds(experiment, seeds) as capacity:
        if capacity.concurrent == 1:
            return 0 if train_seeds(experiment, seeds, train, baselines) else 1
        logger.info(f"{number_of(len(seeds), 'seed')}, {capacity.why}")
        _, rest = take_seeds(typed)
        with Processes([*rest, *capacity.words()], joining()) as processes:
            try:
                return 0 if train_seeds(experiment, seeds, processes.train, baselines, capacity.concurrent) else 1
            except KeyboardInterrupt:
                raise Interrupted("stopped, checkpoints saved; the same command continues") from None


@contextmanager
def room_for_seeds(experiment: Experiment, seeds: Sequence[int]) -> Iterator[Capacity]:
    """One cluster for the trainings of several seeds, and how many of them it has room for at once; their data is prepared.

    Where all are trained already no cluster is asked.

    Raises:
        UserError: data that is not prepared, or that has changed since one of them began, or a cluster without room for one of them.
    """
    experiment = with_tokenizer(experiment)
    runs = [run_of(replicate(experiment, seed)) for seed in seeds]
    if all(run.result() is not None for run in runs):
        yield ONE
        return
    dataset = Dataset.find_early(experiment)
    begun = next((run for run in runs if run.exists), None)
    if begun is not None and (there := Dataset.find_prepared(experiment, begun.load(install_code=False)[1])) is not None:
        if changes := what_changed(there.experiment, there.folder, there.manifest):  # seeds of different data are not a comparison
            raise UserError(f"{changes}, which {begun.name} is trained on: choose another --run.name")

    from ray_jobs.preprocess import prepare
    from ray_jobs.ray_env import connect

    with connect(experiment.parallel):
        plan_resources(experiment)
        count = len(seeds) if experiment.parallel.min_workers is None else 1  # elastic trainings take all that there is
        capacity = most_at_once(experiment.parallel, count)
        if dataset is None and capacity.concurrent > 1:
            prepare(experiment)
        yield capacity


def run(
    experiment: Experiment,
    on_report: Callable[[dict[str, float]], None] | None = None,
    stop_at: int | None = None,
    allow_changed_code: bool = False,
    argv: Sequence[str] | None = None,
    data: str | None = None,
) -> dict[str, float]:
    """Trains an experiment to its end, from its last checkpoint on if there is one, and returns its last metrics.

    Progress is logged (`logging`, loggers perceiver and ray_jobs, level INFO), and kept in the run's log.txt.

    Args:
        on_report: called in a thread with the metrics of each validation.
        stop_at: end with a validation and a checkpoint at this step, to be continued later.
        allow_changed_code: continue a run although the user's code in it has changed since it began.
        argv: the arguments of the command that asks for it, to be kept with the run; None: those that make the experiment.
        data: digest of prepared data to train a new run on, whatever its source is now; None: what the source is now.

    Raises:
        UserError: a mistake in the experiment, data that is not prepared, another experiment under the same name.
        TrainingFailed: workers failed too often.
        Interrupted: a signal (Ctrl-C, SIGTERM) came while it trained; a checkpoint is saved.
    """
    asked_at = BEGUN if argv is not None else time.time()
    experiment = with_tokenizer(experiment)
    check_experiment(experiment)
    check_float8(experiment.training, experiment.parallel)
    callbacks = ready_callbacks(experiment)
    trained = Run(local_folder("run.storage", experiment.run.storage_path) / experiment.run_name)
    remote = RemoteCopy.of(experiment.run, trained.folder)
    if remote is not None:
        remote.check()
        remote.fetch(0)
    trust(code := code_of(experiment))  # which this process has imported, by whatever name
    trained.check_code(code, allow_changed_code)
    experiment = in_its_order(experiment, trained)
    longer = is_longer(experiment, trained)
    finished = None if longer else check_run(experiment, trained)
    if finished is not None:
        logger.info(f"run {experiment.run_name} is finished: {_summary(finished)}")
        logger.info(f"evaluate it: {program('ray_jobs.evaluate')} {_place(experiment, trained)}; another training needs another --run.name")
        return finished
    checkpoints = _checkpoints(trained, remote)
    fork = check_fork(experiment, trained, checkpoints)
    start = check_start(experiment, checkpoints) if fork is None else None
    meant = trained.load(install_code=False)[1] if trained.exists else data if fork is None else fork.data
    dataset = Dataset.find_early(experiment, meant)

    def check_prepared(data_folder: str, manifest: Manifest) -> None:
        check_validation(experiment, data_folder, manifest)
        check_data(trained, manifest)
        steps = total_steps(experiment, manifest.splits["train"].rows)
        check_profile(experiment.run, steps)
        if fork is not None:
            fork.check_data(manifest.digest, steps)
        if longer:
            check_longer(experiment, trained, manifest, steps)

    # What runs were trained on before is there, also where the job itself would prepare it.
    known = dataset or (Dataset.find_prepared(experiment, meant) if fork is not None or longer else None)
    if known is not None:
        check_prepared(known.folder, known.manifest)
        if meant is not None:
            known.warn_of_changes()
        if not experiment.task.measured:
            check_guess(checked_task(experiment), known.parts)

    from ray_jobs import driver
    from ray_jobs.preprocess import prepare
    from ray_jobs.ray_env import connect

    with trained.held(), log_file(trained.log_file):
        with connect(experiment.parallel):
            resources = plan_resources(experiment)
            check_precision(experiment, resources.gpu)
            check_snapshot(experiment.run, resources.gpu)
            experiment, chosen = fit_memory(experiment, resources.gpu)
            if dataset is None:
                prepare(experiment)
                dataset = Dataset.find(experiment, meant)
            experiment, data_folder, manifest = dataset.measured(), dataset.folder, dataset.manifest
            check_prepared(data_folder, manifest)
            check_guess(checked_task(experiment), dataset.parts)
            warn_of_warmup(experiment, manifest)
            say_groups(experiment)
            if longer:
                trained.forget_result()
                if remote is not None:
                    remote.forget_result()
            trained.save_code(code)
            save_experiment(trained, experiment, manifest, data_folder)
            words = [*program("ray_jobs.train").split(), *(command_words(experiment.preset, to_dict(experiment)) if argv is None else argv)]
            provenance.record(trained, words, manifest.digest, resources.workers, "GPU" if resources.gpu else "CPU")
            if remote is not None:
                remote.send_code()
                remote.send_records()
            logger.info(f"run {experiment.run_name} in {trained.folder}" + (f", kept in {remote.uri}" if remote is not None else ""))
            if chosen is not None:
                logger.info(chosen)
            say_cpu_precision(experiment, resources.gpu)
            if fork is not None:
                logger.info(f"forked from {fork.origin}: its weights, optimizer and place in the order (noted in {trained.start_file})")
            if start is not None:
                logger.info(f"{start} (names in {trained.start_file})")
            begun = resolved(experiment, fork.checkpoint if fork is not None else start.of_run if start is not None else None)
            started_with = replace(begun, callbacks=callbacks)
            interrupted = driver.train(started_with, data_folder, trained, resources, on_report, stop_at, asked_at)
        checkpoints = _checkpoints(trained, remote)
        result = trained.result()
        if result is None and interrupted:
            raise Interrupted(f"stopped at step {checkpoints[-1].step:,}, checkpoint saved; the same command continues")
        if result is None:
            return {"step": checkpoints[-1].step, **checkpoints[-1].metrics}
        report(experiment, trained, checkpoints, result, dataset.parts, time.time() - asked_at)
        return result


def _checkpoints(trained: Run, remote: RemoteCopy | None) -> list[CheckpointInfo]:
    return (trained if remote is None else remote).checkpoints()


def report(
    experiment: Experiment,
    trained: Run,
    checkpoints: list[CheckpointInfo],
    result: dict[str, float],
    parts: list[Component],
    seconds: float,
) -> None:
    """Says what came out and where it is, and draws the loss curve."""
    metric = experiment.run.best_metric
    best = best_of(checkpoints, metric)
    picture = training_curves(trained.metrics(), experiment.run_name, metric, None if best is None else best.step)
    write_file(trained.folder, trained.curve_file.name, png(picture))
    task = build_task(experiment)
    baselines = task.baselines(parts) | task.measured_baselines(result)
    logger.info(f"finished after {duration(seconds)}: step {result['step']:,}")
    for line in closing_lines(result, baselines):
        logger.info(line)
    if (reason := trained.stopped()) is not None:
        logger.info(f"  ended early:  {reason}")
    logger.info(f"  run folder:   {trained.folder}")
    logger.info(f"  checkpoints:  last step {checkpoints[-1].step}, best step {(best or checkpoints[-1]).step} by {metric}")
    logger.info(f"  TensorBoard:  tensorboard --logdir {trained.tensorboard_folder}")
    newest = {path.stem.rpartition("-")[0]: path for path in sorted(trained.samples_folder.glob("*.png"))}
    pictures = ", ".join(str(path) for path in [trained.curve_file, *newest.values()])
    logger.info(f"  pictures:     {pictures}")
    for trace in sorted(trained.profile_folder.glob("trace-*")):
        logger.info(f"  profile:      {trace} (open it in https://ui.perfetto.dev); the operators that cost most stand beside it")
    logger.info(f"  evaluate:     {program('ray_jobs.evaluate')} {_place(experiment, trained)}")


def _place(experiment: Experiment, trained: Run) -> str:
    """The run's folder, or the URI that it is kept at."""
    remote = RemoteCopy.of(experiment.run, trained.folder)
    return str(trained.folder) if remote is None else remote.uri


def closing_lines(result: dict[str, float], baselines: dict[str, Baseline]) -> list[str]:
    """The metrics, each with what is reached without training."""
    names = [name for name in result if name != "step"]
    width = max(map(len, names), default=0)
    beside = {name: f"  ({baselines[name]})" if name in baselines else "" for name in names}
    return [f"  {name:{width}}  {result[name]:<8,.4g}{beside[name]}".rstrip() for name in names]


def _summary(metrics: dict[str, float]) -> str:
    """The metrics in one line."""
    return ", ".join(f"step {value:,}" if name == "step" else f"{name} {value:,.4g}" for name, value in metrics.items())


if __name__ == "__main__":
    main_entry(main)
