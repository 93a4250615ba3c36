"""Object stores that fail for a moment are asked again; errors that would come again are not waited for."""

import random

import pytest

from perceiver.data import storage
from tests.faults import troubles


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store that does what the file `troubles/store` says."""
    monkeypatch.setattr(storage, "PAUSES", (0.0,) * 9)
    monkeypatch.setattr(troubles.Flaky, "SECONDS", 0.0)
    (tmp_path / "troubles").mkdir()
    random.seed(0)
    return f"flaky://{tmp_path}/store"


def test_requests_that_fail_now_and_then_succeed_and_what_is_written_is_whole(store, tmp_path):
    (tmp_path / "troubles" / "store").touch()
    (tmp_path / "local").mkdir()
    for number in range(12):
        storage.write_file(f"{store}/run", f"{number}", bytes([number]) * 5000)
        storage.copy_file(f"{store}/run", f"{number}", tmp_path / "local")
        assert (tmp_path / "local" / f"{number}").read_bytes() == bytes([number]) * 5000
    assert len(storage.list_folder(f"{store}/run")) == len(storage.list_tree(store)) == 12


def test_a_store_that_never_answers_is_an_error_of_its_own_words(store, tmp_path, monkeypatch):
    monkeypatch.setattr(troubles.Flaky, "SHARE", 1.0)
    (tmp_path / "troubles" / "store").touch()
    with pytest.raises(OSError, match="does not answer"):
        storage.write_file(f"{store}/run", "a", b"")


def test_a_file_that_is_not_there_is_not_waited_for(store, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (1000.0,))
    with pytest.raises(FileNotFoundError):
        storage.read_file(f"{store}/run", "a")


def test_local_folders_are_not_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (1000.0,))
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        storage.read_file(tmp_path / "file", "a")
