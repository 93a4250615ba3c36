"""Jobs as functions, for programs and notebooks: `perceiver.train`."""

from __future__ import annotations

from collections.abc import Callable

from perceiver.config import Experiment
from perceiver.disk import local_folder
from perceiver.runs import Run
from ray_jobs.logs import show_progress
from ray_jobs.train import run


def train(
    experiment: Experiment,
    *,
    on_validation: Callable[[dict[str, float]], None] | None = None,
    stop_at: int | None = None,
    allow_changed_code: bool = False,
    progress: bool = True,
) -> Run:
    """See `perceiver.train`."""
    if progress:
        show_progress([])
    run(experiment, on_validation, stop_at, allow_changed_code)
    return Run(local_folder("run.storage", experiment.run.storage_path) / experiment.run_name)
