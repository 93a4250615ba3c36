"""Perceiver, Perceiver IO and Perceiver AR in PyTorch: models, tasks, data, training, inference. Knows nothing of
Ray.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from perceiver.inference.trained import TrainedModel

__all__ = ["TrainedModel", "__version__", "load"]

__version__: str
"""Version of the installed package; "unknown" where it is used from a folder, without an installation."""


def load(
    source: str | Path,
    checkpoint: str = "best",
    *,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    trust_code: bool = False,
) -> TrainedModel:
    """A trained model by a run's folder or name, an exported folder, or a name on the hub; see
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
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: Any = version("perceiver-ray")
        except PackageNotFoundError:
            value = "unknown"
    elif name == "TrainedModel":
        from perceiver.inference.trained import TrainedModel as value
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
