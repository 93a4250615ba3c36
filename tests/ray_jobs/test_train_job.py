"""Training and evaluation on Ray, as commands: interrupted, continued, on other numbers of workers, with mistakes."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from perceiver.checkpoints import list_checkpoints
from tests.support.jobs import QUICK, WITHOUT_DROPOUT, Job, losses, weights


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def plain(home) -> Path:
    """An undisturbed run with two workers."""
    Job("ray_jobs.train", "quickstart", *QUICK, "--name", "plain", home=home).finish()
    return home / "runs" / "plain"


@pytest.mark.slow
def test_a_run_that_lost_a_worker_and_was_stopped_and_killed_ends_bitwise_like_an_undisturbed_one(home, plain):
    command = ("ray_jobs.train", "quickstart", *QUICK, "--name", "disturbed")
    run = home / "runs" / "disturbed"
    job = Job(*command, home=home)
    job.wait_for_step(run, 45)
    job.kill_worker()
    # The first 45 steps are there already: the run is back when it has gone beyond them.
    job.wait_for_step(run, 70)
    job.process.send_signal(signal.SIGINT)
    assert job.wait(60) == 130
    assert re.search(r"worker \d: its process ended, .*the run restarts from its last checkpoint \(failure 1 of 3", job.output)
    step = re.search(r"stopped at step (\d+), checkpoint saved; the same command continues", job.output).group(1)
    job = Job(*command, home=home)
    job.wait_for_step(run, 110)
    assert f"continuing from step {step}:" in job.output
    job.kill_driver()
    output = Job(*command, home=home).finish()
    assert "continuing from step" in output
    disturbed, undisturbed = (weights(list_checkpoints(r / "checkpoints")[-1].path) for r in (run, plain))
    assert disturbed.keys() == undisturbed.keys() and len(disturbed) > 100
    assert all(torch.equal(disturbed[name], undisturbed[name]) for name in disturbed)
    assert losses(run) == losses(plain)
    assert [step for step, _ in losses(run)] == list(range(1, 151))


@pytest.mark.slow
def test_a_finished_run_says_so_and_another_experiment_under_its_name_is_refused(home, plain):
    output = Job("ray_jobs.train", "quickstart", *QUICK, "--name", "plain", home=home).finish(60)
    assert "run plain is finished" in output and "ray_jobs.evaluate" in output
    job = Job("ray_jobs.train", "quickstart", *QUICK, "--name", "plain", "--optim.lr", "0.002", home=home)
    assert job.wait(60) == 2 and "optim.lr: 0.003 -> 0.002" in job.output
    assert "Traceback" not in job.output


@pytest.mark.slow
def test_more_workers_than_cpus_are_refused(home):
    job = Job("ray_jobs.train", "quickstart", "--name", "many", "--workers", "1000", home=home)
    assert job.wait(120) == 2
    assert re.search(r"parallel.workers is 1000 but .* has \d+ CPUs", job.output) and "Traceback" not in job.output


@pytest.mark.long
def test_one_and_two_workers_agree_and_a_run_continues_on_another_number(home):
    """Without dropout, whose random numbers are a worker's own. Sums round differently: 1e-3 on losses after 150 steps.

    Training multiplies rounding errors, at the preset's learning rate to 1e-2 by step 150; hence the lower one here.
    """
    command = ("ray_jobs.train", "quickstart", *QUICK, *WITHOUT_DROPOUT, "--optim.lr", "3e-4")
    Job(*command, "--name", "one", "--workers", "1", home=home).finish()
    run = home / "runs" / "changed"
    job = Job(*command, "--name", "changed", "--workers", "2", home=home)
    job.wait_for_step(run, 50)
    job.kill_driver()
    Job(*command, "--name", "changed", "--workers", "1", home=home).finish()
    one, changed = (np.array([loss for _, loss in losses(home / "runs" / name)]) for name in ("one", "changed"))
    assert len(one) == len(changed) == 150
    np.testing.assert_allclose(changed[:50], one[:50], rtol=1e-4)
    np.testing.assert_allclose(changed, one, rtol=1e-3)


@pytest.mark.long
def test_evaluation_is_exact_whatever_the_number_of_workers(home, plain):
    results = []
    for workers in ("1", "2"):
        args = ("--checkpoint", "last", "--workers", workers, "--training.global-batch-size", "96")
        output = Job("ray_jobs.evaluate", str(plain), *args, home=home).finish()
        (path,) = re.findall(r"written to (\S+)", output)
        results.append(json.loads(Path(path).read_text()))
        assert "val_acc" in output and "800 targets" in output
    one, two = results
    assert one["sums"]["targets"] == two["sums"]["targets"] == 800
    assert one["sums"]["confusion"] == two["sums"]["confusion"]
    assert one["metrics"]["val_acc"] == two["metrics"]["val_acc"]
    assert one["metrics"]["val_loss"] == pytest.approx(two["metrics"]["val_loss"], rel=1e-6)


@pytest.mark.long
def test_two_drivers_cannot_train_one_run(home):
    run = home / "runs" / "held"
    first = Job("ray_jobs.train", "quickstart", *QUICK, "--name", "held", home=home)
    first.wait_for_step(run, 1)
    second = Job("ray_jobs.train", "quickstart", *QUICK, "--name", "held", home=home)
    assert second.wait(60) == 2 and "another process" in second.output
    first.kill_driver()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_with_a_sentence_and_no_restarts(home):
    job = Job("ray_jobs.train", "quickstart", *QUICK, "--name", "hot", "--optim.lr", "1e30", "--optim.warmup-steps", "0", home=home)
    assert job.wait(200) == 2
    assert "the loss became" in job.output and "optim.lr" in job.output and "Traceback" not in job.output
    assert job.output.count("starting:") == 1
    shutil.rmtree(home / "runs" / "hot")


@pytest.mark.long
def test_a_small_data_set_and_a_partial_batch_train(home, tmp_path):
    """Fewer images than one global batch, with two workers."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "train.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    (texts / "valid.txt").write_text("A lazy dog sleeps in the sun all day long. " * 20)
    small = [
        "--data.source", str(texts), "--model.max-seq-len", "128", "--model.max-latents", "64", "--model.num-channels", "32",
        "--model.num-heads", "2", "--model.num-self-attention-layers", "1", "--training.global-batch-size", "64",
        "--training.max-steps", "6", "--task.sample-tokens", "20", "--run.val-every", "3", "--name", "text",
    ]  # fmt: skip
    Job("ray_jobs.preprocess", "clm-wikitext-small", *small, home=home).finish()
    output = Job("ray_jobs.train", "clm-wikitext-small", *small, "--workers", "2", home=home).finish()
    assert "val_bits_per_byte" in output
    samples = sorted((home / "runs" / "text" / "samples").glob("continuation-*.txt"))
    assert [s.name for s in samples] == ["continuation-00000003.txt", "continuation-00000006.txt"]
    assert os.listdir(home / "runs" / "text" / "tensorboard")
