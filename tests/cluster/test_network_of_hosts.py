"""Processes of two hosts form a group although each host's own name means its loopback, as Debian installs it."""

import subprocess

import pytest

from tests.support import hosts as machines
from tests.support.hosts import Hosts

pytestmark = pytest.mark.long

MEET = """
import datetime, os, sys
import torch
import torch.distributed as dist
from ray_jobs.rendezvous import interface_of
rank, own, head = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.environ["GLOO_SOCKET_IFNAME"] = interface_of(own)
limit = datetime.timedelta(seconds=60)
dist.init_process_group("gloo", init_method=f"tcp://{head}:29500", rank=rank, world_size=2, timeout=limit)
total = torch.full((1,), float(rank + 1))
dist.all_reduce(total)
print("sum", total.item(), flush=True)
os._exit(0)
"""


def test_processes_of_two_hosts_meet_on_the_interface_of_their_addresses(tmp_path):
    if reason := machines.why_not():
        pytest.skip(reason)
    hosts = Hosts(tmp_path, 2)
    try:
        processes = [
            subprocess.Popen(
                host.inside("python", "-c", MEET, str(rank), hosts.addresses[rank], hosts.addresses[0]),
                env=hosts.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank, host in enumerate(hosts.hosts)
        ]  # fmt: skip
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        hosts.close()
    assert all("sum 3.0" in output for output in outputs), outputs
