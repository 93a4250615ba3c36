"""What one trial of a sweep runs: the training of `ray_jobs.train`, in a run folder of its own, reporting to Ray Tune."""

from __future__ import annotations

import json
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune

from perceiver.checkpoints import checkpoint_name, marked
from perceiver.config import Experiment, UserError, from_dict
from perceiver.datasets import Dataset
from perceiver.disk import write_json
from perceiver.extensions import Code
from perceiver.run_files import TRIAL_FILES
from perceiver.runs import Run
from perceiver.training.run import total_steps
from ray_jobs import train
from ray_jobs.cli import JobFailed
from ray_jobs.ray_env import quiet, use_gpus
from tuning.constraints import costs, refuse
from tuning.population import DonorLost, take_over
from tuning.sweeps import trial_experiment

VALUES, FAILED, COSTS, EARLIER = TRIAL_FILES
WAITING = "waiting"
"""In a sweep's folder: runs of interrupted trials whose sweep has changed since; the first new trial of the same values continues them."""
KEEP_ALL = 1_000_000


def run_name(trial_id: str) -> str:
    """Ray Tune's name of a trial without the part that all trials of a sweep share."""
    return f"trial-{trial_id.rpartition('_')[2]}"


def run_trial(config: dict[str, Any], settings: dict[str, Any]) -> None:
    """The trainable of a sweep.

    Args:
        config: {"values": {dotted field: value}}.
        settings: "experiment": what trials vary (plain data), "data": digest of its prepared data, "code": the source files that it needs,
            "reports" and "examples" of a whole training, "population" (bool), "constraints",
            "trials": folder of runs.
    """
    quiet()
    Code(settings["code"]).install()
    name = run_name(tune.get_context().get_trial_id())
    run = Path(settings["trials"]) / name
    values = config["values"]
    take_waiting(run, values)
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / VALUES, values)
    (run / FAILED).unlink(missing_ok=True)
    reported, over = -1, threading.Event()

    def report(metrics: dict[str, float]) -> None:
        """To Ray Tune, with the place of the weights as its checkpoint."""
        nonlocal reported
        step = int(metrics["step"])
        if step == reported:
            return
        reported = step
        examples = step * experiment.training.global_batch_size
        place = {"step": step, "examples": examples, "reports": settings["reports"] * examples / settings["examples"]}
        with tempfile.TemporaryDirectory() as folder:
            write_json(Path(folder) / "place.json", {"run": run.name, "step": step})
            tune.report({**metrics, **place, **found, "last": step == steps}, checkpoint=tune.Checkpoint.from_directory(folder))

    def report_saved(metrics: dict[str, float]) -> None:
        """Reports once the checkpoint is complete: after a report the trial may be paused, or another take its weights over."""
        name = checkpoint_name(int(metrics["step"]))
        # A later one will do as well: it may have been the cause that the checkpoint was thrown away.
        while not any(path.name >= name for path in marked(Run(run).checkpoints_folder)):
            if over.wait(0.1):
                return
        report(metrics)

    try:
        experiment, steps = _experiment(from_dict(settings["experiment"]), values, name, settings)
        found = costs(experiment, steps, use_gpus(experiment.parallel))
        write_json(run / COSTS, found)
        refuse(settings["constraints"], experiment, found)
        _continue_from_donor(run, experiment, values)
        try:
            metrics = train.run(experiment, on_report=report_saved, data=settings["data"])
        finally:
            over.set()
    except Exception as error:
        is_sentence = isinstance(error, (UserError, JobFailed, DonorLost))
        (run / FAILED).write_text(str(error) if is_sentence else f"{type(error).__name__}: {error}")
        raise
    report(metrics)  # a run that was finished already has reported nothing by itself


def _experiment(base: Experiment, values: dict[str, Any], name: str, settings: dict[str, Any]) -> tuple[Experiment, int]:
    """The trial's experiment and its steps. Its reports and checkpoints fall on the same steps: nothing reported is taken again."""
    dataset = Dataset.find(trial_experiment(base, values), settings["data"])
    experiment = dataset.experiment
    steps = total_steps(experiment, dataset.manifest.splits["train"].rows)
    every = -(-steps // settings["reports"])  # a report comes when its share of the training is full
    trial = replace(
        experiment,
        run=replace(
            experiment.run,
            name=name,
            storage=settings["trials"],
            val_every=every,
            checkpoint_every=every,
            keep_checkpoints=KEEP_ALL if settings["population"] else experiment.run.keep_checkpoints,
        ),
    )
    return trial, steps


def _continue_from_donor(run: Path, experiment: Experiment, values: dict[str, Any]) -> None:
    checkpoint = tune.get_checkpoint()
    if checkpoint is None or not Run(run).exists:
        return
    with checkpoint.as_directory() as folder:
        place = json.loads((Path(folder) / "place.json").read_text())
    if place["run"] != run.name:
        take_over(run.parent / place["run"], place["step"], run, experiment, values)


def take_waiting(run: Path, values: dict[str, Any]) -> None:
    """Makes an interrupted trial of the same values, where there is one, the run of this one, unless that has begun."""
    run.parent.mkdir(parents=True, exist_ok=True)
    for path in sorted((run.parents[1] / WAITING).glob(f"*/{VALUES}")):
        try:
            if json.loads(path.read_text()) != json.loads(json.dumps(values)):
                continue
            left = path.parent
            write_json(left / EARLIER, [*(name for name in earlier_names(left) if name != left.name), left.name])
            left.rename(run)
        except OSError:  # another trial of the same values has taken it, or this one has begun
            continue
        return


def earlier_names(run: Path) -> list[str]:
    """The names under which a trial was run before its sweep changed."""
    return json.loads((run / EARLIER).read_text()) if (run / EARLIER).exists() else []
