"""Served models of sounds, MIDI, optical flow and tables: answers are those of predict, a mistake is one sentence and a status 4xx."""

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from perceiver.data.made_flow import moving_pair
from perceiver.data.make_flow import as_png
from perceiver.data.midi import encode, read_midi, write_midi
from perceiver.inference.predict import PredictOptions, predict_rows
from perceiver.inference.rows import Row
from perceiver.inference.served import ServedModel, interface_of, mode_of
from perceiver.inference.trained import TrainedModel
from perceiver.models import build_model
from perceiver.presets import PRESETS
from ray_jobs.cli import parse_experiment
from tests.data.test_sounds import esc50, sound
from tests.inference.test_tables import trained as table_model
from tests.tasks.test_optical_flow import experiment as flow_experiment
from tests.tasks.test_symbolic_audio import performance

pytest.importorskip("fastapi", reason="perceiver serve needs the extra serve")
from starlette.testclient import TestClient  # noqa: E402

from ray_jobs.serve_http import build_app, hashed  # noqa: E402
from tests.ray_jobs.test_serve import KNOWN, TOKEN, Here  # noqa: E402


def audio(folder: Path) -> TrainedModel:
    words = ["audio-clf-small", "--data.source", str(esc50(folder / "esc")), "--data.label-column", "category"]
    chosen = parse_experiment(words, "x")
    return TrainedModel(model=build_model(chosen.model, 0).eval(), config=chosen.model, task=chosen.task)


def midi(folder: Path) -> TrainedModel:
    base = PRESETS["sam-small"]()
    model = replace(base.model, num_channels=16, num_heads=2, num_self_attention_layers=1, max_seq_len=64, max_latents=8)
    return TrainedModel(model=build_model(model, 0).eval(), config=model, task=base.task, data=base.data)


def flow(folder: Path) -> TrainedModel:
    chosen = flow_experiment()
    return TrainedModel(model=build_model(chosen.model, 0).eval(), config=chosen.model, task=chosen.task)


def table(folder: Path) -> TrainedModel:
    return table_model(folder, "--task.targets", "kind")


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def frames() -> tuple[bytes, bytes]:
    made = moving_pair(np.random.default_rng(0), 32, 48)
    return as_png(made["first"]), as_png(made["second"])


def wav(folder: Path) -> bytes:
    sound(folder / "one.wav")
    return (folder / "one.wav").read_bytes()


def web(model: TrainedModel, token: str | None = None) -> TestClient:
    mode = mode_of(model.abilities, None, "own")
    arrays = model.predictor.rows if mode == "predict" else None
    interface = interface_of("own", "last", model.task, arrays, "", model.abilities, mode)
    served = ServedModel(model, interface, PredictOptions(mode=mode, max_new_tokens=6), arrays)
    return TestClient(build_app(Here(served), interface, token and hashed(token)), base_url="http://127.0.0.1:8000")


def test_a_sound_is_classified_and_what_is_none_is_refused(tmp_path: Path) -> None:
    model, data = audio(tmp_path), wav(tmp_path)
    with web(model) as client:
        answer = client.post("/predict", json={"rows": [{"audio": text(data)}]})
        wrong = [
            client.post("/predict", json={"rows": [row]}) for row in ({"audio": "%"}, {"audio": text(b"x")}, {"sound": "x"}, {"audio": 5})
        ]
    said = predict_rows(model, [Row("0", data)], PredictOptions(mode="classify")).to_pylist()[0]
    assert answer.status_code == 200 and answer.json()["rows"] == [said]
    sentences = [
        "'audio' is not the base64 text of a sound file",
        "no sound file that can be read",
        "rows.0.audio: field required",
        "valid string",
    ]
    for reply, sentence in zip(wrong, sentences, strict=True):
        assert reply.status_code == 422 and sentence in reply.json()["error"]


def test_music_is_continued_the_same_for_the_same_seed_and_begun_from_nothing(tmp_path: Path) -> None:
    prompt = write_midi(encode(performance(0)))
    with web(midi(tmp_path)) as client:
        body = {"rows": [{"midi": text(prompt), "id": "a"}], "options": {"seed": 3, "max_new_tokens": 8}}
        one, same = (client.post("/predict", json=body).json()["rows"][0] for _ in range(2))
        nothing = client.post("/predict", json={"rows": [{"midi": ""}]})
        wrong = client.post("/predict", json={"rows": [{"midi": text(b"MThd")}]})
        option = client.post("/predict", json={"rows": [{"midi": ""}], "options": {"stop": ["a"]}})
        stream = client.post("/stream", json={"midi": ""})
    assert one == same and one["error"] is None
    assert read_midi(base64.b64decode(one["midi"]))[:20].tolist() == read_midi(prompt)[:20].tolist()
    assert nothing.status_code == 200 and nothing.json()["rows"][0]["error"] is None
    assert wrong.status_code == 422 and "the prompt" in wrong.json()["error"]
    assert option.status_code == 422 and "options.stop: extra inputs" in option.json()["error"] and stream.status_code == 404


def test_the_flow_of_two_frames_is_that_of_predict(tmp_path: Path) -> None:
    model, (first, second) = flow(tmp_path), frames()
    with web(model) as client:
        answer = client.post("/predict", json={"rows": [{"first": text(first), "second": text(second)}]}).json()["rows"][0]
        small = as_png(np.zeros((8, 8, 3), np.uint8))
        rows = [{"first": text(first)}, {"first": text(first), "second": "no"}, {"first": text(first), "second": text(small)}]
        wrong = [client.post("/predict", json={"rows": [row]}) for row in rows]
    said = model.flow((first, second))
    assert (answer["height"], answer["width"]) == (32, 48)
    np.testing.assert_allclose(np.array(answer["flow"], np.float32).reshape(32, 48, 2), said, atol=1e-5)
    for reply, sentence in zip(wrong, ["rows.0.second: field required", "'second' is not the base64", "one size"], strict=True):
        assert reply.status_code == 422 and sentence in reply.json()["error"] and "\n" not in reply.json()["error"]


def test_rows_of_a_table_are_answered_and_their_mistakes_named(tmp_path: Path) -> None:
    with web(table(tmp_path), TOKEN) as client:
        answer = client.post("/predict", json={"rows": [{"a": 1, "b": None}, {"a": "cheap", "b": 1}]}, headers=KNOWN)
        wrong = [
            client.post("/predict", json={"rows": [row]}, headers=KNOWN)
            for row in ({"a": "x", "b": 1}, {}, {"c": 1}, {"a": [1, 2], "b": 1})
        ]
        known, unknown = client.get("/model", headers=KNOWN).json(), client.get("/model")
    good, bad = answer.json()["rows"]
    assert answer.status_code == 200 and good["label"] in ("cat", "dog", "owl") and "a cannot be read as float32" in bad["error"]
    for reply, sentence in zip(
        wrong, ["a cannot be read as float32", "none of the columns a, b", "rows.0.c: extra", "a has shape (2,)"], strict=True
    ):
        assert reply.status_code == 422 and sentence in reply.json()["error"] and "\n" not in reply.json()["error"]
    assert known["example"] == {"a": 0.0, "b": 0.0} and unknown.status_code == 401


@pytest.mark.parametrize("made", [audio, midi, flow, table])
def test_the_page_offers_what_a_row_is(made, tmp_path: Path) -> None:
    model = made(tmp_path)
    with web(model) as client:
        page = io.StringIO(client.get("/").text).getvalue()
    assert "let model = {" in page and all(f"{kind}: [" in page for kind in ("audio", "midi", "frames"))
