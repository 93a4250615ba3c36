"""A job submitted to a running Ray cluster with token authentication, as the README says."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from perceiver.runs import Run
from tests.conftest import ROOT

RAY = str(Path(sys.executable).with_name("ray"))
SHORT = [
    "--training.max-epochs", "None", "--training.max-steps", "4", "--run.val-batches", "1", "--name", "submitted",
]  # fmt: skip


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head node with its own ports, folder and token: (dashboard's address, environment of its clients, process)."""
    folder = tmp_path_factory.mktemp("cluster")
    gcs, dashboard, client, agent = free_ports(4)
    token = folder / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    environment = {
        **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PERCEIVER_HOME": str(folder / "home"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [
        RAY, "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}", "--num-cpus=3",
        "--object-store-memory=200000000", f"--temp-dir=/tmp/rt-{os.getpid()}", "--disable-usage-stats",
    ]  # fmt: skip
    log = open(folder / "head.txt", "w")
    head = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    end = time.monotonic() + 120
    while time.monotonic() < end and not answers(address):
        assert head.poll() is None, (folder / "head.txt").read_text()
        time.sleep(0.5)
    yield address, environment, head
    if head.poll() is None:
        os.killpg(head.pid, signal.SIGTERM)
    try:
        head.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(head.pid, signal.SIGKILL)


