"""Local files: written whole, put on disk, locked; JSON. Needs nothing but Python."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from perceiver.config import UserError


def local_folder(field: str, path: str) -> Path:
    """A folder that can be made and written to, as an absolute path; nothing is made.

    Args:
        field: the option that names it, without --, or an argument's name in capitals.
        path: as it is typed.

    Raises:
        UserError: names the field and what is in the way.
    """
    with _naming(field, path, "folder"):
        folder = _absolute(path)
        there = next(parent for parent in (folder, *folder.parents) if parent.exists() or parent.is_symlink())
        there.stat()  # raises for a link that leads nowhere, or to itself
    if not there.is_dir():
        raise UserError(f"{_shown(field)} is {path!r}, but {there} is a file")
    # Asked of the system by making something: rights alone do not tell of file systems that are read-only, or no place for files.
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".perceiver-", dir=there))
    except OSError as error:
        raise UserError(f"{_shown(field)} is {path!r}, but {there} cannot be written to: {error.strerror}") from None
    return folder


def _absolute(path: str) -> Path:
    if "\0" in path:
        raise ValueError("a name holds no NUL")
    return Path(path).expanduser().absolute()


@contextmanager
def _naming(field: str, path: str, what: str) -> Iterator[None]:
    """Turns what the system says of a path into a sentence that names the field."""
    try:
        yield
    except (RuntimeError, OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{_shown(field)} is {path!r} and cannot be a {what}: {reason}") from None


def _shown(field: str) -> str:
    return field if field.isupper() else f"--{field}"


def local_file(field: str, path: str, suffix: str = "") -> Path:
    """A file that can be written, as an absolute path in a folder that exists; nothing is made.

    Args:
        field: the option that names it, without --.
        path: as it is typed.
        suffix: how its name must end, ".html".

    Raises:
        UserError: names the option and what is in the way.
    """
    with _naming(field, path, "file"):
        file = _absolute(path)
        fits = file.suffix == suffix or not suffix
        fits = fits and file.parent.is_dir()
        folder = file.is_dir()
    if not fits:
        raise UserError(f"{_shown(field)} is {path} and must be a {suffix or 'new'} file in a folder that exists")
    if folder:
        raise UserError(f"{_shown(field)} is {path}, which is a folder")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".perceiver-", dir=file.parent))
    except OSError as error:
        raise UserError(f"{_shown(field)} is {path}, which cannot be written ({error.strerror})") from None
    return file


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which appears whole under its name or, where the body raises, not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def to_disk(path: str | Path) -> None:
    """Puts a file's content, or the names in a folder, on disk: content alone would not survive a power cut under its name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that cannot do so
            raise
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, refused: str | None = None) -> Iterator[None]:
    """Holds a lock file for this process; its folder is made where it is missing.

    Args:
        path: of the lock file.
        refused: the error where another process holds it; None: wait for that process.

    Raises:
        UserError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if refused is None else fcntl.LOCK_NB))
        except OSError as error:
            if refused is None:
                raise
            raise UserError(refused) from error
        yield


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock file (as far as this machine can tell)."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except OSError:
        return True


# -------------------------------------------------------------------------------------------------------------------- JSON


def json_bytes(content: Any) -> bytes:
    """JSON for people and programs; what is no finite number becomes null, which all programs can read."""
    return (json.dumps(finite(content), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def finite(content: Any) -> Any:
    """Plain data with None in place of NaN and infinities."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, Iterable) and not isinstance(content, str):
        return [finite(value) for value in content]
    return content


def write_json(path: Path, content: Any) -> None:
    """Writes a file whole or not at all, in a folder that is made where it is missing; see `json_bytes`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(json_bytes(content))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: there is no such file, or it holds anything else.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it holds no JSON object)")
    return content
