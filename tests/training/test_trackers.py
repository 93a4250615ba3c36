"""Trackers: what MLflow and Weights & Biases have of a run, once for every step; and that none of them stops a training."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from perceiver.config import CallbackConfig, Experiment, UserError, from_dict, to_dict
from perceiver.data.manifest import Manifest
from perceiver.disk import write_json
from perceiver.runs import Parent, Run
from perceiver.tasks import build_task
from perceiver.training import tracking
from perceiver.training.batches import read_here
from perceiver.training.callbacks import Callback
from perceiver.training.mlflow_tracker import Mlflow, make_database
from perceiver.training.parallel import join_world
from perceiver.training.run import Training
from perceiver.training.tracking import Tracker, Tracking
from perceiver.training.wandb_files import steps_of
from perceiver.training.wandb_tracker import Wandb
from ray_jobs.cli import parse_experiment
from tests.support.small import Call, heard, image_experiment
from tests.support.wandb_files import read_offline
from tests.training.test_callbacks import same, train

SENT: dict[str, list] = {}


class Kept(Tracker):
    """Keeps what it is sent, as a tracker's server does, and may be slow, or fail."""

    name = "kept"

    def __init__(self, config: "Keeping") -> None:
        self.config, self.sent = config, SENT.setdefault(config.key, [])

    def open(self, run):
        if self.config.trouble == "closed":
            raise OSError("no such host")
        self.before = {(name, step) for name, step, _ in self.sent}
        self.run = run
        return "here"

    def has(self, name, step):
        return (name, step) in self.before

    def metrics(self, step, values, seconds):
        if self.config.trouble == "fails":
            raise OSError("no answer")
        if self.config.trouble == "slow":
            assert WAIT.wait(20)
        if self.config.trouble == "killed" and step > 4:
            return  # what waits in a process that is killed
        self.sent += [(name, step, value) for name, value in values.items()]

    def text(self, step, name, text):
        self.sent.append((name, step, text))

    def image(self, step, name, image):
        self.sent.append((name, step, image.shape))

    def close(self, status):
        self.sent.append(("status", -1, status))


class Keeping(CallbackConfig):
    """Sends records to a list."""

    key: str = ""
    trouble: str = ""

    def build(self) -> Callback:
        return Tracking(Kept(self))


WAIT = threading.Event()


@pytest.fixture(scope="module")
def plain(images, tmp_path_factory) -> dict[str, np.ndarray]:
    """Weights of a training without trackers."""
    return train(tracked(), images, tmp_path_factory.mktemp("plain"))


def tracked(*callbacks: CallbackConfig, max_steps: int = 12, **settings) -> Experiment:
    made = image_experiment(max_steps=max_steps)
    return replace(made, callbacks=callbacks, run=replace(made.run, **settings))


def test_a_tracker_has_each_metric_and_sample_of_each_step_once_though_the_run_was_killed(plain, images, tmp_path):
    train(tracked(Keeping(key="one")), images, tmp_path / "run", kill_at=8)
    assert same(plain, train(tracked(Keeping(key="one")), images, tmp_path / "run"))
    sent = SENT["one"]
    assert [step for name, step, _ in sent if name == "loss"] == list(range(1, 13))
    assert [step for name, step, _ in sent if name == "val_loss"] == [6, 12] == [step for name, step, _ in sent if name == "confusion"]
    assert [value for name, _, value in sent if name == "status"] == ["failed", "finished"]
    recorded = {record["step"]: record["loss"] for record in Run(tmp_path / "run").metrics() if "loss" in record}
    assert {step: value for name, step, value in sent if name == "loss"} == recorded


def test_what_a_killed_process_had_not_sent_is_sent_from_the_records_once(images, tmp_path):
    train(tracked(Keeping(key="lost", trouble="killed")), images, tmp_path / "run", kill_at=8)
    with heard() as lines:
        train(tracked(Keeping(key="lost")), images, tmp_path / "run")
    sent = SENT["lost"]
    assert [step for name, step, _ in sent if name == "loss"] == list(range(1, 13))
    assert [step for name, step, _ in sent if name == "val_loss"] == [6, 12] == [step for name, step, _ in sent if name == "confusion"]
    assert "kept: sends what it lacks of 2 steps up to step 6" in lines
    recorded = {record["step"]: record["loss"] for record in Run(tmp_path / "run").metrics() if "loss" in record}
    assert {step: value for name, step, value in sent if name == "loss"} == recorded


