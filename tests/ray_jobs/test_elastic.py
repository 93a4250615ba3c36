"""An elastic run on a cluster of several nodes that grows and shrinks under it."""

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from perceiver.checkpoints import list_checkpoints
from ray_jobs.cli import parse_experiment
from tests.support.jobs import QUICK, WITHOUT_DROPOUT, Job, losses
from tests.support.preparing import load_prepared
from tests.training import test_training

NODE = {"num_cpus": 2, "object_store_memory": 100_000_000}
# A worker fills a node but for the half CPU of its data tasks.
ELASTIC = ["--parallel.cpus-per-worker", "1.5", "--parallel.resize-seconds", "2", "--parallel.threads-per-worker", "1"]
# Enough for half a minute: Ray may take that long to use a new node.
STEPS = 1000
EXACT = [*QUICK, *WITHOUT_DROPOUT, "--optim.lr", "0.0002", "--training.max-steps", str(STEPS), "--run.val-every", str(STEPS)]
QUICKLY = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}


@pytest.mark.long
def test_a_run_grows_and_shrinks_with_its_cluster_and_takes_every_step_once(tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PERCEIVER_HOME", str(tmp_path))
    command = ["quickstart", *EXACT, *ELASTIC, "--name", "elastic", "--workers", "1..2"]
    run = tmp_path / "runs" / "elastic"
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        job = Job("ray_jobs.train", *command, home=tmp_path, RAY_ADDRESS=cluster.address, **QUICKLY)
        job.wait_for_step(run, 30)
        plain = threading.Thread(target=undisturbed, args=(command, tmp_path / "plain"))
        plain.start()
        node = cluster.add_node(**NODE)
        start = wait_for_workers(job, 2)
        job.wait_for_step(run, start + 25)
        drain(cluster.address, node.node_id)
        saved = wait_for_notice(job, run)
        cluster.remove_node(node, allow_graceful=False)
        output = job.finish(400)
    finally:
        cluster.shutdown()
    print(output)
    begun = re.findall(r"(?:starting|continuing from step (\d+)).* on (\d) workers?", output)
    assert [int(workers) for _, workers in begun] == [1, 2, 1]
    assert int(begun[2][0]) >= saved  # no more is lost than the steps since the notice
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
    plain.join()
    compare(run, tmp_path / "plain")


def undisturbed(command: list[str], run: Path) -> None:
    """Trains the same in one process, without Ray."""
    experiment = parse_experiment(command, "train")
    test_training.run(experiment, Path(load_prepared(experiment)[0]), run)


def compare(run: Path, plain: Path) -> None:
    """The losses of all steps. Other numbers of workers round sums differently; another batch would differ by tenths."""
    one, other = ([loss for _, loss in losses(folder)] for folder in (run, plain))
    print("largest relative difference of losses:", np.max(np.abs(np.array(one) / np.array(other) - 1)))
    np.testing.assert_allclose(one, other, rtol=1e-3)


def wait_for_workers(job: Job, workers: int, timeout: float = 180) -> int:
    """Waits until the job continues with a number of workers; the step it continues from."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if found := re.search(rf"continuing from step (\d+).* on {workers} workers?", job.output):
            return int(found[1])
        assert job.process.poll() is None, job.output
        time.sleep(0.1)
    raise AssertionError(f"not on {workers} workers after {timeout} s:\n{job.output}")


def drain(address: str, node_id: str) -> None:
    """A provider's notice for a node, as cluster/node/notice.sh hands it on."""
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", address, "--node-id", node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test", "--deadline-remaining-seconds", "60"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def wait_for_notice(job: Job, run: Path, timeout: float = 60) -> int:
    """Until the run has made a checkpoint for a notice, between its usual ones; its step."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if "1 of the run's machines will go: checkpoint" in job.output:
            steps = [int(name.name.removeprefix("step-")) for name in (run / "checkpoints").glob("step-*")]
            if extra := [step for step in steps if step % 20]:
                return wait_for_checkpoint(job, run, extra[0])
        assert job.process.poll() is None, job.output
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint for a notice after {timeout} s:\n{job.output}")


def wait_for_checkpoint(job: Job, run: Path, step: int) -> int:
    while step not in [checkpoint.step for checkpoint in list_checkpoints(run / "checkpoints")]:
        assert job.process.poll() is None, job.output
        time.sleep(0.02)
    return step
