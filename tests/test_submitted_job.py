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

from perceiver.training.record import read_metrics
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

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
    """A head node with its own ports, folder and token: (dashboard's address, environment of its clients)."""
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
    yield address, environment
    os.killpg(head.pid, signal.SIGTERM)
    try:
        head.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(head.pid, signal.SIGKILL)


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=5)
    except urllib.error.HTTPError:
        return True  # refuses us, so it is there
    except OSError:
        return False
    return True


def submit(cluster, *job: str, **environment: str) -> subprocess.CompletedProcess:
    address, env = cluster
    command = [RAY, "job", "submit", "--address", address, "--working-dir", ".", "--", "python", "-m", *job]
    return subprocess.run(
        command, cwd=ROOT, env={**env, **environment}, capture_output=True, text=True, timeout=400
    )


def test_a_submitted_training_joins_the_cluster_and_finishes(cluster):
    result = submit(cluster, "ray_jobs.train", "quickstart", *SHORT, "--workers", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "on 2 workers" in result.stdout and "finished after" in result.stdout
    run = Path(cluster[1]["PERCEIVER_HOME"]) / "runs" / "submitted"
    assert (run / "result.json").exists()


def test_prometheus_sees_the_numbers_of_the_metrics_file_while_a_job_runs(cluster):
    address, environment = cluster
    args = ["quickstart", *SHORT, "--name", "metered", "--training.max-steps", "2000", "--run.log-every", "20", "--workers", "1"]
    job = [RAY, "job", "submit", "--address", address, "--submission-id", "metered", "--no-wait", "--working-dir", "."]
    subprocess.run([*job, "--", "python", "-m", "ray_jobs.train", *args], cwd=ROOT, env=environment, check=True, capture_output=True)
    run = Path(environment["PERCEIVER_HOME"]) / "runs" / "metered"
    end, seen = time.monotonic() + 240, {}
    while time.monotonic() < end and not {"step", "loss", "goodput"} <= seen.keys():
        time.sleep(1)
        seen = gauges("metered")
    subprocess.run([RAY, "job", "stop", "--address", address, "metered"], env=environment, check=True, capture_output=True)
    records = read_metrics(run)
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


def test_a_mistake_in_a_submitted_job_fails_it_with_its_sentence(cluster):
    result = submit(cluster, "ray_jobs.train", "quickstart", "--workers", "50")
    assert result.returncode != 0 and "parallel.workers is 50" in result.stdout + result.stderr


def test_without_the_token_nothing_is_accepted(cluster, tmp_path):
    (tmp_path / "token").write_text("wrong" * 8)
    result = submit(cluster, "ray_jobs.train", "quickstart", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert result.returncode != 0 and "authentication token" in (result.stdout + result.stderr).lower(), result.stderr
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{cluster[0]}/api/jobs/", timeout=10)
