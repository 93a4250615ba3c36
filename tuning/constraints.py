"""What a trial must keep to, and what it costs: parameters, FLOPs, memory, from its configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perceiver.config import Experiment, UserError, flatten, nearest, to_dict
from perceiver.costs.devices import GIB
from perceiver.costs.flops import num_parameters
from perceiver.costs.memory import step_memory
from perceiver.tasks import build_task
from ray_jobs.memory_check import layout_of, step_of
from ray_jobs.where import Condition

COSTS = ("parameters", "flops", "memory")
"""Parameters of the model; FLOPs of a whole training; GiB of a worker's device at the fullest moment of a step."""
REFUSED = "refused: "
"""Begins the reason of a trial that does not keep to a constraint."""


class Refused(UserError):
    """A trial's values that a constraint does not allow."""


def costs(experiment: Experiment, steps: int, gpu: bool) -> dict[str, float]:
    """What `COSTS` names, of one training; on GPUs or on CPUs."""
    examples = steps * experiment.training.global_batch_size
    return {
        "parameters": num_parameters(experiment.model),
        "flops": build_task(experiment).flops_per_example() * examples,
        "memory": step_memory(step_of(experiment), layout_of(experiment, gpu)).total / GIB,
    }


def parse_constraint(text: str) -> Condition:
    """A constraint as it is typed: parameters<=2e6, or a field of the experiment, by the rules of `perceiver runs --where`.

    Raises:
        UserError: it is none.
    """
    try:
        return Condition(text)
    except UserError:
        raise UserError(
            f"--constraint {text!r} cannot be read: compare {', '.join(COSTS)} or fields with values by == != < <= > >= in, joined by and, "
            'or, not: "parameters<=2e6"'
        ) from None


def check_constraints(constraints: Sequence[str], experiment: Experiment) -> None:
    """Checks the constraints of a sweep of an experiment.

    Raises:
        UserError: one cannot be read, or names what there is not.
    """
    fields = flatten(to_dict(experiment))
    for text in constraints:
        for name in sorted(parse_constraint(text).names):
            if name not in COSTS and name not in fields:
                raise UserError(
                    f"--constraint {text!r} is about {name}, which is neither a field nor one of {', '.join(COSTS)}"
                    f"{nearest(name, [*COSTS, *fields])}"
                )


def refuse(constraints: Sequence[str], experiment: Experiment, found: dict[str, float]) -> None:
    """Refuses a trial that does not keep to the constraints.

    Args:
        constraints: of its sweep.
        experiment: of the trial.
        found: its `costs`.

    Raises:
        Refused: names the first that it does not meet, and what it has.
    """
    values: dict[str, Any] = {**flatten(to_dict(experiment)), **found}
    for text in constraints:
        condition = parse_constraint(text)
        if not condition.matches(values):
            has = ", ".join(f"{name} {_short(values[name])}" for name in sorted(condition.names))
            raise Refused(f"{REFUSED}{has}, and the sweep's constraint is {text}")


def _short(value: Any) -> str:
    return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
