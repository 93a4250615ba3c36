"""Any number of classes a row: lists of labels from their files to metrics and predictions."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import perceiver
from perceiver.config import UserError
from perceiver.data.tables import BadLabel, Columns, label_of
from perceiver.datasets import Dataset, data_folder
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.tasks.base import IGNORE_INDEX
from perceiver.training.batches import make_train_loader, read_here
from perceiver.training.loop import validate
from perceiver.training.parallel import join_world
from perceiver.training.run import Training, save_experiment
from ray_jobs.cli import parse_experiment
from ray_jobs.preprocess import prepare
from tests.data.test_picture_folders import picture
from tests.support.preparing import rows_of, serially, write_jsonl, write_parquet
from tests.support.small import classification_experiment
from tests.tasks.test_class_metrics import exact_ap, exact_auroc

COLUMNS = Columns(text="text", label="label", num_classes=3, class_names=("a", "b", "c"), tags=True)
TINY = ["--training.max-steps", "2", "--training.global-batch-size", "8", "--model.num-latents", "4", "--run.val-every", "2"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["a", "c"], [1, 0, 1]),
        ([], [0, 0, 0]),
        ("b|c", [0, 1, 1]),
        (" a ; b", [1, 1, 0]),
        ("", [0, 0, 0]),
        ([0, 2], [1, 0, 1]),
        (1, [0, 1, 0]),
    ],
)
def test_lists_of_labels_are_read(value, expected):
    assert label_of(value, COLUMNS).tolist() == expected


def test_labels_that_are_none_are_named_and_those_left_out_are_not_there():
    with pytest.raises(BadLabel, match="label 'd' must be 0 .. 2 or a, b, c"):
        label_of(["a", "d"], COLUMNS)
    with pytest.raises(BadLabel, match="None is no list of labels"):
        label_of(None, COLUMNS)
    assert label_of(["a", "d"], replace(COLUMNS, left_out=("d",))).tolist() == [1, 0, 0]


def rows(num, seed=0):
    """Texts whose letters say which labels they have."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(num):
        labels = [name for name in ("one", "two", "six") if rng.random() < 0.4]
        found.append({"text": "".join(rng.choice([*"efgh", *(name[-1] * 2 for name in labels)], 12)), "label": labels})
    return found


def prepared(tmp_path, monkeypatch, *words):
    serially(monkeypatch)
    chosen = parse_experiment([*words, "--data.root", str(tmp_path / "data"), *TINY], "ray_jobs.train")
    return chosen, prepare(chosen)


@pytest.mark.parametrize("form", ["jsonl", "parquet", "csv"])
def test_texts_with_lists_are_prepared_from_each_format(tmp_path, monkeypatch, form):
    folder, written = tmp_path / "in", rows(40)
    folder.mkdir()
    for split, some in (("train", written[:30]), ("val", written[30:])):
        if form == "jsonl":
            write_jsonl(folder / f"{split}.jsonl", some)
        elif form == "parquet":
            write_parquet(folder / f"{split}.parquet", some)
        else:
            with open(folder / f"{split}.csv", "w", newline="") as file:
                writer = csv.writer(file)
                writer.writerows([["text", "label"], *([row["text"], "|".join(row["label"])] for row in some)])
    chosen, manifest = prepared(tmp_path, monkeypatch, "txt-tags", "--data.source", str(folder))
    assert chosen.task.class_names == ("one", "six", "two") and chosen.model.output.num_classes == 3
    stored = rows_of(data_folder(chosen), manifest, "val")
    expected = [[int(name in row["label"]) for name in chosen.task.class_names] for row in written[30:]]
    assert stored["labels"].to_pylist() == expected
    assert manifest.stats["labels"]["val"] == np.sum(expected, 0).tolist()
    guess = build_task(chosen).baselines(Dataset.find(chosen).parts)
    assert guess.keys() == {f"val_{name}" for name in ("loss", "acc", "f1", "auroc", "ap")} and guess["val_auroc"].value == 0.5


def test_held_out_rows_and_an_unseen_label_are_right(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "all.jsonl", rows(200))
    _, manifest = prepared(tmp_path, monkeypatch, "txt-tags", "--data.source", str(tmp_path / "all.jsonl"))
    assert 10 <= manifest.splits["val"].rows <= 30
    (tmp_path / "two").mkdir()
    write_jsonl(tmp_path / "two" / "train.jsonl", rows(20))
    write_jsonl(tmp_path / "two" / "val.jsonl", [*rows(3), {"text": "x", "label": ["seven"]}])
    with pytest.raises(UserError, match=r"val\.jsonl line 4: label 'seven' must be .*one, six, two"):
        prepared(tmp_path, monkeypatch, "txt-tags", "--data.source", str(tmp_path / "two"))
    with pytest.raises(UserError, match="the presets img-tags and txt-tags take lists of labels"):
        prepared(tmp_path, monkeypatch, "txt-clf", "--data.source", str(tmp_path / "two"))


