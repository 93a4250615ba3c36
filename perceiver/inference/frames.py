"""Image, sound and MIDI files as input rows of batch inference: each by itself, or two frames that follow each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from perceiver.config import UserError
from perceiver.data.files import FORMATS
from perceiver.data.flow_pairs import consecutive, pairs_of
from perceiver.data.rows import ArrayRows
from perceiver.inference.rows import WANTED, Row, Wanted, file_bytes

SOUNDS, IMAGES, MUSIC = (tuple(ending for ending, found in FORMATS.items() if found == name) for name in ("sound", "picture", "midi"))
"""Endings of files that are a row each."""
_KINDS = {**dict.fromkeys(IMAGES, "image"), **dict.fromkeys(SOUNDS, "audio"), **dict.fromkeys(MUSIC, "midi")}
_NAMES = {"image": "an image file", "audio": "a sound file", "midi": "a MIDI file"}
FLOWS = (".flo", ".pfm")
"""Endings of files of optical flow."""
FRAMES = ArrayRows(first=((), "binary"), second=((), "binary"))
"""What a row of two frames has: image files."""


def frame_cuts(paths: Mapping[str, str], rows_per_part: int) -> Iterator[dict[str, Any]]:
    """Parts of pairs of frames: both of each pair in turn. Where files of optical flow lie beside them, the pairs are those that these
    belong to, as in training.

    Raises:
        UserError: no two frames follow each other.
    """
    known = [pair for name in sorted(paths) if is_flow(name) for pair in pairs_of(name, paths)]
    pairs = list(dict.fromkeys((pair.first, pair.second) for pair in known)) or consecutive(name for name in paths if not is_flow(name))
    if paths and not pairs:
        raise UserError(f"--input has no two frames that follow each other, only {', '.join(sorted(paths)[:3])}: name them by numbers")
    for i in range(0, len(pairs), rows_per_part):
        names = tuple(name for pair in pairs[i : i + rows_per_part] for name in pair)
        yield {"paths": tuple(paths[name] for name in names), "names": names, "rows": len(names) // 2}


def is_flow(name: str) -> bool:
    """Whether a file says how pixels move, and is no frame."""
    return name.lower().endswith(FLOWS) or "/flow_occ/" in f"/{name}" or "/flow_noc/" in f"/{name}"


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
    """An image, sound or MIDI file as a row."""
    kind = _KINDS[PurePosixPath(path).suffix.lower()]
    if kind != wanted.kind:
        return Row(name, None, f"{_NAMES[kind]} is no {WANTED[wanted.kind]}")
    try:
        return Row(name, file_bytes(path))
    except OSError as error:
        return Row(name, None, f"cannot be read ({error})")
