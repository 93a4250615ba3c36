"""Optical flow: how the pixels of a frame move until the next one (arXiv 2107.14795, Section 4.2)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from perceiver.config import DataConfig, ModelConfig, TaskConfig, UserError
from perceiver.config.core import spelled
from perceiver.costs.flops import training_flops
from perceiver.costs.memory import has_formulas
from perceiver.data.flow_rows import FlowRows
from perceiver.data.images import decode_image, rgb
from perceiver.data.manifest import Split
from perceiver.data.order import uniforms
from perceiver.models import FlowInput, FlowOutput, PerceiverIOConfig
from perceiver.tasks.base import IGNORE_INDEX, Batch, Sample, Task, loss_of_sources, of_examples
from perceiver.tasks.flow_augmentation import NUMBERS, Augmentation, augmented
from perceiver.tasks.flow_frames import features, scale_flow, scaled_flow, scaled_frames, tiled_flow
from perceiver.tasks.flow_pictures import beside

_CHANNELS = 27
_OUTLIER, _OUTLIER_SHARE = 3.0, 0.05
"""Of KITTI's Fl: an error of more pixels, and of a larger share of the true flow, is an outlier."""
_WITHIN = (1, 3, 5)
_SHOWN = 3
"""Pairs of a validation that are drawn (of those that this worker sees)."""


class OpticalFlowConfig(TaskConfig):
    """A flow vector for each pixel of the first of two frames."""

    kind: ClassVar[str] = FlowRows.kind
    abilities: ClassVar[tuple[str, ...]] = ("flow",)

    patch_min_overlap: int = 20
    """Pixels that neighbouring tiles of a frame share at least, where it is larger than the model's input."""
    fit: Literal["crop", "resize"] = "crop"
    """crop: training cuts a random part of the model's size out of larger frames, and predictions are put together from tiles; resize:
    frames are scaled to the model's size as a whole, and predictions back to theirs (coarser, and much cheaper)."""
    flow_scale: float = 20.0
    """Pixels of flow that stand for 1 in the model's output, as published weights have it."""
    loss: Literal["epe", "l1"] = "epe"
    """Of each pixel: epe: length of the error; l1: sum of the absolute errors of both directions."""
    brightness: float = 0.0
    """Training frames get a random brightness, changed by at most this share."""
    contrast: float = 0.0
    """The same of their contrast."""
    saturation: float = 0.0
    """The same of their saturation."""
    hue: float = 0.0
    """Their hue is turned at random by at most this share of the circle; at most 0.5."""
    asymmetric: float = 0.0
    """Share of training pairs whose two frames get colours of their own."""
    erase: float = 0.0
    """Share of training pairs of which the second frame has one or two rectangles hidden."""
    scale: tuple[float, float] = (0.0, 0.0)
    """Least and greatest change of scale of training pairs, as powers of 2: -0.2 0.5 is from 0.87 to 1.41."""
    stretch: float = 0.0
    """Training pairs are stretched along each axis by a random power of 2 of at most this size."""
    mirror: float = 0.0
    """Share of training pairs that are mirrored, left to right."""
    mirror_vertical: float = 0.0
    """Share of training pairs that are turned upside down, as in a mirror."""

    def check(self, where: str) -> None:
        where = spelled(where)
        for name in ("asymmetric", "erase", "mirror", "mirror_vertical"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise UserError(f"{where}{spelled(name)} is {value} and must be from 0 to 1")
        for name, most in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0.5), ("stretch", 1)):
            if not 0 <= (value := getattr(self, name)) <= most:
                raise UserError(f"{where}{spelled(name)} is {value} and must be from 0 to {most}")
        if not -2 <= self.scale[0] <= self.scale[1] <= 2:
            raise UserError(f"{where}scale is {self.scale} and must be two powers of 2 from -2 to 2, the lesser first")
        if self.fit == "resize" and (self.scale != (0.0, 0.0) or self.stretch):
            raise UserError(f"{where}scale and {where}stretch change what is cut out, and {where}fit is resize: leave them out")
        if not self.flow_scale > 0:
            raise UserError(f"{where}flow-scale is {self.flow_scale} and must be above 0")

    @classmethod
    def of_model(cls, model: ModelConfig) -> TaskConfig | None:
        match model:
            case PerceiverIOConfig(input=FlowInput(), output=FlowOutput()):
                return cls()
        return None

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task[Any, Any]:
        if not isinstance(model, PerceiverIOConfig) or not isinstance(model.input, FlowInput) or not isinstance(model.output, FlowOutput):
            raise UserError("optical flow needs a Perceiver IO model with a FlowInput and a FlowOutput")
        return OpticalFlow(self, model, data, seed)


