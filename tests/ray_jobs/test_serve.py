"""A served model: what requests get, by HTTP and without Ray; the same on Ray, with a replica that is lost, in the slow test."""

import asyncio
import base64
import io
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import perceiver
from perceiver.config import UserError
from perceiver.inference.load import describe
from perceiver.inference.predict import PredictOptions, predict_rows
from perceiver.inference.rows import Row
from perceiver.inference.served import ServedModel, interface_of, mode_of
from ray_jobs import serve
from tests.conftest import ROOT
from tests.support.jobs import Job
from tests.support.trained import write_run

pytest.importorskip("fastapi", reason="perceiver serve needs the extra serve")
from starlette.testclient import TestClient  # noqa: E402

from ray_jobs import serve_app  # noqa: E402
from ray_jobs.serve_app import RayBackend, application, settings_of  # noqa: E402
from ray_jobs.serve_http import MOST_BYTES, MOST_ROWS, Busy, build_app, hashed  # noqa: E402

TOKEN = "a-token-of-a-test-only"
KNOWN = {"Authorization": f"Bearer {TOKEN}"}


class Here:
    """A backend in this process."""

    def __init__(self, served):
        self.served, self.alive = served, True

    async def predict(self, rows, options):
        if not self.alive:
            raise Busy("no model is free")
        return await asyncio.to_thread(self.served.answers, [(row, options) for row in rows])

    async def stream(self, text, options, identity):
        for piece in self.served.stream(text, options, identity):
            yield piece

    async def ready(self):
        return self.alive


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return {task: write_run(tmp_path_factory.mktemp("runs") / task, task) for task in ("causal", "masked", "sentiment", "images")}


def served(run, **options):
    settings = settings_of(describe(str(run)), options=options)
    return ServedModel(perceiver.load(run, device="cpu"), settings.interface, settings.options, None)


def client(run, token=None, **options):
    model = served(run, **options)
    return TestClient(build_app(Here(model), model.interface, token and hashed(token)), base_url="http://127.0.0.1:8000")


def as_predicted(run, mode, values):
    """What `perceiver predict` writes of rows with these values, alone, and with their numbers as ids."""
    model = perceiver.load(run, device="cpu")
    rows = [Row(str(number), value) for number, value in enumerate(values)]
    return [predict_rows(model, [row], PredictOptions(mode=mode)).to_pylist()[0] for row in rows]


# ------------------------------------------------------------------------------------------------------------- answers


def picture(value=7):
    file = io.BytesIO()
    Image.fromarray(np.full((6, 6), value, np.uint8)).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize(
    ("task", "mode", "column", "values"),
    [
        ("sentiment", "classify", "text", ["some text", "other"]),
        ("masked", "fill-mask", "text", ["a <mask>"]),
        ("causal", "generate", "text", ["abc", "abc"]),
        ("images", "classify", "image", [picture(), picture(200)]),
    ],
)
def test_answers_are_bitwise_those_of_predict(runs, task, mode, column, values):
    with client(runs[task]) as web:
        sent = [base64.b64encode(value).decode() if isinstance(value, bytes) else value for value in values]
        answers = [web.post("/predict", json={"rows": [{column: value, "id": number}]}) for number, value in enumerate(sent)]
    assert [answer.status_code for answer in answers] == [200] * len(values)
    assert [answer.json()["rows"][0] for answer in answers] == as_predicted(runs[task], mode, values)


def test_rows_of_several_requests_are_computed_together_and_answered_apart(runs):
    model = served(runs["causal"])
    items = [({"text": "abc", "id": "0"}, {"max_new_tokens": 5}), ({"text": "", "id": "1"}, {"top_k": 0}), ({"text": 5, "id": "x"}, {})]
    first, second, third = model.answers([*items, *items])[3:]
    assert first["error"] is None and first["text"] == model.answers(items[:1])[0]["text"] and second["id"] == "1"
    assert "top_k is 0" in second["error"] and third == {"id": "x", "error": "'text' is int, not text"}


