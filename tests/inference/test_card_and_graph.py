"""What goes with exported weights: a card that the hub reads, a graph that computes the same; and the way to the hub."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import perceiver
from perceiver.config import DataConfig, ModelConfig, UserError
from perceiver.inference import graph
from perceiver.inference.card import card, source_of
from perceiver.inference.trained import TrainedModel
from perceiver.models import build_model
from ray_jobs import push
from tests.support.trained import write_run

TASKS = {"causal": "text-generation", "masked": "fill-mask", "sentiment": "text-classification", "images": "image-classification"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return {task: write_run(tmp_path_factory.mktemp("runs") / task, task) for task in TASKS}


def parts_of(text):
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


@pytest.mark.parametrize("task", TASKS)
def test_a_card_has_the_fields_that_the_hub_reads(runs, task):
    head, body = parts_of(card(perceiver.load(runs[task], device="cpu"), "apache-2.0"))
    assert (head["library_name"], head["license"], head["pipeline_tag"]) == ("perceiver-ray", "apache-2.0", TASKS[task])
    (result,) = head["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "loss", "value": 1.0, "name": "val_loss"}]
    assert f"# {task}" in body and "| val_loss | 1 |" in body and "- run " in body and "step 1" in body


CALLS = {
    "optical-flow-small": ({}, 'model.flow(("first.png", "second.png"))'),
    "multimodal-small": ({}, "model.predict(rows)"),
    "audio-clf-small": ({"model.output.num-classes": 3, "model.input.num-samples": 4000}, 'model.classify("sound.wav")'),
    "sam-small": ({}, 'model.play("prompt.mid")'),
}


@pytest.mark.parametrize("preset", CALLS)
def test_a_card_says_how_a_model_of_any_kind_is_called(preset):
    fields, line = CALLS[preset]
    made = perceiver.experiment(preset, fields)
    model = TrainedModel(model=build_model(made.model, seed=0), config=made.model, task=made.task, data=made.data)
    assert line in card(model)


def test_a_card_tells_no_place_of_this_machine_and_survives_the_export(runs, tmp_path):
    (tmp_path / "pictures").mkdir()
    assert source_of(DataConfig(source=str(tmp_path / "pictures"))) == "files:pictures"
    assert source_of(DataConfig(mixture=(f"{tmp_path}/pictures=0.3", "c4=0.7"))) == "files:pictures (0.3), c4 (0.7)"
    text = card(perceiver.load(runs["images"], device="cpu"))
    assert "license" not in parts_of(text)[0] and "None is stated." in text and str(runs["images"].parent) not in text
    folder = perceiver.load(runs["images"], device="cpu").export(tmp_path / "out")
    again = perceiver.load(folder, device="cpu").export(tmp_path / "again")
    assert parts_of((again / "README.md").read_text())[0]["model-index"] == parts_of((folder / "README.md").read_text())[0]["model-index"]


def test_a_card_tells_what_the_weights_began_from(runs, tmp_path):
    run = write_run(tmp_path / "second", "sentiment")
    parent = {"name": "first", "folder": "/somewhere/first", "step": 7, "digest": "0", "whole": False}
    (run / "start.json").write_text(json.dumps({"origin": "/somewhere/first", "parent": parent}))
    text = card(perceiver.load(run, device="cpu"))
    assert "began from run first, step 7" in text and "/somewhere" not in text


@pytest.mark.parametrize("license", ["Apache 2.0", "", "MIT", "../x"])
def test_a_license_is_a_name_of_the_hub(runs, license):
    with pytest.raises(UserError, match="--license is .* such as apache-2.0"):
        card(perceiver.load(runs["images"], device="cpu"), license)


# ---------------------------------------------------------------------------------------------------------------- onnx


@pytest.mark.parametrize("task", ["causal", "sentiment", *(pytest.param(task, marks=pytest.mark.slow) for task in ("masked", "images"))])
def test_the_graph_computes_what_the_model_does_for_any_number_and_length(runs, task, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="graphs need the extra onnx")
    pytest.importorskip("onnxscript")
    loaded = perceiver.load(runs[task], device="cpu")
    folder = loaded.export(tmp_path / "out", format="onnx")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    if task == "images":
        images = rng.standard_normal((5, 6, 6, 1)).astype(np.float32)
        given, wanted = {"input": images}, loaded.model(torch.from_numpy(images))
    else:
        length = loaded.config.max_seq_len if task == "causal" else 20
        ids, padding = rng.integers(0, 262, (5, length)), np.zeros((5, length), bool)
        padding[1, :3] = task == "causal"
        padding[1, -3:] = task != "causal"
        given, mask = {"input": ids, "padding": padding}, torch.from_numpy(padding)
        if task == "causal":
            wanted = loaded.model(torch.from_numpy(ids), loaded.config.max_seq_len - loaded.config.max_latents, mask)[:, -1]
        else:
            wanted = loaded.model(torch.from_numpy(ids), mask)
    (found,) = session.run(["output"], given)
    np.testing.assert_allclose(found, wanted.numpy(), atol=graph.TOLERANCE * max(1, wanted.abs().max().item()))
    assert perceiver.load(folder, device="cpu").name == task  # it is an export like any other
    assert loaded.export(folder).is_dir() and not (folder / "model.onnx").exists()


class Plain(ModelConfig):
    """A model of a user's, no Perceiver."""

    def build(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))

    def batch_shape(self):
        return "B", 3, 4


