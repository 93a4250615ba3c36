"""Columns of categories and of free text as inputs beside numbers: how they are found, what goes in, that a text is learned from."""

import csv
import logging
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from perceiver.config import Experiment, UserError, from_dict, to_dict
from perceiver.data.read_arrays import read_arrays
from perceiver.data.sources import resolve
from perceiver.data.spans import Problems, Span
from perceiver.data_settings import prepare_settings
from perceiver.inference.export import export
from perceiver.inference.load import load
from perceiver.inference.parts import list_inputs, plan_parts, read_part
from perceiver.inference.predict import PredictOptions, predict_rows
from perceiver.inference.trained import TrainedModel
from perceiver.models import TableInput, build_model
from perceiver.models.table_input import Categories, TableAdapter
from perceiver.tasks import build_task
from perceiver.tasks.base import dummy_split
from perceiver.tasks.check import check_task
from ray_jobs.cli import parse_experiment
from tests.data.test_train_tokenizer import CONFIG

ROWS = 120
GOOD, BAD = ("superb", "lovely", "fresh"), ("dirty", "rude", "stale")
FILL = ("the", "soup", "table", "was", "we", "went", "there", "window", "menu")


def rows() -> list[dict[str, str]]:
    rng, found = random.Random(0), []
    for number in range(ROWS):
        liked = rng.random() < 0.5
        words = [rng.choice(FILL) for _ in range(rng.randint(3, 6))]
        words.insert(rng.randrange(len(words)), rng.choice(GOOD if liked else BAD))
        found.append({
            "id": f"r{number}", "city": rng.choice(["Ulm", "Bonn"]), "price": f"{rng.gauss(20, 5):.2f}",
            "review": " ".join(words) + f" {number}", "liked": "yes" if liked else "no", "stars": str(4 if liked else 2),
        })  # fmt: skip
    found[0]["review"] = "the menu was long " * 40 + "0"
    found[1]["review"] = found[2]["city"] = found[3]["price"] = ""
    return found


def write(path: Path, found: list[dict[str, str]]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("texts") / "own.csv", rows())


def parsed(file: Path, *words: str) -> Experiment:
    small = ["--model.num-latents", "4", "--model.encoder.num-self-attention-layers-per-block", "1", "--model.input.text-length", "48"]
    preset = "table-heads" if "--task.heads" in words else "tables"
    return parse_experiment([preset, "--data.source", str(file), *small, *words], "ray_jobs.train")


def stored(experiment: Experiment) -> pa.Table:
    kind, (file,) = experiment.task.rows(experiment.model, experiment.data), resolve(experiment.data, "arrays").files
    return kind.stack([row for row, _ in read_arrays(Span(file, 0, file.size), kind, Problems(skip=False))])


def measured(experiment: Experiment) -> Experiment:
    return replace(experiment, task=experiment.task.measure(experiment.model, iter([stored(experiment)])))


def batch_of(experiment: Experiment):
    task, table = build_task(experiment), stored(experiment)
    return task, task.collate(table, table.num_rows, dummy_split(task.rows, table.num_rows), True, 0)


def test_texts_and_categories_are_found_and_names_of_rows_left_out(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "perceiver.tasks"):
        found = parsed(file, "--task.targets", "liked").model.input
    assert found.columns == ("city", "price", "review", "stars")
    assert found.shapes == ("category", "scalar", "text:48", "scalar")
    assert found.categories == (Categories(column="city", values=("Bonn", "Ulm")),) and found.vocab_size == 262
    assert "'review' is read as text: 1 of 119 texts (0.8%) have more than 48 tokens: 673 of" in caplog.text
    assert "'city' is read as one of 2 categories" in caplog.text and "not used: 'id'" in caplog.text


