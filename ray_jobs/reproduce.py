"""`perceiver reproduce RUN [--run]`: shows how a run was made; with `--run`, repeats it and compares the weights bit by bit."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from perceiver.config import UserError
from perceiver.disk import read_json
from perceiver.provenance import MAIN, differences_here
from perceiver.runs import Run
from perceiver.terminal import CommandParser, add_trust_option, number_of, summary
from ray_jobs.cli import main_entry, refuse_empty
from ray_jobs.logs import show_progress
from ray_jobs.program import program


def main(argv: list[str]) -> int:
    parser = CommandParser(prog=program("ray_jobs.reproduce"), description=summary(__doc__))
    parser.add_argument("run", help="folder or name of a run")
    parser.add_argument("--run", dest="again", action="store_true", help="train it again under another name, and compare the weights")
    parser.add_argument("--name", help="name of the new run; default: RUN-again")
    add_trust_option(parser)
    args = parser.parse_args(show_progress(argv))
    refuse_empty(args, ("run",))
    run = Run.open(args.run)
    content = read_json(run.provenance_file) if run.provenance_file.is_file() else None
    try:
        for line in describe(run, content):
            print(line, flush=True)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{run.provenance_file} is damaged: it does not say how a run was made ({type(error).__name__}: {error})"
        ) from error
    if args.name and not args.again:
        raise UserError(f"--name is {args.name!r}, which names the run that --run makes: give --run, too")
    return _again(run, args.name or f"{run.name}-again", args.trust_code) if args.again else 0


def describe(run: Run, content: dict[str, Any] | None) -> Iterator[str]:
    """Lines that say how a run was made, and what is another here.

    Args:
        content: what `perceiver.provenance.record` wrote; None: the run was begun before that was written.
    """
    saved = run.saved()
    yield f"run:       {run.folder}"
    if (parent := run.parent()) is not None:
        yield f"parent:    {parent} ({parent.folder}, checkpoint {parent.digest})"
    yield f"version:   {saved.get('version', 'before 0.2.0')}"
    yield f"data:      {saved.get('data')}"
    if content is None:
        yield "command, code and packages are not on record: the run was begun by a version that did not write them"
        return
    yield f"command:   {shlex.join(content['command'])}"
    yield f"in:        {content['folder']}"
    for name, code in content["code"].items():
        changes = f", with the changes in {run.diff_file(name)}" if code["changed"] else ""
        new = f", and {number_of(len(code['untracked']), 'file')} that git does not know" if code["untracked"] else ""
        yield f"code:      {name} at commit {code['commit']} of {code['root']}{changes}{new}"
    machine = content["machine"]
    yield f"machine:   {machine['processor']}, {machine['cores']} cores, {machine['system']}"
    yield f"workers:   {content['workers']} ({content['device']})"
    known = content["packages"]
    yield "packages:  " + ", ".join(f"{name} {known[name]}" for name in ("python", *MAIN) if name in known)
    yield f"           all {len(known)} in {run.provenance_file}"
    for line in differences_here(content):
        yield f"differs:   {line}"


def _again(run: Run, name: str, trust_code: bool) -> int:
    # Here and not above: to look takes neither models nor Ray.
    from perceiver.experiments import find_experiment
    from perceiver.training.checkpoint_files import differing_weights
    from ray_jobs.train import run as train

    checkpoints = run.checkpoints()
    if not checkpoints:
        raise UserError(f"run {run.name} has no checkpoint to compare with")
    last = checkpoints[-1]
    experiment = find_experiment(str(run.folder), trust_code)
    made = replace(experiment, run=replace(experiment.run, name=name))
    train(made, stop_at=last.step)
    again = Run(run.folder.with_name(name))
    found = next((checkpoint for checkpoint in again.checkpoints() if checkpoint.step == last.step), None)
    if found is None:
        raise UserError(f"run {name} has no checkpoint of step {last.step:,}, the last one of {run.name}: choose another --name")
    total, different = differing_weights(last.path, found.path)
    if not different:
        print(f"the same bits: all {total} tensors of weights at step {last.step:,} are equal", flush=True)
        return 0
    weight, most = max(different.items(), key=lambda item: item[1])
    print(
        f"other bits: {len(different)} of {total} tensors of weights at step {last.step:,} differ, by {most:.3g} at most ({weight})",
        flush=True,
    )
    return 1


if __name__ == "__main__":
    main_entry(main)
