"""Costs of this package's tasks with a model of a user's own: counted on batches that the tasks make up."""

import sys
from dataclasses import fields, replace

import pytest

from perceiver.config import Experiment
from perceiver.costs.memory import has_formulas
from perceiver.models import PerceiverARConfig, PerceiverIOConfig
from perceiver.presets import PRESETS
from perceiver.tasks import build_task
from ray_jobs import plan
from ray_jobs.memory_check import layout_of, step_of
from tests.support.outside import forget

NAMES = ["img-clf-mnist", "txt-clf-imdb-decoder-small", "mlm-imdb-small", "clm-c4-small"]

OUTSIDE = '''
from dataclasses import fields, replace
import torch
from torch import nn
from perceiver.models import PerceiverIOConfig
from perceiver.presets import PRESETS

class Plain(PerceiverIOConfig):
    """A layer on the mean of all pixels' rows."""
    def build(self):
        return PlainModel(self.output.num_classes)

class PlainModel(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layer = nn.Linear(28, num_classes, bias=False)
    def layers(self):
        return [self.layer]
    def init_weights(self, seed):
        torch.manual_seed(seed)
        nn.init.normal_(self.layer.weight, std=0.02)
    def reset_buffers(self):
        pass
    def forward(self, x):
        return self.layer(x.mean((1, 3)))

def experiment():
    base = PRESETS["quickstart"]()
    return replace(base, model=Plain(**{field.name: getattr(base.model, field.name) for field in fields(base.model)}))
'''


class OwnIO(PerceiverIOConfig):
    """A Perceiver IO of somebody's, whose attention to images is the plain one: its FLOPs are what the formula reports."""

    def build(self):
        model = super().build()
        model.encoder.factored = False
        return model


class OwnAR(PerceiverARConfig):
    """A Perceiver AR of somebody's."""


def with_own_model(name: str) -> Experiment:
    base = PRESETS[name]()
    own = OwnAR if isinstance(base.model, PerceiverARConfig) else OwnIO
    return replace(base, model=own(**{field.name: getattr(base.model, field.name) for field in fields(base.model)}))


@pytest.mark.parametrize("name", NAMES)
def test_costs_of_an_own_model_are_counted_and_near_those_of_the_model_that_it_is_made_from(name):
    own, base = with_own_model(name), PRESETS[name]()
    assert not has_formulas(own.model) and has_formulas(base.model)
    counted, formula = (build_task(experiment).flops_per_example() for experiment in (own, base))
    memory = [step_of(experiment).walk(layout_of(experiment))[0] for experiment in (own, base)]
    kept = [sum(call.held + call.saved for call in calls if call.trained) for calls in memory]
    assert counted == pytest.approx(formula, rel=0.02)
    if name != "img-clf-mnist":  # of images the formula is of the factored attention, which keeps less
        assert kept[0] == pytest.approx(kept[1], rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_a_made_up_batch_has_the_tensors_that_the_model_is_given(name):
    task = build_task(PRESETS[name]())
    batch = task.dummy_batch(3)
    assert {len(tensor) for tensor in batch.values()} == {3}
    loss, _ = task.loss(task.build_model(), batch)
    assert loss.dim() == 0 and loss.requires_grad


def test_a_task_of_the_package_with_a_model_of_a_file_is_planned(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PERCEIVER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "mine.py").write_text(OUTSIDE)
    forget()
    assert plan.main([f"{tmp_path / 'mine.py'}:experiment"]) == 0
    shown = capsys.readouterr().out
    forget()
    # Products with 28 x 10 weights, forward and for their gradient: the input needs none.
    assert "parameters         280\n" in shown and "1.12 kFLOP per example" in shown
