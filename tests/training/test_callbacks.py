"""Callbacks: when their hooks are called, what they may ask for, how their states travel, and what their failures do."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from perceiver.checkpoints import list_checkpoints
from perceiver.config import CallbackConfig, Experiment, UserError, from_dict, to_dict
from perceiver.data.manifest import Manifest
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.training import hooks, record
from perceiver.training.batches import read_here
from perceiver.training.callbacks import Callback, Divergence, EarlyStop
from perceiver.training.checkpoint import Checkpointer
from perceiver.training.hooks import STATES, CallbackError, misspelt
from perceiver.training.parallel import join_world
from perceiver.training.run import Training
from ray_jobs.cli import parse_experiment
from ray_jobs.preflight import check_experiment
from tests.faults.invariants import board
from tests.support.small import Call, heard, image_experiment
from tests.support.weights import full
from tests.training.test_not_finite import training_of
from tests.training.test_training import run

CALLS: list[tuple] = []


class Recording(CallbackConfig):
    """Notes its calls."""

    def build(self) -> Callback:
        names = ("after_step", "after_log", "after_validation", "after_checkpoint", "on_end")
        hooks = {name: lambda step, *args, name=name: CALLS.append((name, step)) for name in names}
        return Call(on_start=lambda training: CALLS.append(("on_start", training.step)), **hooks)


class Sum(CallbackConfig):
    """Adds up the losses of all steps."""

    def build(self) -> Callback:
        return _Sum()


class _Sum(Callback):
    def __init__(self) -> None:
        self.losses = torch.zeros(2, dtype=torch.float64)
        self.steps: list[int] = []

    def after_step(self, step, result):
        self.losses += torch.stack([result.loss_sum, result.targets.double()])
        self.steps.append(step)

    def on_end(self, step, metrics, error):
        if error is None:
            (self.training.run_folder / "sum.json").write_text(json.dumps([self.losses.tolist(), self.steps]))

    def state_dict(self):
        return {"losses": self.losses, "more": {"steps": self.steps, "best": None, "rate": 0.5, "nothing": float("inf")}}

    def load_state_dict(self, state):
        self.losses, self.steps = state["losses"], state["more"]["steps"]
        assert state["more"]["rate"] == 0.5 and state["more"]["best"] is None and state["more"]["nothing"] == float("inf")


class Asking(CallbackConfig):
    """Asks for the end, or a pause, on one worker."""

    what: str = "stop"
    rank: int = 0
    at: int = 4

    def build(self) -> Callback:
        def after_step(step, result):
            if step == self.at and callback.training.world.rank == self.rank:
                callback.training.stop("enough") if self.what == "stop" else callback.training.pause()

        callback = Call(after_step=after_step)
        return callback


class Failing(CallbackConfig):
    """Fails in a hook."""

    hook: str = "after_validation"

    def build(self) -> Callback:
        def fail(*args):
            return {}["absent"]

        return Call(**{self.hook: fail})


class Killed(BaseException):
    """Ends a training as a kill does: nothing is written any more."""


def with_callbacks(*callbacks: CallbackConfig, **settings) -> Experiment:
    experiment = image_experiment(max_steps=12)
    return replace(experiment, callbacks=callbacks, run=replace(experiment.run, **settings))


def train(experiment: Experiment, data: Path, folder: Path, kill_at: int | None = None) -> dict[str, np.ndarray]:
    """The weights after training in this process."""

    def kill(step, result):
        if step == kill_at:
            training.checkpointer.close()
            raise Killed

    training = Training(
        experiment, build_task(experiment), str(data), Manifest.load(data), join_world(torch.device("cpu")), folder, read_here,
        [Call(after_step=kill)],
    )  # fmt: skip
    if kill_at is not None:
        with pytest.raises(Killed):
            training.run()
        return {}
    training.run()
    return {name: full(p).numpy() for name, p in training.state.model.named_parameters()}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(folder / "checkpoints")]


def test_hooks_are_called_in_the_order_of_the_steps_and_change_no_bit(images, tmp_path):
    CALLS.clear()
    weights = train(with_callbacks(Recording(), log_every=4, checkpoint_every=5), images, tmp_path / "run")
    assert same(weights, train(with_callbacks(log_every=4, checkpoint_every=5), images, tmp_path / "plain"))
    called = {name: [step for found, step in CALLS if found == name] for name, _ in CALLS}
    completed = called.pop("after_checkpoint")
    assert called == {
        "on_start": [0],
        "after_step": list(range(1, 13)),
        "after_log": [4, 5, 6, 8, 10, 12],
        "after_validation": [6, 12],
        "on_end": [12],
    }
    assert completed == [5, 6, 10, 12] and CALLS[0] == ("on_start", 0) and CALLS[-1] == ("on_end", 12)
    of_six = [name for name, step in CALLS if step == 6 and name != "after_checkpoint"]
    assert of_six == ["after_step", "after_log", "after_validation"]


def test_a_state_is_saved_with_the_checkpoints_and_a_killed_run_ends_with_that_of_an_uninterrupted_one(images, tmp_path):
    experiment = with_callbacks(Sum())
    whole = train(experiment, images, tmp_path / "whole")
    train(experiment, images, tmp_path / "run", kill_at=8)
    marker = json.loads((tmp_path / "run" / "checkpoints" / "step-00000006" / "checkpoint.json").read_text())
    assert STATES in marker["files"]
    assert same(whole, train(experiment, images, tmp_path / "run"))
    found, expected = (json.loads((tmp_path / name / "sum.json").read_text()) for name in ("run", "whole"))
    assert found == expected and found[1] == list(range(1, 13))


def test_a_checkpoint_whose_states_are_damaged_is_left(images, tmp_path):
    experiment = with_callbacks(Sum())
    train(experiment, images, tmp_path, kill_at=8)
    path = tmp_path / "checkpoints" / "step-00000006" / STATES
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with heard() as lines:
        train(experiment, images, tmp_path)
    assert "step-00000006 is damaged" in lines[0] and "continuing from step 3" in lines[1]
    assert json.loads((tmp_path / "sum.json").read_text())[1] == list(range(1, 13))


def test_a_run_continues_with_other_callbacks_which_begin_anew(images, tmp_path):
    plain = train(with_callbacks(), images, tmp_path / "plain")
    train(with_callbacks(EarlyStop()), images, tmp_path / "run", kill_at=8)
    assert same(plain, train(with_callbacks(Sum()), images, tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "sum.json").read_text())[1] == list(range(7, 13))


def early(**settings) -> Experiment:
    """Validates every 3 of 60 steps; only the first validation counts as an improvement."""
    experiment = with_callbacks(EarlyStop(patience=2, threshold=100.0, **settings), val_every=3)
    return replace(experiment, training=replace(experiment.training, max_steps=60))


def test_an_early_stop_ends_the_same_with_and_without_an_interruption_and_on_two_workers(images, tmp_path):
    reason = "val_loss has not improved in 2 validations"
    whole = train(early(), images, tmp_path / "whole")
    train(early(), images, tmp_path / "run", kill_at=7)
    assert same(whole, train(early(), images, tmp_path / "run"))
    run(early(), images, tmp_path / "two", world=2, stop_at=6)
    run(early(), images, tmp_path / "two", world=2)
    for name in ("whole", "run", "two"):
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert result["step"] == 9 and result["stopped"].startswith(reason)
        assert Run(tmp_path / name).stopped().startswith(reason) and "stopped" not in Run(tmp_path / name).result()
        assert steps(tmp_path / name)[-1] == 9
        assert [r["step"] for r in Run(tmp_path / name).metrics() if "val_loss" in r] == [3, 6, 9]


def test_a_run_that_was_killed_after_its_last_checkpoint_is_known_to_be_over(images, tmp_path):
    whole = train(early(), images, tmp_path)
    (tmp_path / "result.json").unlink()
    assert same(whole, train(early(), images, tmp_path))
    assert Run(tmp_path).result()["step"] == 9 and Run(tmp_path).stopped()


def test_an_early_stop_knows_the_direction_of_its_metric_and_its_least_length(images, tmp_path):
    def ends(values: dict[int, float], **settings) -> int:
        experiment = replace(early(), callbacks=(EarlyStop(patience=2, **settings),))
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        task, world = build_task(experiment), join_world(torch.device("cpu"))
        training = Training(experiment, task, str(images), Manifest.load(images), world, folder, read_here)
        training.validate = lambda: {name: values[training.state.step] for name in ("val_acc", "val_loss")}
        return int(training.run()["step"])

    falling = {step: 1 - step / 100 for step in range(61)}
    assert ends(falling, metric="val_acc") == 9
    assert ends(falling) == 60
    assert ends(falling, threshold=0.04) == 60, "0.03 better twice is 0.06 better than the best"
    assert ends(falling, threshold=0.07) == 9
    assert ends(dict.fromkeys(range(61), float("nan")), min_steps=20) == 21
    with pytest.raises(UserError, match="'val_los' and must be one of val_loss, val_acc"):
        ends(falling, metric="val_los")


def test_a_loss_that_runs_away_ends_the_training_and_one_that_is_noisy_does_not():
    def ends(losses: list[float], **settings) -> int | None:
        callback, asked = Divergence(**settings).build(), []
        for step, loss in enumerate(losses, 1):
            callback.training = SimpleNamespace(stop=lambda reason, step=step: asked.append((step, reason)))
            callback.after_log(step, {"loss": loss})
            again = Divergence(**settings).build()
            again.load_state_dict(callback.state_dict())
            callback = again
        return asked[0][0] if asked else None

    assert ends([1.0, 0.5, 1.1, 1.2, 1.3]) == 5, "a loss that is above in three lines has run away, wherever the run is continued"
    assert ends([1.0, 0.5, 1.1, 1.2, 0.9, 1.1, 1.2]) is None, "two lines, twice, are noise"
    assert ends([1.0, 0.5, 0.9, 0.9, 0.9, 0.9]) is None, "0.9 is not above twice 0.5"
    assert ends([1.0, 0.5, 0.9], factor=1.5, patience=1) == 3
    assert ends([1.0, 0.5, 1.1, 1.2, 1.3, 1.3], min_steps=6) == 6
    assert ends([-1.0, -2.0, -1.5, -0.1, 0.1, 0.1, 0.1]) == 7, "of a loss below 0, away is upwards too"


def test_a_training_that_diverges_ends_with_the_reason_on_record(images, tmp_path):
    experiment = with_callbacks(Divergence(factor=1.5), log_every=1)
    diverging = replace(experiment, optim=replace(experiment.optim, lr=100.0, max_grad_norm=None, warmup_steps=0))
    train(replace(diverging, training=replace(diverging.training, max_steps=60)), images, tmp_path)
    assert Run(tmp_path).stopped().startswith("diverged: loss ") and Run(tmp_path).result()["step"] < 60


def test_what_one_worker_asks_for_all_do_at_the_same_step(images, tmp_path):
    run(with_callbacks(Asking(rank=1, at=4), log_every=5), images, tmp_path / "run", world=2)
    assert Run(tmp_path / "run").result()["step"] == 5 and Run(tmp_path / "run").stopped() == "enough"
    assert steps(tmp_path / "run") == [3, 5]
    assert "val_loss" in Run(tmp_path / "run").result()


def test_a_paused_training_has_a_checkpoint_of_its_last_step_and_continues_to_the_same_bits(images, tmp_path):
    whole = train(with_callbacks(), images, tmp_path / "whole")
    train(with_callbacks(Asking(what="pause", at=7)), images, tmp_path / "run")
    assert steps(tmp_path / "run")[-1] == 8 and Run(tmp_path / "run").result() is None
    assert same(whole, train(with_callbacks(), images, tmp_path / "run"))
    assert Run(tmp_path / "run").result()["step"] == 12 and Run(tmp_path / "run").stopped() is None


@pytest.mark.parametrize("hook", ["on_start", "after_step", "after_log", "after_validation", "after_checkpoint", "on_end", "state_dict"])
def test_an_exception_in_a_hook_is_a_sentence_with_class_hook_file_and_line(hook, images, tmp_path):
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if 'return {}["absent"]' in text)
    with pytest.raises(CallbackError) as caught:
        train(with_callbacks(Failing(hook=hook)), images, tmp_path)
    assert str(caught.value) == (
        f"callback tests.training.test_callbacks:Failing fails in {hook} (test_callbacks.py, line {line}): KeyError: 'absent'"
    )


def test_a_state_that_could_not_be_read_again_is_refused(images, tmp_path):
    class Wrong(CallbackConfig):
        def build(self) -> Callback:
            return Call(state_dict=lambda: {"seen": {1, 2}})

    with pytest.raises(CallbackError, match=r"state_dict\(\)\['seen'\] is a set"):
        train(with_callbacks(Wrong()), images, tmp_path)


def test_a_hook_that_does_not_return_is_reported(images, tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "PATIENCE", 0.2)
    reported = threading.Event()

    class Slow(CallbackConfig):
        def build(self) -> Callback:
            return Call(after_validation=lambda step, metrics: reported.wait(20))

    with heard() as lines:
        monkeypatch.setattr(hooks.logger, "warning", lambda *args: (lines.append(args[0] % args[1:]), reported.set()))
        train(with_callbacks(Slow()), images, tmp_path)
    assert any("Slow.after_validation has not returned for" in line for line in lines)


def test_records_that_cannot_be_written_are_one_warning_and_stop_no_step(images, tmp_path, monkeypatch):
    """The disk is full for TensorBoard, the metrics and the samples from step 4 to 7."""
    whole = train(with_callbacks(), images, tmp_path / "whole")
    no_room = [False]
    write_event, append = record.EventsWriter.write_event, record.Recorder._append

    def no_space(*args):
        raise OSError(28, "No space left on device")

    def switch(step, result):
        no_room[0] = 4 <= step <= 7

    monkeypatch.setattr(record.EventsWriter, "write_event", lambda *args: no_space() if no_room[0] else write_event(*args))
    monkeypatch.setattr(record.Recorder, "_append", lambda *args: no_space() if no_room[0] else append(*args))
    experiment = with_callbacks()
    training = Training(
        experiment, build_task(experiment), str(images), Manifest.load(images), join_world(torch.device("cpu")), tmp_path / "run",
        read_here, [Call(after_step=switch)],
    )  # fmt: skip
    with heard() as lines:
        training.run()
    assert same(whole, {name: full(p).numpy() for name, p in training.state.model.named_parameters()})
    warnings = [line for line in lines if "records of this run are incomplete" in line]
    assert len(warnings) == 1 and "No space left on device" in warnings[0]
    assert [r["step"] for r in Run(tmp_path / "run").metrics() if "loss" in r] == [1, 2, 3, 8, 9, 10, 11, 12]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2, "after an error a new file, as a cut one is read no further"


@pytest.mark.parametrize("resumed", [0, 3])
def test_a_run_that_starts_again_shows_each_step_once(resumed, tmp_path):
    """Also one that had no checkpoint yet and starts over."""
    for start in range(2):
        first = resumed * start + 1
        recorder = record.Recorder(tmp_path, first - 1, 10, "images", True)
        for step in range(first, 6):
            recorder.metrics(step, {"loss": 1.0})
        recorder.close()
        if not start:  # its name has the process and the second, which both starts share here
            (path,) = (tmp_path / "tensorboard").iterdir()
            path.rename(path.with_name("events.out.tfevents.0"))
    assert board(tmp_path) == {("train/loss", step): 1 for step in range(1, 6)}
    assert [entry["step"] for entry in Run(tmp_path).metrics()] == [1, 2, 3, 4, 5]


def test_records_are_on_disk_before_a_checkpoint_whose_steps_are_not_taken_again(images, tmp_path, monkeypatch):
    """A power cut would otherwise leave the checkpoint, and of its last steps no record."""
    seen: list[list[str]] = [[]]
    save = Checkpointer.save
    monkeypatch.setattr(record, "to_disk", lambda path: seen[-1].append(Path(path).name.split(".")[0]))
    monkeypatch.setattr(Checkpointer, "save", lambda *args: (seen.append([]), save(*args)))
    training_of(image_experiment(max_steps=6), images, tmp_path / "run").run()
    assert len(seen) > 2 and all(files == ["metrics", "events"] for files in seen[:-1])


def test_a_line_that_was_cut_off_does_not_take_the_next_one_along(tmp_path):
    recorder = record.Recorder(tmp_path, 0, 10, "images", True)
    recorder.metrics(1, {"loss": 1.0})
    with open(tmp_path / record.METRICS, "ab") as file:
        file.write(b'{"step": 2, "lo')
    recorder._cut = True
    recorder.metrics(3, {"loss": 3.0})
    assert [r["step"] for r in Run(tmp_path).metrics()] == [1, 3]


def test_callbacks_are_chosen_and_set_on_the_command_line():
    def made(*words: str) -> tuple[CallbackConfig, ...]:
        return parse_experiment(["quickstart", *words], "ray_jobs.train").callbacks

    both = made("--callbacks", "earlystop", "divergence", "--callbacks.0.patience", "9", "--callbacks.1.factor", "3", "--name", "x")
    assert both == (EarlyStop(patience=9), Divergence(factor=3.0))
    assert made("--callbacks=earlystop") == (EarlyStop(),) and made("--callbacks", "--name", "x") == ()
    with pytest.raises(UserError, match=r"--callbacks is 'earlystp' and must be one of .*, did you mean earlystop\?"):
        made("--callbacks", "earlystp")
    with pytest.raises(UserError, match="--callbacks is 'adam' and must be one of divergence, earlystop"):
        made("--callbacks", "adam")
    with pytest.raises(UserError, match="did you mean --callbacks.0.patience"):
        made("--callbacks", "earlystop", "--callbacks.1.patience", "3")


def test_callbacks_are_no_part_of_a_runs_identity_and_survive_its_file():
    experiment = with_callbacks(EarlyStop(patience=5), Sum())
    assert experiment.identity == with_callbacks().identity
    assert from_dict(json.loads(json.dumps(to_dict(experiment)))) == experiment


@pytest.mark.parametrize("metric, near", [("val_acccc", ".*, did you mean val_acc"), ("val_loss/books", ""), ("loss", "")])
def test_a_misspelt_metric_of_an_early_stop_is_refused_before_anything_starts(metric, near):
    experiment = with_callbacks(Divergence(), EarlyStop(metric=metric))
    with pytest.raises(UserError, match=f"--callbacks.1.metric is {metric!r} and must be one of val_loss, val_acc{near}"):
        check_experiment(experiment)
    check_experiment(with_callbacks(EarlyStop(), EarlyStop(metric="val_acc")))


def test_a_hook_with_a_misspelt_name_is_found():
    class Almost(Callback):
        def after_steps(self, step, result):
            """Never called."""

        def on_plateau(self):
            """One's own."""

        def after_validation(self, step, metrics):
            """A hook."""

    assert misspelt(Almost()) == [("after_steps", "after_step")]
