"""Metrics of classes against few lines that compute them from all scores; and weights of classes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from perceiver.config import UserError
from perceiver.tasks import build_task
from perceiver.tasks.base import IGNORE_INDEX
from perceiver.tasks.class_metrics import areas_of, class_metrics, class_sums, class_table, log_odds, score_counts
from perceiver.tasks.class_settings import balanced_weights
from perceiver.training.loop import add_to
from tests.support.small import image_experiment


def exact_auroc(scores, positive):
    """The share of pairs in order, by comparing each positive with each negative."""
    difference = scores[positive][:, None] - scores[~positive][None]
    return float((np.sign(difference) + 1).mean() / 2)


def exact_ap(scores, positive):
    """Precision at each distinct score, times the recall that it adds."""
    total, found = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        said = scores >= threshold
        recall = (said & positive).sum() / positive.sum()
        total += (recall - found) * (said & positive).sum() / said.sum()
        found = recall
    return total


def logits_of(num, classes, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.geometric(0.35, num) - 1, classes - 1)
    logits = rng.normal(size=(num, classes)) * scale
    logits[np.arange(num), labels] += scale
    return torch.from_numpy(logits).float(), torch.from_numpy(labels)


def summed(logits, labels, parts):
    """The sums of a pass whose rows come in the given number of batches, each with a row of padding."""
    sums = {}
    for some, few in zip(logits.tensor_split(parts), labels.tensor_split(parts), strict=True):
        some, few = torch.cat([some, some[:1] * 3]), torch.cat([few, torch.tensor([IGNORE_INDEX])])
        add_to(sums, class_sums(some, few, few != IGNORE_INDEX))
    return {name: value.numpy() for name, value in sums.items()}


@pytest.mark.parametrize(("classes", "scale"), [(2, 1.0), (2, 1e-4), (2, 30.0), (4, 1.0), (11, 3.0)])
def test_metrics_are_those_of_all_scores(classes, scale):
    logits, labels = logits_of(700, classes, scale=scale)
    sums = summed(logits, labels, 1)
    found, stated = class_metrics(sums), max(areas.auroc_error for areas in areas_of(sums["scores"]) if areas is not None)
    answers, truth = logits.argmax(-1).numpy(), labels.numpy()
    recalls, f1 = [], []
    for label in range(classes):
        hit, said, there = ((answers == label) & (truth == label)).sum(), (answers == label).sum(), (truth == label).sum()
        if there:
            recalls.append(hit / there)
        if there + said:
            f1.append(2 * hit / (there + said))
    assert found["acc"] == pytest.approx((answers == truth).mean(), abs=1e-12)
    assert found["recall"] == pytest.approx(np.mean(recalls), abs=1e-12)
    assert found["f1"] == pytest.approx(np.mean(f1), abs=1e-12)
    scores = log_odds(logits).numpy()
    columns = [1] if classes == 2 else [label for label in range(classes) if (truth == label).any()]
    auroc = [exact_auroc(scores[:, 0 if classes == 2 else label], truth == label) for label in columns]
    ap = [exact_ap(scores[:, 0 if classes == 2 else label], truth == label) for label in columns]
    assert found["auroc"] == pytest.approx(np.mean(auroc), abs=stated + 1e-12)
    assert stated < (1e-3 if classes == 2 else 2e-3)
    assert found["ap"] == pytest.approx(np.mean(ap), abs=1e-3 if classes == 2 else 4e-3)
    assert ("top5" in found) == (classes > 5)
    if classes > 5:
        best = np.argsort(-logits.numpy(), 1)[:, :5]
        assert found["top5"] == pytest.approx((best == truth[:, None]).any(1).mean(), abs=1e-12)


def test_the_area_is_within_the_error_that_it_states():
    logits, labels = logits_of(3000, 6, scale=0.003)
    scores, truth = log_odds(logits).numpy(), labels.numpy()
    for label, areas in enumerate(areas_of(summed(logits, labels, 1)["scores"])):
        exact = exact_auroc(scores[:, label], truth == label)
        assert areas is not None and abs(areas.auroc - exact) <= areas.auroc_error + 1e-12


@pytest.mark.parametrize("classes", [2, 7])
def test_metrics_do_not_depend_on_batches_or_workers(classes):
    logits, labels = logits_of(301, classes)
    whole = class_metrics(summed(logits, labels, 1))
    for parts in (2, 7, 301):
        assert class_metrics(summed(logits, labels, parts)) == whole


def test_scores_that_are_not_finite_and_classes_that_are_not_there():
    logits = torch.tensor([[0.0, float("inf")], [float("nan"), 0.0], [1e9, -1e9], [0.0, 0.0]])
    counts = class_sums(logits, torch.tensor([1, 0, 0, 1]), torch.ones(4, dtype=torch.bool))
    assert counts["scores"].sum() == 4
    none = class_sums(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.bool))
    assert "auroc" not in class_metrics({name: value.numpy() for name, value in none.items()})
    many = class_sums(torch.zeros(2, 101), torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.bool))
    assert "scores" not in many


def test_columns_have_positives_of_their_own():
    scores, positive = torch.randn(400, 3), torch.rand(400, 3) < torch.tensor([0.1, 0.5, 0.9])
    given = torch.rand(400, 3) < 0.8
    for column, areas in enumerate(areas_of(score_counts(scores, positive, given).numpy())):
        there = given[:, column].numpy()
        exact = exact_auroc(scores[there, column].numpy(), positive[there, column].numpy())
        assert areas is not None and areas.auroc == pytest.approx(exact, abs=1e-3)


def test_the_table_names_each_class():
    lines = class_table(np.array([[8, 2], [0, 0]]), ("good", "bad"))
    assert lines[1].split() == ["good", "10", "0.8000", "1.0000", "0.8889"]
    assert lines[2].split() == ["bad", "0", "-", "0.0000", "0.0000"]


# ------------------------------------------------------------------------------------------------------ weights of classes


class Fixed(nn.Module):
    """Logits that are its weight, whatever comes in."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, *inputs):
        return self.logits