class OpticalFlow(Task[OpticalFlowConfig, PerceiverIOConfig]):
    """Trained on parts of frames of the model's size, measured on whole frames, in their own pixels."""

    metric_directions = {
        "loss": "min", "epe": "min", "fl_all": "min", "within_1px": "max", "within_3px": "max", "within_5px": "max",
        "epe_visible": "min", "epe_occluded": "min", "epe_zero": "min",
    }  # fmt: skip
    baseline_metrics = {"epe": ("epe_zero", "nothing moves")}

    def __init__(self, config: OpticalFlowConfig, model: PerceiverIOConfig, data: DataConfig, seed: int) -> None:
        super().__init__(config, model, data, seed)
        self._shown: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []
        """Row, first frame, true and predicted flow."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        assert isinstance(self.model_config.input, FlowInput)
        return self.model_config.input.image_shape

    def check(self) -> None:
        flow = self.model_config.input
        assert isinstance(flow, FlowInput)
        if flow.num_patch_input_channels != _CHANNELS:
            raise UserError(
                f"model.input.num-patch-input-channels is {flow.num_patch_input_channels} and must be {_CHANNELS}: 3 x 3 pixels in colour"
            )
        if not 0 <= self.config.patch_min_overlap < min(self.size):
            raise UserError(
                f"task.patch-min-overlap is {self.config.patch_min_overlap} and must be at least 0 and less than both sizes of "
                f"model.input.image-shape, {self.size}"
            )

    def examples(self, block: pa.Table, split: Split, first_row: int, epoch: int, train: bool) -> pa.Table:
        """Frames "frames" (2, height, width, 3) uint8 and "flow" (height, width, 2) float32 as bytes, "size" (height, width), "occluded"
        as stored. For training they have the model's size, for validation their own.
        """
        columns: dict[str, list[Any]] = {"frames": [], "flow": [], "height": [], "width": [], "occluded": []}
        for i, row in enumerate(block.slice(0, block.num_rows - split.lookahead).to_pylist()):
            frames = np.stack([rgb(decode_image(row[name])) for name in ("first", "second")])
            flow = np.frombuffer(row["flow"], np.float32).reshape(*row["size"], 2)
            if train:
                frames, flow = self._for_training(frames, flow, first_row + i, epoch)
            columns["frames"].append(frames.tobytes())
            columns["flow"].append(flow.tobytes())
            columns["height"].append(flow.shape[0])
            columns["width"].append(flow.shape[1])
            columns["occluded"].append(b"" if train else row["occluded"])
        kinds = {"height": pa.int32(), "width": pa.int32()}
        return pa.table({name: pa.array(values, kinds.get(name, pa.large_binary())) for name, values in columns.items()})

    def _for_training(self, frames: np.ndarray, flow: np.ndarray, row: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        config = self.config
        how = Augmentation(**{name: getattr(config, name) for name in Augmentation.__dataclass_fields__})
        drawn = uniforms(self.seed, epoch, np.array([row]), NUMBERS)[0].tolist()
        pair, moved = torch.from_numpy(frames), torch.from_numpy(flow.copy())
        if config.fit == "resize":
            pair, moved = scaled_frames(pair, self.size), scale_flow(moved, self.size)
        pair, moved = augmented(pair, moved, self.size, how, drawn)
        return pair.numpy(), moved.numpy().astype(np.float32)

    def collate(self, rows: pa.Table, size: int, split: Split, train: bool, step: int) -> Batch:
        """frames (size, 2, H, W, 3) uint8, flow (size, H, W, 2) float32, NaN where it is not known and outside of a frame, "sizes"
        (size, 2), "occluded" (size, H, W) uint8: 1 where it is, 2 where that is not known. H and W: those of the largest frames.
        """
        heights, widths = (rows[name].to_numpy() for name in ("height", "width"))
        height, width = (int(max(least, *there, least)) for least, there in zip(self.size, (heights, widths), strict=True))
        batch = {
            "frames": torch.zeros(size, 2, height, width, 3, dtype=torch.uint8),
            "flow": torch.full((size, height, width, 2), torch.nan),
            "sizes": torch.tensor(self.size).repeat(size, 1),
            "labels": torch.full((size,), IGNORE_INDEX),
        }
        if not train:
            batch |= {"occluded": torch.full((size, height, width), 2, dtype=torch.uint8), "number": torch.full((size,), -1)}
        for i, (h, w) in enumerate(zip(heights.tolist(), widths.tolist(), strict=True)):
            frames = np.frombuffer(rows["frames"][i].as_buffer(), np.uint8).reshape(2, h, w, 3)
            batch["frames"][i, :, :h, :w] = torch.from_numpy(frames.copy())
            batch["flow"][i, :h, :w] = torch.from_numpy(np.frombuffer(rows["flow"][i].as_buffer(), np.float32).reshape(h, w, 2).copy())
            batch["sizes"][i] = torch.tensor([h, w])
            batch["labels"][i] = 0
            if train:
                continue
            batch["number"][i] = rows["row"][i].as_py()
            if packed := rows["occluded"][i].as_py():
                hidden = np.unpackbits(np.frombuffer(packed, np.uint8), count=h * w).reshape(h, w)
                batch["occluded"][i, :h, :w] = torch.from_numpy(hidden)
        return batch

    def num_targets(self, batch: Batch) -> Tensor:
        """Pixels whose flow is known."""
        return (~batch["flow"][..., 0].isnan()).sum()

    def flows(self, model: nn.Module, frames: Tensor) -> Tensor:
        """Flow in pixels (B, h, w, 2) of frames (B, 2, h, w, 3) uint8 of the model's size."""
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        return model(features(frames).to(dtype)).float() * self.config.flow_scale

    def whole_flows(self, model: nn.Module, pairs: list[Tensor], at_once: int | None = None) -> list[Tensor]:
        """Flow in pixels (H, W, 2) of each pair of frames (2, H, W, 3) uint8 of any size.

        Args:
            model: the model.
            pairs: the frames.
            at_once: parts that the model computes at once; None: all of them.
        """

        def of_parts(parts: Tensor) -> Tensor:
            return self.flows(model, parts)

        if self.config.fit == "resize":
            return scaled_flow(of_parts, pairs, self.size, at_once)
        return tiled_flow(of_parts, pairs, self.size, self.config.patch_min_overlap, at_once)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over the pixels whose flow is known."""
        flow = batch["flow"]
        known = ~flow[..., 0].isnan()
        truth = torch.where(known[..., None], flow, 0.0)
        if torch.is_grad_enabled():
            each = torch.where(known, self._each(self.flows(model, batch["frames"]) - truth), 0.0)
            return each.sum(), loss_of_sources(each, {**batch, "labels": torch.where(known, 0, IGNORE_INDEX)})
        said = torch.zeros_like(truth)
        sizes = batch["sizes"].tolist()
        found = self.whole_flows(model, [pair[:, :h, :w] for pair, (h, w) in zip(batch["frames"], sizes, strict=True)])
        for i, ((h, w), one) in enumerate(zip(sizes, found, strict=True)):
            said[i, :h, :w] = one
        each = torch.where(known, self._each(said - truth), 0.0)
        self._observe(batch, truth, said)
        return each.sum(), {**_measured(said - truth, truth, known, batch["occluded"]), **of_examples(each, known)}

    def _each(self, error: Tensor) -> Tensor:
        """(..., 2) -> (...)."""
        if self.config.loss == "l1":
            return error.abs().sum(-1)
        return (error.square().sum(-1) + 1e-12).sqrt()  # whose gradient is finite at 0

    def _observe(self, batch: Batch, truth: Tensor, said: Tensor) -> None:
        """Keeps the first pairs of a validation, of those that this worker sees."""
        for i in (batch["labels"] != IGNORE_INDEX).nonzero().flatten().tolist():
            if len(self._shown) == _SHOWN:
                return
            h, w = batch["sizes"][i].tolist()
            known = ~batch["flow"][i, :h, :w, :1].isnan()
            flows = [torch.where(known, truth[i, :h, :w], torch.nan), said[i, :h, :w]]
            frame = batch["frames"][i, 0, :h, :w].cpu().numpy()
            self._shown.append((int(batch["number"][i]), frame, *(flow.cpu().numpy() for flow in flows)))

    def metrics(self, sums: dict[str, np.ndarray], split: Split) -> dict[str, float]:
        """End-point error (EPE) in pixels; Fl-all, the share of pixels whose error is above 3 pixels and 5% of the flow; shares of pixels
        with an error of at most 1, 3 and 5; the EPE of what can be seen in the second frame and what cannot, where that is known;
        epe_zero, the EPE of saying that nothing moves.
        """
        count = max(float(sums["targets"]), 1.0)
        found = {**super().metrics(sums, split), "epe": float(sums["epe"]) / count, "fl_all": float(sums["outliers"]) / count}
        found |= {f"within_{n}px": float(sums[f"within_{n}px"]) / count for n in _WITHIN}
        for name in ("visible", "occluded"):
            if (number := float(sums[f"num_{name}"])) > 0:
                found[f"epe_{name}"] = float(sums[f"epe_{name}"]) / number
        return found | {"epe_zero": float(sums["epe_zero"]) / count}

    def samples(self, model: nn.Module, sums: dict[str, np.ndarray], split: Split) -> list[Sample]:
        """First frame, true flow and predicted flow of a few pairs, in the usual colours of directions."""
        found, self._shown = sorted(self._shown, key=lambda shown: shown[0]), []
        return [Sample("flow", image=beside([shown[1:] for shown in found]))] if found else []

    def throughput_unit(self) -> tuple[str, int]:
        return "pairs", 1

    def flops_per_example(self) -> float:
        return training_flops(self.model_config) if has_formulas(self.model_config) else super().flops_per_example()

    def dummy_batch(self, size: int) -> Batch:
        return {
            "frames": torch.zeros(size, 2, *self.size, 3, dtype=torch.uint8),
            "flow": torch.zeros(size, *self.size, 2),
            "sizes": torch.tensor(self.size).repeat(size, 1),
            "labels": torch.zeros(size, dtype=torch.int64),
        }


def _measured(error: Tensor, truth: Tensor, known: Tensor, occluded: Tensor) -> dict[str, Tensor]:
    """Sums over the pixels whose flow is known."""
    length, moved, valid = error.norm(dim=-1).double(), truth.norm(dim=-1).double(), known.double()
    found = {
        "epe": (length * valid).sum(),
        "outliers": (((length > _OUTLIER) & (length > _OUTLIER_SHARE * moved)) * valid).sum(),
        "epe_zero": (moved * valid).sum(),
        **{f"within_{n}px": ((length <= n) * valid).sum() for n in _WITHIN},
    }
    for value, name in enumerate(("visible", "occluded")):
        here = (occluded == value) * valid
        found |= {f"num_{name}": here.sum(), f"epe_{name}": (length * here).sum()}
    return found
