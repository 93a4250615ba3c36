"""How rows of optical flow are made, from files and from code."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from perceiver.data.examples import ExamplePart
from perceiver.data.files import InputFile
from perceiver.data.flow_formats import NotFlow, read_flow
from perceiver.data.flow_rows import FlowRows
from perceiver.data.images import BadImage, decode_image
from perceiver.data.preparation import PieceWriter, Preparation, ShardParts, content_hashes
from perceiver.data.rows import BadExample
from perceiver.data.spans import Problems, Span, Unreadable
from perceiver.data.storage import open_folder

_COMPRESSED = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")
"""First bytes of image files that are stored as they are; others, such as .ppm, become PNG."""


class FlowPreparation(Preparation):
    """Pairs of frames with their flow. Pairs of one scene, or of one flow (a scene in several passes), are of one split."""

    kind = FlowRows.kind

    def add(self, span: Span, problems: Problems, writers: Mapping[str, PieceWriter]) -> None:
        rows = FlowRows()
        for where, read, group in _pairs(span, problems):
            try:
                example = read()
            except (BadImage, NotFlow) as error:
                problems.report("bad pair", f"{where()}: {error}")
                continue
            except BadExample as error:
                problems.report(error.reason, f"{where()}: {error}")
                continue
            except Unreadable as error:
                problems.report(*error.args)
                continue
            together = group or example["flow"]
            content = rows.contents(example)
            for split, _ in self.splits(span.file, [content], [together]):
                writers[split].add_example(example, content, None if span.file.split == "hash" else content_hashes([content]))

    def block(self, shard: ShardParts, first: int, num: int) -> pa.Table:
        return shard.read_rows(FlowRows(), first, first + num)


_Read = tuple[Callable[[], str], Callable[[], dict[str, Any]], bytes | None]
"""What messages call a pair, what reads it, and the scene that it is from."""


def _pairs(span: Span, problems: Problems) -> Iterator[_Read]:
    part = span.file
    if isinstance(part, ExamplePart):
        for number, example in enumerate(part.examples()):
            yield partial("{}, example {:,}".format, part.place, number), partial(row_of_example, example), None
        return
    yield lambda: part.name, partial(_row_of_files, part), None if part.group is None else part.group.encode()


def _row_of_files(file: InputFile) -> dict[str, Any]:
    first, second, *more = (_bytes(path, file.name) for path in file.beside)
    try:
        flow = read_flow(_bytes(file.path, file.name))
    except NotFlow as error:
        raise NotFlow(f"its flow {file.path.rpartition('/')[2]} cannot be read: {error}") from None
    height, width = flow.shape[:2]
    occluded = b""
    for data in more:
        mask = decode_image(data)
        if mask.shape[:2] != (height, width):
            raise BadImage(f"its occlusions have {_by(mask)} pixels, and its flow {_by(flow)}")
        occluded = np.packbits(mask[..., 0] > 127).tobytes()
    for name, data in (("first", first), ("second", second)):
        if (frame := decode_image(data)).shape[:2] != (height, width):
            raise BadImage(f"its {name} frame has {_by(frame)} pixels, and its flow {_by(flow)}")
    return _row(_stored(first), _stored(second), flow, occluded)


def row_of_example(example: Any) -> dict[str, Any]:
    """A row of what code yields: frames "first" and "second" (height, width, 1 or 3) uint8, "flow" (height, width, 2), and if known
    "occluded" (height, width).

    Raises:
        BadExample: something is missing, or has another type or size.
    """
    if not isinstance(example, Mapping):
        raise BadExample("no mapping", f"it is a {type(example).__name__} and must be a mapping with first, second and flow")
    if missing := [name for name in ("first", "second", "flow") if example.get(name) is None]:
        raise BadExample("missing column", f"it has no {missing[0]} (it has: {', '.join(map(str, example)) or 'nothing'})")
    frames = [np.asarray(example[name]) for name in ("first", "second")]
    flow = np.asarray(example["flow"], np.float32)
    for name, frame in zip(("first", "second"), frames, strict=True):
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] not in (1, 3) or frame.shape[:2] != flow.shape[:2]:
            raise BadExample(
                "other shape", f"{name} is {frame.dtype} {frame.shape} and must be uint8 (height, width, 1 or 3) as large as the flow"
            )
    if flow.ndim != 3 or flow.shape[2] != 2:
        raise BadExample("other shape", f"flow has shape {flow.shape} and must have (height, width, 2)")
    occluded = example.get("occluded")
    if occluded is not None and np.shape(occluded) != flow.shape[:2]:
        raise BadExample("other shape", f"occluded has shape {np.shape(occluded)} and must have {flow.shape[:2]}")
    packed = b"" if occluded is None else np.packbits(np.asarray(occluded, bool)).tobytes()
    return _row(as_png(frames[0]), as_png(frames[1]), flow, packed)


def _row(first: bytes, second: bytes, flow: np.ndarray, occluded: bytes) -> dict[str, Any]:
    size = np.array(flow.shape[:2], np.int32)
    return {"first": first, "second": second, "flow": np.ascontiguousarray(flow, "<f4").tobytes(), "occluded": occluded, "size": size}


def _stored(data: bytes) -> bytes:
    return data if data.startswith(_COMPRESSED) else as_png(decode_image(data))


def as_png(pixels: np.ndarray) -> bytes:
    """uint8 (height, width, 1 or 3) as a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _bytes(path: str, name: str) -> bytes:
    filesystem, inner = open_folder(path)
    try:
        with filesystem.open_input_file(inner) as source:
            return source.read()
    except OSError as error:
        raise Unreadable("missing file", f"{name}: {path.rpartition('/')[2]} cannot be read ({str(error).splitlines()[0]})") from None


def _by(array: np.ndarray) -> str:
    return f"{array.shape[1]} x {array.shape[0]}"
