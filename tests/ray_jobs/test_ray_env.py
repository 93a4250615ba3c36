"""Joining and starting Ray."""

import subprocess
import sys

import pytest
import ray

from perceiver.config import ParallelConfig
from ray_jobs.ray_env import connect

OTHER = "import ray, sys; ray.init(address='local', num_cpus=1, include_dashboard=False); print('up', flush=True); sys.stdin.read()"


@ray.remote(num_cpus=0.1)
def seen_nodes() -> list[str]:
    from ray.util.state import list_nodes

    return [node.node_id for node in list_nodes()]


@pytest.mark.slow
def test_processes_of_a_local_cluster_ask_their_own_state_service_though_another_cluster_runs_on_the_machine():
    """Ray Train asks it whether a training is still there, to free what a stopped trial of a sweep held."""
    with subprocess.Popen([sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "up\n"
        with connect(ParallelConfig(), dashboard=True):
            assert ray.get(seen_nodes.remote()) == [ray.get_runtime_context().get_node_id()]
        other.stdin.close()
