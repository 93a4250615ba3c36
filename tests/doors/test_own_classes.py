"""Parts of an experiment that somebody wrote wrongly: a sentence that names the class, before anything is trained."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from perceiver.config import Cosine, Experiment, OptimConfig, OptimizerConfig, RunConfig, TaskConfig, UserError
from perceiver.config.checks import check_values
from perceiver.experiments import find_experiment
from perceiver.models import DecoderConfig, EncoderConfig, InputConfig, OutputConfig, OutputQueries, PerceiverIOConfig, build_model
from perceiver.tasks.check_model import positions_within
from perceiver.training.optim import build_optimizer
from ray_jobs.preflight import check_experiment
from tests.tasks.test_check import experiment


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": OptimConfig(lr="5e-3")}, "OptimConfig: optim.lr is '5e-3' and must be float"),
        ({"optim": OptimConfig(schedule="cosine")}, "OptimConfig: optim.schedule is 'cosine' and must be ScheduleConfig"),
        ({"optim": OptimConfig(schedule=Cosine)}, "optim.schedule is the class Cosine and must be an object of a class: Cosine(...)"),
        ({"callbacks": []}, "callbacks is [], a list, and must be a tuple"),
        ({"callbacks": 3}, "callbacks is 3 and must be a tuple of CallbackConfig"),
    ],
)
def test_a_value_that_no_saved_run_could_have_is_refused(changes, message):
    """Whatever Python accepts: else the run is trained, and cannot be read again."""
    with pytest.raises(UserError) as error:
        check_values(replace(experiment(), **changes))
    assert message in str(error.value)


def test_a_field_of_a_wrong_default_is_refused():
    changed = type("Half", (type(experiment().task),), {"__annotations__": {"share": "float"}, "share": None})
    with pytest.raises(UserError, match="Half: task.share is None and must be float"):
        check_values(replace(experiment(), task=changed()))


def test_a_default_that_would_not_count_is_refused():
    class Momentum(OptimizerConfig):
        momentum: float = 0.5

    with pytest.raises(UserError, match="Nine.momentum is set without a type, so the field momentum of its base class would keep its own"):
        type("Nine", (Momentum,), {"momentum": 0.9})
    with pytest.raises(UserError, match="Typed has a field type"):
        type("Typed", (TaskConfig,), {"__annotations__": {"type": "str"}, "type": "x"})


class Numbers(InputConfig):
    channels: int | str = 4

    def build(self):
        return nn.Identity()

    def adapted_channels(self):
        return self.channels

    def num_positions(self):
        return 3


class Answers(OutputConfig):
    num_learned: float = 1

    def queries(self, model):
        return OutputQueries(num_learned=self.num_learned, num_channels=4, num_outputs=1) if self.num_learned else None


class Failing(Answers):
    def queries(self, model):
        return model.nothing


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"input": Numbers(channels="4")}, "Numbers.adapted_channels is '4' and must be a whole number from 0 on"),
        ({"output": Answers(num_learned=1.0)}, "Answers.queries(model).num_learned is 1.0 and must be a whole number from 0 on"),
        ({"output": Answers(num_learned=0)}, "Answers.queries returned None and must return perceiver.models.OutputQueries"),
        ({"output": Failing()}, "cannot be checked: test_own_classes.py, line "),
        ({}, "model.encoder.num-cross-attention-heads is 8"),
    ],
)
def test_a_mistake_in_an_input_or_output_is_named(parts, message):
    made = experiment()
    model = PerceiverIOConfig(**{"input": Numbers(), "output": Answers(), **parts})
    with pytest.raises(UserError) as error:
        check_experiment(replace(made, model=model, run=RunConfig(name="x")))
    assert message in str(error.value) and "\n" not in str(error.value)


class Flat(OptimizerConfig):
    def build(self, groups, lr):
        return torch.optim.SGD([parameter for group in groups for parameter in group["params"]], lr=lr)


def test_an_optimizer_that_loses_the_factors_of_groups_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    build_optimizer(model, OptimConfig(optimizer=Flat()))
    with pytest.raises(UserError, match="Flat.build loses 'lr_factor' of a group of parameters: give the optimizer the groups as they are"):
        build_optimizer(model, OptimConfig(optimizer=Flat(), groups=("0.*:lr=0.1",)))


def test_a_script_that_ends_the_process_is_named(tmp_path):
    (tmp_path / "ends_at_once.py").write_text("import sys\n\nsys.exit(3)\n")
    try:
        with pytest.raises(UserError, match="experiment: ends_at_once.py, line 3: SystemExit: 3"):
            find_experiment(f"{tmp_path / 'ends_at_once.py'}:tiny")
    finally:
        sys.path.remove(str(tmp_path))
    assert isinstance(experiment(), Experiment)


class Counted(Numbers):
    most: int = 3

    def num_positions(self):
        return self.most


@pytest.mark.parametrize("masked", [False, True])
def test_an_input_that_gives_more_positions_than_it_says_is_named(masked):
    class Adapter(nn.Module):
        def forward(self, x):
            return (x, torch.zeros(x.shape[:2], dtype=torch.bool)) if masked else x

    one = {"num_cross_attention_heads": 1}
    model = PerceiverIOConfig(
        num_latents=2, num_latent_channels=4, input=Counted(), output=Answers(), decoder=DecoderConfig(**one),
        encoder=EncoderConfig(**one, num_self_attention_heads=1),
    )  # fmt: skip
    built = build_model(model)
    built.encoder.input_adapter = Adapter()
    with positions_within(replace(experiment(), model=model), built):
        built(torch.zeros(2, 3, 4))
        built(torch.zeros(2, 2, 4))
        with pytest.raises(UserError, match="Counted.num_positions returned 3, but its adapter returned 4 positions"):
            built(torch.zeros(2, 4, 4))
    built(torch.zeros(2, 4, 4))  # looked at during the check alone
