"""Copies of a run in an object store (`run.storage s3://bucket/runs`), from which it continues on any machine.

Workers train in a local folder, which need not be shared: each copies its own shards of a checkpoint when they are written, and
one the run's records. What counts is the store: a checkpoint without its marker there does not exist, and a worker that starts
gets the newest one's files, whoever wrote them.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from perceiver.checkpoints import MARKER, STEPS, CheckpointInfo, DamagedCheckpoint, damaged_name, parse_marker
from perceiver.config import RunConfig, UserError, home
from perceiver.data.storage import (
    check_store,
    copy_file,
    file_hash,
    list_folder,
    list_tree,
    move_file,
    read_file,
    remove_file,
    remove_folder,
    write_file,
)
from perceiver.disk import locked
from perceiver.run_files import CHECKPOINTS, CODE, EXPERIMENT, FAILURE, PROGRESS, RECORD_FOLDERS, RECORDS, RESULT
from perceiver.runs import Run


class RemoteCopy:
    """The copy of one run.

    Args:
        root: URI of the folder of runs (s3://, gs://, file://, ... as pyarrow or fsspec know them).
        folder: the run's local folder; its name is the run's.
    """

    def __init__(self, root: str, folder: Path) -> None:
        self.uri = f"{root.rstrip('/')}/{folder.name}"
        self.folder = folder
        self._records = (*RECORDS, *(path.name for path in Run(folder).tokenizer_files))
        self._sent: dict[str, tuple[int, int]] = {}

    @classmethod
    def of(cls, run: RunConfig, folder: Path) -> RemoteCopy | None:
        """The copy of a run whose storage is an object store; None for others."""
        return cls(run.remote_root, folder) if run.remote_root else None

    def check(self) -> None:
        """Raises UserError where the store cannot be reached or read."""
        try:
            check_store(self.uri)
            list_folder(self.uri)
        except (OSError, ValueError, ImportError, UserError) as error:
            raise UserError(f"run.storage {self.uri.rpartition('/')[0]} cannot be read: {str(error).splitlines()[0]}") from error

    def send_shards(self, checkpoint: str, files: Iterable[str]) -> None:
        """Copies what this worker wrote of a checkpoint."""
        for name in files:
            copy_file(self.folder / CHECKPOINTS / checkpoint, name, f"{self.uri}/{CHECKPOINTS}/{checkpoint}")

    def complete(self, checkpoint: str, content: bytes) -> None:
        """Marks a checkpoint whose shards are all there."""
        write_file(f"{self.uri}/{CHECKPOINTS}/{checkpoint}", MARKER, content)

    def remove(self, checkpoint: str) -> None:
        """Removes a checkpoint, its marker first."""
        folder = f"{self.uri}/{CHECKPOINTS}/{checkpoint}"
        if MARKER in list_folder(folder):
            remove_file(folder, MARKER)
        remove_folder(folder)

    def set_aside(self, checkpoint: str) -> str:
        """Renames a damaged checkpoint so that it does not count, its marker last; its new name."""
        folder, target = f"{self.uri}/{CHECKPOINTS}/{checkpoint}", damaged_name(checkpoint)
        for name in sorted(list_folder(folder), key=lambda name: name == MARKER):
            move_file(folder, name, f"{self.uri}/{CHECKPOINTS}/{target}")
        remove_folder(folder)
        return target

    def send_records(self) -> None:
        """Copies the run's records that have changed since they were last copied."""
        paths = [self.folder / name for name in self._records]
        paths += [path for name in RECORD_FOLDERS for path in sorted((self.folder / name).rglob("*"))]
        for path in filter(Path.is_file, paths):
            stat, name = path.stat(), str(path.relative_to(self.folder))
            if self._sent.get(name) != (stat.st_mtime_ns, stat.st_size):
                copy_file(path.parent, path.name, f"{self.uri}/{path.parent.relative_to(self.folder)}".removesuffix("/."))
                self._sent[name] = (stat.st_mtime_ns, stat.st_size)

    def send_code(self) -> None:
        """Copies the source files that the run needs; those that it no longer needs are removed there."""
        code, here = f"{self.uri}/{CODE}", Run(self.folder).code().files
        for name in list_tree(code).keys() - here.keys():
            remove_file(*_place(f"{code}/{name}"))
        for name in here:
            copy_file(*_place(self.folder / CODE / name), _place(f"{code}/{name}")[0])

    def send_failure(self) -> None:
        """Copies the note of why the run's start failed."""
        copy_file(self.folder, FAILURE, self.uri)

    def forget_failure(self) -> None:
        """Removes the note of why the run's last start failed."""
        self._forget(FAILURE)

    def forget_result(self) -> None:
        """Makes the run one that is not finished."""
        self._forget(RESULT)

    def _forget(self, record: str) -> None:
        if record in list_folder(self.uri):
            remove_file(self.uri, record)

    def markers(self) -> dict[str, bytes]:
        """The markers of the checkpoints that are complete, by folder, oldest first."""
        there = sorted(list_tree(f"{self.uri}/{CHECKPOINTS}"))
        folders = [name.removesuffix(f"/{MARKER}") for name in there if fnmatch(name, f"{STEPS}/{MARKER}")]
        return {folder: read_file(f"{self.uri}/{CHECKPOINTS}/{folder}", MARKER) for folder in folders}

    def checkpoints(self) -> list[CheckpointInfo]:
        """The checkpoints that are complete, oldest first, without those whose marker is damaged; their paths are names alone."""
        found = []
        for name, marker in self.markers().items():
            try:
                found.append(parse_marker(Path(name), marker))
            except DamagedCheckpoint:
                continue
        return found

    def fetch(self, checkpoints: int | None = 1) -> None:
        """Brings the local folder to what the store has: all records, the source files that the run needs, and the given number of
        newest checkpoints (None: all).

        Checkpoints and progress that the store has not are removed: they were not complete, or are of a run that was removed
        there, whose name may by now be another's. Files that differ from their hash are fetched again; what is damaged in the
        store shows when it is loaded. Several processes of a machine may call this at once.
        """
        with locked(self.folder / ".fetch.lock"):
            markers = self.markers()  # first: then all their files are listed
            there = list_tree(self.uri)
            for name in there:
                if name in self._records or name.partition("/")[0] in (*RECORD_FOLDERS, CODE):
                    self._get(name)
            code = Run(self.folder).code_folder
            if stored := {self.folder / name for name in there if name.startswith(f"{CODE}/")}:  # a run of before code was kept has none
                for path in set(code.rglob("*.py")) - stored:
                    path.unlink()
            for name in PROGRESS:
                if name not in there:
                    (self.folder / name).unlink(missing_ok=True)
            complete = list(markers)
            for path in (self.folder / CHECKPOINTS).glob(STEPS):
                if not (path / MARKER).is_file() or (path / MARKER).read_bytes() != markers.get(path.name):
                    shutil.rmtree(path)
            for checkpoint in complete if checkpoints is None else complete[max(0, len(complete) - checkpoints) :]:
                self._fetch_checkpoint(checkpoint, markers[checkpoint], there)

    def _fetch_checkpoint(self, checkpoint: str, marker: bytes, there: Iterable[str]) -> None:
        """Gets the files of a checkpoint that are not here as they were written, its marker last."""
        folder = f"{CHECKPOINTS}/{checkpoint}"
        try:
            files = parse_marker(self.folder / folder, marker).files
        except DamagedCheckpoint:
            files = {}
        if files is None:  # of before hashes were recorded
            names = {name.removeprefix(f"{folder}/") for name in there if name.startswith(f"{folder}/")} - {MARKER}
            missing = [name for name in sorted(names) if not (self.folder / folder / name).is_file()]
        else:
            missing = [name for name, known in files.items() if not self._is_here(f"{folder}/{name}", known)]
        for name in missing:
            if f"{folder}/{name}" in there:
                self._get(f"{folder}/{name}")
        write_file(self.folder / folder, MARKER, marker)

    def _is_here(self, name: str, known: tuple[int, str]) -> bool:
        path = self.folder / name
        return path.is_file() and path.stat().st_size == known[0] and file_hash(path.parent, path.name) == known

    def _get(self, name: str) -> None:
        copy_file(*_place(f"{self.uri}/{name}"), (self.folder / name).parent)


def _place(path: str | Path) -> tuple[str, str]:
    """The folder that a file is in, and its name there."""
    folder, _, name = str(path).rpartition("/")
    return folder, name


def fetch_run(uri: str) -> Run | None:
    """A local copy of a run of an object store, with all its checkpoints, brought up to date; None: there is no such run.

    Raises:
        UserError: the store cannot be reached.
    """
    root, _, name = uri.rstrip("/").rpartition("/")
    folder = home() / "fetched" / hashlib.sha256(root.encode()).hexdigest()[:8] / name
    remote = RemoteCopy(root, folder)
    remote.check()
    if EXPERIMENT not in list_folder(uri):
        return None
    remote.fetch(None)
    return Run(folder)


def find_run(source: str | Path, storage: str | Path | None = None) -> Run | None:
    """A run that is given by its path, its URI in an object store (then fetched), or its name among those of `storage` or
    $PERCEIVER_HOME; else None.
    """
    if "://" in str(source):
        check_store(str(source))
    return fetch_run(str(source)) if "://" in str(source) else Run.find(source, storage)