def test_a_column_is_read_as_it_is_said_to_be(file: Path) -> None:
    found = parsed(file, "--task.targets", "liked", "--model.input.columns", "id=text,review=category").model.input
    assert found.shapes == ("text:4", "category") and len(found.categories[0].values) == ROWS - 1
    assert parsed(file, "--task.targets", "liked", "--model.input.columns", "id,city").model.input.shapes == ("text:4", "category")


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ("review=txt", "--model.input.columns has 'review=txt', and what follows = must be number, category or text"),
        ("price=text", "has 'price=text', and 'price' holds double: text needs texts"),
        ("review=number", "'review', which holds string"),
        ("reviews=text", "names 'reviews', which own.csv does not have, did you mean review"),
        ("city,city", "names 'city' twice"),
    ],
)
def test_a_wrong_reading_of_a_column_is_one_sentence(file: Path, columns: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parsed(file, "--task.targets", "liked", "--model.input.columns", columns)


@pytest.mark.parametrize("words", [("--task.targets", "liked"), ("--task.heads", "liked", "stars=mse")])
def test_texts_keep_the_contract_of_tasks(file: Path, words: tuple[str, ...]) -> None:
    experiment = measured(parsed(file, *words))
    two = stored(experiment).slice(0, 2)
    check_task(experiment, two.append_column("row", pa.array([0, 1])).append_column("epoch", pa.array([0, 0])))
    assert from_dict(to_dict(experiment)) == experiment
    assert build_task(experiment).flops_per_example() > 0


def test_a_text_decides_what_numbers_and_categories_do_not(file: Path) -> None:
    reached = {}
    for columns in ("city,price", "city,price,review"):
        experiment = measured(parsed(file, "--task.targets", "liked", "--model.input.columns", columns))
        task, batch = batch_of(experiment)
        model = build_model(experiment.model)
        train, rest = ({name: values[part] for name, values in batch.items()} for part in (slice(40, None), slice(40)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        for _ in range(60):
            optimizer.zero_grad()
            (task.loss(model, train)[0] / 80).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            said = task.predict(model, rest)["class"]
        reached[columns] = float((said == rest["labels"]).float().mean())
    assert reached["city,price,review"] > 0.9 > 0.75 > reached["city,price"], reached


def adapter() -> TableAdapter:
    categories = (Categories(column="c", values=("x", "y")),)
    config = TableInput(columns=("n", "c", "t"), shapes=("2", "category", "text:4"), categories=categories, num_channels=8, vocab_size=9)
    torch.manual_seed(0)
    return TableAdapter(config)


def test_what_follows_a_text_is_masked_and_an_empty_one_has_a_position() -> None:
    numbers = torch.tensor([[1.0, float("nan")]]).expand(3, -1)
    ids = torch.tensor([[1, 3, 4, -1, -1], [0, -1, -1, -1, -1], [2, 3, 4, 5, 6]])
    adapted, missing = adapter()({"numbers": numbers, "ids": ids})
    assert adapted.shape == (3, 7, 8)
    assert missing.int().tolist() == [[0, 1, 0, 0, 0, 1, 1], [0, 1, 0, 0, 1, 1, 1], [0, 1, 0, 0, 0, 0, 0]]
    assert not torch.equal(adapted[0, 2], adapted[1, 2]), "a category that is not there has a vector of its own"


def test_a_token_is_seen_by_its_neighbours_alone() -> None:
    module, numbers = adapter(), torch.zeros(1, 2)
    text = torch.tensor([[1, 3, 4, 5, 6]])
    other = text.clone()
    other[0, 1] = 8
    with torch.no_grad():
        same = (module({"numbers": numbers, "ids": text})[0] == module({"numbers": numbers, "ids": other})[0]).all(-1)[0]
    assert same.tolist() == [True, True, True, False, False, False, True]


def test_a_tokenizer_of_a_file_reads_the_texts_and_belongs_to_the_data(file: Path, tmp_path: Path) -> None:
    from perceiver.data.train_huggingface import train_huggingface

    texts = [row["review"] for row in rows() if row["review"]]
    path = tmp_path / "tokenizer.json"
    path.write_bytes(train_huggingface(texts * 3, replace(CONFIG, model_type="bpe", vocab_size=300)))
    plain, pieces = (parsed(file, "--task.targets", "liked", *words) for words in ((), ("--data.tokenizer", str(path))))
    assert pieces.model.input.vocab_size == 300
    _, batch = batch_of(pieces)
    assert (batch["input_ids"] >= 0).sum() < (batch_of(plain)[1]["input_ids"] >= 0).sum()
    assert "tokenizer" not in prepare_settings(plain) and prepare_settings(pieces)["tokenizer"]["vocab_size"] == 300


def test_new_rows_are_predicted_with_what_they_lack_and_an_export_says_the_same(file: Path, tmp_path: Path) -> None:
    experiment = measured(parsed(file, "--task.targets", "liked", "--model.input.columns", "city,price,review"))
    model = build_model(experiment.model, 0).eval()
    trained = TrainedModel(model=model, config=experiment.model, task=experiment.task, data=experiment.data)
    new = write(tmp_path / "new.csv", [
        {"id": "a", "city": "Ulm", "price": "3", "review": "lovely"}, {"id": "b", "city": "Rome", "price": "3", "review": "lovely"},
        {"id": "c", "city": "", "price": "3", "review": "lovely"}, {"id": "d", "city": "", "price": "", "review": ""},
        {"id": "e", "city": "Ulm", "price": "cheap", "review": "x"},
    ])  # fmt: skip
    arrays = trained.predictor.rows
    (part,) = plan_parts(list_inputs([str(new)]), 9, "", "id", arrays)
    found = list(read_part(part, "arrays", "", "id", arrays))
    said = predict_rows(trained, found, PredictOptions(mode="predict"))
    errors = said["error"].to_pylist()
    assert errors[:4] == [None] * 4 and "price cannot be read as float32" in errors[4]
    probabilities = [list(row.values()) if isinstance(row, dict) else row for row in said["probabilities"].to_pylist()]
    assert probabilities[1] == probabilities[2] != probabilities[0], "a category that training did not have is as none"
    export(replace_tokenizer(trained, experiment), tmp_path / "exported")
    again = load(tmp_path / "exported")
    table = predict_rows(again, found, PredictOptions(mode="predict"))
    np.testing.assert_allclose(flat(table), flat(said), rtol=1e-6)


def replace_tokenizer(trained: TrainedModel, experiment: Experiment) -> TrainedModel:
    from perceiver.inference.load import model_tokenizer

    return replace(trained, tokenizer=model_tokenizer(experiment.model, experiment.data))


def flat(table: pa.Table) -> list[float]:
    return [value for row in table["probabilities"].to_pylist()[:4] for value in (row.values() if isinstance(row, dict) else row)]
