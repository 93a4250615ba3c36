"""A cluster of several hosts, from `ray up` to `ray down`: the on-premise file, SSH, the token, a job from outside; one host is
cut off and another dies under the job."""

import re
import shutil
import time
from pathlib import Path

import pytest

from perceiver.runs import Run
from tests.conftest import ROOT
from tests.ray_jobs.test_elastic import compare, undisturbed
from tests.support import hosts as machines
from tests.support.hosts import Hosts
from tests.support.jobs import QUICK, WITHOUT_DROPOUT, losses

pytestmark = pytest.mark.long

HEAD, CUT, KILLED = 0, 1, 2
TRAINING = [
    "quickstart", *QUICK, *WITHOUT_DROPOUT, "--optim.lr", "0.0002", "--run.val-every", "150",
    "--name", "hosts", "--workers", "1..3", "--parallel.cpus-per-worker", "1.5", "--parallel.threads-per-worker", "1",
    "--parallel.resize-seconds", "1000",
]  # fmt: skip
ADDRESS = "http://127.0.0.1:8265"
ASK = "import sys, urllib.request as r; print(r.urlopen(r.Request(sys.argv[1], headers=dict([sys.argv[2:4]]))).status)"


@pytest.fixture
def hosts(tmp_path):
    if reason := machines.why_not():
        pytest.skip(reason)
    made = Hosts(tmp_path, 3)
    for host in made.hosts:
        install(host)
    yield made
    made.close()


def install(host) -> None:
    """What node/setup.sh would install: the packages of this Python, and the mark that all is there."""
    environment = host.home / "perceiver-env"
    environment.mkdir()
    for part in Path(machines.sys.prefix).iterdir():
        (environment / part.name).symlink_to(part)
    shutil.copy(ROOT / "cluster" / "node" / "requirements.txt", environment)


def launcher_file(hosts: Hosts) -> str:
    """cluster/onprem.yaml, filled in as its comments and the guide say."""
    text = (ROOT / "cluster" / "onprem.yaml").read_text()
    for blank, value in {
        "head_ip: 192.0.2.10": f"head_ip: {hosts.addresses[HEAD]}",
        "worker_ips: [192.0.2.11, 192.0.2.12, 192.0.2.13]": f"worker_ips: [{', '.join(hosts.addresses[1:])}]",
        "max_workers: 3": "max_workers: 2",
        "REPLACE_WITH_YOUR_USER": "root",
    }.items():
        assert blank in text
        text = text.replace(blank, value)
    (hosts.client.home / "my-onprem.yaml").write_text(text)
    return str(machines.HOME / "my-onprem.yaml")


def test_a_job_on_a_cluster_of_hosts_outlives_one_that_is_cut_off_and_one_that_dies(hosts, tmp_path, monkeypatch):
    hosts.run("ray", "get-auth-token", "--generate")
    file = launcher_file(hosts)
    clock = time.monotonic()
    print(hosts.run("ray", "up", "--yes", file, timeout=400))
    hosts.start("ray", "dashboard", file, log=tmp_path / "tunnel.txt")
    wait_for(lambda: nodes(hosts) == 3, "three nodes", 400)
    print(f"three nodes after {time.monotonic() - clock:.0f} s")
    refuses_without_the_token(hosts)

    submit = ["ray", "job", "submit", "--address", ADDRESS, "--working-dir", ".", "--submission-id", "hosts", "--no-wait"]
    hosts.run(*submit, "--", "python", "-m", "ray_jobs.train", *TRAINING)
    run = hosts.shared / "runs" / "hosts"
    wait_for(lambda: last_step(run) >= 25, "step 25", 400, hosts)
    print(f"step 25 after {time.monotonic() - clock:.0f} s")
    hosts.cut(CUT)
    start = went_on(hosts, 2)
    print(f"on 2 after {time.monotonic() - clock:.0f} s")
    wait_for(lambda: last_step(run) >= start + 25, "25 steps more", 400, hosts)
    hosts.hosts[KILLED].kill()
    went_on(hosts, 1)
    print(f"on 1 after {time.monotonic() - clock:.0f} s")
    output = hosts.run("python", "-m", "ray_jobs.submit", "--follow", "hosts", timeout=400)
    assert "\njob hosts succeeded\n" in output
    assert "Job 'hosts' succeeded" in hosts.run("ray", "job", "status", "--address", ADDRESS, "hosts")
    print(output, f"done after {time.monotonic() - clock:.0f} s")

    assert [step for step, _ in losses(run)] == list(range(1, 151))
    monkeypatch.setenv("PERCEIVER_HOME", str(hosts.shared))
    undisturbed(TRAINING, tmp_path / "plain")
    compare(run, tmp_path / "plain")

    hosts.join(CUT)
    print(hosts.run("ray", "down", "--yes", file))
    hosts.client.kill()  # the tunnel with it
    wait_for(lambda: not left(hosts), "end of Ray on all hosts", 180)
    print(f"down after {time.monotonic() - clock:.0f} s")


def refuses_without_the_token(hosts: Hosts) -> None:
    token = (hosts.client.home / ".ray" / "auth_token").read_text()
    for path in ("/api/jobs/", "/nodes?view=summary"):
        ask = ("python", "-c", ASK, ADDRESS + path)
        assert "401" in hosts.run(*ask, "x", "y", check=False)
        assert hosts.run(*ask, "Authorization", f"Bearer {token}").strip() == "200"
    submit = ("ray", "job", "submit", "--address", ADDRESS, "--", "true")
    assert "uthentication token" in hosts.run(*submit, check=False, RAY_AUTH_TOKEN="0" * 32)


def nodes(hosts: Hosts) -> int:
    """Nodes of the cluster that are alive, as the client sees them."""
    text = hosts.run("ray", "list", "nodes", "--address", ADDRESS, "--format", "json", check=False)
    return text.count('"ALIVE"')


def driver_log(hosts: Hosts) -> str:
    logs = list((hosts.hosts[HEAD].tmp / "ray").glob("session_2*/logs/job-driver-*.log"))
    return logs[0].read_text() if logs else ""


def last_step(run: Path) -> int:
    records = Run(run).metrics()
    return records[-1]["step"] if records else 0


def went_on(hosts: Hosts, workers: int) -> int:
    """Waits until the job continues with a number of workers; the step it continues from."""
    pattern = re.compile(rf"continuing from step (\d+).* on {workers} workers?")
    wait_for(lambda: pattern.search(driver_log(hosts)), f"{workers} workers", 400, hosts)
    return int(pattern.search(driver_log(hosts))[1])


def left(hosts: Hosts) -> list[str]:
    return [line for host in hosts.hosts for line in host.processes()]


def wait_for(condition, what: str, seconds: float, hosts: Hosts | None = None) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} after {seconds} s\n{driver_log(hosts) if hosts else ''}"
        time.sleep(0.3)