def trained(chosen, manifest, tmp_path):
    dataset = Dataset.find(chosen)
    folder = tmp_path / "run"
    chosen = dataset.measured()
    training = Training(chosen, build_task(chosen), dataset.folder, manifest, join_world(torch.device("cpu")), folder, read_here)
    metrics = training.run()
    save_experiment(Run(folder), chosen, manifest, dataset.folder)
    assert metrics.keys() >= {"val_loss", "val_acc", "val_f1", "val_auroc", "val_ap"}
    assert "one" in next((folder / "samples").glob("classes-*.txt")).read_text()
    return perceiver.load(str(folder), device="cpu")


def test_a_text_gets_the_names_of_its_classes(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "all.jsonl", rows(60))
    chosen, manifest = prepared(tmp_path, monkeypatch, "txt-tags", "--data.source", str(tmp_path / "all.jsonl"))
    model = trained(chosen, manifest, tmp_path)
    found = model.classify("eeff")
    probabilities = dict(zip(model.class_names, found.probabilities, strict=True))
    assert found.label == "|".join(name for name, value in probabilities.items() if value > 0.5)
    assert found.probability == max(found.probabilities)
    again = perceiver.load(str(model.export(tmp_path / "out")), device="cpu")
    assert again.classify("eeff") == found


def test_pictures_with_a_table_of_labels(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    lines = []
    for i in range(20):
        picture(folder / f"{i}.png", "red", i)
        lines.append({"file_name": f"{i}.png", "label": [["one"], ["one", "two"], []][i % 3], "split": "val" if i > 14 else "train"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    chosen, manifest = prepared(tmp_path, monkeypatch, "img-tags", "--data.source", str(folder))
    assert manifest.stats["labels"] == {"train": [10, 5], "val": [3, 1]} or manifest.stats["labels"]["train"] == [10, 5]
    model = trained(chosen, manifest, tmp_path)
    assert len(model.classify(np.zeros((8, 8, 3), np.uint8)).probabilities) == 2


def test_the_loss_is_torchs_and_metrics_are_those_of_all_scores():
    from perceiver.tasks.text_classification import TextTagsConfig

    base = classification_experiment()
    output = replace(base.model.output, num_classes=3)
    task = build_task(replace(base, task=TextTagsConfig(class_names=("a", "b", "c")), model=replace(base.model, output=output)))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 3, generator=generator)
    labels = (torch.rand(60, 3, generator=generator) < 0.3).long()
    labels[50:] = IGNORE_INDEX
    batch = {"ids": torch.zeros(60, 1, dtype=torch.long), "labels": labels}

    class Fixed(torch.nn.Module):
        def forward(self, *inputs):
            return logits

    with torch.no_grad():
        loss, _ = task.loss(Fixed(), batch)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[:50], labels[:50].float(), reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and task.num_targets(batch).item() == 150
    assert task.loss(Fixed(), batch)[0].item() == pytest.approx(expected.item(), rel=1e-6)
    world = join_world(torch.device("cpu"))
    halves = [[{name: values[i : i + 30] for name, values in batch.items()}] for i in (0, 30)]
    scores, there = logits[:50].numpy(), labels[:50].numpy() == 1
    parts = iter([logits[:30], logits[30:]])

    class Parts(torch.nn.Module):
        def forward(self, *inputs):
            return next(parts)

    found = [task.metrics(validate(task, model, batches, world), None) for model, batches in ((Fixed(), [[batch]]), (Parts(), halves))]
    assert found[0] == pytest.approx(found[1], abs=1e-12)
    assert found[0]["acc"] == pytest.approx(((scores > 0) == there).mean())
    assert found[0]["auroc"] == pytest.approx(np.mean([exact_auroc(scores[:, i], there[:, i]) for i in range(3)]), abs=1e-3)
    assert found[0]["ap"] == pytest.approx(np.mean([exact_ap(scores[:, i], there[:, i]) for i in range(3)]), abs=1e-3)


def test_what_has_no_meaning_for_several_classes_is_refused(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "all.jsonl", rows(30))
    chosen, manifest = prepared(tmp_path, monkeypatch, "txt-tags", "--data.source", str(tmp_path / "all.jsonl"))
    with pytest.raises(UserError, match="--task.class-weights is given, but each row has any number of classes"):
        build_task(replace(chosen, task=replace(chosen.task, class_weights=("balanced",)))).check()
    balanced = replace(chosen, data=replace(chosen.data, balance=4))
    with pytest.raises(UserError, match="--data.balance is 4, but TextTags has no one class for each row"):
        make_train_loader(balanced, build_task(balanced), data_folder(chosen), manifest)
