"""Command lines that are an experiment, read before the job is loaded: neither a mistake in a field nor `--help` needs Ray."""

from __future__ import annotations

from collections.abc import Sequence

from perceiver.experiments import find_experiment
from ray_jobs.cli import TRUST_CODE, WRITE_CONFIG
from ray_jobs.overrides import override
from ray_jobs.seeds import take_seeds

OPTIONS = (TRUST_CODE, "--allow-changed-code", "--verbose", "--quiet")
"""Options of jobs that are no fields and take no value."""


def check_line(module: str, words: Sequence[str]) -> None:
    """Reads the experiment of a command line, and prints the help where that is asked for.

    Args:
        module: the job's, "ray_jobs.train", whose command line is an experiment and `OPTIONS`.
        words: what is typed after the command, first the experiment's name.

    Raises:
        UserError: an unknown experiment, field or value.
        SystemExit: after `--help`.
    """
    if any(word.partition("=")[0] == WRITE_CONFIG for word in words):  # which the job does
        return
    _, rest = take_seeds([word for word in words if word not in OPTIONS])
    override(find_experiment(rest[0], TRUST_CODE in words), rest[1:], f"{module} {rest[0]}")
