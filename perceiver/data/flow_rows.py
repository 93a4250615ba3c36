"""Rows of optical flow: two frames as image files, and how the pixels of the first one move."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from perceiver.data.flow_pairs import flow_files
from perceiver.data.row_kind import RowKind
from perceiver.data.rows import ArrayRows

TYPICAL_BYTES = 3_000_000
"""Of a row: frames of 384 x 512 pixels."""


class FlowRows(ArrayRows):
    """Pairs of frames, each of any size.

    "first" and "second": image files, of grey or colour. "flow": float32 (height, width, 2) as bytes, NaN where it is not known.
    "occluded": bool (height, width) as bits, whether a pixel of the first frame is not seen in the second; none where that is not known.
    "size": height and width.
    """

    kind = "flow"
    prepared_by_training = True
    has_columns = False
    takes_code = True
    made_from = "pairs of frames"
    new_rows: ClassVar[Literal["text", "image", "arrays", "frames"]] = "frames"
    formats: ClassVar[tuple[str, ...]] = ("flow",)
    expected = "frames with .flo, .pfm or 16-bit .png files of their optical flow (Flying Chairs, MPI Sintel, KITTI, FlyingThings3D)"

    def __init__(self) -> None:
        super().__init__(
            first=((), "binary"), second=((), "binary"), flow=((), "binary"), occluded=((), "binary"), size=((2,), "int32")
        )  # fmt: skip

    @classmethod
    def make(cls, row_length: int, columns: RowKind | None) -> RowKind:
        return cls()

    @classmethod
    def found(cls, listed: list[tuple[str, str, int]], label: str, what: str) -> list[Any] | None:
        return flow_files(listed, label, what)

    @classmethod
    def stored_columns(cls) -> FlowRows:
        return cls()

    @property
    def bytes_per_row(self) -> int:
        return TYPICAL_BYTES
