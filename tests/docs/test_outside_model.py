"""A trained model of a task that is not of this package: predicted with, exported, loaded, and never imported unasked."""

import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.checkpoint as dcp

import perceiver
from perceiver.checkpoints import MARKER, CheckpointInfo, marker_content
from perceiver.config import DataConfig, Experiment, OptimConfig, TrainingConfig, UserError, to_dict
from perceiver.extensions import Code, code_of, trust
from perceiver.inference.parts import list_inputs, plan_parts, read_part
from perceiver.inference.rows import rows_from_table, rows_to_table
from perceiver.models import build_model
from perceiver.run_files import CHECKPOINTS, CODE, EXPERIMENT
from perceiver.training.checkpoint_files import ShardWriter
from perceiver.training.init_from import find_start, trust_start
from ray_jobs.export import main as export_main
from ray_jobs.predict import Predictor, _read, parse, predict
from ray_jobs.predict_job import PLAN, Placement, finish, plan
from ray_jobs.shipping import Shipped

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE = '''
"""Sums of columns, by a model that is one linear layer."""
from pathlib import Path
import torch
import torch.nn.functional as F
from torch import nn
from perceiver.config import ModelConfig, TaskConfig
from perceiver.data.rows import ArrayRows
from perceiver.tasks.base import Task

Path(__file__).with_suffix(".imported").touch()


class Linear(nn.Module):
    def __init__(self, wide):
        super().__init__()
        self.layer = nn.Linear(6, wide)

    def layers(self):
        return [self.layer]

    def init_weights(self, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def reset_buffers(self):
        pass

    def forward(self, x):
        return self.layer(x.flatten(1))


class LinearConfig(ModelConfig):
    wide: int = 4
    """Outputs."""
    comment: str | None = None
    """Free text."""

    def build(self):
        return Linear(self.wide)


class Sums(TaskConfig):
    scale: float = 2.0
    """Factor of what is predicted."""

    def rows(self, model, data):
        return ArrayRows(x=((2, 3), "float32"), name=((), "string"), y=((), "float32"))

    def build(self, model, data, seed):
        return SumsTask(self, model, data, seed)


class SumsTask(Task):
    def loss(self, model, batch):
        error = model(batch["x"]).sum(1) - batch["y"]
        return (error**2 * batch["valid"]).sum(), {}

    def predict(self, model, batch):
        outputs = model(batch["x"]).float() * self.config.scale
        return {"outputs": outputs.view(-1, 2, 2), "best": outputs.argmax(1)}
'''


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """The user's file, imported, under a name of its own for each test; it leaves no trace in this process."""
    name = f"sums_{abs(hash(request.node.name)) % 10**8}"
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / f"{name}.py").write_text(SOURCE)
    monkeypatch.setenv("PERCEIVER_HOME", str(tmp_path / "home"))
    monkeypatch.syspath_prepend(str(tmp_path / "user"))
    importlib.invalidate_caches()
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def write_run(folder: Path, module, trusted: bool = True) -> Path:
    """A run of the outside task, as a training leaves it, with one checkpoint."""
    experiment = Experiment(
        task=module.Sums(), model=module.LinearConfig(comment="mine"), data=DataConfig(source="none"), optim=OptimConfig(),
        training=TrainingConfig(max_steps=1),
    )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / EXPERIMENT).write_text(json.dumps({"experiment": to_dict(experiment), "data": "none"}))
    code = code_of(experiment)
    code.save(folder / CODE)
    if trusted:
        trust(code)
    path = folder / CHECKPOINTS / "step-00000001"
    with warnings.catch_warnings(action="ignore"):
        writer = ShardWriter(path, 0)
        dcp.save({"model": build_model(experiment.model, seed=3).state_dict()}, storage_writer=writer, no_dist=True)
    (path / MARKER).write_bytes(marker_content(CheckpointInfo(path, 1, {"val_loss": 1.0}, frozenset(), writer.files)))
    return folder


def inputs(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 2, 3)).astype(np.float32)


def expected(x: np.ndarray, module) -> np.ndarray:
    model = build_model(module.LinearConfig(), seed=3)
    with torch.no_grad():
        return 2 * model(torch.from_numpy(x)).view(-1, 2, 2).numpy()


