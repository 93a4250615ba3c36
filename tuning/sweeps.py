"""What a sweep is, and the ready-made ones. A sweep of your own is a function in a file: `python -m tuning.sweep my.py:sweep`.

from ray import tune
from tuning.sweeps import Sweep

def sweep() -> Sweep:
    return Sweep(preset="quickstart", space={"optim.lr": tune.loguniform(1e-4, 1e-2)}, trials=8)
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ray import tune
from ray.tune.search.sample import Function

from perceiver.comparison import SEED
from perceiver.config import Experiment, UserError, flatten, nearest, to_dict
from perceiver.experiments import field_words, find_experiment
from perceiver.extensions import call, is_reference, load_object
from perceiver.tasks import build_task
from ray_jobs.overrides import override
from tuning.constraints import check_constraints
from tuning.space_texts import check_names
from tuning.spaces import parse_space

AGAINST = ("parameters", "flops", "memory", "seconds")
"""What a metric can be set against."""
Scheduler = Literal["fifo", "asha", "hyperband", "pbt"]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Trainings of one preset that differ in some fields."""

    preset: str
    """The preset that all trials start from."""
    space: Mapping[str, Any] = field(default_factory=dict)
    """What is varied: dotted field -> one of Ray Tune's domains (tune.loguniform, tune.uniform, tune.choice, tune.grid_search)."""
    points: tuple[Mapping[str, Any], ...] = ()
    """Trials given one by one, as values of fields; instead of a space."""
    overrides: tuple[str, ...] = ()
    """Fields that are other than the preset's in all trials, as on the command line."""
    metric: str = "val_loss"
    """What is compared: a validation metric."""
    trials: int = 8
    """Samples of the space (each of them with every combination of its grids)."""
    search: Literal["random", "optuna"] = "random"
    """How samples are drawn; grids need random."""
    scheduler: Scheduler = "asha"
    """fifo: all run to the end; asha, hyperband: losing trials are stopped early, by examples seen; pbt: losing trials take
    over the checkpoint of a winning one with changed values."""
    reports: int = 9
    """Validations (and checkpoints) of a whole training: the moments at which a scheduler can act."""
    reduction: int = 3
    """asha, hyperband: one of this number of trials continues at each rung."""
    grace: float = 1 / 9
    """asha: share of a whole training that every trial gets."""
    perturb: float = 1 / 3
    """pbt: share of a whole training between two exchanges."""
    keep: int = 3
    """Best trials whose checkpoints are kept."""
    constraints: tuple[str, ...] = ()
    """What trials must keep to, by parameters, flops, memory or fields ("parameters<=2e6"); others are refused before they train."""
    against: str = ""
    """What the metric is set against in the report: parameters, flops (of a whole training), memory or seconds; "": nothing."""
    seeds: tuple[int, ...] = ()
    """Seeds of the trainings, under each of which every sample is trained; samples are then ranked by the mean. (): training.seed alone."""
    warm_start: tuple[str, ...] = ()
    """search optuna: earlier sweeps (folders), whose finished trials it knows from the start."""
    seed: int = 0
    """Of the samples (the seed of the trainings is training.seed)."""

    def __post_init__(self) -> None:
        # Fields may be spelled as on the command line.
        object.__setattr__(self, "space", {name.replace("-", "_"): domain for name, domain in self.space.items()})
        points = tuple({name.replace("-", "_"): value for name, value in point.items()} for point in self.points)
        object.__setattr__(self, "points", points)

    @property
    def mode(self) -> Literal["min", "max"]:
        return "max" if build_task(self.experiment()).higher_is_better(self.metric) else "min"

    @property
    def has_grid(self) -> bool:
        return any(map(_is_grid, self.space.values()))

    @property
    def size(self) -> int:
        """How many trials there will be."""
        grids = [len(domain["grid_search"]) for domain in self.space.values() if isinstance(domain, dict)]
        return (len(self.points) or self.trials * math.prod(grids)) * max(1, len(self.seeds))

    @property
    def objectives(self) -> tuple[str, ...]:
        """What the search looks at: the metric, and with optuna what it is set against, too."""
        return (self.metric, self.against) if self.against and self.search == "optuna" else (self.metric,)

    def experiment(self) -> Experiment:
        """The experiment that trials vary.

        Raises:
            UserError: an unknown preset or field.
        """
        experiment = override(find_experiment(self.preset), self.overrides, f"tuning.sweep {self.preset}")
        return experiment.task.completed(experiment)

    def default(self) -> dict[str, Any]:
        """The preset's own values of the fields that are varied."""
        flat = flatten(to_dict(self.experiment()))
        # Ray Tune takes a list apart and leaves a tuple whole.
        return {name: tuple(flat[name]) if isinstance(flat[name], list) else flat[name] for name in self.space}


