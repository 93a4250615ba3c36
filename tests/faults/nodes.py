"""Faults of whole machines: runs on a cluster of hosts, each a set of namespaces of this machine with a network of its own."""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from perceiver.runs import Run
from tests.faults.causes import WORKER, Fault, Place, send
from tests.faults.cluster import Cluster
from tests.faults.disturb import Disturbed, command, follow
from tests.faults.outcome import HOSTS, Outcome
from tests.support import hosts as machines
from tests.support.hosts import Host, Hosts
from tests.support.jobs import Job

NODES = 3
"""Nodes beside the head, one more than a run has workers: what is lost is replaced at once, and the bits stay those of two workers."""
SPARE = 8
"""Hosts that take the places of those that are lost for good."""
PORT = 6379
MOMENT = 8.0
"""Seconds without a network that must go by unnoticed."""
SLOW = "2mbit"
SAYS = "machines will go: checkpoint"
"""What a run says when it has saved for a notice."""


class ClusterOfHosts(Cluster):
    """A cluster of hosts: a head, on which commands run, and nodes with room for a worker each.

    Attributes:
        hosts: all of them.
        nodes: numbers of those that are in the cluster, without the head.
    """

    place = HOSTS

    def __init__(self, folder: Path) -> None:
        self.hosts = Hosts(folder, 1 + NODES + SPARE)
        self.nodes: list[int] = []
        self._next = 1
        token = secrets.token_hex(32)
        for host in self.hosts.hosts:
            path = host.home / ".ray" / "auth_token"
            path.parent.mkdir()
            path.write_text(token)
            path.chmod(0o600)
        try:
            self._ray(0, "--head", f"--port={PORT}", "--num-cpus=1", "--include-dashboard=false")
            for _ in range(NODES):
                self.add()
            super().__init__(self.hosts.shared)
        except BaseException:
            self.hosts.close()
            raise

    def _ray(self, number: int, *words: str) -> None:
        """Starts Ray on a host."""
        ray = str(Path(sys.executable).with_name("ray"))
        common = [f"--node-ip-address={self.hosts.addresses[number]}", "--object-store-memory=100000000", "--disable-usage-stats"]
        start = self.hosts.hosts[number].inside(ray, "start", *words, *common)
        done = subprocess.run(start, env=self.hosts.environment, capture_output=True, text=True, timeout=180, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f"Ray does not start on host {number}: {done.stdout[-500:]}{done.stderr[-500:]}"

    def add(self, number: int | None = None) -> None:
        """Lets a host join the cluster; None: the next that was in none."""
        if number is None:
            number, self._next = self._next, self._next + 1
        self._ray(number, f"--address={self.hosts.addresses[0]}:{PORT}", "--num-cpus=2")
        self.nodes.append(number)

    def with_a_worker(self, rng: random.Random) -> int | None:
        """The number of a node that trains."""
        found = [n for n in self.nodes if any(line.startswith(WORKER) for line in self.hosts.hosts[n].processes())]
        return rng.choice(found) if found else None

    def _on_head(self, module: str, *args: str, home: Path) -> Job:
        environment = {
            **self.hosts.environment,
            "RAY_ADDRESS": f"{self.hosts.addresses[0]}:{PORT}",
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
        }
        return OnHost(self.hosts.hosts[0], module, *args, home=home, **environment)

    def _hold(self, home: Path) -> Job:
        return self._on_head("tests.faults.cluster", str(self._file), f"{self.hosts.addresses[0]}:{PORT}", home=home)

    def train(self, home: Path, *args: str) -> Job:
        return self._on_head("ray_jobs.train", *args, "--parallel.cpus-per-worker", "1.5", home=home)

    def pids(self) -> list[int]:
        return [pid for host in self.hosts.hosts if host.alive for pid in host.pids()]

    def drain(self, number: int) -> None:
        """A provider's notice for a node, as cluster/node/notice.sh hands it on."""
        words = ["drain-node", f"--address={self.address}", f"--node-id={self.state()['nodes'][self.hosts.addresses[number]]}"]
        words += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test", "--deadline-remaining-seconds=60"]
        line = self.hosts.hosts[0].inside(str(Path(sys.executable).with_name("ray")), *words)
        subprocess.run(line, env=self.hosts.environment, check=True, capture_output=True, timeout=60)

    def close(self) -> None:
        self.hosts.close()


class OnHost(Job):
    """A command on a host."""

    def __init__(self, host: Host, *args: str, **environment) -> None:
        self.inside = host.inside
        super().__init__(*args, **environment)


def on_a_node(do: Callable[[Place, ClusterOfHosts, int], object]) -> Callable[[Place], bool]:
    """Does something to a node that trains, which from then on is the one that is to be put right."""

    def cause(place: Place) -> bool:
        cluster = place.cluster
        assert isinstance(cluster, ClusterOfHosts)
        number = cluster.with_a_worker(place.rng)
        if number is not None:
            cluster.nodes.remove(number)
            cluster.nodes.append(number)  # the last one is it
            do(place, cluster, number)
        return number is not None

    return cause


def kill(place: Place, cluster: ClusterOfHosts, number: int) -> None:
    cluster.hosts.hosts[number].kill()


def cut(place: Place, cluster: ClusterOfHosts, number: int) -> None:
    cluster.hosts.cut(number)


def cut_for_a_moment(place: Place, cluster: ClusterOfHosts, number: int) -> None:
    cluster.hosts.cut(number)
    time.sleep(MOMENT)
    cluster.hosts.join(number)


def slow(place: Place, cluster: ClusterOfHosts, number: int) -> None:
    last = Run(place.run).last_step()
    cluster.hosts.slow(number, SLOW)
    place.until(lambda: Run(place.run).last_step() >= last + 15, 60)
    cluster.hosts.slow(number, "0")


def freeze(place: Place, cluster: ClusterOfHosts, number: int) -> None:
    send(cluster.hosts.hosts[number].pids(), signal.SIGSTOP)


def notice(place: Place, cluster: ClusterOfHosts, number: int) -> None:
    """A notice, and the machine's end as soon as the run has saved for it."""
    cluster.drain(number)
    place.until(lambda: SAYS in place.job.output, 60)
    cluster.hosts.hosts[number].kill()


def replace(place: Place) -> None:
    """A new machine for the one that is lost."""
    assert isinstance(place.cluster, ClusterOfHosts)
    if not place.cluster.hosts.hosts[place.cluster.nodes[-1]].alive:
        place.cluster.nodes.pop()
        place.cluster.add()


def come_back(again: Callable[[ClusterOfHosts, int], object]) -> Callable[[Place], None]:
    """The machine is there again. The cluster has given it up, so its raylet and its workers must end by themselves; the rest of Ray's
    there (what collects its logs) is ended as by an operator, and the machine joins anew.
    """

    def undo(place: Place) -> None:
        cluster = place.cluster
        assert isinstance(cluster, ClusterOfHosts)
        number = cluster.nodes.pop()
        host = cluster.hosts.hosts[number]
        again(cluster, number)
        end = time.monotonic() + 120
        while left := [line for line in host.processes() if line.startswith("ray::") or "/raylet " in line.partition("--")[0]]:
            assert time.monotonic() < end, f"left on a machine that came back: {left}"
            time.sleep(0.5)
        send(host.pids(), signal.SIGKILL)
        cluster.add(number)

    return undo


def join(cluster: ClusterOfHosts, number: int) -> None:
    cluster.hosts.join(number)


def thaw(cluster: ClusterOfHosts, number: int) -> None:
    send(cluster.hosts.hosts[number].pids(), signal.SIGCONT)


NODE_FAULTS = [
    Fault("machine killed", "a host's first process ended", on_a_node(kill), restarts=True, undo=replace),
    Fault("machine cut off", "its network's plug pulled", on_a_node(cut), restarts=True, undo=come_back(join)),
    Fault("machine cut off for a moment", f"for {MOMENT:.0f} seconds", on_a_node(cut_for_a_moment)),
    Fault("machine with a slow network", f"{SLOW.removesuffix('mbit')} Mbit/s over 15 steps", on_a_node(slow)),
    Fault("machine frozen", "SIGSTOP to all of a host's processes", on_a_node(freeze), restarts=True, undo=come_back(thaw)),
    Fault(
        "machine that will go",
        "a provider's notice, killed when the run has saved",
        on_a_node(notice),
        says=SAYS,
        restarts=True,
        undo=replace,
    ),
]


def disturb_nodes(home: Path, minutes: float, seed: int, only: list[str], outcomes: list[Outcome]) -> None:
    """Adds the outcomes of faults of machines in a random order, or in that of `only`, as many as there is time for."""
    os.environ["PERCEIVER_TEST_HOSTS"] = "1"
    if reason := machines.why_not():
        raise SystemExit(reason)
    rng, end = random.Random(seed), time.monotonic() + 60 * minutes
    home.mkdir(parents=True, exist_ok=True)
    cluster = ClusterOfHosts(home)
    try:
        shared, number = cluster.hosts.shared, 0
        (shared / "troubles").mkdir()
        (shared / "troubles" / "fast").touch()
        cluster.train(shared, *command(shared, "undisturbed")).finish(600)
        while time.monotonic() < end:
            chosen = [fault for name in only for fault in NODE_FAULTS if fault.name == name] or rng.sample(NODE_FAULTS, len(NODE_FAULTS))
            waiting = deque(chosen)
            while waiting and time.monotonic() < end:
                number += 1
                run = Disturbed(shared, f"hosts-{seed}-{number}", shared / "runs" / "undisturbed", cluster, rng)
                follow(run, waiting, end, outcomes)
    finally:
        cluster.close()