def test_rows_in_any_form_are_predicted_without_their_targets(tmp_path, module):
    model = perceiver.load(write_run(tmp_path / "run", module), device="cpu")
    assert model.abilities == ("predict",)
    x = inputs(7)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 6)
    forms = {
        "mapping": {"x": x},
        "mappings": [{"x": each, "other": 1} for each in x],
        "with a target": [{"x": each.tolist(), "y": 1.0} for each in x],
        "table of flat lists": pa.table({"x": flat}),
        "table of nested lists": pa.table({"x": x.tolist(), "unknown": [1] * 7}),
    }
    for rows in forms.values():
        for batch_size in (1, 3, 16):
            found = model.predict(rows, batch_size=batch_size)
            assert found.keys() == {"outputs", "best"} and found["best"].dtype == np.int64
            np.testing.assert_allclose(found["outputs"], expected(x, module), rtol=1e-5)
    empty = model.predict([])
    assert empty["outputs"].shape == (0, 2, 2) and empty["best"].shape == (0,)
    half = perceiver.load(tmp_path / "run", device="cpu", precision="bf16").predict({"x": x})["outputs"]
    assert half.dtype == np.float32 and np.abs(half - expected(x, module)).max() < 0.2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"y": 1.0}], "the rows have no x, which SumsTask needs to predict"),
        ([{"x": np.zeros((3, 2))}], "x has shape (3, 2) and must have (2, 3)"),
        ([{"x": [[1.0, 2.0, 3.0], [4.0, None, 6.0]]}], "x has nulls among its numbers"),
        ([{"z": 1}], "needs rows with name, x, y"),
        ({"x": inputs(2), "y": [1.0]}, "different numbers of rows: x 2, y 1"),
        ("text", "must be a pyarrow table, a list of mappings or a mapping of arrays, not str"),
        ([3], "a row is a int and must be a mapping"),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path, module, rows, message):
    model = perceiver.load(write_run(tmp_path / "run", module), device="cpu")
    with pytest.raises(UserError) as error:
        model.predict(rows)
    assert message in str(error.value)


def test_a_method_that_predicts_something_else_is_named_with_its_shape(tmp_path, module, monkeypatch):
    model = perceiver.load(write_run(tmp_path / "run", module), device="cpu")
    for found, message in (
        ({"a": torch.zeros(())}, "SumsTask.predict gives a as a tensor of shape ()"),
        ({"a": torch.zeros(3)}, "its first dimension must be the size of the batch, 2"),
        ({"a": 1.0}, "SumsTask.predict gives a as a float"),
        (torch.zeros(2), "SumsTask.predict gives a Tensor and must give a dict"),
    ):
        monkeypatch.setattr(module.SumsTask, "predict", lambda self, model, batch, found=found: found)
        with pytest.raises(UserError) as error:
            model.predict({"x": inputs(2)})
        assert message in str(error.value)


