"""Files in folders that are local paths or URIs (s3://, gs://, ...): read, list, and written at once as a whole."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, BinaryIO, Concatenate, ParamSpec, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from perceiver.config import UserError
from perceiver.disk import whole_file

logger = logging.getLogger(__name__)

RETRY_SECONDS = 30
"""How long an object store is asked again that does not answer."""
PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before an object store of fsspec's is asked once more. Those of pyarrow do so by themselves."""
STORE_PATIENCE = 10.0
"""Seconds in which an object store's host must be reached when a process first uses it."""
DOOR_PATIENCE = 1.5
"""The same before a command does anything else."""
UNREACHED_FOR = 60.0
"""Seconds in which a host that was not reached is tried once only."""
HOSTS = {"gs": "storage.googleapis.com", "gcs": "storage.googleapis.com", "s3": "s3.{region}.amazonaws.com"}
"""Hosts of object stores that pyarrow reads by itself; by scheme."""
LASTING = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Errors that come again."""
_UNREACHED: dict[tuple[str, int], float] = {}
P = ParamSpec("P")
R = TypeVar("R")


class NoStore(UserError, ConnectionError):
    """The host of an object store cannot be reached."""


def patient(function: Callable[Concatenate[str | Path, P], R]) -> Callable[Concatenate[str | Path, P], R]:
    """A function of a folder that is called again where an object store fails for a moment."""

    @wraps(function)
    def patiently(folder: str | Path, *args: P.args, **kwargs: P.kwargs) -> R:
        stores = [place for place in (folder, *args) if isinstance(place, (str, Path)) and "://" in str(place)]
        for pause in PAUSES if stores else ():
            try:
                return function(folder, *args, **kwargs)
            except LASTING:
                raise
            except OSError as error:
                if not any(isinstance(open_folder(place)[0], pafs.PyFileSystem) for place in stores):
                    raise
                logger.debug("%s of %s is tried again in %g s: %s", function.__name__, folder, pause, error)
                time.sleep(pause)
        return function(folder, *args, **kwargs)

    return patiently


@lru_cache(maxsize=64)
def open_folder(folder: str | Path) -> tuple[pafs.FileSystem, str]:
    """The file system of a local path or URI, and the path in it. What pyarrow does not know goes through fsspec.

    Raises:
        NoStore: the object store's host cannot be reached.
        UserError: the object store's name is wrong, or its library is not installed; a path with NUL, or in the home of nobody.
    """
    text = str(folder)
    if "\0" in text:
        raise UserError(f"{text!r} holds a NUL character, which no path can")
    if "://" not in text:
        try:
            return pafs.LocalFileSystem(), os.path.abspath(Path(text).expanduser())
        except RuntimeError:
            raise UserError(f"{text} names the home of a user that does not exist here") from None
    check_store(text, STORE_PATIENCE)
    if text.startswith(("gs://", "gcs://")) and "retry_limit_seconds" not in text:
        # By itself it tries for 15 minutes, in which no Ctrl-C is heard.
        text += ("&" if "?" in text else "?") + f"retry_limit_seconds={RETRY_SECONDS}"
    try:
        filesystem, path = pafs.FileSystem.from_uri(text)
    except pa.ArrowInvalid as error:
        import fsspec

        try:
            remote, path = fsspec.core.url_to_fs(text)
        except (ValueError, ImportError) as other:  # fsspec knows no such scheme, or its library is not there
            known = text.partition("://")[0] in HOSTS
            raise UserError(f"{folder} cannot be opened: {str(error if known else other).strip().splitlines()[0]}") from None
        filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(remote))
    return filesystem, path.rstrip("/")


def find_place(place: str, field: str) -> tuple[pafs.FileSystem, str, pafs.FileInfo]:
    """The file system of a path or URI that a user gave, the path in it, and what is there.

    Args:
        field: what the user gave it as, for messages.

    Raises:
        UserError: it cannot be reached or read.
    """
    check_store(place)
    try:
        filesystem, path = open_folder(place)
        return filesystem, path, filesystem.get_file_info(path)
    except OSError as error:
        raise UserError(f"{field} {place} cannot be read: {str(error).strip().splitlines()[0]}") from None


def check_store(uri: str, patience: float = DOOR_PATIENCE) -> None:
    """Looks whether an object store's host can be reached: the library that asks it does so for minutes, in which no Ctrl-C is heard.

    Where a proxy stands between, or the URI's store is none of `HOSTS`, nothing is looked at.

    Args:
        patience: seconds in which it is tried.

    Raises:
        NoStore: it cannot.
    """
    if (place := _store_of(uri)) is None:
        return
    if time.monotonic() - _UNREACHED.get(place, -math.inf) < UNREACHED_FOR:
        end, pause = 0.0, 0.0  # a command that asks once more need not wait once more
    else:
        end, pause = time.monotonic() + patience, 0.5
    while True:
        try:
            socket.create_connection(place, timeout=max(1.0, end - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() + pause > end:
                _UNREACHED[place] = time.monotonic()
                raise NoStore(
                    f"{uri} cannot be reached: {place[0]}, port {place[1]}: {error.strerror or error}; is there a network?"
                ) from None
        time.sleep(pause)
        pause *= 2


def _store_of(uri: str) -> tuple[str, int] | None:
    """Host and port of the object store that a URI names, as pyarrow finds it; None: it is not known here."""
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme not in HOSTS or urllib.request.getproxies().keys() & {"https", "http", "all"}:
        return None
    options = dict(urllib.parse.parse_qsl(parts.query))
    variables = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if parts.scheme == "s3" else ("CLOUD_STORAGE_EMULATOR_ENDPOINT",)
    given = options.get("endpoint_override") or next((os.environ[name] for name in variables if os.environ.get(name)), "")
    region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    found = urllib.parse.urlsplit(given if "://" in given else f"//{given}") if given else None
    scheme = options.get("scheme") or (found.scheme if found else "") or "https"
    try:
        host, port = (found.hostname, found.port) if found else (HOSTS[parts.scheme].format(region=region), None)
    except ValueError:  # a port that is no number: pyarrow says so
        return None
    return None if not host else (host, port or (80 if scheme == "http" else 443))


def whole_place(folder: str | Path, path: str) -> str:
    """A path in a folder's file system as a path or URI: with the folder's scheme, which the paths of some file systems have themselves."""
    scheme, mark, _ = str(folder).partition("://")
    return path if not mark or "://" in path else f"{scheme}://{path}"


@contextmanager
def atomic_file(folder: str | Path, name: str) -> Iterator[BinaryIO]:
    """A file of a folder to write to, which appears whole or, where the body raises, not at all.

    Local ones by `whole_file`; an object store does so by itself.
    """
    filesystem, path = open_folder(folder)
    filesystem.create_dir(path, recursive=True)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        stream = filesystem.open_output_stream(f"{path}/{name}")
        try:
            with stream as file:
                yield file
        except BaseException:
            with suppress(OSError):  # the error that is raised says more
                filesystem.delete_file(f"{path}/{name}")  # closing the stream made an object of what there was
            raise
        return
    with whole_file(Path(path) / name) as file:
        yield file


@patient
def write_file(folder: str | Path, name: str, content: bytes | Callable[[BinaryIO], Any]) -> None:
    """Writes a file at once as a whole."""
    with atomic_file(folder, name) as file:
        file.write(content) if isinstance(content, bytes) else content(file)


@patient
def read_file(folder: str | Path, name: str) -> bytes:
    """A whole file of a folder. Raises FileNotFoundError."""
    filesystem, path = open_folder(folder)
    with filesystem.open_input_stream(f"{path}/{name}", compression=None) as file:
        return file.read()


@patient
def list_folder(folder: str | Path) -> dict[str, int]:
    """Names and sizes of the files that lie directly in a folder; none if it does not exist."""
    filesystem, path = open_folder(folder)
    infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return {info.base_name: info.size for info in infos if info.type == pafs.FileType.File}


@patient
def list_tree(folder: str | Path) -> dict[str, int]:
    """Paths relative to a folder and sizes of all files in it and below it; none if it does not exist.

    Raises:
        UserError: a name leads out of the folder.
    """
    filesystem, path = open_folder(folder)
    infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True))
    found = {info.path[len(path) :].lstrip("/"): info.size for info in infos if info.type == pafs.FileType.File}
    for name in found:  # of an object store, in which any text is a name
        if ".." in name.split("/"):
            raise UserError(f"{folder} holds a file named {name!r}, which would lie outside of it: it is not read")
    return found


@patient
def copy_file(source: str | Path, name: str, target: str | Path) -> None:
    """Copies a file of one folder into another, where it appears whole."""
    filesystem, path = open_folder(source)
    with filesystem.open_input_stream(f"{path}/{name}", compression=None) as file, atomic_file(target, name) as copy:
        while part := file.read(8 << 20):
            copy.write(part)


@patient
def file_hash(folder: str | Path, name: str) -> tuple[int, str]:
    """Size and sha256 of a file of a folder."""
    filesystem, path = open_folder(folder)
    result, size = hashlib.sha256(), 0
    with filesystem.open_input_stream(f"{path}/{name}", compression=None) as file:
        while part := file.read(1 << 20):
            result.update(part)
            size += len(part)
    return size, result.hexdigest()


@patient
def read_range(folder: str | Path, name: str, start: int, stop: int) -> bytes:
    """The bytes start .. stop - 1 of a file of a folder."""
    filesystem, path = open_folder(folder)
    with filesystem.open_input_file(f"{path}/{name}") as file:
        return file.read_at(stop - start, start)


def move_file(source: str | Path, name: str, target: str | Path) -> None:
    """Moves a file of one folder into another of the same file system."""
    filesystem, path = open_folder(source)
    _, there = open_folder(target)
    filesystem.create_dir(there, recursive=True)
    filesystem.move(f"{path}/{name}", f"{there}/{name}")


def remove_folder(folder: str | Path) -> None:
    """Removes a folder with all that is in it, if it exists."""
    filesystem, path = open_folder(folder)
    if filesystem.get_file_info(path).type == pafs.FileType.Directory:
        filesystem.delete_dir(path)


def remove_file(folder: str | Path, name: str) -> None:
    """Removes a file of a folder."""
    filesystem, path = open_folder(folder)
    filesystem.delete_file(f"{path}/{name}")