def test_a_tracker_that_fails_while_it_catches_up_is_sent_nothing_twice(images, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "RETRY_SECONDS", (0.0, 0.0))
    train(tracked(max_steps=12), images, tmp_path / "run", kill_at=8)
    metrics, failures = Kept.metrics, iter([False, True, False, True, True])

    def failing(self, step, values, seconds):
        if next(failures, False):
            raise OSError("no answer")
        metrics(self, step, values, seconds)

    monkeypatch.setattr(Kept, "metrics", failing)
    train(tracked(Keeping(key="again")), images, tmp_path / "run")
    assert [step for name, step, _ in SENT["again"] if name == "loss"] == list(range(1, 13))


@pytest.mark.parametrize("trouble", ["closed", "fails"])
def test_a_tracker_that_fails_is_one_warning_and_stops_no_step(trouble, images, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "RETRY_SECONDS", ())
    with heard() as lines:
        train(tracked(Keeping(key=trouble, trouble=trouble), max_steps=2), images, tmp_path)
    assert Run(tmp_path).result()["step"] == 2
    assert len([line for line in lines if "kept fails, training continues without it: OSError: no" in line]) == 1
    assert len([line for line in lines if "records of this start were not sent" in line]) == 1


def test_a_tracker_that_is_slow_holds_no_step_up_and_what_it_loses_is_counted(images, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "MOST_WAITING", 5)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.2)
    WAIT.clear()
    with heard() as lines:
        train(tracked(Keeping(key="slow", trouble="slow"), max_steps=9), images, tmp_path)
    WAIT.set()
    assert Run(tmp_path).result()["step"] == 9
    assert any("did not take all records within" in line for line in lines)
    lost = next(line for line in lines if "records of this start were not sent" in line)
    assert int(lost.split(": ")[1].split()[0]) >= 5


def test_only_the_first_worker_sends(tmp_path):
    callback = Keeping(key="second").build()
    callback.training = SimpleNamespace(world=SimpleNamespace(rank=1), run_folder=tmp_path)
    callback.on_start(callback.training)
    callback.after_log(1, {"loss": 1.0})
    callback.on_end(1, {}, None)
    assert SENT["second"] == []


def test_what_a_tracker_is_told_has_configuration_place_and_lineage_and_no_address(tmp_path):
    run = Run(tmp_path / "child")
    run.save_start(Parent("base", str(tmp_path / "base"), 40, "0" * 16, True), {})
    write_json(run.labels_file, {"tags": ["good"]})
    write_json(run.provenance_file, {"command": ["perceiver", "train"], "data": "d", "code": {"package": {"commit": "c0ffee"}}})
    described = tracking.describe_run(tracked(Mlflow(uri="http://me:secret@host")), run)
    assert described.parameters["optim.lr"] == 5e-3 and described.parameters["optim.optimizer"] == "AdamW"
    assert described.parameters["model.encoder.dropout"] == 0.1
    assert "secret" not in json.dumps(described.parameters)
    assert described.tags == {
        "folder": str(run.folder), "parent": "base@40", "commit": "c0ffee", "command": "perceiver train", "data": "d",
    }  # fmt: skip
    assert described.labels == ("good",)