def write_files(folder: Path) -> None:
    folder.mkdir()
    x = inputs(9)
    pq.write_table(pa.table({"key": [f"k{i}" for i in range(5)], "x": x[:5].tolist()}), folder / "a.parquet", row_group_size=2)
    lines = [{"key": f"k{i}", "x": x[i].tolist(), "y": float(i)} for i in range(5, 9)]
    lines[1] = {"key": "k6", "x": [[1.0, 2.0, 3.0], [4.0, None, 6.0]]}
    lines[2] = {"key": "k7", "y": 1.0}
    (folder / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("rows_per_part", [2, 100])
def test_files_of_arrays_are_predicted_in_order_and_a_bad_row_has_an_error(tmp_path, module, rows_per_part):
    run = write_run(tmp_path / "run", module)
    write_files(tmp_path / "in")
    out = tmp_path / "out"
    words = [str(run), "--input", str(tmp_path / "in"), "--output", str(out), "--id-column", "key", "--rows-per-part", str(rows_per_part)]
    job, output, _, _ = parse(words)
    assert (job.options.mode, job.kind) == ("predict", "arrays")
    parts = plan(job, output)
    assert plan(job, output) == parts and (out / PLAN).exists()
    worker = Predictor(job, output, "cpu", 0)
    for part in parts:
        worker(_read(pa.table({"part": [json.dumps({**part.__dict__})]}), job))
    summary = finish(parts, output)
    assert (summary["rows"], summary["errors"]) == (9, 2)
    tables = [pq.read_table(path) for path in sorted(out.glob("part-*.parquet"))]
    assert len(tables) == len(parts) and len({str(table.schema) for table in tables}) == 1
    table = pa.concat_tables(tables)
    assert table["id"].to_pylist() == [f"k{i}" for i in range(9)]
    assert json.loads(table.schema.field("outputs").metadata[b"shape"]) == [2, 2]
    good = [0, 1, 2, 3, 4, 5, 8]
    found = np.array([table["outputs"][i].as_py() for i in good]).reshape(-1, 2, 2)
    np.testing.assert_allclose(found, expected(inputs(9)[good], module), rtol=1e-5)
    errors = table["error"].to_pylist()
    assert errors[6] == "x has nulls among its numbers: all of them must be there" and "the rows have no x" in errors[7]
    assert table["outputs"][6].as_py() is None and table["best"][7].as_py() is None


def test_rows_of_arrays_arrive_as_they_were_sent(tmp_path, module):
    write_files(tmp_path / "in")
    rows = module.Sums().rows(None, None)
    for part in plan_parts(list_inputs([str(tmp_path / "in")]), 3, "", "key", rows):
        there = read_part(part, "arrays", "", "key", rows)
        here = rows_from_table(rows_to_table(there, rows), "arrays", rows)
        assert [(row.id, row.error, row.place) for row in here] == [(row.id, row.error, row.place) for row in there]
        for sent, got in zip(there, here, strict=True):
            assert (sent.value or {}).keys() == (got.value or {}).keys()
            assert all(np.array_equal(sent.value[name], got.value[name]) for name in sent.value or {})


def test_files_without_any_of_the_columns_and_a_column_that_is_given_are_refused(tmp_path, module):
    run = write_run(tmp_path / "run", module)
    pq.write_table(pa.table({"z": [1]}), tmp_path / "new.parquet")
    words = [str(run), "--input", str(tmp_path / "new.parquet"), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="has none of the columns name, x, y \\(it has: z\\)"):
        plan(parse(words)[0], str(tmp_path / "out"))
    with pytest.raises(UserError, match="--column is x, but run reads rows of arrays"):
        parse([*words, "--column", "x"])


def test_an_export_carries_no_code_and_loads_where_its_module_is_imported(tmp_path, module):
    run = write_run(tmp_path / "run", module)
    assert export_main([str(run), "--out", str(tmp_path / "out")]) == 0
    assert not list((tmp_path / "out").rglob("*.py"))
    x = inputs(3)
    model = perceiver.load(tmp_path / "out", device="cpu")
    assert type(model.task) is module.Sums and model.config == module.LinearConfig(comment="mine")
    np.testing.assert_allclose(model.predict({"x": x})["outputs"], expected(x, module), rtol=1e-5)


def test_foreign_weights_import_nothing_and_name_the_module(tmp_path, module):
    """Where a process has not imported it, although it could be: the folder of the module is on the import path."""
    perceiver.load(write_run(tmp_path / "run", module), device="cpu").export(tmp_path / "out")
    mark = tmp_path / "user" / f"{module.__name__}.imported"
    mark.unlink()
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path / "user")!r})
import perceiver
from perceiver.config import UserError
from perceiver.experiments import find_experiment
from perceiver.training.init_from import find_start
from ray_jobs.overrides import override
from ray_jobs.export import main as export
from ray_jobs.predict import parse
folder = {str(tmp_path / "out")!r}
started = override(find_experiment("quickstart"), ["--init-from", folder], "test")
for call in (
    lambda: perceiver.load(folder),
    lambda: perceiver.load(folder, trust_code=True),
    lambda: parse([folder, "--input", folder, "--output", folder + "-out"]),
    lambda: export([folder, "--out", folder + "-again"]),
    lambda: find_start(started, {{}}),
):
    try:
        call()
    except UserError as error:
        assert {module.__name__!r} in str(error) and "config.json" in str(error), error
    else:
        raise AssertionError("not refused")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not mark.exists()


def test_a_run_with_code_that_was_never_run_here_is_refused_until_it_is_trusted(tmp_path, module):
    run = write_run(tmp_path / "run", module, trusted=False)
    words = [str(run), "--input", str(tmp_path), "--output", str(tmp_path / "out")]
    started = Experiment(
        task=module.Sums(), model=module.LinearConfig(comment="mine"), data=DataConfig(source="none"), optim=OptimConfig(),
        training=TrainingConfig(max_steps=1, init_from=str(run)),
    )  # fmt: skip
    shapes = {"layer.weight": (4, 6), "layer.bias": (4,)}
    for call in (
        lambda: perceiver.load(run, device="cpu"),
        lambda: parse(words),
        lambda: export_main([str(run), "--out", str(tmp_path / "exported")]),
        lambda: find_start(started, shapes),
    ):
        with pytest.raises(UserError, match="was never run from this account: .* --trust-code"):
            call()
    trust_start(started)
    assert find_start(started, shapes).loaded == ("layer.bias", "layer.weight")
    assert perceiver.load(run, device="cpu").predict({"x": inputs(1)})["best"].shape == (1,)


