"""`python -m ray_jobs.evaluate RUN [--checkpoint best|last|STEP] [--source FILES] [--workers N]`: measures a trained run
on its whole validation set.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from perceiver.checkpoints import CheckpointInfo
from perceiver.config import DataConfig, Experiment, UserError
from perceiver.config.optimization import AVERAGED, averaged_of
from perceiver.data.manifest import Manifest
from perceiver.data.storage import copy_file
from perceiver.data_settings import OtherData
from perceiver.datasets import Dataset
from perceiver.disk import write_json
from perceiver.evaluations import save_examples
from perceiver.runs import Run
from perceiver.tasks.baselines import Baseline
from perceiver.tasks.check import check_guess
from perceiver.terminal import CommandParser, add_checkpoint_option, add_trust_option, summary
from perceiver.training.checkpoint_files import check_files
from perceiver.training.remote_copy import find_run
from perceiver.training.state import has_average
from ray_jobs.cli import main_entry, refuse_empty
from ray_jobs.logs import show_progress
from ray_jobs.overrides import SHORTCUTS, UNDOTTED, override
from ray_jobs.preflight import check_experiment, plan_resources
from ray_jobs.program import program

logger = logging.getLogger("ray_jobs.evaluate")  # which __name__ is not where it is run as a program

MOST_LINES = 31
"""Lines of a table of classes that are shown, at most: all of them are in the run's samples."""


def main(argv: list[str]) -> int:
    argv = show_progress(argv)
    parser = CommandParser(
        prog=program("ray_jobs.evaluate"),
        usage=f"{program('ray_jobs.evaluate')} RUN [--checkpoint CHECKPOINT] [--source FILES] [--workers N] [--field value ...]",
        description=summary(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="fields of the experiment that may be changed for an evaluation:\n"
        "  --source FILES        evaluate on all of these files instead (any --data.* field)\n"
        "  --workers N           number of workers (any --parallel.* field)\n"
        "  --task.*, --training.global-batch-size",
    )
    parser.add_argument("run", help="folder or URI of a run, or its name among the runs of $PERCEIVER_HOME")
    add_checkpoint_option(parser)
    add_trust_option(parser)
    args, overrides = parser.parse_with_fields(argv, UNDOTTED)
    refuse_empty(args, ("run",))
    evaluate_run(args.run, args.checkpoint, overrides, trust_code=args.trust_code)
    return 0


def evaluate_run(
    run: str | Path, checkpoint: str = "best", overrides: list[str] | None = None, trust_code: bool = False
) -> dict[str, float]:
    """Evaluates a checkpoint of a run over a whole validation set, and writes the result into the run's folder.

    Args:
        run: folder, URI or name of a run.
        checkpoint: "best", "last" or a step.
        overrides: command-line arguments for fields that an evaluation may change: `--data.source FILES` (other files, all of
            them), `--data.*`, `--task.*`, `--parallel.*`, `--training.global-batch-size`.
        trust_code: run the code that the run brings although that was never run from this account.

    Returns:
        The metrics, named val_...

    Raises:
        UserError: no such run, checkpoint or data, a damaged checkpoint, or data without any target.
    """
    found = find_run(run)
    if found is None:
        raise Run.missing(run)
    trained, digest = found.load(trust_code)
    experiment = override(trained, overrides or [], f"ray_jobs.evaluate {run}")
    if experiment.model != trained.model:
        raise UserError("the model of a run cannot be changed: only data, task, parallel and the batch size may be overridden")
    check_experiment(experiment)
    data, other = _data(experiment.data, trained.data, found, overrides or [])
    chosen = found.checkpoint(checkpoint, trained.run.best_metric)
    check_files(chosen.path)
    _, averaged = averaged_of(checkpoint)
    if averaged and not has_average(chosen.path):
        raise UserError(
            f"--checkpoint is {checkpoint!r}, but run {found.name} has no averaged weights (--optim.ema-decay): leave out {AVERAGED}"
        )

    from ray_jobs import driver
    from ray_jobs.preprocess import prepare_data
    from ray_jobs.ray_env import connect

    with connect(experiment.parallel):
        resources = plan_resources(experiment)
        asked = OtherData.of(experiment, data)
        if other:
            prepare_data(asked, experiment.parallel)
        dataset = Dataset.find(asked, digest)
        data_folder, manifest, parts = dataset.folder, dataset.manifest, dataset.parts
        task = experiment.task.build(experiment.model, dataset.experiment.data, experiment.training.seed)
        trained_on = _trained_on(trained, digest) if other else None
        check_guess(task, parts, trained_on)
        origin = str(run) if "://" in str(run) else None
        result = driver.evaluate_checkpoint(experiment, dataset, found, resources, chosen.path, origin, averaged)
    if not result["metrics"]:
        raise UserError(f"the validation data in {data_folder} has no target, so nothing can be measured on it")
    baselines = task.baselines(parts, trained_on) | task.measured_baselines(result["metrics"])
    path = found.evaluation_file(chosen.step, manifest.digest, averaged)
    result["baselines"] = {name: asdict(baseline) for name, baseline in baselines.items()}
    examples = result.pop("examples")
    source = " ".join(data.mixture) or data.val_source or data.source
    where_from = {"folder": data_folder, "source": source, "digest": manifest.digest}
    content = {"checkpoint": chosen.path.name, "data": where_from, **result}
    write_json(path, content)
    apart = save_examples(path, examples)
    where = str(path)
    if origin:  # the folder is this machine's copy
        there = f"{origin.rstrip('/')}/{path.parent.name}"
        copy_file(path.parent, path.name, there)
        copy_file(path.parent, apart.name, there)
        where = f"{there}/{path.name}"
    _print_table(found, chosen, content, baselines, where, task.details(result["sums"]) if len(parts) == 1 else [])
    return result["metrics"]


def _data(asked: DataConfig, trained: DataConfig, run: Run, overrides: Sequence[str]) -> tuple[DataConfig, bool]:
    """What is evaluated on, and whether that is other data than the run's own: then all of it, whatever is validation data there."""
    if asked.tokenizer == trained.tokenizer and run.tokenizer_file.is_file():
        asked = replace(asked, tokenizer=str(run.tokenizer_file))
    # The source beside a mixture is read by nobody, and what is beside val_source was trained on: given here, it is another one.
    named = any(SHORTCUTS.get(word := text.partition("=")[0], word) == "--data.source" for text in overrides)
    if not (named if trained.mixture or trained.val_source else asked.source != trained.source):
        return asked, False
    return replace(asked, source="", val_source=asked.source, mixture=(), prepare="shards"), True


def _trained_on(trained: Experiment, digest: str) -> Manifest | None:
    """What a run was trained on, for a baseline on other data; None where it is not here any more."""
    try:
        return Dataset.find(trained, digest).manifest
    except UserError:
        return None


def _print_table(
    run: Run, chosen: CheckpointInfo, content: dict[str, Any], baselines: dict[str, Baseline], where: str, details: list[str]
) -> None:
    targets = int(content["sums"]["targets"])
    logger.info(f"{run.name}, step {chosen.step:,}, on {content['data']['source']}: {targets:,} targets")
    width = max(22, 2 + max(map(len, content["metrics"])))  # names of a mixture's sources may be long
    for name, value in content["metrics"].items():
        beside = f"  ({baselines[name]})" if name in baselines else ""
        logger.info(f"  {name:<{width}}{value:>12.4f}{beside}")
    for line in details[:MOST_LINES]:
        logger.info(f"  {line}")
    logger.info(f"  written to {where}")


if __name__ == "__main__":
    main_entry(main)
