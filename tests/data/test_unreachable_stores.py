"""An object store that cannot be reached is one sentence, soon: its own library would try for minutes."""

from __future__ import annotations

import socket
import time

import pytest

from perceiver.config import UserError
from perceiver.data import storage
from perceiver.data.files import list_files
from perceiver.inference.parts import list_inputs
from perceiver.training.remote_copy import find_run

DOORS = {
    "a source": lambda uri: list_files(uri, "--data.source", ()),
    "rows to predict": lambda uri: list_inputs([uri]),
    "a run": find_run,
    "a folder": storage.list_folder,
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(storage, "STORE_PATIENCE", 0.0)
    for name in (
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(storage, "_UNREACHED", {})
    storage.open_folder.cache_clear()


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


@pytest.mark.parametrize("scheme", ["s3", "gs"])
@pytest.mark.parametrize("door", DOORS)
def test_every_door_says_which_host_does_not_answer(door, scheme, closed_port):
    uri, start = f"{scheme}://bucket/x?endpoint_override=127.0.0.1:{closed_port}&scheme=http", time.monotonic()
    with pytest.raises(UserError, match=rf"cannot be reached: 127\.0\.0\.1, port {closed_port}: Connection refused"):
        DOORS[door](uri)
    assert time.monotonic() - start < 5


def test_a_store_is_asked_again_for_a_while(closed_port, monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: server.bind(("127.0.0.1", closed_port)) or server.listen())
    with socket.socket() as server:
        storage.check_store(f"s3://bucket/x?endpoint_override=127.0.0.1:{closed_port}&scheme=http", 5.0)


def test_a_host_that_was_not_reached_is_waited_for_once(closed_port, monkeypatch):
    uri, seconds = f"gs://bucket/x?endpoint_override=127.0.0.1:{closed_port}", []
    for _ in range(2):
        start = time.monotonic()
        with pytest.raises(UserError, match="cannot be reached"):
            storage.check_store(uri, 1.0)
        seconds.append(time.monotonic() - start)
    assert seconds[0] >= 0.5 > seconds[1]


@pytest.mark.parametrize(
    ("uri", "environment", "place"),
    [
        ("s3://b/x", {}, ("s3.us-east-1.amazonaws.com", 443)),
        ("s3://b/x?region=eu-west-1", {}, ("s3.eu-west-1.amazonaws.com", 443)),
        ("s3://b/x", {"AWS_DEFAULT_REGION": "eu-central-1"}, ("s3.eu-central-1.amazonaws.com", 443)),
        ("s3://b/x?scheme=http&endpoint_override=minio%3A9000", {}, ("minio", 9000)),
        ("s3://b/x", {"AWS_ENDPOINT_URL": "http://minio"}, ("minio", 80)),
        ("gs://b/x", {}, ("storage.googleapis.com", 443)),
        ("gs://b/x", {"https_proxy": "http://proxy:3128"}, None),
        ("hdfs://namenode/x", {}, None),
        ("memory://x", {}, None),
    ],
)
def test_the_host_is_the_one_that_the_library_would_ask(uri, environment, place, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert storage._store_of(uri) == place


def test_a_scheme_that_nobody_knows_is_one_sentence():
    with pytest.raises(UserError, match="nowhere://x/y cannot be opened: Protocol not known: nowhere"):
        storage.open_folder("nowhere://x/y")
