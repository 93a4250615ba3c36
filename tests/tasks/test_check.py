"""Mistakes in one's own classes: each is found on two rows and named with its method."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from perceiver.config import (
    CallbackConfig,
    DataConfig,
    Experiment,
    ModelConfig,
    OptimConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TaskConfig,
    TrainingConfig,
    UserError,
)
from perceiver.data.components import Component
from perceiver.data.manifest import Manifest
from perceiver.data.rows import ArrayRows
from perceiver.models import build_model
from perceiver.models.initialize import initialize
from perceiver.tasks.base import IGNORE_INDEX, Sample, Task, dummy_split
from perceiver.tasks.baselines import Guess
from perceiver.tasks.check import check_guess, check_task, checked_task
from perceiver.training.parallel import build_sharded, join_world
from ray_jobs.preflight import check_experiment


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 1)

    def layers(self):
        return [self.one, self.two]

    def init_weights(self, seed):
        initialize(self, 0.2, seed)

    def reset_buffers(self):
        """Has none."""

    def forward(self, x):
        return self.two(torch.relu(self.one(x))).squeeze(-1)


class NetConfig(ModelConfig):
    cls: str = "Net"

    def build(self):
        return MODELS[self.cls]()


class Normalized(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return super().forward(self.norm(x))


class Shifted(Net):
    """With a constant, which `init_weights` leaves to `reset_buffers`."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.empty(4), persistent=False)

    def reset_buffers(self):
        self.shift.fill_(3.0)

    def forward(self, x):
        return super().forward(x + self.shift)


class Random(Shifted):
    """With a constant that is another one each time."""

    def reset_buffers(self):
        self.shift.normal_()


class Generated(Net):
    def layers(self):
        return (layer for layer in (self.one, self.two))


class Empty(Net):
    def __init__(self):
        nn.Module.__init__(self)
        self.one = nn.Identity()

    def layers(self):
        return [self.one]


MODELS = {"Net": Net, "Shifted": Shifted, "Random": Random, "Normalized": Normalized, "Generated": Generated, "Empty": Empty}


class Regression(TaskConfig):
    def rows(self, model, data):
        return ArrayRows(x=((4,), "float32"), y=((), "float32"))

    def build(self, model, data, seed):
        return RegressionTask(self, model, data, seed)


class RegressionTask(Task):
    metric_directions = {"loss": "min", "mae": "min"}

    def loss(self, model, batch):
        error = model(batch["x"]) - batch["y"]
        return (error**2 * batch["valid"]).sum(), {"mae": (error.abs() * batch["valid"]).sum()}

    def metrics(self, sums, split):
        return {**super().metrics(sums, split), "mae": float(sums["mae"] / sums["targets"])}

    def predict(self, model, batch):
        return {"y": model(batch["x"])}


def noisy(rows):
    return rows.set_column(rows.column_names.index("y"), "y", pa.array(np.random.rand(rows.num_rows).astype(np.float32)))


def experiment(model="Net", config=None, **methods):
    """The regression with some methods of its task, or of its configuration, replaced."""
    task = type("Changed", (RegressionTask,), methods)
    settings = type("Settings", (Regression,), {"build": lambda self, *args: task(self, *args), **(config or {})})
    return Experiment(
        task=settings(), model=NetConfig(cls=model), data=DataConfig(source="x"), training=TrainingConfig(max_steps=1)
    )  # fmt: skip


def collate_without_labels(self, rows, size, split, train, step):
    return {**Task.collate(self, rows, size, split, train, step), "labels": torch.full((size,), IGNORE_INDEX)}


def loss_with_a_mean(self, model, batch):
    loss, sums = RegressionTask.loss(self, model, batch)
    return loss, {"mae": sums["mae"] / batch["valid"].sum().clamp(min=1)}


def loss_of_chance(self, model, batch):
    loss, sums = RegressionTask.loss(self, model, batch)
    return loss * torch.rand(()), sums


def collate_while_training(self, rows, size, split, train, step):
    batch = Task.collate(self, rows, size, split, train, step)
    return {**batch, "x": batch["x"] + torch.randn(1)} if train else batch