def task_with(*weights, **measured):
    experiment = image_experiment()
    return build_task(replace(experiment, task=replace(experiment.task, class_weights=weights, **measured)))


def test_the_training_loss_is_torchs_weighted_one_and_validation_is_not_weighted():
    classes = 10
    weights = tuple(str(1 + i / 4) for i in range(classes))
    logits, labels = logits_of(40, classes)
    batch = {"images": torch.zeros(40, 1, 1, 1, dtype=torch.uint8), "labels": torch.cat([labels[:-1], torch.tensor([IGNORE_INDEX])])}
    task, model = task_with(*weights), Fixed(logits)
    given = nn.CrossEntropyLoss(torch.tensor([float(w) for w in weights]), reduction="sum", ignore_index=IGNORE_INDEX)
    assert task.loss(model, batch)[0].item() == pytest.approx(given(logits, batch["labels"]).item(), rel=1e-6)
    with torch.no_grad():
        plain = nn.CrossEntropyLoss(reduction="sum", ignore_index=IGNORE_INDEX)(logits, batch["labels"])
        assert task.loss(model, batch)[0].item() == pytest.approx(plain.item(), rel=1e-6)
    assert task_with().loss(model, batch)[0].item() == pytest.approx(plain.item(), rel=1e-6)


def test_balanced_weights_make_classes_count_alike():
    counts = (90, 0, 9, 1)
    weights = balanced_weights(counts)
    assert weights == pytest.approx((100 / 3 / 90, 0, 100 / 3 / 9, 100 / 3))
    assert np.dot(weights, counts) == pytest.approx(100)
    task = image_experiment().task
    assert replace(task, class_weights=("balanced",)).counted(counts).weights() == weights
    assert task.counted(counts) == task and replace(task, class_weights=("balanced",)).weights() is None


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (("ballanced",), "--task.class-weights is ballanced and must be balanced, or a number for each class"),
        (("1", "-1"), "must have numbers of at least 0"),
        (("0", "0"), "one of them above 0"),
        (("nan", "1"), "must have numbers of at least 0"),
    ],
)
def test_weights_that_cannot_be_are_named(weights, message):
    with pytest.raises(UserError, match=message):
        replace(image_experiment().task, class_weights=weights).check("task.")


def test_there_must_be_a_weight_for_each_class():
    with pytest.raises(UserError, match="--task.class-weights has 2 numbers, but there are 3 classes"):
        task_with("1", "2").check()