def _is_grid(domain: Any) -> bool:
    return isinstance(domain, dict) and "grid_search" in domain


def trial_experiment(base: Experiment, values: Mapping[str, Any]) -> Experiment:
    """An experiment with a trial's values.

    Raises:
        UserError: an unknown field, or a value that does not fit it.
    """
    return override(base, arguments(values), f"tuning.sweep {base.preset}")


def arguments(values: Mapping[str, Any]) -> list[str]:
    """Values of fields as words of a command line; a sequence is as many words as it has members."""
    return [word for name, value in values.items() for word in field_words(name, value)]


def _check_seeds(sweep: Sweep) -> None:
    if len(set(sweep.seeds)) < len(sweep.seeds):
        raise UserError(f"seeds of the sweep are {sweep.seeds} and name one twice")
    if SEED in sweep.space or any(SEED in point for point in sweep.points):
        raise UserError(f"{SEED} is in the sweep's space, and --seeds sets it, too: leave one out")
    if sweep.scheduler != "fifo" or sweep.search != "random":
        raise UserError(
            f"--seeds ranks samples by the mean of trainings that came to their end: use --scheduler fifo and --search random, not "
            f"{sweep.scheduler} and {sweep.search}"
        )


def check_sweep(sweep: Sweep) -> None:
    """Checks what the sweep alone tells, with the first and last values of each domain where it has such.

    Raises:
        UserError: the first thing that cannot be right.
    """
    if bool(sweep.space) == bool(sweep.points):
        raise UserError("a sweep needs either a space or points")
    check_names([*sweep.space, *(name for point in sweep.points for name in point)], sweep.experiment())
    for name, value in {"trials": sweep.trials, "reports": sweep.reports, "keep": sweep.keep}.items():
        if value < 1:
            raise UserError(f"{name} is {value} and must be at least 1")
    if sweep.reduction < 2:
        raise UserError(f"reduction is {sweep.reduction} and must be at least 2")
    for name, share in {"grace": sweep.grace, "perturb": sweep.perturb}.items():
        if not 0 < share <= 1:
            raise UserError(f"{name} is {share:g} and must be above 0 and at most 1")
    check_constraints(sweep.constraints, sweep.experiment())
    if sweep.against and sweep.against not in AGAINST:
        raise UserError(f"--against is {sweep.against!r} and must be one of {', '.join(AGAINST)}")
    if len(sweep.objectives) > 1 and sweep.scheduler != "fifo":
        raise UserError(
            f"search optuna with --against {sweep.against} looks at both, of trials that came to their end: use --scheduler fifo, "
            f"not {sweep.scheduler}"
        )
    if sweep.seeds:
        _check_seeds(sweep)
    if sweep.warm_start and sweep.search != "optuna":
        raise UserError(f"--warm-start is for a search that learns from trials: use --search optuna, not {sweep.search}")
    if sweep.search == "optuna" and (drawn := [name for name, domain in sweep.space.items() if isinstance(domain, Function)]):
        raise UserError(
            f"search is optuna, which knows no function as a domain, and {drawn[0]} of the sweep's space is one: use search random"
        )
    if sweep.search == "optuna" and (sweep.has_grid or sweep.points):
        raise UserError("search is optuna, which draws its own samples: use no grid_search and no points, or search random")
    if sweep.scheduler == "pbt" and (sweep.search != "random" or sweep.trials < 2):
        raise UserError(f"scheduler pbt needs search random and at least 2 trials, not {sweep.search} and {sweep.trials}")
    if sweep.scheduler == "pbt" and (sweep.points or sweep.has_grid):
        raise UserError("scheduler pbt changes values while training: it needs a space of ranges and choices")
    if sweep.scheduler == "pbt" and (bad := [n for n in sweep.space if not n.startswith("optim.")]):
        raise UserError(f"scheduler pbt can change optim.* while training, not {', '.join(bad)}")
    if sweep.search == "optuna" and importlib.util.find_spec("optuna") is None:
        raise UserError("search optuna needs a package that is not installed: pip install 'optuna>=4'")


