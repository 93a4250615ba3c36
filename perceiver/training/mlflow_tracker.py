"""MLflow as a callback: `--callbacks mlflow`. Needs the extra package mlflow."""

from __future__ import annotations

import os
import re
import shlex
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceiver.config import CallbackConfig, UserError
from perceiver.disk import locked
from perceiver.runs import Run
from perceiver.training.callbacks import Callback
from perceiver.training.tracking import TrackedRun, Tracker, Tracking, check_installed, note_of

if TYPE_CHECKING:
    import numpy as np

ADDRESS = "MLFLOW_TRACKING_URI"
"""Variable of the environment by which MLflow's own commands find their server."""
SQLITE = "sqlite:///"
LONGEST_VALUE = 6000
"""Characters of a parameter that MLflow takes."""
MOST_PARAMETERS = 100
"""In one call, that MLflow takes."""
FOLDER = "samples"
"""Of MLflow's files of a run."""
STATUS = {"finished": "FINISHED", "failed": "FAILED", "paused": "KILLED"}


class Mlflow(CallbackConfig):
    """Sends parameters, metrics, samples and lineage to MLflow (extra: perceiver-ray[mlflow])."""

    uri: str = ""
    """Server or database: http://HOST:5000, sqlite:///FILE; "": $MLFLOW_TRACKING_URI, else the file mlflow.db beside the runs."""
    experiment: str = ""
    """Name of MLflow's experiment, which it is made with where there is none; "": the preset's."""

    def check(self, where: str) -> None:
        if self.uri and "://" not in self.uri and not self.uri.startswith(("databricks", "/")):
            raise UserError(
                f"--{where}uri is {self.uri!r} and must be http://HOST:PORT, sqlite:///FILE or another address that MLflow takes"
            )

    def ready(self, where: str) -> CallbackConfig:
        check_installed("mlflow", where)
        uri = self.uri or os.environ.get(ADDRESS, "")
        if uri.startswith(SQLITE):  # seen from the folder of the command; a worker has another one
            uri = SQLITE + str(Path(uri.removeprefix(SQLITE)).expanduser().absolute())
        return replace(self, uri=uri)

    def build(self) -> Callback:
        return Tracking(_Mlflow(self))


class _Mlflow(Tracker):
    name = "mlflow"

    def __init__(self, config: Mlflow) -> None:
        self.config = config
        self._sent: dict[str, set[int]] = {}
        """Steps of each metric and sample that earlier starts have sent."""

    def open(self, run: TrackedRun) -> str:
        storage = run.run.folder.parent
        uri = self.config.uri or f"{SQLITE}{storage / 'mlflow.db'}"
        if not uri.startswith(SQLITE):
            return self._open(run, uri, storage)
        # MLflow makes and migrates the tables of a database that it meets; two runs that do so at once leave it broken for good.
        file = Path(uri.removeprefix(SQLITE))
        with locked(file.with_name(f".{file.name}.lock")):
            make_database(file)
            return self._open(run, uri, storage)

    def _open(self, run: TrackedRun, uri: str, storage: Path) -> str:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = client = MlflowClient(uri)
        key = f"mlflow {uri.rpartition('@')[2]}"  # without the password of an address
        there = self._find(run.note(key).get("id"))
        parameters = {_plain(name): _short(value) for name, value in run.parameters.items()}
        if there is None:
            experiment = self._experiment(self.config.experiment or run.preset or run.name, uri, storage)
            there = client.create_run(experiment, run_name=run.name, tags=self._tags(run, key))
            run.save_note(key, {"id": there.info.run_id})
        else:
            client.update_run(there.info.run_id, status="RUNNING")
            for name in there.data.metrics:
                self._sent[name] = {metric.step for metric in client.get_metric_history(there.info.run_id, name)}
            for file in client.list_artifacts(there.info.run_id, FOLDER):
                name, _, step = Path(file.path).stem.rpartition("-")
                if step.isdecimal():
                    self._sent.setdefault(f"{FOLDER}/{name}", set()).add(int(step))
        self._id = there.info.run_id
        # Fields that are no part of a run's identity may have changed since it began; what MLflow has of one is never changed.
        new = [Param(name, value) for name, value in parameters.items() if name not in there.data.params]
        for first in range(0, len(new), MOST_PARAMETERS):
            client.log_batch(self._id, params=new[first : first + MOST_PARAMETERS])
        local = uri.startswith(SQLITE)
        look = f"mlflow ui --backend-store-uri {shlex.quote(uri)}" if local else uri.rpartition("@")[2]
        return f"run {self._id} of experiment {there.info.experiment_id} ({look})"

    def _find(self, run_id: str | None) -> Any:
        """The run of an earlier start; None: there is none, or it was deleted."""
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return None
        try:
            found = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return found if found.info.lifecycle_stage == "active" else None

    def _experiment(self, name: str, uri: str, storage: Path) -> str:
        from mlflow.exceptions import MlflowException

        client = self._client
        if (found := client.get_experiment_by_name(name)) is not None:
            return found.experiment_id
        # Of a database without a server the place of files is the client's affair.
        place = (storage / "mlflow-artifacts").as_uri() if uri.startswith(SQLITE) else None
        try:
            return client.create_experiment(name, artifact_location=place)
        except MlflowException:  # another run has just made it
            if (found := client.get_experiment_by_name(name)) is None:
                raise
            return found.experiment_id

    def _tags(self, run: TrackedRun, key: str) -> dict[str, str]:
        tags = {f"perceiver.{name}": value for name, value in run.tags.items()}
        tags |= {f"perceiver.tag.{label}": "yes" for label in run.labels}
        if "commit" in run.tags:
            tags["mlflow.source.git.commit"] = run.tags["commit"]
        if "command" in run.tags:
            tags["mlflow.source.name"] = run.tags["command"]
        if run.parent is not None and (parent := note_of(Run(Path(run.parent.folder)), key).get("id")):
            tags["mlflow.parentRunId"] = parent
        return tags

    def has(self, name: str, step: int) -> bool:
        plain = _plain(name)
        return step in self._sent.get(plain, ()) or step in self._sent.get(f"{FOLDER}/{plain}", ())

    def metrics(self, step: int, values: dict[str, float], seconds: float) -> None:
        from mlflow.entities import Metric

        self._client.log_batch(self._id, metrics=[Metric(_plain(name), value, int(seconds * 1000), step) for name, value in values.items()])

    def text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self._id, text, f"{FOLDER}/{_plain(name)}-{step:08d}.txt")

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._client.log_image(self._id, image, f"{FOLDER}/{_plain(name)}-{step:08d}.png")

    def checkpoint(self, step: int, path: Path) -> None:
        self._client.set_tag(self._id, "perceiver.checkpoint", str(path))

    def close(self, status: str) -> None:
        self._client.set_terminated(self._id, STATUS[status])


def make_database(file: Path) -> None:
    """Makes MLflow's tables in a file that is not there yet. It has its name when they are all there: a start that is killed meanwhile
    leaves nothing that the next one would take for a database.
    """
    if file.exists() and file.stat().st_size:
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    file.parent.mkdir(parents=True, exist_ok=True)
    for left in file.parent.glob(f".{file.name}.new-*"):  # with SQLite's journals
        left.unlink()
    new = file.with_name(f".{file.name}.new-{uuid.uuid4().hex[:8]}")  # MLflow keeps connections by the names of files
    store = SqlAlchemyStore(f"{SQLITE}{new}", (file.parent / "mlflow-artifacts").as_uri())
    store.engine.dispose()
    os.replace(new, file)


def _plain(name: str) -> str:
    """A name of the letters that MLflow takes."""
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."
