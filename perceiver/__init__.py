"""Perceiver, Perceiver IO and Perceiver AR in PyTorch: models, tasks, data, training, inference. Knows nothing of
Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from perceiver.config import Experiment, UserError
    from perceiver.inference.trained import TrainedModel
    from perceiver.runs import Run

__all__ = ["Experiment", "Run", "TrainedModel", "UserError", "__version__", "experiment", "load", "train"]

__version__: str
"""Version of the installed package; "unknown" where it is used from a folder, without an installation."""


def experiment(name: str, fields: Mapping[str, Any] | None = None) -> Experiment:
    """An experiment by its name, with some of its fields changed.

    Args:
        name: a preset, FILE.py:FUNCTION, MODULE:FUNCTION, a run's folder, a .yaml or .json file.
        fields: values of fields by their names as the command line has them: {"optim.lr": 1e-3, "run.name": "mine"}.

    Raises:
        UserError: there is no such experiment or field, or a value does not fit its field.
    """
    from perceiver.experiments import changed_experiment

    return changed_experiment(name, fields or {})


def train(
    experiment: Experiment,
    *,
    on_validation: Callable[[dict[str, float]], None] | None = None,
    stop_at: int | None = None,
    allow_changed_code: bool = False,
    progress: bool = True,
) -> Run:
    """Trains an experiment on Ray to its end, as `perceiver train` does: prepares its data where need be, continues a run that was
    stopped, and does nothing for one that is finished.

    Args:
        experiment: what to train; `run.name` names the run.
        on_validation: called in a thread with the metrics of each validation.
        stop_at: end with a validation and a checkpoint at this step, to be continued later.
        allow_changed_code: continue a run although code of yours in it has changed since it began.
        progress: show lines of progress.

    Returns:
        The run: its folder, its `metrics()` (a record for each log line and validation) and its `result()`; `load` takes it.

    Raises:
        UserError: a mistake in the experiment or its data.
    """
    # By name: the library knows nothing of the jobs, and needs nothing of Ray where no training is started.
    job: Run = import_module("ray_jobs.api").train(
        experiment, on_validation=on_validation, stop_at=stop_at, allow_changed_code=allow_changed_code, progress=progress
    )
    return job


def load(
    source: str | Path | Run,
    checkpoint: str = "best",
    *,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    trust_code: bool = False,
) -> TrainedModel:
    """A trained model by a run, its folder or name, an exported folder, or a name on the hub; see
    `perceiver.inference.load`.

    Raises:
        UserError: there is no such model; says where it was looked for.
    """
    # Here and not above: to import the package takes no PyTorch.
    from perceiver.inference.load import load as load_model

    return load_model(source, checkpoint, device=device, precision=precision, trust_code=trust_code)


def __getattr__(name: str) -> Any:
    """What the package offers and loads when it is first asked for: importing the package takes neither PyTorch nor the metadata
    of installed packages.
    """
    if name == "__version__":
        from perceiver.version import installed_version

        value: Any = installed_version()
    elif name == "TrainedModel":
        from perceiver.inference.trained import TrainedModel as value
    elif name in ("Experiment", "UserError"):
        value = getattr(import_module("perceiver.config"), name)
    elif name == "Run":
        from perceiver.runs import Run as value
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
