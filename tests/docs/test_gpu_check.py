"""`benchmarks.gpu_check` runs as a whole where there is no GPU, and notes what fails."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import gpu_check

ON_CPU = ["--device", "cpu", "--tiny"]


def run(tmp_path, *parts):
    out = tmp_path / "found.json"
    status = gpu_check.main([*ON_CPU, "--out", str(out), "--parts", *parts])
    return status, json.loads(out.read_text())


def test_parts_of_the_check_for_gpus_run_on_a_cpu(tmp_path, capsys):
    status, found = run(tmp_path, "attention", "waiting", "generation")
    assert status == 0 and {row["part"] for row in found["rows"]} == {"attention", "waiting", "generation"}
    assert all(row["value"] >= 0 and row["holds"] is None for row in found["rows"])  # a CPU's times say nothing
    assert "batch 8, cached: tokens/s" in capsys.readouterr().out


def test_a_part_that_fails_is_noted_and_the_others_run(tmp_path, monkeypatch, capsys):
    def failing(check):
        raise ValueError("no such kernel")

    monkeypatch.setitem(gpu_check.PARTS, "parity", failing)
    status, found = run(tmp_path, "parity", "generation")
    assert status == 1 and found["rows"][0]["error"] == "ValueError: no such kernel" and len(found["rows"]) > 1
    assert "FAILED: ValueError: no such kernel" in capsys.readouterr().out


def test_the_loss_over_a_large_vocabulary_has_the_numbers_of_another_library(tmp_path):
    """Liger Kernel's fused kernel, in Triton's interpreter, which must be known before Triton is loaded."""
    pytest.importorskip("liger_kernel")
    out = tmp_path / "found.json"
    words = [sys.executable, "-m", "benchmarks.gpu_check", *ON_CPU, "--parts", "liger", "--out", str(out)]
    subprocess.run(words, env={**os.environ, "TRITON_INTERPRET": "1"}, check=True, capture_output=True)
    apart = [row["value"] for row in json.loads(out.read_text())["rows"] if "difference" in row["what"]]
    assert len(apart) == 3 and max(apart) < 1e-6


@pytest.mark.slow
def test_the_whole_check_for_gpus_runs_on_a_cpu(tmp_path):
    status, found = run(tmp_path, "parity", "clm-c4", "steps", "repeat", "transformers", "reference")
    assert status == 0
    same = [row["value"] for row in found["rows"] if "the same bits" in row["what"]]
    assert same and all(same)
