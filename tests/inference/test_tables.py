"""Models of tables at work on new .csv and Excel files: names in the output, missing numbers, rows that are wrong."""

import csv
import json
import random
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from perceiver.data.read_arrays import read_arrays
from perceiver.data.sources import resolve
from perceiver.data.spans import Problems, Span
from perceiver.inference.joined import join
from perceiver.inference.parts import list_inputs, plan_parts, read_part
from perceiver.inference.predict import PredictOptions, predict_rows
from perceiver.inference.rows import rows_from_table, rows_to_table
from perceiver.inference.served import ServedModel, interface_of
from perceiver.inference.trained import TrainedModel
from perceiver.models import build_model
from ray_jobs.cli import parse_experiment

NEW = [["a", "b", "id"], [1, 2.5, "x"], ["", 3, "y"], ["two", 4, "z"]]


def trained(folder: Path, *words: str) -> TrainedModel:
    """A model of random weights, with what its task measures of a table."""
    rng = random.Random(0)
    rows = "".join(f"{rng.random()},{rng.randrange(9)},{i * 0.5},{['cat', 'dog', 'owl'][i % 3]},{i % 2}\n" for i in range(30))
    (folder / "own.csv").write_text(f"a,b,mass,kind,awake\n{rows}")
    words = ("--data.source", str(folder / "own.csv"), "--model.input.columns", "a,b", "--model.num-latents", "4", *words)
    chosen = parse_experiment(["tables" if "--task.targets" in words else "table-heads", *words], "x")
    kind, (file,) = chosen.task.rows(chosen.model, chosen.data), resolve(chosen.data, "arrays").files
    stored = kind.stack([row for row, _ in read_arrays(Span(file, 0, file.size), kind, Problems(skip=False))])
    chosen = replace(chosen, task=chosen.task.measure(chosen.model, iter([stored])))
    model = build_model(chosen.model, 0).eval()
    return TrainedModel(model=model, config=chosen.model, task=chosen.task, data=chosen.data)


def predicted(model: TrainedModel, folder: Path, name: str):
    """NEW through the command's own steps without Ray."""
    if name.endswith(".xlsx"):
        book = pytest.importorskip("openpyxl").Workbook()
        for row in NEW:
            book.active.append(row)
        book.save(folder / name)
    else:
        (folder / name).write_text("\n".join(",".join(map(str, row)) for row in NEW))
    arrays = model.predictor.rows
    parts = plan_parts(list_inputs([str(folder / name)]), 2, "", "id", arrays)
    assert [part.rows for part in parts] == [2, 1]
    rows = [row for part in parts for row in read_part(part, "arrays", "", "id", arrays)]
    return predict_rows(model, rows_from_table(rows_to_table(rows, arrays), "arrays", arrays), PredictOptions(mode="predict"))


@pytest.mark.parametrize("name", ["new.csv", "new.xlsx"])
def test_a_row_with_a_missing_number_is_predicted_and_a_wrong_one_is_named(tmp_path: Path, name: str) -> None:
    table = predicted(trained(tmp_path, "--task.targets", "mass"), tmp_path, name)
    assert table["id"].to_pylist() == ["x", "y", "z"]
    errors = table["error"].to_pylist()
    assert errors[:2] == [None, None] and "a cannot be read as float32" in errors[2]
    assert [value is not None for value in table["prediction"].to_pylist()] == [True, True, False]


def test_predictions_bear_the_names_of_classes_and_columns(tmp_path: Path) -> None:
    found = {}
    for number, words in enumerate(
        (["--task.targets", "kind"], ["--task.targets", "mass"], ["--task.heads", "kind", "mass=gaussian", "awake=labels"])
    ):
        table = predicted(trained(tmp_path, *words), tmp_path, "new.csv")
        (tmp_path / f"{number}").mkdir()
        pq.write_table(table, tmp_path / f"{number}" / "part.parquet")
        for suffix in (".csv", ".jsonl", ".parquet"):
            join(str(tmp_path / f"{number}"), ["part.parquet"], str(tmp_path / f"{number}{suffix}"))
        with open(tmp_path / f"{number}.csv", newline="") as file:
            found[number] = next(csv.DictReader(file))
    assert list(found[0]) == ["id", "class", "label", "probability_cat", "probability_dog", "probability_owl", "error"]
    assert found[0]["label"] == ["cat", "dog", "owl"][int(found[0]["class"])]
    assert list(found[1]) == ["id", "prediction", "error"] and isinstance(float(found[1]["prediction"]), float)
    assert [name for name in found[2] if "kind" not in name] == ["id", "mass_prediction", "mass_deviation", "awake_probabilities", "error"]
    assert {"kind_label", "kind_probability_owl"} <= found[2].keys()
    line = json.loads((tmp_path / "0.jsonl").read_text().splitlines()[0])
    assert sum(line["probabilities"].values()) == pytest.approx(1) and list(line["probabilities"]) == ["cat", "dog", "owl"]
    assert pq.read_table(tmp_path / "2.parquet").to_pylist()[0]["kind_probabilities"].keys() == {"cat", "dog", "owl"}


def test_a_request_may_leave_a_number_open_as_null(tmp_path: Path) -> None:
    model = trained(tmp_path, "--task.targets", "kind")
    interface = interface_of("own", "last", model.task, model.predictor.rows, "", model.abilities, "predict")
    served = ServedModel(model, interface, PredictOptions(mode="predict"), model.predictor.rows)
    answers = served.answers([({"a": 1, "b": None}, {}), ({"a": 1}, {})])
    assert answers[0]["error"] is None and answers[0]["label"] in ("cat", "dog", "owl")
    assert "b" in answers[1]["error"], "a column that is not there at all is a mistake"