def test_a_stream_is_what_predict_writes(runs):
    with client(runs["causal"]) as web:
        body = {"text": "abc", "id": "r", "options": {"max_new_tokens": 20, "seed": 3}}
        reply = web.post("/stream", json=body)
        assert reply.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(event.removeprefix("data: ")) for event in reply.text.split("\n\n") if event]
        whole = web.post("/predict", json={"rows": [{"text": "abc", "id": "r"}], "options": body["options"]}).json()["rows"][0]["text"]
    assert events[-1] == {"done": True} and len(events) > 2
    assert "".join(event["text"] for event in events[:-1]) == whole


def test_not_a_number_is_null_in_json(runs):
    model = served(runs["sentiment"])
    with torch.no_grad():
        model.model.model.decoder.output.bias.fill_(float("nan"))
    (answer,) = model.answers([({"text": "a", "id": "0"}, {})])
    assert answer["probabilities"] == [None, None] and "NaN" not in json.dumps(answer)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("status", "path", "body", "sentence"),
    [
        (422, "/predict", {"rows": [{"txt": "a"}]}, "rows.0.text: field required; a row has text, id"),
        (422, "/predict", {"rows": [{"text": "a", "labl": 1}]}, "rows.0.labl: extra inputs are not permitted"),
        (422, "/predict", {"rows": []}, "rows: list should have at least 1 item"),
        (422, "/predict", {"rows": [{"text": "a"}] * (MOST_ROWS + 1)}, "rows: list should have at most 1024 items"),
        (422, "/predict", {"rows": [{"text": "a"}], "options": {"temprature": 1}}, "options.temprature: extra inputs"),
        (422, "/predict", {"rows": [{"text": "a"}], "options": {"max_new_tokens": 10**9}}, "options.max_new_tokens: input should be less"),
        (422, "/predict", {"rows": [{"text": "a"}], "options": {"num_latents": 99}}, "num_latents"),
        (400, "/predict", "no json", "the body is no JSON"),
        (404, "/predit", {}, "there is no POST /predit here: there are"),
        (405, "/health", {}, "there is no POST /health here"),
        (422, "/stream", {"text": "a", "options": {"num_latents": 99}}, "num_latents"),
    ],
)
def test_a_mistake_is_one_sentence_with_its_status(runs, status, path, body, sentence):
    with client(runs["causal"]) as web:
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        reply = web.post(path, content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == status
    assert sentence in reply.json()["error"] and "\n" not in reply.json()["error"]


def test_a_bad_row_beside_good_ones_has_its_own_error(runs):
    with client(runs["images"]) as web:
        good = base64.b64encode(picture()).decode()
        rows = [{"image": good}, {"image": "%%"}, {"image": base64.b64encode(b"no picture").decode()}]
        reply = web.post("/predict", json={"rows": rows})
        alone = web.post("/predict", json={"rows": rows[1:2]})
    found = reply.json()["rows"]
    assert reply.status_code == 200 and [row["id"] for row in found] == ["0", "1", "2"]
    assert found[0]["error"] is None and "base64" in found[1]["error"] and found[2]["error"]
    assert alone.status_code == 422 and "base64" in alone.json()["error"]


def test_a_body_that_is_too_long_is_refused_before_it_is_read(runs):
    with client(runs["sentiment"]) as web:
        reply = web.post("/predict", content=b"{}", headers={"Content-Length": str(MOST_BYTES + 1)})
    assert reply.status_code == 413 and "32 MiB" in reply.json()["error"]


def test_health_says_when_no_model_is_ready(runs):
    model = served(runs["sentiment"])
    backend = Here(model)
    with TestClient(build_app(backend, model.interface, None), base_url="http://localhost:1") as web:
        assert web.get("/health").json()["status"] == "ok"
        backend.alive = False
        health, busy = web.get("/health"), web.post("/predict", json={"rows": [{"text": "a"}]})
    assert (health.status_code, busy.status_code) == (503, 503) and busy.headers["retry-after"] == "1"


# --------------------------------------------------------------------------------------------------------------- token


def test_without_the_token_nothing_is_told_but_health_and_the_page(runs):
    with client(runs["sentiment"], TOKEN) as web:
        body = {"rows": [{"text": "a"}]}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
            for reply in (web.post("/predict", json=body, headers=headers), web.get("/model", headers=headers)):
                assert reply.status_code == 401 and "Authorization: Bearer TOKEN" in reply.json()["error"]
        assert web.post("/predict", json=body, headers=KNOWN).status_code == 200
        assert web.get("/model", headers=KNOWN).json()["model"] == "sentiment"
        open_to_all = web.get("/health").text, web.get("/").text
    assert open_to_all[0] == '{"status":"ok"}' and "let model = null;" in open_to_all[1] and "sentiment" not in open_to_all[1]


def test_without_a_token_only_this_machine_by_name_is_answered(runs):
    """A page of another site, whose name was made to lead here, must not reach the model."""
    with client(runs["sentiment"]) as web:
        reply = web.get("/model", headers={"Host": "evil.example:8000"})
    assert reply.status_code == 403


def test_a_server_for_other_machines_needs_a_token(runs, tmp_path, monkeypatch):
    monkeypatch.delenv("PERCEIVER_SERVE_TOKEN", raising=False)
    run = str(runs["sentiment"])
    with pytest.raises(UserError, match="--host is 0.0.0.0, .* --token-file FILE"):
        serve.parse([run, "--host", "0.0.0.0"])
    (tmp_path / "short").write_text("abc\n")
    for file, sentence in (("short", "at least 16 ASCII characters"), ("none", "No such file")):
        with pytest.raises(UserError, match=sentence):
            serve.parse([run, "--token-file", str(tmp_path / file)])
    monkeypatch.setenv("PERCEIVER_SERVE_TOKEN", TOKEN)
    settings, _, _ = serve.parse([run, "--host", "0.0.0.0"])
    assert settings.token_hash == hashed(TOKEN) and TOKEN not in repr(settings)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--port", "0"], "--port is 0"),
        (["--replicas", "0"], "--replicas is 0"),
        (["--mode", "generate"], "--mode is generate, but sentiment can only classify, embed"),
        (["--batch-wait", "-1"], "--batch-wait is -1.0"),
    ],
)
def test_a_mistake_in_the_command_is_found_before_ray_starts(runs, words, sentence):
    with pytest.raises(UserError, match=sentence):
        serve.parse([str(runs["sentiment"]), *words])


