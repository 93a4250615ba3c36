"""Joining and starting Ray."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.train.v2._internal.constants import get_env_vars_to_propagate

from perceiver.config import ParallelConfig, UserError
from ray_jobs.ray_env import ALONE, CLUSTER, UNSEEN, VARIABLES, _home, check_address, connect, unset_variables
from ray_jobs.ray_hints import leave_out_hints

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


@ray.remote(num_cpus=0.1)
def variables(names: list[str]) -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("dashboard", [False, True])
def test_a_local_cluster_keeps_no_account_that_nobody_sees_and_of_few_tasks(dashboard):
    """Each would grow with every task and data set of a long training."""
    with connect(ParallelConfig(), dashboard=dashboard):
        assert not os.environ.keys() & (CLUSTER | UNSEEN).keys()  # for whatever this process starts besides
        assert ray.get(variables.remote(list(CLUSTER))) == CLUSTER
        assert ray.get(variables.remote(list(UNSEEN))) == dict.fromkeys(UNSEEN) | ({} if dashboard else UNSEEN)


@ray.remote(num_cpus=0.1)
def handed_on() -> dict[str, str]:
    return get_env_vars_to_propagate()


@pytest.mark.slow
def test_processes_of_a_local_cluster_hand_on_what_this_one_does():
    """What is started early for data tasks serves these only in the environment that Ray Train's controller hands to the workers."""
    with connect(ParallelConfig()):
        assert ray.get(handed_on.remote()) == get_env_vars_to_propagate()
        assert get_env_vars_to_propagate().items() >= ALONE.items()
    assert not os.environ.keys() & ALONE.keys()


LOSES_ITS_CLUSTER = """
import sys
import time
from pathlib import Path
import ray
from perceiver.config import ParallelConfig
from ray_jobs.ray_env import connect, own_processes
import psutil
with connect(ParallelConfig()):
    print(*(process.pid for process in psutil.Process().children(recursive=True)), flush=True)
    (lost,) = ray._private.worker._global_node.all_processes[sys.argv[1]]
    lost.process.kill()
    lost.process.wait()
"""


@pytest.mark.slow
def test_nothing_is_left_of_a_local_cluster_whose_state_service_is_lost():
    """The raylet's agents, which have nobody to ask any more, would look for it for a minute."""
    done = subprocess.run([sys.executable, "-c", LOSES_ITS_CLUSTER, "gcs_server"], stdout=subprocess.PIPE, text=True, timeout=180)
    begun = [int(pid) for pid in done.stdout.splitlines()[0].split()]
    end = time.monotonic() + 30
    while left := [pid for pid in begun if running(pid)]:
        assert time.monotonic() < end, [Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:3] for pid in left]
        time.sleep(0.1)
    assert len(begun) > 4


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_address_where_nothing_listens_is_refused_at_once_and_one_that_listens_is_not():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"no Ray cluster answers at '{address}' .--parallel.address or"):
            check_address(address)
        with pytest.raises(UserError, match="no Ray cluster answers"):
            check_address(f"ray://{address}")
        free.listen()
        check_address(address)
    check_address("auto")


def test_a_hint_of_rays_that_is_no_matter_of_the_users_is_not_printed_and_all_else_is(monkeypatch):
    from ray._private import worker

    printed: list = []
    monkeypatch.setattr(worker, "print_to_stdstream", lambda data, **settings: printed.append((data["lines"], settings)))
    leave_out_hints()
    leave_out_hints()
    hint = "WARNING: 8 PYTHON worker processes have been started on node: c46 with address: 192.0.2.2."
    worker.print_to_stdstream({"lines": [hint], "pid": "raylet"}, ignore_prefix=False)
    worker.print_to_stdstream({"lines": [hint, "a node has failed"], "pid": "raylet"}, ignore_prefix=False)
    assert printed == [(["a node has failed"], {"ignore_prefix": False})]


def test_variables_of_the_user_are_kept_also_by_their_other_names():
    assert unset_variables({}) == VARIABLES
    assert "GOMP_SPINCOUNT" not in unset_variables({"GOMP_SPINCOUNT": "7"})
    for name, ours in (("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"), ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")):
        assert set(VARIABLES) - set(unset_variables({name: "its value"})) == {ours}


def test_processes_of_a_cluster_that_was_started_without_it_get_this_ones_home(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERCEIVER_HOME", "here")
    assert _home() == {"PERCEIVER_HOME": str(tmp_path / "here")}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")  # a submitted job, whose own environment Ray would not merge with another
    assert _home() == {}
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    monkeypatch.delenv("PERCEIVER_HOME")
    assert _home() == {}
