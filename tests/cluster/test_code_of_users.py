"""An experiment of a user's file on two hosts, of which only that of the driver has the file: nothing but runs and data is shared."""

import subprocess
import time

import pytest

from tests.support import hosts as machines
from tests.support.hosts import Hosts
from tests.support.outside import EXAMPLES

pytestmark = pytest.mark.long

START = "ray start --num-cpus=$1 --node-ip-address=$2 --disable-usage-stats ${@:3} && exec sleep infinity"
TRAIN = """cd ~/mine && exec python -m ray_jobs.train weather.py:tiny --training.max-steps 60 --run.val-every 30 --name apart \\
    --storage /mnt/perceiver/runs --data.root /mnt/perceiver/data --workers 2 --parallel.cpus-per-worker 2"""


def test_a_file_that_only_the_drivers_host_has_is_trained_on_two_hosts(tmp_path):
    if reason := machines.why_not():
        pytest.skip(reason)
    hosts = Hosts(tmp_path, 2)
    head, other = hosts.hosts
    (head.home / "mine").mkdir()
    (head.home / "mine" / "weather.py").write_text((EXAMPLES / "weather.py").read_text())
    environment = hosts.environment | {"RAY_AUTH_MODE": "disabled", "PERCEIVER_HOME": "/tmp/perceiver"}
    started = []

    def start(host, command, *arguments):
        log = open(tmp_path / f"{len(started)}.txt", "w+")
        process = subprocess.Popen(
            host.inside("bash", "-c", command, "bash", *arguments),
            env=environment | {"RAY_ADDRESS": f"{hosts.addresses[0]}:6379"} if command == TRAIN else environment,
            stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        started.append((process, log))
        return process

    try:
        # Neither has room for two workers of two CPUs, so that each host gets one.
        start(head, START, "3", hosts.addresses[0], "--head", "--port=6379")
        time.sleep(10)
        start(other, START, "2", hosts.addresses[1], f"--address={hosts.addresses[0]}:6379")
        time.sleep(10)
        job, seen = start(head, TRAIN), set()
        end = time.monotonic() + 400
        while job.poll() is None and time.monotonic() < end:
            seen |= {(host.name, line.split()[0]) for host in hosts.hosts for line in host.processes() if line.startswith("ray::")}
            time.sleep(0.5)
        logs = []
        for _, log in started:
            log.seek(0)
            logs.append(log.read())
        assert job.poll() == 0, "\n".join(logs)
        workers = {host for host, title in seen if "TrainWorker" in title}
        assert workers == {head.name, other.name}, seen
        assert not list(other.home.rglob("weather.py"))
        run = hosts.shared / "runs" / "apart"
        assert (run / "result.json").is_file() and (run / "code" / "weather.py").is_file()
    finally:
        hosts.close()