def test_the_page_loads_nothing_from_elsewhere(runs):
    with client(runs["causal"]) as web:
        page = web.get("/").text
    assert "http" not in page.replace("http-equiv", "") and "src=" not in page and '"mode": "generate"' in page


@pytest.mark.skipif(shutil.which("node") is None, reason="the page's script is run by node")
@pytest.mark.parametrize("token", [None, TOKEN])
def test_the_page_shows_answers_and_streams(runs, token):
    with client(runs["causal"], token) as web:
        page, interface = web.get("/").text, web.get("/model", headers=KNOWN).json()
    stream = 'data: {"text": "a b"}\n\ndata: {"text": "c"}\n\ndata: {"done": true}\n\n'
    given = json.dumps([page, {"model": interface, "predict": {"rows": [{"id": "0", "text": "x"}]}, "stream": stream}])
    script = ROOT / "tests/support/files/serve_page.mjs"
    shown = json.loads(subprocess.run(["node", script], input=given, capture_output=True, text=True, check=True).stdout)
    assert shown["sent"][1:] == [
        ["predict", "Bearer secret", {"rows": [{"text": "abc"}], "options": {"seed": 1}}],
        ["stream", "Bearer secret", {"text": "abc", "options": {"seed": 1}}],
    ]
    assert shown["name"] == "causal" and '"text": "x"' in shown["predicted"] and shown["streamed"] == "a bc" and not shown["bad"]


