"""`perceiver average RUN [--last K] [--steps N ...]`: writes the mean of a run's checkpoints as a new run, without Ray.

Stochastic weight averaging (arXiv 1803.05407): the mean of the last weights of a training run is often better than the last weights.
A run has as many checkpoints as --run.keep-checkpoints kept, and the best ones.
"""

from __future__ import annotations

from perceiver.checkpoints import CheckpointInfo
from perceiver.config import UserError, check_folder_name
from perceiver.runs import Run
from perceiver.terminal import CommandParser, add_trust_option, summary
from ray_jobs.cli import main_entry, refuse_empty
from ray_jobs.program import program


def main(argv: list[str]) -> int:
    parser = CommandParser(prog=program("ray_jobs.average"), description=summary(__doc__))
    parser.add_argument("run", help="folder or name of a run")
    parser.add_argument("--last", type=int, metavar="K", help="average the last K checkpoints; default: all")
    parser.add_argument("--steps", type=int, nargs="+", metavar="STEP", help="average the checkpoints of these steps")
    parser.add_argument("--name", help="name of the new run, in the same folder as the old one; default: RUN-mean")
    add_trust_option(parser)
    args = parser.parse_args(argv)
    refuse_empty(args, ("run",))
    run = Run.open(args.run)
    chosen = choose(run, args.last, args.steps)
    name = args.name or f"{run.name}-mean"
    check_folder_name("--name", name)
    run.load(args.trust_code)
    # Here and not above: a mistake is reported without PyTorch.
    from perceiver.training.mean import save_mean

    made = save_mean(run, chosen, Run(run.folder.with_name(name)))
    print(f"mean of steps {', '.join(f'{c.step:,}' for c in chosen)}: {made.path.parents[1]}")
    print(f"evaluate: {program('ray_jobs.evaluate')} {made.path.parents[1]}")
    return 0


def choose(run: Run, last: int | None, steps: list[int] | None) -> list[CheckpointInfo]:
    """The checkpoints to average, oldest first.

    Raises:
        UserError: there are fewer than two, or not those that are asked for; names the ones there are.
    """
    there = run.checkpoints()
    known = ", ".join(str(c.step) for c in there) or "none"
    kept = f"run {run.name} has checkpoints of steps {known}; --run.keep-checkpoints of its training says how many it keeps"
    if last is not None and steps is not None:
        raise UserError("--last and --steps both say what to average: give one of them")
    if len(there) < 2:
        raise UserError(f"an average needs two checkpoints, and {kept}")
    if last is not None and not 2 <= last <= len(there):
        raise UserError(f"--last is {last} and must be from 2 to {len(there)}: {kept}")
    if steps is not None and (missing := sorted(set(steps) - {c.step for c in there})):
        raise UserError(f"--steps names {missing[0]}, and {kept}")
    chosen = there[-last:] if last else [c for c in there if steps is None or c.step in steps]
    if len(chosen) < 2:
        raise UserError(f"--steps is {' '.join(map(str, steps or ()))}, and an average needs two checkpoints: {kept}")
    return chosen


if __name__ == "__main__":
    main_entry(main)
