"""Population-based training (arXiv 1711.09846): a losing trial continues from a winner's checkpoint with changed values.

Ray Tune decides who takes over from whom (its scheduler needs a Tune checkpoint of each trial: a file that names the run and
the step). The weights are our own sharded checkpoints, model and optimizer. Trials of such a sweep keep all checkpoints until
the sweep is over, so a donor's are still there when they are loaded.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perceiver.checkpoints import MARKER, checkpoint_name
from perceiver.config import Experiment
from perceiver.runs import Run

EXCHANGES = "exchanges.jsonl"
"""In a trial's run folder: which values held from which step on, and whose checkpoint they began with."""
PATIENCE = 120.0
"""Seconds to wait until a donor's checkpoint is seen to be complete: on a shared file system it may be later than its report."""


class DonorLost(Exception):
    """The checkpoint that a trial was to take over is not there."""


def take_over(donor: Path, step: int, run: Path, experiment: Experiment, values: Mapping[str, Any]) -> None:
    """Makes a donor's checkpoint the last one of a run, and `experiment` the run's experiment.

    Interrupted at any point it can be done again.

    Args:
        donor, run: run folders.
        step: of the donor's checkpoint.
        experiment: what the run continues with; `values` of it are recorded.

    Raises:
        DonorLost: the donor's checkpoint did not become complete within PATIENCE.
    """
    source = wait_for(Run(donor).checkpoints_folder / checkpoint_name(step))
    for checkpoint in Run(run).checkpoints():
        if checkpoint.step >= step:
            (checkpoint.path / MARKER).unlink()
            shutil.rmtree(checkpoint.path)
    target = Run(run).checkpoints_folder / source.name
    incoming = target.with_name(f".{source.name}")
    for leftover in (incoming, target):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(source, incoming, copy_function=_link)
    os.replace(incoming, target)
    Run(run).change_experiment(experiment)
    with open(run / EXCHANGES, "a") as file:
        file.write(json.dumps({"step": step, "from": donor.name, "values": dict(values)}) + "\n")


def wait_for(checkpoint: Path) -> Path:
    """The folder of a checkpoint, once it is complete.

    Raises:
        DonorLost: it did not become complete within PATIENCE.
    """
    end = time.monotonic() + PATIENCE
    while not (checkpoint / MARKER).exists():
        if time.monotonic() > end:
            raise DonorLost(f"{checkpoint} did not become complete within {PATIENCE:.0f} s")
        time.sleep(0.2)
    return checkpoint


def exchanges(run: Path) -> list[dict[str, Any]]:
    """What `take_over` recorded in a run."""
    path = run / EXCHANGES
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _link(source: str, target: str) -> None:
    """A second name for a file of a checkpoint, which nobody changes; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
