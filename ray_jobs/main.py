"""`perceiver COMMAND [arguments]`: one command for all jobs. Each command is the main function of a module, which is loaded when the
command is given and not before.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from perceiver.catalog import CATALOG
from perceiver.config import UserError, nearest
from ray_jobs.cli import main_entry


@dataclass(frozen=True)
class Command:
    """A command: the module whose `main` it runs."""

    group: str
    """What one wants to do: the heading it stands under in the help."""
    summary: str
    """What it does, in one line of the help."""
    module: str
    """Runs the same as `python -m MODULE`."""
    arguments: tuple[str, ...] = ()
    """Arguments that it always has, before those that are typed."""
    takes: str = "files"
    """What its first argument is, for the completion: preset, run, job, shell or files."""
    fields: bool = False
    """Whether its command line is an experiment with its fields, and so can be checked before the module is loaded."""
    job: bool = False
    """Whether it can be submitted to a cluster."""
    early: str = ""
    """Module whose `check_line` reads the command line before the module is loaded; empty: there is none."""


_INFERENCE = "perceiver.inference.__main__"

COMMANDS = {
    "data": Command("prepare data", "show what data contains, and the command that trains on it", "ray_jobs.data"),
    "init": Command("prepare data", "write an experiment on your own data as a file", "ray_jobs.init"),
    "preprocess": Command(
        "prepare data",
        "prepare the data of an experiment",
        "ray_jobs.preprocess",
        fields=True,
        job=True,
        takes="preset",
    ),
    "tokenizer": Command("prepare data", "train a tokenizer (SentencePiece, or a tokenizer.json)", "ray_jobs.train_tokenizer", job=True),
    "presets": Command("train", "list the experiments that come with the package", "perceiver.catalog"),
    "plan": Command("train", "compute memory, time and cost of a training run, before it starts", "ray_jobs.plan", takes="preset"),
    "lr-find": Command("train", "find an initial learning rate with a short test", "ray_jobs.lr_find", takes="preset"),
    "train": Command("train", "train an experiment, or continue it", "ray_jobs.train", fields=True, job=True, takes="preset"),
    "runs": Command("train", "list the runs, and the command that continues each", "ray_jobs.runs", job=True),
    "reproduce": Command("train", "show how a run was made; repeat it and compare the bits", "ray_jobs.reproduce", job=True, takes="run"),
    "show": Command("train", "show all that is known about a run", "ray_jobs.show", takes="run"),
    "tag": Command("keep order", "add tags to a run", "ray_jobs.labels", ("tag",), takes="run"),
    "note": Command("keep order", "write a note on a run", "ray_jobs.labels", ("note",), takes="run"),
    "archive": Command("keep order", "pack runs into files and remove their folders", "ray_jobs.tidy", ("archive",), takes="run"),
    "prune": Command("keep order", "remove the checkpoints of the worse runs", "ray_jobs.tidy", ("prune",), takes="run"),
    "rm": Command("keep order", "remove runs", "ray_jobs.tidy", ("rm",), takes="run"),
    "compare": Command("train", "show what differs between runs, and whether one is better", "ray_jobs.compare", takes="run"),
    "average": Command("train", "average a run's last checkpoints, as a new run", "ray_jobs.average", takes="run"),
    "evaluate": Command("train", "measure a run on its whole validation set", "ray_jobs.evaluate", job=True, takes="run"),
    "generate": Command("use a model", "continue a text", _INFERENCE, ("--action", "generate"), takes="run"),
    "play": Command("use a model", "continue a performance and write a MIDI file", "perceiver.inference.play", takes="run"),
    "flow": Command("use a model", "write the optical flow between frames, as files and images", "perceiver.inference.flow", takes="run"),
    "fill-mask": Command("use a model", "fill in masked words", _INFERENCE, ("--action", "fill_mask"), takes="run"),
    "predict": Command("use a model", "apply a model to many inputs", "ray_jobs.predict", job=True, takes="run"),
    "serve": Command("use a model", "serve a model over HTTP, with Ray Serve", "ray_jobs.serve", takes="run"),
    "export": Command("use a model", "write a model as files to keep or share", "ray_jobs.export", job=True, takes="run"),
    "push": Command("use a model", "upload a model to the Hugging Face hub", "ray_jobs.push", takes="run"),
    "sweep": Command("tune", "search for good settings", "tuning.sweep", job=True, early="tuning.space_texts"),
    "report": Command("train", "write an HTML report on runs or a sweep", "tuning.report", job=True),
    "scaling-laws": Command("tune", "fit scaling laws to training runs of several sizes", "tuning.scaling_laws", job=True),
    "submit": Command("run on a cluster", "submit a job to a Ray cluster and follow it", "ray_jobs.submit", takes="job"),
    "schema": Command("other", "print the JSON Schema of experiment files, for editors", "ray_jobs.schema"),
    "completion": Command("other", "print the completion script of a shell", "ray_jobs.completion", takes="shell"),
}

JOBS = {command.module.rpartition(".")[2]: command.module for command in COMMANDS.values() if command.job}
"""Jobs that can be submitted, by the names of their modules."""

EXAMPLES = """examples:
  perceiver train quickstart         train a small image classifier on this machine
  perceiver train quickstart --help  list all settings of a preset
  perceiver runs                     show what has been trained, and how to continue it"""


def main(argv: Sequence[str]) -> int:
    """Runs a command line.

    Raises:
        UserError: an unknown command (offers the nearest), or what the command raises.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        import perceiver

        print(f"perceiver {perceiver.__version__}")
        return 0
    name, arguments = argv[0], list(argv[1:])
    if name not in COMMANDS:
        raise UserError(f"command {name!r} does not exist{nearest(name, COMMANDS)}; perceiver --help lists the commands")
    command = COMMANDS[name]
    if command.takes == "preset" and arguments and not arguments[0].startswith("-"):
        # Here and not above: the overview needs neither. The job itself would load all models before it saw a mistake.
        from perceiver.experiments import check_name
        from ray_jobs.help import show_help

        def run() -> int | None:
            if command.fields:
                from ray_jobs.early import check_line

                check_line(command.module, arguments)
            return import_module(command.module).main([*command.arguments, *arguments])

        check_name(arguments[0])
        if arguments[0] in CATALOG and arguments[1:] == ["--help"]:
            show_help(name, arguments[0], run)
            return 0
        return run() or 0
    if command.early and arguments:
        import_module(command.early).check_line(arguments)
    return import_module(command.module).main([*command.arguments, *arguments]) or 0


def overview() -> str:
    """The help: commands by what one wants to do, and examples."""
    width = max(map(len, COMMANDS))
    lines = ["usage: perceiver COMMAND [arguments]"]
    for group in dict.fromkeys(command.group for command in COMMANDS.values()):
        lines += ["", f"{group}:"]
        lines += [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items() if command.group == group]
    return "\n".join(
        [
            *lines,
            "",
            EXAMPLES,
            "",
            "help on a command: perceiver COMMAND --help; version: perceiver --version",
            "to show more or less progress: --verbose, --quiet",
        ]
    )


def entry() -> None:
    """The console script."""
    main_entry(main, sys.argv[1:])


if __name__ == "__main__":
    entry()
