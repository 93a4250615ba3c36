"""Files of many pictures or sounds as input of batch inference: .tar files, as WebDataset has them, and idx files, as MNIST has them."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import Any

from perceiver.config import UserError
from perceiver.data import spans
from perceiver.data.files import format_of
from perceiver.data.images import parse_idx
from perceiver.data.make_flow import as_png
from perceiver.data.spans import Span, whole
from perceiver.data.storage import open_folder
from perceiver.inference.part import as_input_file, named
from perceiver.inference.rows import Row, Wanted

_MEDIA = {"image": "picture", "audio": "sound"}
"""The format of the files that a row of a kind is."""


def tar_cuts(path: str, name: str, rows_per_part: int, kind: str) -> Iterator[dict[str, int]]:
    """Where every n-th example of a .tar file begins. One that is damaged is cut before its damage, which counts as a row.

    Raises:
        UserError: it has no example of the kind.
    """
    first, start, rows = 0, 0, 0
    for begin, _, _ in _examples(path, 0, kind):
        if rows == rows_per_part:
            yield {"first": first, "rows": rows, "start": start, "stop": 0}
            first, rows = first + rows, 0
        if not rows:
            start = begin
        rows += 1
    if not first and not rows:
        raise UserError(f"{name} holds no {_MEDIA.get(kind, kind)}s")
    yield {"first": first, "rows": rows, "start": start, "stop": 0}


def tar_rows(path: str, name: str, start: int, num: int, wanted: Wanted) -> list[Row]:
    """The rows of a part of a .tar file, each with the name of its picture or sound in the archive as its id."""
    rows: list[Row] = []
    for _, member, content in _examples(path, start, wanted.kind, read=True):
        rows.append(Row(f"{name}/{member}" if member else f"{name}:{num}", content) if isinstance(content, bytes) else
                    Row(f"{name}/{member}" if member else name, None, content))  # fmt: skip
        if len(rows) == num:
            break
    return rows


def _examples(path: str, start: int, kind: str, read: bool = False) -> Iterator[tuple[int, str, bytes | str]]:
    """For each example: the byte that it begins at, its member, and that one's content (where asked for), or what is wrong with it.

    Members of an example share their name up to the first dot.
    """
    filesystem, inner = open_folder(path)
    wanted, key, begin, yielded, member_name = _MEDIA.get(kind, ""), "", start, False, ""
    try:
        with filesystem.open_input_file(inner) as source:
            source.seek(start)
            with tarfile.open(fileobj=source, mode="r:") as archive:
                for member in archive:
                    folder, slash, base = member.name.rpartition("/")
                    if (this := folder + slash + base.partition(".")[0]) != key:
                        key, begin, yielded = this, member.offset, False
                    if yielded or not member.isfile() or format_of(member.name) != wanted:
                        continue
                    yielded, member_name = True, member.name
                    if member.size > spans.MOST_RECORD:
                        yield begin, member.name, f"has {member.size:,} bytes, more than {spans.MOST_RECORD >> 20:,} MiB"
                        continue
                    content = archive.extractfile(member) if read else None
                    yield begin, member.name, content.read() if content is not None else b""
    except (tarfile.TarError, OSError, EOFError) as error:
        after = f" after {member_name}" if member_name else ""
        yield begin, "", f"is no readable .tar file{after} ({(str(error) or 'damaged').splitlines()[0]})"


def idx_images(path: str, name: str) -> int:
    """How many images an idx file has.

    Raises:
        UserError: it is none of images, or damaged.
    """
    with named(name):
        return len(parse_idx(whole(Span(as_input_file(path, name), 0, 0)), 3, name))


def idx_rows(path: str, name: str, first: int, num: int, wanted: Wanted) -> list[Row]:
    """Some images of an idx file, as PNG files."""
    with named(name):
        images: Any = parse_idx(whole(Span(as_input_file(path, name), 0, 0)), 3, name)[first : first + num]
    ids = [f"{name}:{number}" for number in range(first, first + len(images))]
    if wanted.kind != "image":
        return [Row(identity, None, "an image is no row of what the model reads") for identity in ids]
    return [Row(identity, as_png(image[..., None])) for identity, image in zip(ids, images, strict=True)]
