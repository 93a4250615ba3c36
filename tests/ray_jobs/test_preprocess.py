"""`ray_jobs.preprocess` for real: on Ray, as its own process, killed and started again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from perceiver.data.manifest import MANIFEST
from perceiver.datasets import data_folder
from tests.conftest import ROOT
from tests.support.preparing import content, experiment, load_prepared, texts, write_jsonl, write_parquet

pytestmark = pytest.mark.slow

SCRIPT = """
import sys, ray
from ray_jobs.preprocess import prepare
from ray_jobs.ray_env import quiet
from tests.support.preparing import experiment
root, source, cpus = sys.argv[1:]
quiet()
settings = {"include_dashboard": False, "object_store_memory": 100 << 20, "log_to_driver": False}
ray.init(address="local", num_cpus=int(cpus), **settings)
data = {"val_fraction": 0.2, "rows_per_block": 2, "blocks_per_shard": 2}
prepare(experiment("clm-wikitext", root, source, **data), piece_bytes=500)
"""


def start(root: Path, source: Path, cpus: int) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, str(root), str(source), str(cpus)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)


def notes(root: Path, kind: str) -> int:
    return len(list(root.glob(f".staging-*/{kind}-*.json")))


def kill_after(process: subprocess.Popen, root: Path, kind: str, num: int) -> None:
    """Kills a preparation (and with it its Ray) as soon as a number of its jobs are finished."""
    while notes(root, kind) < num:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_and_continued_on_other_cpus_gives_the_same_bytes(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    rows = [{"text": text} for text in texts(160)]
    for i in range(4):
        write_jsonl(source / f"{i}.jsonl.gz", rows[i::8])
        write_jsonl(source / f"{i + 4}.jsonl", rows[i + 4 :: 8])
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert start(whole, source, 1).wait() == 0
    chosen = experiment("clm-wikitext", stopped, source, val_fraction=0.2, rows_per_block=2, blocks_per_shard=2)
    kill_after(start(stopped, source, 2), stopped, "piece", 3)
    first = notes(stopped, "piece")
    kill_after(start(stopped, source, 1), stopped, "shard", 5)
    assert notes(stopped, "piece") > first and not list(stopped.rglob(MANIFEST))
    assert start(stopped, source, 3).wait() == 0
    folder = Path(data_folder(chosen))
    assert content(folder) == content(next(path.parent for path in whole.rglob(MANIFEST)))
    assert len(content(folder)) > 20 and not list(stopped.glob(".staging-*"))


def command(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "ray_jobs.preprocess", *arguments]
    environment = {**os.environ, **variables}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_the_command_prepares_and_then_has_nothing_to_do(tmp_path):
    arguments = ("quickstart", "--data.root", str(tmp_path))
    first = command(*arguments)
    assert first.returncode == 0 and "4,000 rows, images of 28 x 28 x 1" in first.stdout
    # No cluster is asked for: there is none at this address.
    second = command(*arguments, RAY_ADDRESS="127.0.0.1:9")
    assert second.returncode == 0 and "nothing to do" in second.stdout and not second.stderr
    _, manifest = load_prepared(experiment("quickstart", tmp_path, "mnist-mini", rows_per_block=256, blocks_per_shard=64))
    assert manifest.splits["val"].rows == 800


def test_a_fault_found_by_a_task_is_one_sentence_and_status_2(tmp_path):
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts(50))]
    write_parquet(tmp_path / "train-0.parquet", rows)
    write_parquet(tmp_path / "test.parquet", [{"text": f"{row['text']} again", "label": row["label"]} for row in rows])
    write_jsonl(tmp_path / "train-1.jsonl.gz", rows)
    whole = (tmp_path / "train-1.jsonl.gz").read_bytes()
    (tmp_path / "train-1.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    arguments = ("txt-clf-imdb-all", "--data.source", str(tmp_path), "--data.root", str(tmp_path / "out"))
    result = command(*arguments)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert [line for line in result.stderr.splitlines() if "train-1.jsonl.gz is truncated" in line] == result.stderr.splitlines()
    assert not list((tmp_path / "out").rglob(MANIFEST))
    skipped = command(*arguments, "--data.on-error", "skip")
    assert skipped.returncode == 0 and "skipped: 1 x truncated file" in skipped.stdout
