"""A shard that is damaged where nothing looked before it was read: the run ends with its name, on all workers."""

from dataclasses import replace
from pathlib import Path

import pytest

from perceiver import presets
from perceiver.datasets import data_folder
from ray_jobs import preprocess
from tests.conftest import ROOT
from tests.support import preparing
from tests.support.jobs import QUICK, Job

pytestmark = pytest.mark.slow

SCRIPT = """
from perceiver.data import shards
from ray_jobs.cli import main_entry
from ray_jobs.train import main

shards.CHECKED_BYTES = 0  # as of data that is too large to be read before each run
main_entry(main)
"""


def test_a_damaged_shard_ends_a_run_with_its_name_and_the_command_that_prepares_it_again(tmp_path, monkeypatch):
    preparing.serially(monkeypatch)
    chosen = presets.quickstart()
    chosen = replace(chosen, data=replace(chosen.data, root=str(tmp_path / "data")))
    preprocess.prepare(chosen)
    shard = Path(data_folder(chosen)) / "train-00000.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    (tmp_path / "train.py").write_text(SCRIPT)
    arguments = ("quickstart", *QUICK, "--parallel.workers", "2", "--name", "damaged")
    job = Job(str(tmp_path / "train.py"), *arguments, home=tmp_path, PYTHONPATH=str(ROOT))
    assert job.wait() == 2, job.output
    line = job.output.strip().splitlines()[-1]
    assert line.startswith(
        f"error: {shard} is damaged (row group 0 does not have its checksum): remove it and run `perceiver preprocess quickstart`"
    )
    assert "Traceback" not in job.output
