"""Models as graphs for programs without PyTorch (ONNX): written, and compared with the model before they count."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from perceiver.config import UserError
from perceiver.models.tensor_shapes import Shape

if TYPE_CHECKING:
    from perceiver.inference.trained import TrainedModel

GRAPH = "model.onnx"
GRAPHS = (GRAPH, f"{GRAPH}.data")
"""The graph, and its weights where they are too large for one file."""
TOLERANCE = 1e-4
"""Greatest difference between the outputs of graph and model, as a share of the largest output (at least 1)."""
INPUT, PADDING, OUTPUT = "input", "padding", "output"
"""Names of what the graph takes and gives."""


class WholeWindow(nn.Module):
    """A causal model for a whole window: (B, max_seq_len) ids, padded on the left, to the logits of the next token (B, vocabulary)."""

    def __init__(self, model: nn.Module, prefix_len: int) -> None:
        super().__init__()
        self.model, self.prefix_len = model, prefix_len

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        return self.model(ids, self.prefix_len, padding, last_only=True)[:, 0]


def write_graph(trained: TrainedModel, folder: Path) -> None:
    """Writes `model.onnx`: from `input` (and `padding` of text: True where there is none) to `output`, what the module gives (logits, say).
    The number of examples is free, that of a text's tokens too, up to the model's length; a causal model takes whole windows.

    Raises:
        UserError: the package onnx is missing, the model cannot be written so, or the outputs do not agree.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (what torch writes graphs with)
    except ImportError:
        raise UserError("format onnx needs the packages onnx, onnxscript and onnxruntime: pip install 'perceiver-ray[onnx]'") from None
    parameter = next(trained.model.parameters())
    if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
        raise UserError(f"format onnx is written in fp32 on a CPU: load {trained.name} with device='cpu' and precision='fp32'")
    module, shapes = _module_and_shapes(trained)
    examples = _examples(trained, shapes, size=2, length=6)
    batch = torch.export.Dim("batch", min=1)
    dynamic = tuple(
        {0: batch}
        | {number: torch.export.Dim("length", min=2, max=size[1]) for number, size in enumerate(shape) if isinstance(size, tuple)}
        for shape in shapes
    )
    path = folder / GRAPH
    names = [INPUT, PADDING][: len(shapes)]
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module, examples, str(path), dynamo=True, input_names=names, output_names=[OUTPUT], dynamic_shapes=dynamic, verbose=False
            )
    except Exception as error:  # whatever torch's exporter meets
        raise UserError(f"{trained.name} cannot be written as ONNX ({_first_line(error)})") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for size, length in ((1, 4), (3, 9)):
        check_agreement(
            trained.name, module, lambda given: session.run([OUTPUT], given)[0], names, _examples(trained, shapes, size, length)
        )


@torch.no_grad()
def check_agreement(
    name: str, module: nn.Module, graph: Callable[[dict[str, np.ndarray]], np.ndarray], names: list[str], given: tuple[Tensor, ...]
) -> None:
    """Compares what a graph gives for some inputs with what the module gives.

    Raises:
        UserError: they differ by more than the tolerance.
    """
    wanted = module(*given).numpy()
    found = graph({input_name: tensor.numpy() for input_name, tensor in zip(names, given, strict=True)})
    difference = float(np.abs(found - wanted).max()) if found.shape == wanted.shape else float("inf")
    if not difference <= TOLERANCE * max(1.0, float(np.abs(wanted).max())):
        raise UserError(f"the graph of {name} gives other outputs than the model (by {difference:.3g}): it is not written")


def _module_and_shapes(trained: TrainedModel) -> tuple[nn.Module, list[Shape]]:
    """What is written, and the shapes of what it takes."""
    config = trained.config
    if (causal := config.causal_limits()) is not None:
        longest, latents = causal
        window: Shape = ("B", longest)
        return WholeWindow(trained.model, longest - latents), [window, window]
    shape = config.batch_shape()
    if shape is None:
        what = type(getattr(config, "input", config)).__name__
        raise UserError(f"{trained.name} cannot be written as ONNX: {what} takes no single tensor")
    return trained.model, [shape, shape] if config.text_limits() is not None else [shape]


def _examples(trained: TrainedModel, shapes: list[Shape], size: int, length: int) -> tuple[Tensor, ...]:
    """Random inputs; the last positions of the first example (of causal models the first) are padding, where it has some."""
    generator = torch.Generator().manual_seed(size)
    sizes = [
        (size, *(min(length, s[1]) if isinstance(s, tuple) else s if isinstance(s, int) else length for s in shape[1:])) for shape in shapes
    ]
    limits = trained.config.text_limits()
    if limits is None:
        return (torch.randn(sizes[0], generator=generator),)
    ids = torch.randint(limits[1], sizes[0], generator=generator)
    padding = torch.zeros(sizes[1], dtype=torch.bool)
    if trained.config.causal_limits() is not None:
        padding[0, :2] = True
    else:
        padding[0, -1] = True
    return ids, padding


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter's lines of progress are left out."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
