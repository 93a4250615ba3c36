"""`perceiver lr-find EXPERIMENT [--field value ...]`: runs a learning-rate range test and suggests an initial learning rate.

This is a short training run in this process, without Ray, whose learning rate grows from --from to --to. It stops when the loss diverges,
and keeps only a plot of the losses. The data must have been prepared (`perceiver preprocess EXPERIMENT`).
"""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

import torch

from perceiver.config import UserError
from perceiver.data.storage import write_file
from perceiver.datasets import Dataset, with_prepared_tokenizer, with_tokenizer
from perceiver.disk import local_file
from perceiver.plots import png, range_curve
from perceiver.terminal import CommandParser, summary
from perceiver.training.lr_range import FEWEST, alone_on, device_of, range_test
from perceiver.training.parallel import choose_arithmetic
from ray_jobs.cli import main_entry, naming_words, parse_experiment
from ray_jobs.logs import show_progress
from ray_jobs.overrides import UNDOTTED
from ray_jobs.preflight import check_experiment
from ray_jobs.program import program

logger = logging.getLogger("ray_jobs.lr_find")  # which __name__ is not where it is run as a program


def main(argv: list[str]) -> int:
    argv = show_progress(argv)
    name = program("ray_jobs.lr_find")
    parser = CommandParser(
        prog=name, usage=f"{name} EXPERIMENT [option value ...] [--field value ...]", description=summary(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, add_help=False,
    )  # fmt: skip
    parser.add_argument("--from", dest="low", type=float, default=1e-6, metavar="RATE", help="first learning rate (%(default)g)")
    parser.add_argument("--to", dest="high", type=float, default=1.0, metavar="RATE", help="last learning rate (%(default)g)")
    parser.add_argument("--steps", type=int, default=100, help="maximum number of optimizer steps (%(default)s)")
    parser.add_argument(
        "--out", metavar="FILE",
        help="file for the plot; default: lr-find-NAME.png in the current folder, or the first of lr-find-NAME-2.png, ... that is free",
    )  # fmt: skip
    own, rest = parser.parse_with_fields(argv, UNDOTTED)
    if not rest or "-h" in rest or "--help" in rest:
        print(parser.format_help())
    experiment = with_tokenizer(parse_experiment(rest, "ray_jobs.lr_find"))
    if not 0 < own.low < own.high:
        raise UserError(f"--from is {own.low:g} and --to {own.high:g}: the first rate must be above 0 and below the last")
    if own.steps < FEWEST:
        raise UserError(f"--steps is {own.steps} and must be at least {FEWEST}")
    path = local_file("out", own.out or str(_free(f"lr-find-{experiment.run_name}", ".png")), ".png")
    check_experiment(experiment)
    with naming_words(rest):
        dataset = Dataset.find(experiment)
    experiment = with_prepared_tokenizer(dataset.measured(), dataset.folder, dataset.manifest)
    if experiment.parallel.threads_per_worker:
        torch.set_num_threads(experiment.parallel.threads_per_worker)
    device = device_of(experiment)
    choose_arithmetic(experiment.training, device)
    every = max(1, own.steps // 10)

    def on_step(step: int, rate: float, loss: float) -> None:
        if step % every == 0 or step == 1:
            logger.info(f"step {step:,}/{own.steps:,}  lr {rate:.2e}  loss {loss:.4f}")

    with alone_on(device) as world:
        found = range_test(experiment, dataset.folder, dataset.manifest, world, own.low, own.high, own.steps, on_step)
    if found.diverged:
        logger.info(f"ended at step {len(found.rates):,}, learning rate {found.rates[-1]:.2e}: the loss runs away")
    picture = range_curve(
        found.rates, found.losses, found.smoothed, found.lowest, found.suggestion,
        shorten(f"learning-rate range test of {shlex.join(_without(rest, '--optim.lr'))}", 100),
    )  # fmt: skip
    write_file(path.absolute().parent, path.name, png(picture))
    print(f"picture: {path.absolute()}")
    if found.suggestion is None:
        print("no suggestion: the loss has not fallen; try more --steps, or another --from and --to")
        return 1
    print(f"the loss is lowest at learning rate {found.lowest:.2e}; a third of it, {found.suggestion:.2e}, is one to begin with")
    words = [*program("ray_jobs.train").split(), *_without(rest, "--optim.lr"), "--optim.lr", f"{found.suggestion:.2g}"]
    print(f"to train with it: {shlex.join(words)}")
    return 0


def _free(name: str, ending: str) -> Path:
    """A file in the working directory that is not there: the name, or the name with the first number from 2 that is free."""
    path, number = Path(name + ending), 2
    while path.exists():
        path, number = Path(f"{name}-{number}{ending}"), number + 1
    return path


def _without(words: Sequence[str], flag: str) -> list[str]:
    """Words of a command line without an option and its value."""
    kept, skip = [], False
    for word in words:
        if not skip and word.partition("=")[0] != flag:
            kept.append(word)
        skip = not skip and word == flag
    return kept


if __name__ == "__main__":
    main_entry(main)