def test_trackers_are_chosen_by_name_and_refused_before_workers_start_where_they_cannot_work(monkeypatch, tmp_path):
    made = parse_experiment(["quickstart", "--callbacks", "mlflow", "wandb", "--callbacks.1.mode", "offline"], "x")
    assert made.callbacks == (Mlflow(), Wandb(mode="offline"))
    with pytest.raises(UserError, match=r"--callbacks.0.uri is 'host:5000' and must be http://HOST:PORT"):
        Mlflow(uri="host:5000").check("callbacks.0.")
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    for callback, name in ((Mlflow(), "mlflow"), (Wandb(), "wandb")):
        with pytest.raises(UserError, match=rf"--callbacks.0 is {name}, which needs .* pip install 'perceiver-ray\[{name}\]'"):
            callback.ready("callbacks.0.")
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: True)
    monkeypatch.chdir(tmp_path)
    assert Mlflow(uri="sqlite:///my.db").ready("callbacks.0.").uri == f"sqlite:///{tmp_path / 'my.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert Mlflow().ready("callbacks.0.").uri == "http://host:5000"
    monkeypatch.setattr("perceiver.training.wandb_tracker._has_key", lambda: False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(UserError, match="--callbacks.0.mode is online, but no key"):
        Wandb().ready("callbacks.0.")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert Wandb().ready("callbacks.0.") == Wandb(project="perceiver", mode="offline")


def test_mlflow_has_a_killed_run_as_one_with_one_point_a_step(images, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    made = tracked(Mlflow())
    folder = tmp_path / "runs" / "killed"
    train(made, images, folder, kill_at=8)
    train(made, images, folder)
    child = tmp_path / "runs" / "child"
    Run(child).save_start(Parent("killed", str(folder), 12, "0" * 16, True), {})
    train(made, images, child)
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    (experiment,) = [found for found in client.search_experiments() if found.name == "quickstart"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    run = runs["killed"]
    assert runs.keys() == {"killed", "child"} and run.info.status == "FINISHED"
    assert runs["child"].data.tags["mlflow.parentRunId"] == run.info.run_id
    assert runs["child"].data.tags["perceiver.parent"] == "killed@12"
    records = [record for record in Run(folder).metrics() if "loss" in record]
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(record["step"], record["loss"]) for record in records]
    assert [point.step for point in client.get_metric_history(run.info.run_id, "val_acc")] == [6, 12]
    assert run.data.params["optim.lr"] == "0.005" and run.data.params["optim.schedule"] == "Cosine"
    assert run.data.tags["perceiver.checkpoint"].endswith("step-00000012")
    pictures = [file.path for file in client.list_artifacts(run.info.run_id, "samples")]
    assert "samples/confusion-00000006.png" in pictures and "samples/confusion-00000012.png" in pictures


OPEN = """
import sys
from pathlib import Path
from types import SimpleNamespace
from perceiver.training.mlflow_tracker import Mlflow, _Mlflow
run = SimpleNamespace(run=SimpleNamespace(folder=Path(sys.argv[1]) / sys.argv[2]), note=lambda key: {}, save_note=lambda key, note: None)
run.__dict__.update(parameters={"a": 1}, preset="p", name=sys.argv[2], tags={}, labels=(), parent=None)
tracker = _Mlflow(Mlflow())
import mlflow.store.tracking.sqlalchemy_store  # the slow part, so that both meet at the database
print("ready", flush=True)
sys.stdin.read(1)
tracker.open(run)
tracker.metrics(1, {"loss": 1.0}, 0.0)
"""


@pytest.mark.slow
def test_runs_that_begin_at_once_share_a_new_database_of_mlflow(tmp_path):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    processes = [
        subprocess.Popen([sys.executable, "-c", OPEN, str(tmp_path), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for name in ("one", "two")
    ]
    assert all(process.stdout.readline() == b"ready\n" for process in processes)
    for process in processes:
        process.stdin.write(b"g")
        process.stdin.flush()
    assert [process.wait(timeout=120) for process in processes] == [0, 0]


def test_files_of_wandb_have_a_killed_run_under_one_id_with_one_point_a_step(images, tmp_path):
    pytest.importorskip("wandb")
    made = tracked(Wandb(mode="offline"))
    train(made, images, tmp_path / "run", kill_at=8)
    train(made, images, tmp_path / "run")
    history, runs = read_offline(Run(tmp_path / "run").trackers_folder)
    assert len(runs) >= 2 and len({run.run_id for run in runs}) == 1
    assert [row["_step"] for row in history] == list(range(1, 13))
    recorded = {record["step"]: record["loss"] for record in Run(tmp_path / "run").metrics() if "loss" in record}
    assert {row["_step"]: row["loss"] for row in history} == recorded
    assert [row["_step"] for row in history if "val_loss" in row] == [6, 12]
    assert all(any(name.startswith("samples/confusion") for name in row) for row in history if "val_loss" in row)
    config = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in runs[0].config.update}
    assert config["optim.lr"] == 0.005


def train_and_die(config: dict, data: str, folder: str) -> None:
    """Trains in a process of its own, which ends without a word when the checkpoint of step 6 is complete."""
    os.environ.pop("WANDB_SERVICE", None)  # a process of W&B's that belongs to the tests
    made: Experiment = from_dict(config)
    die = Call(after_checkpoint=lambda step, path: os._exit(9) if step == 6 else None)
    world = join_world(torch.device("cpu"))
    Training(made, build_task(made), data, Manifest.load(data), world, Path(folder), read_here, [die]).run()


@pytest.mark.slow
@pytest.mark.parametrize("tracker", [Wandb(mode="offline"), Mlflow()])
def test_a_tracker_has_every_point_of_a_run_whose_process_died_without_a_word(tracker, images, tmp_path):
    """After a validation of which there is a checkpoint: it is never measured again."""
    pytest.importorskip(type(tracker).__name__.lower())
    made, folder = tracked(tracker), tmp_path / "runs" / "killed"
    process = multiprocessing.get_context("spawn").Process(target=train_and_die, args=(to_dict(made), str(images), str(folder)))
    process.start()
    process.join(240)
    assert process.exitcode == 9 and Run(folder).checkpoints()[-1].step == 6
    train(made, images, folder)
    if isinstance(tracker, Wandb):
        history, runs = read_offline(Run(folder).trackers_folder)
        points = {name: [row["_step"] for row in history if name in row] for name in ("loss", "val_loss")}
        assert len({run.run_id for run in runs}) == 1
    else:
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
        (found,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
        points = {name: [point.step for point in client.get_metric_history(found.info.run_id, name)] for name in ("loss", "val_loss")}
        pictures = {file.path for file in client.list_artifacts(found.info.run_id, "samples")}
        assert {"samples/confusion-00000006.png", "samples/confusion-00000012.png"} <= pictures
    # W&B's files of two starts may be closed in any order.
    assert {name: sorted(steps) for name, steps in points.items()} == {"loss": list(range(1, 13)), "val_loss": [6, 12]}
    assert isinstance(tracker, Wandb) or points["loss"] == list(range(1, 13)), "in the order of their times"


def test_offline_files_that_are_gone_are_sent_ones_and_what_was_cut_off_is_left_out(images, tmp_path):
    pytest.importorskip("wandb")
    train(tracked(Wandb(mode="offline")), images, tmp_path / "run")
    folder = Run(tmp_path / "run").trackers_folder
    run_id = tracking.note_of(Run(tmp_path / "run"), "wandb /perceiver")["id"]
    assert steps_of(folder, run_id) == set(range(1, 13)) and steps_of(folder, "other") is None
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    file.write_bytes(file.read_bytes()[:-40])
    assert steps_of(folder, run_id) >= set(range(1, 12))
    assert tracking.note_of(Run(tmp_path / "run"), "wandb /perceiver")["step"] == 12


def test_mlflows_database_has_its_name_when_it_is_whole(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow import MlflowClient
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    file = tmp_path / "runs" / "mlflow.db"
    made = SqlAlchemyStore.__init__

    def killed(self, uri, *args):
        made(self, uri, *args)
        assert not file.exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SqlAlchemyStore, "__init__", killed)
        make_database(file)
    assert not file.exists()
    (tmp_path / "runs" / ".mlflow.db.new-1").write_bytes(b"half")
    make_database(file)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mlflow.db"]
    before = file.read_bytes()
    make_database(file)
    assert file.read_bytes() == before
    client = MlflowClient(f"sqlite:///{file}")
    assert client.create_run(client.create_experiment("mine")).info.status == "RUNNING"


def test_notes_of_a_run_that_are_damaged_are_begun_anew(tmp_path):
    run = Run(tmp_path)
    run.trackers_file.write_text("{")
    assert tracking.note_of(run, "kept") == {}
