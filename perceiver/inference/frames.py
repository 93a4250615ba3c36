"""Image and sound files as input rows of batch inference: each by itself, or two frames that follow each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from perceiver.config import UserError
from perceiver.data.flow_pairs import consecutive
from perceiver.data.rows import ArrayRows
from perceiver.data.storage import open_folder
from perceiver.inference.rows import Row, Wanted

SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_WANTED = {"arrays": "row of arrays", "text": "text", "image": "image", "audio": "sound", "frames": "pair of frames"}
FRAMES = ArrayRows(first=((), "binary"), second=((), "binary"))
"""What a row of two frames has: image files."""


def frame_cuts(paths: Mapping[str, str], rows_per_part: int) -> Iterator[dict[str, Any]]:
    """Parts of pairs of frames: both of each pair in turn.

    Raises:
        UserError: no two frames follow each other.
    """
    pairs = consecutive(paths)
    if paths and not pairs:
        raise UserError(f"--input has no two frames that follow each other, only {', '.join(sorted(paths)[:3])}: name them by numbers")
    for i in range(0, len(pairs), rows_per_part):
        names = tuple(name for pair in pairs[i : i + rows_per_part] for name in pair)
        yield {"paths": tuple(paths[name] for name in names), "names": names, "rows": len(names) // 2}


def frames_rows(paths: Sequence[str], names: Sequence[str]) -> list[Row]:
    """The rows of such a part, each with the id of its first frame."""
    wanted = Wanted("image", "", None)
    found = [media_row(path, name, wanted) for path, name in zip(paths, names, strict=True)]
    rows = []
    for first, second in zip(found[::2], found[1::2], strict=True):
        error = first.error or (second.error and f"{second.id} {second.error}")
        rows.append(Row(first.id, None if error else {"first": first.value, "second": second.value}, error))
    return rows


def media_row(path: str, name: str, wanted: Wanted) -> Row:
    """An image or sound file as a row."""
    what = "a sound file" if PurePosixPath(path).suffix.lower() in SOUNDS else "an image file"
    if what != {"image": "an image file", "audio": "a sound file"}.get(wanted.kind):
        return Row(name, None, f"{what} is no {_WANTED[wanted.kind]}")
    filesystem, inner = open_folder(path)
    try:
        with filesystem.open_input_stream(inner, compression=None) as source:
            return Row(name, source.read())
    except OSError as error:
        return Row(name, None, f"cannot be read ({error})")
