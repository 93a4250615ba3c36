"""The large run in small, on real C4 text with the real SentencePiece model: prepared, trained by FSDP workers, killed,
continued by another number of workers, evaluated."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from tests.support.jobs import Job, losses

SMALL = [
    "--model.num-channels", "64", "--model.num-self-attention-layers", "2", "--training.global-batch-size", "8",
    "--training.max-steps", "60", "--optim.warmup-steps", "10", "--optim.lr", "0.005",
    "--run.log-every", "1", "--run.checkpoint-every", "10", "--run.val-every", "60", "--run.val-batches", "4",
]  # fmt: skip


@pytest.mark.long
def test_a_killed_run_on_c4_goes_on_with_another_number_of_workers_as_if_nothing_had_happened(shared, tmp_path):
    data, home = shared / "data", tmp_path / "home"
    model = tmp_path / "spiece.model"
    model.write_bytes((data / "sentencepiece" / "spiece.model").read_bytes())
    files = [
        "--data.source", str(data / "c4-sample" / "c4-en-first1000.json.gz"),
        "--data.val-source", str(data / "c4-sample" / "c4-en-random1000.json.gz"),
    ]  # fmt: skip
    prepared = Job("ray_jobs.preprocess", "clm-c4-small", *files, "--data.tokenizer", str(model), home=home).finish()
    assert re.search(r"train: .* 1,000 documents", prepared)
    model.unlink()  # from here on the prepared data set is enough

    command = ("ray_jobs.train", "clm-c4-small", *files, *SMALL)
    run = home / "runs" / "killed"
    job = Job(*command, "--name", "killed", "--workers", "2", home=home)
    job.wait_for_step(run, 25)
    job.kill_driver()
    output = Job(*command, "--name", "killed", "--workers", "1", home=home).finish()
    assert re.search(r"continuing from step [1-5]0", output)
    Job(*command, "--name", "whole", "--workers", "1", home=home).finish()

    killed, whole = (np.array([loss for _, loss in losses(home / "runs" / name)]) for name in ("killed", "whole"))
    assert len(killed) == len(whole) == 60
    # Two workers' sums round differently, and training multiplies that; another batch, or another window, would differ by tenths.
    np.testing.assert_allclose(killed, whole, rtol=1e-3)
    assert whole[-5:].mean() < whole[:5].mean() - 2.0

    table = Job("ray_jobs.evaluate", str(run), "--parallel.workers", "1", home=home).finish()
    print(prepared, output, table, sep="\n")
    values = {name: float(value) for name, value in re.findall(r"val_(\w+)\s+([\d.]+)", table)}
    assert values["loss"] < math.log(32_000) - 1
    assert values["perplexity"] == pytest.approx(math.exp(values["loss"]), rel=1e-3)
    tokens, size = (int(re.search(rf"val: .*?([\d,]+) {what}", prepared)[1].replace(",", "")) for what in ("tokens", "bytes"))
    assert values["bits_per_byte"] == pytest.approx(values["loss"] / math.log(2) * tokens / size, rel=1e-3)
    assert (run / "tokenizer.model").is_file() and not Path(model).exists()
