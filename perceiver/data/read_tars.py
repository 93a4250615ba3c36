"""Pictures in .tar files, as WebDataset has them: the members of an example share their name up to the first dot."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from typing import Any

from perceiver.data import spans
from perceiver.data.files import InputFile, format_of
from perceiver.data.spans import Unreadable
from perceiver.data.storage import open_folder


def tar_pictures(file: InputFile, label_column: str) -> Iterator[tuple[str, bytes, Any]]:
    """What messages call each picture, its bytes and its label: that of NAME.cls, or a field of NAME.json.

    Raises:
        Unreadable: the file is damaged, or has no picture.
    """
    key, data, name, label = "", None, "", None
    any_picture = False
    for member, content in _members(file):
        folder, slash, base = member.rpartition("/")
        this = folder + slash + base.partition(".")[0]
        if this != key:
            if data is not None:
                yield name, data, label
            key, data, label = this, None, None
        ending = base.lower().rpartition(".")[2]
        if format_of(member) == "picture":
            name, data, any_picture = f"{file.name} {member}", content, True
        elif ending in ("cls", "json"):
            label = _label(content, ending, label_column, label)
    if data is not None:
        yield name, data, label
    if not any_picture:
        raise Unreadable("empty file", f"{file.name} has no pictures")


def _label(content: bytes, ending: str, label_column: str, before: Any) -> Any:
    text = content.decode(errors="replace").strip()
    if ending == "cls":
        return text
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return before
    return fields.get(label_column, before) if isinstance(fields, dict) else before


def _members(file: InputFile) -> Iterator[tuple[str, bytes]]:
    filesystem, path = open_folder(file.path)
    try:
        with filesystem.open_input_stream(path) as source, tarfile.open(fileobj=source, mode="r|") as archive:
            for member in archive:
                if member.size > spans.MOST_RECORD:
                    most = f"{spans.MOST_RECORD >> 20:,} MiB"
                    raise Unreadable("too large", f"{file.name} has a member {member.name!r} of {member.size:,} bytes, more than {most}")
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None:
                    yield member.name, content.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise Unreadable("corrupt file", f"{file.name} is no readable .tar file ({(str(error) or 'damaged').splitlines()[0]})") from None