TASKS = {
    "noise while training": ({"collate": collate_while_training}, "Changed.collate gave another 'x' for the same rows"),
    "decode of chance": ({"decode": lambda self, rows, split, train: noisy(rows)}, "Changed.decode gave other rows the second time"),
    "decode loses rows": ({"decode": lambda self, rows, split, train: rows.slice(1)}, "decode of 2 rows returned 1 rows"),
    "decode of a list": ({"decode": lambda self, rows, split, train: rows.to_pylist()}, "returned a list and must return a pyarrow.Table"),
    "examples of chance": ({"examples": lambda self, block, *args: noisy(block)}, "Changed.examples gave other rows the second time"),
    "arrange loses rows": ({"arrange": lambda self, rows: rows.slice(1)}, "Changed.arrange must return the same rows"),
    "no metrics": ({"metrics": lambda self, sums, split: None}, "Changed.metrics returned None and must return a dictionary"),
    "best metric": ({"metrics": lambda self, sums, split: {"mae": 1.0}}, "gave mae, but not 'loss', by which the best checkpoint"),
    "direction": ({"metric_directions": {"loss": "low", "mae": "min"}}, "says 'low' of 'loss'"),
    "each": ({"each": lambda self, model, batch, sums: {"loss": torch.zeros(1)}}, "Changed.each of 3 examples returned"),
    "check": ({"check": lambda self: self.config.horizon}, "Changed.check fails: test_check.py, line"),
    "an array as metric": (
        {"metrics": lambda self, sums, split: {"loss": 1.0, "mae": np.ones(3)}},
        "Changed.metrics gave 'mae' as an array of shape (3,) and type float64 and must give finite numbers",
    ),
    "labels without a target": (
        {"collate": collate_without_labels},
        'counts no target in any of 16 random rows, so there is nothing to learn: all of its "labels", a tensor of shape (2,)',
    ),
    "a mean among the sums": ({"loss": loss_with_a_mean}, "of each alone: it is a mean, and must be a sum"),
    "a loss of chance": ({"loss": loss_of_chance}, "where the model is not training: random choices must be functions of"),
    "targets": ({"targets_per_example": lambda self: 2}, "targets_per_example returned 2 and must return None or a number from 1 to 1"),
    "unit": ({"throughput_unit": lambda self: "tokens"}, "Changed.throughput_unit returned 'tokens'"),
    "directions": ({"metric_directions": ["loss"]}, "Changed.metric_directions is a list and must be a dictionary"),
    "a baseline of nothing": (
        {"baseline_metrics": {"mae": ("usual", "always the mean")}},
        "Changed.baseline_metrics names 'usual', which metric_directions does not say: it has loss, mae",
    ),
    "a baseline without words": ({"baseline_metrics": {"mae": "loss"}}, "has 'loss' for 'mae' and must have a pair of texts"),
    "an undeclared metric": ({"metric_directions": {"mae": "min"}}, "metrics gave 'loss', but metric_directions does not say"),
    "__init__": ({"__init__": lambda self, *args: None}, "__init__ did not set config: it must call super().__init__(config, model, data"),
    "a sample's name": ({"samples": lambda self, *args: [Sample("a/b", text="")]}, "whose name is 'a/b' and must be that of a file"),
    "a sample's image": (
        {"samples": lambda self, *args: [Sample("a", image=np.zeros((4, 4)))]},
        "is an array of shape (4, 4) and type float64 and must be an array (height, width, 3) of type uint8",
    ),
    "a prediction's name": ({"predict": lambda self, model, batch: {1: batch["x"]}}, "calls a prediction 1: names are texts"),
    "a loss of nothing": (
        {"loss": lambda self, model, batch: ((batch["x"].sum(1) * batch["valid"]).requires_grad_().sum(), {"mae": torch.zeros(())})},
        "Settings: the loss does not depend on any parameter of the model, so nothing is learned",
    ),
    "padding of zeros": (
        {"loss": lambda self, model, batch: (((model(batch["x"]) - batch["y"]) ** 2).sum(), {"mae": torch.zeros(())})},
        "with an example of padding, which must add nothing",
    ),
}


@pytest.mark.parametrize("mistake", TASKS)
def test_a_mistake_in_a_task_is_named(mistake):
    methods, message = TASKS[mistake]
    with pytest.raises(UserError) as error:
        check_task(experiment(**methods))
    assert message in str(error.value) and "\n" not in str(error.value)


SETTINGS = {
    "no rows": ({"rows": lambda self, model, data: None}, "Settings.rows returned None and must return a perceiver.data.rows.ArrayRows"),
    "failing rows": ({"rows": lambda self, model, data: 1 / 0}, "Settings.rows fails: test_check.py, line"),
    "shape": ({"rows": lambda self, model, data: ArrayRows(x=(4, "float32"))}, "column x is (4, 'float32') and must be its shape and its"),
    "kind": ({"kind": "arays"}, "whose module is imported, did you mean arrays?"),
    "measured": ({"measured": ("mean",)}, "Settings.measured names 'mean', which is none of its fields"),
}


@pytest.mark.parametrize("mistake", SETTINGS)
def test_a_mistake_in_a_tasks_settings_is_named(mistake):
    config, message = SETTINGS[mistake]
    with pytest.raises(UserError) as error:
        check_task(experiment(config=config))
    assert message in str(error.value)


def test_a_missing_method_is_named_by_its_class_alone():
    lacking = type("Lacking", (Task,), {})
    with pytest.raises(UserError) as error:
        check_task(experiment(config={"build": lambda self, *args: lacking(self, *args)}))
    assert str(error.value) == "Lacking needs a method loss"
    with pytest.raises(UserError) as error:
        check_task(replace(experiment(), task=type("Unbuilt", (TaskConfig,), {})()))
    assert str(error.value) == "Unbuilt needs a method build(model, data, seed) that returns the task"


