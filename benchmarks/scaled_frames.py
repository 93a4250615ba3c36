"""Real pairs of frames scaled to 64 x 96 pixels, as a data source: a small model is to learn a few of them by heart.

    FRAMES=folder/ perceiver train optical-flow-small --data.source benchmarks/scaled_frames.py:ScaledFrames ...

FRAMES is a folder in any layout that `optical-flow` reads. Each pair is there COPIES times, so that an epoch has more than one step and
frames need not be scaled again in each of them.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from perceiver.config import UserError
from perceiver.data.examples import Example, ExampleSource
from perceiver.data.flow_formats import read_flow
from perceiver.data.flow_pairs import flow_files
from perceiver.data.images import decode_image, rgb
from perceiver.tasks.flow_frames import scale_flow, scaled_frames

SIZE = 64, 96
COPIES = 64


class ScaledFrames(ExampleSource):
    """Pairs "first", "second" (64, 96, 3) uint8, "flow" (64, 96, 2) in pixels of these sizes. There are none for validation."""

    splits = ("train",)

    def examples(self, split: str, part: int) -> Iterator[Example]:
        pairs = list(self._pairs())
        for _ in range(COPIES):
            yield from pairs

    def _pairs(self) -> Iterator[Example]:
        folder = Path(os.environ.get("FRAMES", ""))
        if "FRAMES" not in os.environ or not folder.is_dir():
            raise UserError(f"FRAMES is {os.environ.get('FRAMES')!r} and must be a folder of frames with their flow")
        listed = [(str(p), p.relative_to(folder).as_posix(), p.stat().st_size) for p in sorted(folder.rglob("*")) if p.is_file()]
        for found in flow_files(listed, str(folder), str(folder)):
            frames = np.stack([rgb(decode_image(Path(path).read_bytes())) for path in found.file.beside[:2]])
            flow = torch.from_numpy(read_flow(Path(found.file.path).read_bytes()).copy())
            first, second = scaled_frames(torch.from_numpy(frames), SIZE).numpy()
            yield {"first": first, "second": second, "flow": scale_flow(flow, SIZE).numpy()}