@pytest.mark.skipif(shutil.which("node") is None, reason="the page's script is run by node")
def test_the_page_shortens_long_lists_and_offers_files_to_save(runs):
    with client(runs["causal"]) as web:
        page, interface = web.get("/").text, web.get("/model").json()
    row = {"id": "0", "flow": [0.5] * 1000, "probabilities": [0.25] * 4, "midi": "TVRoZAAAAAYAAQACAeBNVHJrAAAA"}
    given = json.dumps([page, {"model": interface, "predict": {"rows": [row]}, "stream": ""}])
    script = ROOT / "tests/support/files/serve_page.mjs"
    shown = json.loads(subprocess.run(["node", script], input=given, capture_output=True, text=True, check=True).stdout)
    found = json.loads(shown["predicted"])
    assert found["flow"] == [0.5] * 6 + ["... 1,000 in all"] and found["probabilities"] == row["probabilities"]
    assert found["midi"].startswith("TVRoZAAAAAYAAQACAeBNVHJr...") and shown["saved"] == f"data:audio/midi;base64,{row['midi']}"


def test_what_is_served_is_described(runs):
    model = describe(str(runs["images"]))
    interface = interface_of(model.name, "1", model.task, None, "text", model.abilities, mode_of(model.abilities, None, "m"))
    assert interface.to_json()["row"] == {"id": "text, may be left out", "image": "image"}
    with pytest.raises(UserError, match="runn is no argument"):
        application({"runn": "x"})


# ------------------------------------------------------------------------------------------------------- lost replicas


class Losing:
    """A handle of Ray Serve whose replicas are lost as often as is said."""

    def __init__(self, times, pieces=()):
        self.left, self.pieces = times, pieces
        self.predict = self.stream = self.ready = self

    def options(self, stream):
        return self

    def remote(self, *arguments):
        if self.pieces:
            return self._pieces()
        return self._answer()

    async def _answer(self):
        self._lose()
        return [{"id": "0", "error": None}]

    async def _pieces(self):
        for number, piece in enumerate(self.pieces):
            if number == 2:
                self._lose()
            yield "text", piece

    def _lose(self):
        from ray.exceptions import ActorDiedError

        self.left -= 1
        if self.left >= 0:
            raise ActorDiedError()


def test_what_a_lost_replica_had_is_given_to_another(monkeypatch):
    monkeypatch.setattr(serve_app, "PAUSE", 0)
    assert asyncio.run(RayBackend(Losing(3)).predict([{}], {})) == [{"id": "0", "error": None}]
    with pytest.raises(Busy):
        asyncio.run(RayBackend(Losing(1000)).predict([{}], {}))


def test_a_stream_continues_after_what_was_sent_when_its_replica_is_lost(monkeypatch):
    monkeypatch.setattr(serve_app, "PAUSE", 0)

    async def collect():
        return [piece async for piece in RayBackend(Losing(2, ("ab", "c", "de"))).stream("", {}, "0")]

    assert "".join(asyncio.run(collect())) == "abcde"


# ------------------------------------------------------------------------------------------------------------- on Ray


@pytest.mark.slow
def test_a_replica_killed_under_load_loses_nothing(tmp_path):
    run = write_run(tmp_path / "runs" / "tiny", "sentiment")
    job = Job("ray_jobs.serve", str(run), "--replicas", "2", "--port", "18431", home=tmp_path)
    try:
        end = time.monotonic() + 180
        while "serving classify" not in job.output:
            assert job.process.poll() is None and time.monotonic() < end, job.output
            time.sleep(0.2)

        def ask(number):
            body = json.dumps({"rows": [{"text": f"text {number % 7}", "id": str(number)}]}).encode()
            request = urllib.request.Request("http://127.0.0.1:18431/predict", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.loads(reply.read())["rows"][0]

        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(ask, number) for number in range(400)]
            answers[50].result()
            os.kill(job.pids("ray::ServeReplica:perceiver:model")[0], signal.SIGKILL)
            found = [answer.result() for answer in answers]
        alone = {row: as_predicted(run, "classify", [f"text {row}"])[0]["probabilities"] for row in range(7)}
        for number, answer in enumerate(found):
            assert answer["id"] == str(number)
            assert np.allclose(answer["probabilities"], alone[number % 7], atol=1e-6)
        job.process.send_signal(signal.SIGINT)
        assert job.wait(60) == 0
    finally:
        job.process.kill()