def test_a_model_of_ones_own_is_a_graph_by_its_batch_shape(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    config = Plain()
    model, given = config.build(), torch.randn(5, 3, 4)
    graph.write_graph(SimpleNamespace(name="plain", model=model, config=config), tmp_path)
    session = onnxruntime.InferenceSession(str(tmp_path / graph.GRAPH), providers=["CPUExecutionProvider"])
    (found,) = session.run([graph.OUTPUT], {graph.INPUT: given.numpy()})
    assert np.allclose(found, model(given).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("found", [torch.tensor([[1.0, -2.0]]) * 1.001, torch.tensor([[1.0]]), torch.tensor([[1.0, float("nan")]])])
def test_a_graph_that_computes_something_else_is_refused(found):
    given = (torch.tensor([[1.0, -2.0]]),)
    graph.check_agreement("it", torch.nn.Identity(), lambda arrays: arrays["input"] * (1 + 1e-6), ["input"], given)
    with pytest.raises(UserError, match="the graph of it gives other outputs than the model"):
        graph.check_agreement("it", torch.nn.Identity(), lambda arrays: found.numpy(), ["input"], given)


def test_what_cannot_be_a_graph_is_one_sentence(runs, tmp_path, monkeypatch):
    loaded = perceiver.load(runs["images"], device="cpu", precision="bf16")
    pytest.importorskip("onnxruntime", reason="graphs need the extra onnx")
    with pytest.raises(UserError, match="fp32 on a CPU"):
        loaded.export(tmp_path / "out", format="onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install 'perceiver-ray.onnx.'"):
        loaded.export(tmp_path / "out", format="onnx")


# ----------------------------------------------------------------------------------------------------------------- hub


class Hub:
    """A stand-in for `huggingface_hub.HfApi`, which keeps what it is given."""

    made: list = []
    cards: list = []

    def create_repo(self, name, private, exist_ok):
        self.made.append((name, private))

    def upload_folder(self, repo_id, folder_path):
        import pathlib

        self.made.append((repo_id, sorted(path.name for path in pathlib.Path(folder_path).iterdir())))
        self.cards.append((pathlib.Path(folder_path) / "README.md").read_text())
        return f"https://hub.example/{repo_id}"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    Hub.made = []
    return Hub.made


def test_push_shows_what_it_uploads_and_is_private_by_default(runs, hub, capsys):
    assert push.main([str(runs["images"]), "me/digits", "--yes", "--license", "mit"]) == 0
    files = ["README.md", "config.json", "export.json", "model.safetensors"]
    assert hub == [("me/digits", True), ("me/digits", files)]
    said = capsys.readouterr().out
    assert all(name in said for name in files) and "license: mit" in said and "me/digits, private" in said
    assert 'perceiver.load("me/digits")' in Hub.cards[-1] and "OWNER/NAME" not in Hub.cards[-1]
    assert said.index("model.safetensors") < said.index("uploaded to https://hub.example/me/digits")


def test_push_uploads_nothing_that_was_not_agreed_to(runs, hub, monkeypatch, capsys, tmp_path):
    folder = str(perceiver.load(runs["images"], device="cpu").export(tmp_path / "out"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(UserError, match="say --yes"):
        push.main([folder, "me/digits"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert push.main([folder, "me/digits"]) == 0 and not hub
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert push.main([folder, "me/digits", "--public"]) == 0 and hub[0] == ("me/digits", False)
    for words, sentence in ((["digits"], "must be OWNER/NAME"), (["me/digits", "--license", "mit"], "is an export already")):
        with pytest.raises(UserError, match=sentence):
            push.main([folder, *words, "--yes"])