@pytest.mark.parametrize("command", ["load", "predict", "export"])
def test_trusting_code_once_is_enough(tmp_path, module, command):
    run = write_run(tmp_path / "run", module, trusted=False)
    match command:
        case "load":
            perceiver.load(run, device="cpu", trust_code=True)
        case "predict":
            parse([str(run), "--input", str(tmp_path), "--output", str(tmp_path / "out"), "--trust-code"])
        case "export":
            export_main([str(run), "--out", str(tmp_path / "exported"), "--trust-code"])
    perceiver.load(run, device="cpu")


def test_weights_of_a_run_whose_file_has_changed_since_start_another(tmp_path, module):
    """The usual way: train, edit the file, and go on from what was learned."""
    run = write_run(tmp_path / "run", module)
    (saved,) = (run / CODE).glob("*.py")
    saved.write_text(saved.read_text() + "\n# as it was then\n")
    trust(Code.load(run / CODE))
    started = Experiment(
        task=module.Sums(), model=module.LinearConfig(comment="mine"), data=DataConfig(source="none"), optim=OptimConfig(),
        training=TrainingConfig(max_steps=1, init_from=str(run)),
    )  # fmt: skip
    assert find_start(started, {"layer.weight": (4, 6), "layer.bias": (4,)}).loaded == ("layer.bias", "layer.weight")


def test_the_encoder_of_an_outside_model_is_started_from_where_it_says_what_its_encoder_is(tmp_path, module, monkeypatch):
    def started(module, run, **fields):
        training = TrainingConfig(max_steps=1, init_encoder_from=str(run))
        model = module.LinearConfig(**fields)
        return Experiment(task=module.Sums(), model=model, data=DataConfig(source="none"), optim=OptimConfig(), training=training)

    run = write_run(tmp_path / "run", module)
    with pytest.raises(UserError, match="training.init-encoder-from needs a model with an encoder .*; LinearConfig has none"):
        find_start(started(module, run), {})

    with_encoder = (
        SOURCE.replace("self.layer = nn.Linear(6, wide)", "self.encoder = nn.Linear(6, wide)\n        self.head = nn.Linear(wide, 4)")
        .replace("return [self.layer]", "return [self.encoder, self.head]")
        .replace("self.layer(x.flatten(1))", "self.head(self.encoder(x.flatten(1)))")
        .replace("class LinearConfig(ModelConfig):", 'class LinearConfig(ModelConfig):\n    encoder_fields = ("wide",)')
    )
    (tmp_path / "user" / "sums_with_encoder.py").write_text(with_encoder)
    importlib.invalidate_caches()
    monkeypatch.setitem(sys.modules, "sums_with_encoder", module)  # so that it is gone afterwards
    del sys.modules["sums_with_encoder"]
    other = importlib.import_module("sums_with_encoder")
    run = write_run(tmp_path / "encoder", other)
    shapes = {"encoder.weight": (4, 6), "encoder.bias": (4,), "head.weight": (4, 4), "head.bias": (4,)}
    start = find_start(started(other, run, comment="a decoder of another kind"), shapes)
    assert start.loaded == ("encoder.bias", "encoder.weight") and start.new == ("head.bias", "head.weight")
    with pytest.raises(UserError, match="another encoder than this experiment's .*wide"):
        find_start(started(other, run, wide=5), shapes)


def test_a_model_s_classes_reach_a_process_without_the_file(tmp_path, module):
    """As the actors of `ray_jobs.predict` get them, with the code that they need."""
    import pickle

    data = tmp_path / "classes"
    data.write_bytes(pickle.dumps(Shipped((module.Sums(scale=3.0), module.LinearConfig()))))
    program = f"""
import pickle
task, model = pickle.loads(open({str(data)!r}, "rb").read()).value
assert task.scale == 3.0 and task.rows(None, None).columns["x"].shape == (2, 3) and type(task).__module__ == {module.__name__!r}
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_a_job_on_ray_predicts_with_an_outside_task(tmp_path, module):
    run = write_run(tmp_path / "run", module)
    write_files(tmp_path / "in")
    job, output, _, model = parse([str(run), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--rows-per-part", "3"])
    summary = predict(job, output, Placement(device="cpu"), model)
    assert (summary["rows"], summary["errors"]) == (9, 2)
