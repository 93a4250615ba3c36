"""A run: the folder of a training, and how what lies in it is read and written. Needs no PyTorch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perceiver.checkpoints import CheckpointInfo, choose_checkpoint, list_checkpoints
from perceiver.config import Experiment, UserError, home, load_tree, to_dict
from perceiver.config.core import digest
from perceiver.disk import is_locked, locked, read_json, write_json
from perceiver.extensions import Code
from perceiver.run_files import CODE, EXPERIMENT, FAILURE, LOCK, METRICS, RESULT, START, RunFiles
from perceiver.trust import check_trust

TAIL = 2**16
"""Bytes at the end of the metrics in which the last record is looked for."""


class DamagedRun(UserError):
    """A run's folder whose files do not say what they must."""


@dataclass(frozen=True)
class Parent:
    """The run, and its checkpoint, that another run began from."""

    name: str
    folder: str
    step: int
    digest: str
    """Of the files of the checkpoint, as its marker lists them."""
    whole: bool = False
    """Whether the optimizer's state and the place in the order came from there too (a fork)."""

    @classmethod
    def of(cls, run: Run, checkpoint: CheckpointInfo, whole: bool = False) -> Parent:
        return cls(run.name, str(run.folder), checkpoint.step, digest(checkpoint.files or {}, 16), whole)

    def __str__(self) -> str:
        return f"{self.name}@{self.step}"