def find_sweep(name: str, space: Sequence[str] = ()) -> Sweep:
    """A ready-made sweep by its name, or yours: path/file.py:function or package.module:function.

    Args:
        name: of a sweep; of an experiment where a space is given.
        space: FIELD=DOMAIN(VALUE,...) of each field, or one reference of a function that returns a search space, dotted field -> one of
            Ray Tune's domains.

    Raises:
        UserError: there is none of that name, or the file has no such function.
    """
    if len(space) == 1 and is_reference(space[0]) and "=" not in space[0]:
        (reference,) = space
        found = call(reference, load_object(reference, "search space"), "search space")
        if not isinstance(found, Mapping):
            raise UserError(f"--space {reference} is a {type(found).__name__} and must be a mapping from fields to domains of Ray Tune")
        return _over(name, found)
    if space:
        return _over(name, parse_space(space))
    if name in SWEEPS:
        return SWEEPS[name]()
    if not is_reference(name):
        raise UserError(
            f"sweep {name!r} does not exist{nearest(name, SWEEPS)}; there are {', '.join(SWEEPS)}; "
            "yours can be FILE.py:FUNCTION or MODULE:FUNCTION; an experiment needs a --space"
        )
    made = call(name, load_object(name, "sweep"), "sweep")
    if isinstance(made, Experiment):
        raise UserError(f"{name} is an experiment: give its search space with --space FIELD=DOMAIN(VALUE,...) or --space FILE.py:FUNCTION")
    if not isinstance(made, Sweep):
        raise UserError(f"sweep {name!r} is a {type(made).__name__} and must be a Sweep or a function that returns one")
    return made


def _over(name: str, space: Mapping[str, Any]) -> Sweep:
    """A sweep over a space; one of grids alone has each combination once: a second training of it would be the same to the last bit."""
    sweep = Sweep(preset=name, space=space)
    return replace(sweep, trials=1) if space and all(map(_is_grid, space.values())) else sweep


def quickstart() -> Sweep:
    """Learning rate, warm-up and dropout on the digits of the package: minutes on two cores."""
    return Sweep(
        preset="quickstart",
        space={
            "optim.lr": tune.loguniform(3e-4, 2e-2),
            "optim.warmup_steps": tune.choice([0, 50, 150]),
            "model.encoder.dropout": tune.uniform(0.0, 0.3),
        },
        overrides=("--workers", "1"),
    )


def img_clf_mnist() -> Sweep:
    """Learning rate, warm-up and dropout."""
    return Sweep(
        preset="img-clf-mnist",
        space={
            "optim.lr": tune.loguniform(1e-4, 1e-2),
            "optim.warmup_steps": tune.choice([0, 200, 1000]),
            "model.encoder.dropout": tune.uniform(0.0, 0.3),
        },
        trials=16,
    )


def clm_shape() -> Sweep:
    """Width, depth and number of latents of a causal language model, with a learning rate for each."""
    return Sweep(
        preset="clm-wikitext-small",
        space={
            "model.num_channels": tune.choice([128, 192, 256, 384]),
            "model.num_self_attention_layers": tune.choice([2, 4, 6, 8]),
            "model.max_latents": tune.choice([128, 256, 512]),
            "optim.lr": tune.loguniform(5e-4, 5e-3),
        },
        trials=24,
    )


def mlm_masking() -> Sweep:
    """The share of words that are masked in training; in validation it is the same for all."""
    return Sweep(
        preset="mlm-imdb-small",
        space={"task.mask_probability": tune.grid_search([0.1, 0.15, 0.2, 0.3, 0.4])},
        overrides=("--task.val-mask-probability", "0.15"),
        trials=1,
        scheduler="fifo",
    )


def optim_pbt() -> Sweep:
    """A schedule of learning rate and weight decay, found by a population of four."""
    return Sweep(
        preset="img-clf-mnist",
        space={"optim.lr": tune.loguniform(1e-4, 1e-2), "optim.weight_decay": tune.loguniform(1e-4, 1e-1)},
        scheduler="pbt",
        trials=4,
    )


SWEEPS: dict[str, Callable[[], Sweep]] = {
    function.__name__.replace("_", "-"): function for function in (quickstart, img_clf_mnist, clm_shape, mlm_masking, optim_pbt)
}
