"""A cluster that many runs are disturbed on, one after the other: it starts once, and says what runs have left on it.

As a program (`python -m tests.faults.cluster FILE [ADDRESS]`) it holds the cluster, its own or one that it joins, until it is asked to
end, and writes what is there to a file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import tests.conftest  # noqa: F401  # settings of Ray, before it is imported
from tests.faults.outcome import RAY
from tests.support.jobs import Job

EVERY = 0.5
"""Seconds between two looks."""
OWN = ("PlacementGroupCleaner", "_AutoscalingCoordinatorActor", "_StatsActor", "StatsManager", "DatasetStats")
"""Actors by which Ray keeps account of a cluster, not of a run."""


class Cluster:
    """A cluster on this machine, in processes of its own.

    Attributes:
        job: the process that holds it; the cluster's processes have its mark, those of runs on it too.
        address: HOST:PORT.
        place: what it is, for the table.
    """

    place = RAY

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self._file = home / "cluster.json"
        self._file.unlink(missing_ok=True)
        self.job = self._hold(home)
        end = time.monotonic() + 180
        while not self._file.exists():
            assert self.job.process.poll() is None and time.monotonic() < end, self.job.output
            time.sleep(0.1)
        self.address: str = self.state()["address"]

    def _hold(self, home: Path) -> Job:
        return Job("tests.faults.cluster", str(self._file), home=home)

    def train(self, home: Path, *args: str) -> Job:
        """The command that trains, on this cluster."""
        return Job("ray_jobs.train", *args, home=home, RAY_ADDRESS=self.address)

    def pids(self) -> list[int]:
        """Ids of its processes and of those of runs on it."""
        return self.job.pids("")

    def state(self) -> dict:
        return json.loads(self._file.read_text())

    def left(self, patience: float = 60.0) -> list[str]:
        """What runs have left on it, each in a word or two, when they have had some time to clear up."""
        begin = time.time()
        while True:
            state = self.state()
            if state["time"] > begin and not state["left"]:
                return []
            if time.time() - begin > patience:
                return state["left"]
            time.sleep(EVERY / 2)

    def close(self) -> None:
        self.job.process.send_signal(signal.SIGTERM)
        self.job.wait(60)


def main(file: Path, address: str | None) -> None:
    """Holds a cluster; None: one of its own."""
    import ray

    from perceiver.config import ParallelConfig
    from ray_jobs.ray_env import connect

    ended: list[int] = []
    with connect(ParallelConfig(address=address)):
        signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))  # in the place of Ray's
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        address = ray.get_runtime_context().gcs_address
        while not ended and os.getppid() != 1:
            actors = [a for a in ray._private.state.actors().values() if a["State"] != "DEAD"]
            left = [f"actor {a['ActorClassName']}" for a in actors if not any(name in a["ActorClassName"] for name in OWN)]
            groups = ray.util.placement_group_table().values()
            left += [f"placement group {g['placement_group_id'][:8]}" for g in groups if g["state"] != "REMOVED"]
            temporary = file.with_suffix(".new")
            nodes = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
            temporary.write_text(json.dumps({"address": address, "time": time.time(), "left": sorted(left), "nodes": nodes}))
            temporary.replace(file)
            time.sleep(EVERY)


if __name__ == "__main__":
    main(Path(sys.argv[1]), next(iter(sys.argv[2:]), None))