def kill_all(mark: str, but: int | None = None) -> None:
    """Ends all processes with `mark` in their environment without a word."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.name) not in (but, os.getpid()) and mark in (folder / "environ").read_text():
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:
            continue  # it has ended, or is not ours


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=5)
    except urllib.error.HTTPError:
        return True  # refuses us, so it is there
    except OSError:
        return False
    return True


def submit(cluster, *job: str, **environment: str) -> subprocess.CompletedProcess:
    address, env, _ = cluster
    command = [RAY, "job", "submit", "--address", address, "--working-dir", ".", "--", "python", "-m", *job]
    return subprocess.run(command, cwd=ROOT, env={**env, **environment}, capture_output=True, text=True, timeout=400)


@pytest.mark.long
def test_a_submitted_training_joins_the_cluster_and_finishes(cluster):
    result = submit(cluster, "ray_jobs.train", "quickstart", *SHORT, "--workers", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "on 2 workers" in result.stdout and "finished after" in result.stdout
    run = Path(cluster[1]["PERCEIVER_HOME"]) / "runs" / "submitted"
    assert (run / "result.json").exists()


@pytest.mark.long
def test_a_submitted_sweep_runs_its_trials_on_the_cluster(cluster):
    result = submit(cluster, "tuning.sweep", "quickstart", *SHORT, "--trials", "2", "--scheduler", "fifo")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the winner at full length: python -m ray_jobs.train quickstart" in result.stdout
    sweep = Path(cluster[1]["PERCEIVER_HOME"]) / "sweeps" / "submitted"
    assert (sweep / "results.csv").read_text().count("finished") == 2


@pytest.mark.long
def test_prometheus_sees_the_numbers_of_the_metrics_file_while_a_job_runs(cluster):
    address, environment, _ = cluster
    args = ["quickstart", *SHORT, "--name", "metered", "--training.max-steps", "2000", "--run.log-every", "20", "--workers", "1"]
    job = [RAY, "job", "submit", "--address", address, "--submission-id", "metered", "--no-wait", "--working-dir", "."]
    subprocess.run([*job, "--", "python", "-m", "ray_jobs.train", *args], cwd=ROOT, env=environment, check=True, capture_output=True)
    run = Path(environment["PERCEIVER_HOME"]) / "runs" / "metered"
    end, seen = time.monotonic() + 240, {}
    while time.monotonic() < end and not {"step", "loss", "goodput"} <= seen.keys():
        time.sleep(1)
        seen = gauges("metered")
    subprocess.run([RAY, "job", "stop", "--address", address, "metered"], env=environment, check=True, capture_output=True)
    records = Run(run).metrics()
    assert {"step", "loss", "goodput", "throughput", "data_wait_share"} <= seen.keys()
    assert seen["step"] in {record["step"] for record in records}
    for name in ("loss", "throughput", "goodput"):
        assert any(seen[name] == pytest.approx(record[name], rel=1e-6) for record in records if name in record)


def gauges(run: str) -> dict[str, float]:
    """The gauges of a run, from the endpoints that the cluster tells Prometheus to scrape."""
    discovery = Path(f"/tmp/rt-{os.getpid()}/prom_metrics_service_discovery.json")
    found = {}
    for target in [t for group in json.loads(discovery.read_text()) for t in group["targets"]] if discovery.exists() else []:
        try:
            text = urllib.request.urlopen(f"http://{target}/metrics", timeout=5).read().decode()
        except OSError:
            continue
        for name, tags, value in re.findall(r"^ray_perceiver_(\w+)\{(.*)\} (\S+)$", text, flags=re.M):
            if f'run="{run}"' in tags.lower():
                found[name] = float(value)
    return found


def ours(cluster, *args: str, **environment: str) -> subprocess.Popen:
    """`python -m ray_jobs.submit`."""
    address, env, _ = cluster
    return subprocess.Popen(
        [sys.executable, "-m", "ray_jobs.submit", "--address", address, *args], cwd=ROOT, env={**env, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.long
def test_submit_follows_a_job_and_has_its_exit_status(cluster):
    job = ours(cluster, "--id", "good", "train", "quickstart", *SHORT, "--name", "good")
    output = job.communicate(timeout=400)[0]
    assert job.returncode == 0, output
    assert "finished after" in output and output.strip().endswith("job good succeeded")
    assert output.count("run good in ") == 1  # every line once
    address, environment, _ = cluster
    listed = subprocess.run([RAY, "job", "list", "--address", address], env=environment, capture_output=True, text=True).stdout
    assert "'git': " in listed and "quickstart" in listed

    job = ours(cluster, "train", "quickstart", *SHORT, "--name", "bad", "--init-from", "nowhere")
    output = job.communicate(timeout=400)[0]
    assert job.returncode == 2, output
    assert "error: " in output and "nowhere" in output and "failed: " in output and "succeeded" not in output


@pytest.mark.long
def test_submit_refuses_what_cannot_run_before_it_submits(cluster, tmp_path):
    job = ours(cluster, "train", "quickstart", "--workers", "50")
    output = job.communicate(timeout=100)[0]
    assert job.returncode == 2 and "parallel.workers is 50 but the cluster has 3 CPUs on 1 node" in output
    (tmp_path / "token").write_text("wrong" * 8)
    job = ours(cluster, "train", "quickstart", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    output = job.communicate(timeout=100)[0]
    assert job.returncode == 2 and "refuses the authentication token" in output and "Traceback" not in output


@pytest.mark.long
def test_an_interrupt_detaches_from_a_job_or_stops_it(cluster):
    address, environment, _ = cluster
    long = [*SHORT, "--training.max-steps", "100000", "--run.log-every", "5", "--workers", "1"]
    job = ours(cluster, "--id", "long", "train", "quickstart", *long, "--name", "long")
    read_until(job, "step ")
    job.send_signal(signal.SIGINT)
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 130 and "the job continues" in output
    job = ours(cluster, "--on-interrupt", "stop", "--follow", "long")
    read_until(job, "step ")
    job.send_signal(signal.SIGINT)
    output = job.communicate(timeout=120)[0]
    assert job.returncode == 130 and "job long stopped" in output


def read_until(job: subprocess.Popen, text: str) -> None:
    for line in job.stdout:
        if text in line:
            return
    raise AssertionError(f"the job ended without {text!r}")


@pytest.mark.long
def test_without_the_token_nothing_is_accepted(cluster, tmp_path):
    (tmp_path / "token").write_text("wrong" * 8)
    result = submit(cluster, "ray_jobs.train", "quickstart", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert result.returncode != 0 and "authentication token" in (result.stdout + result.stderr).lower(), result.stderr
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{cluster[0]}/api/jobs/", timeout=10)


@pytest.mark.long
def test_submit_never_says_success_for_a_dead_head(cluster):
    """The last test of this file: it ends the cluster."""
    job = ours(cluster, "--patience", "5", "train", "quickstart", *SHORT, "--training.max-steps", "100000", "--name", "lost")
    read_until(job, "step ")
    kill_all(cluster[1]["RAY_AUTH_TOKEN_PATH"], but=job.pid)
    output = job.communicate(timeout=120)[0]
    assert job.returncode == 1 and "has not answered for 5 seconds" in output and "succeeded" not in output
    job = ours(cluster, "train", "quickstart")
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 2 and "no cluster answers at" in output