@dataclass(frozen=True)
class Run(RunFiles):
    """A run, by its folder (which need not exist yet)."""

    @classmethod
    def find(cls, source: str | Path, storage: str | Path | None = None) -> Run | None:
        """The run on this machine that is given by its path or its name among those of `storage` or $PERCEIVER_HOME; None: there
        is none.

        Raises:
            UserError: the name is empty.
        """
        if not str(source).strip():
            raise UserError("the name of the run is empty: give its folder, its URI or its name")
        candidates = [Path(source).expanduser()]
        if not Path(source).is_absolute():
            candidates += [Path(folder).expanduser() / source for folder in (storage, home() / "runs") if folder]
        return next((cls(folder.absolute()) for folder in candidates if cls(folder).exists), None)

    @classmethod
    def open(cls, source: str | Path, storage: str | Path | None = None) -> Run:
        """As `find`.

        Raises:
            UserError: there is none.
        """
        run = cls.find(source, storage)
        if run is None:
            raise cls.missing(source, storage)
        return run

    @staticmethod
    def missing(source: str | Path, storage: str | Path | None = None) -> UserError:
        """The error of a run that was not found."""
        return UserError(f"no run {str(source)!r}: neither a run's folder nor the name of one in {storage or home() / 'runs'}")

    @property
    def is_trial_of_running_sweep(self) -> bool:
        """Whether it lies in a sweep that a process holds (as far as this machine can tell)."""
        return is_locked(self.folder.parent.parent / LOCK)

    # -------------------------------------------------------------------------------------------------------- experiment

    def saved(self) -> dict[str, Any]:
        """The content of its `experiment.json`, checked to be an object that holds the sections of an experiment. No class of the
        experiment is needed for that.

        Raises:
            DamagedRun: it cannot be read, or is something else.
        """
        try:
            content = json.loads((self.folder / EXPERIMENT).read_bytes())
        except OSError as error:
            raise DamagedRun(f"{self.folder / EXPERIMENT} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise DamagedRun(f"{self.folder / EXPERIMENT} is not JSON: {error}") from error
        experiment = content.get("experiment") if isinstance(content, dict) else None
        if not isinstance(experiment, dict) or not all(isinstance(experiment.get(name), dict) for name in ("task", "training", "run")):
            raise DamagedRun(f"{self.folder / EXPERIMENT} holds no experiment")
        return content

    def load(self, trust_code: bool = False, install_code: bool = True) -> tuple[Experiment, str]:
        """Its experiment and the digest of its data. The code that it brings is importable afterwards.

        Args:
            trust_code: run the code that it brings although that was never run from this account.
            install_code: False where this process has its own version of that code.

        Raises:
            UserError: a damaged file; code that may not be run, or is imported already in another version.
        """
        path = self.folder / EXPERIMENT
        content = read_json(path)
        if install_code:
            code = self.code()
            self.check_trust(code, trust_code)
            code.install()
        what = f"{path} is damaged: it does not describe a run"
        if not isinstance(digest := content.get("data"), str):
            raise UserError(f"{what} (no digest of its data)")
        return load_tree(content.get("experiment"), Experiment, what), digest

    def save(self, content: Mapping[str, Any]) -> None:
        """Writes its `experiment.json`."""
        write_json(self.folder / EXPERIMENT, content)

    def change_experiment(self, experiment: Experiment) -> None:
        """Makes it a run of another experiment on the same data."""
        self.save({**self.saved(), "experiment": to_dict(experiment)})

    # -------------------------------------------------------------------------------------------------------------- code

    def code(self) -> Code:
        """The source files of the user's that it brings."""
        return Code.load(self.code_folder)

    def check_trust(self, code: Code, trusted: bool = False) -> None:
        """Refuses code of the run that was never run from this account.

        Raises:
            UserError: it was not, and is not trusted.
        """
        check_trust(code, f"run {self.name}", self.code_folder, trusted)

    def check_code(self, code: Code, allow_changed: bool = False) -> None:
        """Refuses to continue the run with other code than it began with.

        Args:
            code: what the experiment needs now.
            allow_changed: whether the user lets the run continue with it.

        Raises:
            UserError: it has changed; names the files.
        """
        changed = self.code().differences(code) if self.exists else []
        if changed and not allow_changed:
            raise UserError(
                f"{', '.join(changed)} changed since run {self.name} began (its copy is in {self.code_folder}): give "
                "--allow-changed-code to continue with the new one, or another --run.name to start anew"
            )

    def save_code(self, code: Code) -> None:
        """Puts the source files that it needs into its folder. Where they differ from those there, these are kept beside them."""
        old, folder = self.code(), self.code_folder
        if old and old.digest != code.digest:
            os.replace(folder, _free(folder.with_name(f"{CODE}-before")))
        code.save(folder)

    # ----------------------------------------------------------------------------------------------------------- lineage

    def parent(self) -> Parent | None:
        """The run that it began from; None: from random weights, or from weights that are no run's."""
        try:
            return Parent(**json.loads((self.folder / START).read_bytes())["parent"])
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def save_start(self, parent: Parent | None, content: Mapping[str, Any]) -> None:
        """Notes what it began from."""
        write_json(self.start_file, {**content, "parent": None if parent is None else asdict(parent)})

    # ------------------------------------------------------------------------------------------------ how far it is, lock

    def metrics(self) -> list[dict[str, Any]]:
        """Its records so far. Lines that are no records are left out: the last one may have been cut off by a crash."""
        try:
            lines = (self.folder / METRICS).read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return []
        found = _records(lines)
        return [
            {name: math.nan if value is None else value for name, value in record.items()} if None in record.values() else record
            for record in found
        ]

    def last_step(self) -> int:
        """The step of its last record, found from the end of the file; without any that of its result (the mean of checkpoints has no
        records), or 0.
        """
        try:
            with open(self.folder / METRICS, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
                lines = file.read().splitlines()
        except FileNotFoundError:
            lines = []
        found = next((record["step"] for line in reversed(lines) if (record := _record(line)) is not None), None)
        return found if found is not None else int((self.result() or {}).get("step", 0))

    def checkpoints(self) -> list[CheckpointInfo]:
        """Its complete checkpoints, oldest first, without those whose marker is damaged."""
        return list_checkpoints(self.checkpoints_folder)

    def checkpoint(self, which: str, metric: str) -> CheckpointInfo:
        """The checkpoint named "last", "best" (by the metric; the last, where none has it) or by its step.

        Raises:
            UserError: there is none, or none of that step, or a damaged marker hides it; names the ones there are.
        """
        return choose_checkpoint(self.checkpoints_folder, which, metric)

    def result(self) -> dict[str, float] | None:
        """Its last metrics where it is finished; None: it is not (or the file is damaged, and continuing writes it again)."""
        content = self._result()
        if content is None:
            return None
        return {name: math.nan if value is None else value for name, value in content.items() if name != "stopped"}

    def stopped(self) -> str | None:
        """Why it ended before its last step; None: it did not."""
        return (self._result() or {}).get("stopped")

    def save_result(self, metrics: Mapping[str, float], stopped: str | None) -> None:
        """Marks it as finished."""
        write_json(self.folder / RESULT, {**metrics, **({} if stopped is None else {"stopped": stopped})})

    def forget_result(self) -> None:
        """Makes it a run that is not finished."""
        (self.folder / RESULT).unlink(missing_ok=True)

    def failure(self) -> dict[str, Any] | None:
        """Why its last start failed: "reason", and "users", whether that is a mistake of the user's. None: it did not."""
        path = self.folder / FAILURE
        return json.loads(path.read_text()) if path.exists() else None

    def save_failure(self, users: bool, reason: str) -> None:
        """Notes why this start failed for good."""
        write_json(self.folder / FAILURE, {"users": users, "reason": reason})

    def forget_failure(self) -> None:
        (self.folder / FAILURE).unlink(missing_ok=True)

    def status(self) -> str:
        """Whether it is finished, running, failed or stopped."""
        if (self.folder / RESULT).exists():
            return "finished"
        if is_locked(self.folder / LOCK):  # as far as this machine can tell
            return "running"
        return "failed" if (self.folder / FAILURE).exists() else "stopped"

    def held(self) -> AbstractContextManager[None]:
        """See the function `held`."""
        return held(self.folder)

    def _result(self) -> dict[str, Any] | None:
        try:
            content = json.loads((self.folder / RESULT).read_bytes())
        except (FileNotFoundError, ValueError, RecursionError):
            return None
        return content if isinstance(content, dict) else None


def runs(storage: str | Path) -> list[Run]:
    """The runs in a folder, by name."""
    return [Run(path.parent) for path in sorted(Path(storage).glob(f"*/{EXPERIMENT}"))]


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds a run, or a sweep, for this process: two drivers of one would write over each other.

    A folder that this made, and in which nothing is when an error ends it, is gone then: a start that is refused leaves none.

    Raises:
        UserError: another process trains it.
    """
    is_new = not folder.exists()
    with locked(folder / LOCK, f"{folder} is being trained by another process: wait for it or stop it"):
        try:
            yield
        except BaseException:
            if is_new and [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()
            raise


def _records(lines: Sequence[str]) -> list[dict[str, Any]]:
    """The records among some lines. Whole files are read at once, which takes half the time; line by line where a line is damaged."""
    try:
        values = json.loads(f"[{','.join(lines)}]")
    except (ValueError, RecursionError):
        values = []
    if len(values) == len(lines) and all(isinstance(value, dict) and type(value.get("step")) is int for value in values):
        return values
    return [record for record in map(_record, lines) if record is not None]


def _record(line: str | bytes) -> dict[str, Any] | None:
    """A record of the metrics: a JSON object that has a step; None for anything else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and type(value.get("step")) is int else None


def _free(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return candidate