def test_a_row_of_which_only_some_have_a_target_passes():
    """Such as a mask that is a column: of two random rows neither may have one."""

    def collate(self, rows, size, split, train, step):
        batch = Task.collate(self, rows, size, split, train, step)
        return {**batch, "valid": batch["valid"] & (batch["y"] > 0.7)}

    check_task(experiment(collate=collate))


def test_constants_are_set_although_initial_weights_leave_them():
    check_task(experiment("Shifted"))
    model = build_model(NetConfig(cls="Shifted"))
    with torch.device("meta"):
        empty = NetConfig(cls="Shifted").build()
    sharded = build_sharded(empty, join_world(torch.device("cpu")), ParallelConfig(), TrainingConfig(max_steps=1), empty.layers())
    assert (model.shift == 3).all() and (sharded.shift == 3).all()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("Normalized", "Normalized.reset_buffers left norm.running_mean as it was"),
        ("Random", "Random.reset_buffers gave shift other values the second time: constants must be the same on every worker"),
        ("Generated", "Generated.layers returned a generator and must return a list"),
        ("Empty", "Empty has no parameters"),
    ],
)
def test_a_mistake_in_a_model_is_named(model, message):
    with pytest.raises(UserError, match=message):
        check_task(experiment(model))


class NeedsClosure(OptimizerConfig):
    def build(self, groups, lr):
        return torch.optim.LBFGS([parameter for group in groups for parameter in group["params"]], lr=lr)


class LeavesOut(OptimizerConfig):
    def build(self, groups, lr):
        return torch.optim.SGD(groups[:1], lr=lr)


class Miscounts(OptimizerConfig):
    def build(self, groups, lr):
        return torch.optim.SGD(groups, lr=lr)

    def state_size(self, shape, shards=1, hidden=False):
        return "two"


class Explodes(OptimizerConfig):
    def build(self, groups, lr):
        return torch.optim.SGD(groups, lr=math.inf)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (NeedsClosure(), "NeedsClosure: LBFGS.step fails: TypeError"),
        (Explodes(), "has values that are not finite"),
        (LeavesOut(), "LeavesOut.build leaves out a parameter of shape .*: the optimizer must be made of all groups"),
        (Miscounts(), "Miscounts.state_size returned 'two' and must return how many numbers it keeps"),
    ],
)
def test_an_optimizer_is_tried_for_a_step(optimizer, message):
    with pytest.raises(UserError, match=message):
        check_task(replace(experiment(), optim=OptimConfig(optimizer=optimizer)))


def test_what_keeps_the_contract_passes():
    check_task(experiment())


def of_parts(**methods):
    """The task of the regression with other methods, and one data set that it was prepared for."""
    made = experiment(**methods)
    rows = made.task.rows(made.model, made.data)
    splits = {name: replace(dummy_split(rows, 2), name=name) for name in ("train", "val")}
    manifest = Manifest(kind="arrays", settings={}, settings_digest="", splits=splits, columns=rows.to_json())
    return checked_task(made), [Component("", 1.0, "nowhere", manifest)]


SUMS = {"loss": np.float64(4), "targets": np.float64(2), "mae": np.float64(3)}
GUESSES = {
    "fails": (lambda self, manifest, trained_on: manifest.stats["means"], "Changed.guess fails: test_check.py, line"),
    "a number": (
        lambda self, manifest, trained_on: 0.5,
        "Changed.guess returned a float and must return a perceiver.tasks.baselines.Guess",
    ),
    "a metric": (lambda self, *manifests: Guess(SUMS, {"mse": "0"}), "Changed.guess speaks of 'mse', but metrics gives loss, mae for"),
    "a sum": (lambda self, *manifests: Guess({"loss": SUMS["loss"]}, {"loss": "0"}), "Changed.metrics fails: "),
}


@pytest.mark.parametrize("mistake", GUESSES)
def test_a_wrong_guess_is_named(mistake):
    guess, message = GUESSES[mistake]
    with pytest.raises(UserError) as error:
        check_guess(*of_parts(guess=guess))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_guess_that_metrics_knows_passes():
    check_guess(*of_parts())
    check_guess(*of_parts(guess=lambda self, *manifests: Guess(SUMS, {"mae": "always 0"})))


def test_a_training_names_a_failing_build_or_check_of_a_task_and_of_a_callback():
    def made(**changes):
        tried = experiment(**changes.pop("methods", {}), config=changes.pop("config", None))
        return replace(tried, run=RunConfig(name="tried"), **changes)

    wrong = {
        "Settings.build fails: test_check.py": made(config={"build": lambda self, *args: self.nothing}),
        "Settings.build returned None": made(config={"build": lambda self, *args: None}),
        "Changed.check fails: test_check.py": made(methods={"check": lambda self: 1 / 0}),
        "Watching.check_metrics fails: test_check.py": made(callbacks=(Watching(),)),
    }
    for message, mistaken in wrong.items():
        with pytest.raises(UserError, match=message):
            check_experiment(mistaken)


class Watching(CallbackConfig):
    def check_metrics(self, where, names):
        return names["val_loss"]
