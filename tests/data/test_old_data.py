"""Data sets that version 0.1.0 prepared: tests/support/files/data-0.1.0.tar.gz holds one of each kind, and what that version read."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from perceiver.config import from_dict
from perceiver.data.manifest import Manifest
from perceiver.data.shards import broken_files
from perceiver.datasets import Dataset
from tests.support.record_bits import batches_of

OLD = Path(__file__).parents[1] / "support/files/data-0.1.0.tar.gz"


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(OLD) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("kind", ["tokens", "documents", "images"])
def test_data_of_version_0_1_0_are_found_and_read_in_the_same_order(kind, old, tmp_path):
    expected = json.loads((old / "expected.json").read_text())[kind]
    chosen = from_dict(expected["experiment"])
    chosen = replace(chosen, data=replace(chosen.data, root=str(tmp_path)))
    (old / kind).rename(tmp_path / expected["folder"])
    dataset = Dataset.find(chosen)
    manifest = Manifest.load(dataset.folder)
    assert manifest.digest == expected["digest"]
    assert broken_files(dataset.folder, manifest) == []
    assert batches_of(chosen, dataset.folder, manifest) == {name: expected[name] for name in ("steps", "rows", "batches")}
