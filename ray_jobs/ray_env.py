"""Joining a Ray cluster or starting a local one, and finding out what it can carry."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray

from perceiver.config import ParallelConfig, UserError, home
from ray_jobs.ray_hints import leave_out_hints
from ray_jobs.ray_sessions import mark, remove_old

VARIABLES = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # no second copy of workers' prints
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",  # instead of 32 readers of footers
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # A thread that has done its half of an operation looks for the other one in a loop, and then sleeps. By default it looks for long,
    # and where another process takes a core, it keeps the very thread from running that it waits for (docs/speed.md).
    "GOMP_SPINCOUNT": "3000",
    # GPU memory in segments that grow: batches of other lengths do not leave holes that nothing fits into.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
"""Environment of Ray's processes in a job, where the user has not set these."""
OTHER_NAMES = {"OMP_WAIT_POLICY": "GOMP_SPINCOUNT", "PYTORCH_CUDA_ALLOC_CONF": "PYTORCH_ALLOC_CONF"}
"""By which a user may have said the same: of a variable that would be overruled, the one of `VARIABLES`."""
ALONE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""The same where the cluster is this machine, which nobody takes away: one process less that starts and polls. Also this process has it, as
Ray Train's controller hands it to the workers and they to their data tasks, which find no process that was started early without it.
"""
CLUSTER = {
    # Tasks that the dashboard knows: at 4 KiB each, Ray's 100,000 would be 400 MiB.
    "RAY_task_events_max_num_task_in_gcs": "10000",
    # Milliseconds after which an idle process ends. After Ray's 1,000, each validation of a training would wait for processes that load
    # everything anew, and those that are started early would be gone before there is something to read.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
}
"""Read by Ray where it starts a cluster."""
UNSEEN = {"RAY_enable_metrics_collection": "0"}
"""The same where there is no dashboard, so that nobody sees Ray's metrics: an actor and an agent would keep those of every data set that
was ever read, 2 MiB a minute.
"""
SETTINGS: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
"""Of `ray.init`, for any cluster."""
PORT = "RAY_GCS_SERVER_PORT"
"""Read by Ray where it starts a cluster: the port of the cluster's address."""
ADDRESS_PATIENCE = 5.0
"""Seconds in which the address of a cluster must take a connection."""
PACKAGES = Path(__file__).resolve().parent.parent
"""The folder that `perceiver` and `ray_jobs` are imported from."""


@contextmanager
def connect(parallel: ParallelConfig, dashboard: bool = False) -> Iterator[None]:
    """Joins the cluster of this process, of `parallel.address` or $RAY_ADDRESS; else runs a local one for the time being.

    With `dashboard` a local cluster has Ray's dashboard (as with PERCEIVER_DASHBOARD=1), whose state service some of Ray needs.
    A local cluster counts one CPU more than the machine has: the workers may take all cores, and data tasks still find a slot.
    Its processes know its address: Ray's own would else look for a cluster on the machine, and stumble over a second one (then
    what a stopped trial held is never freed).

    Raises:
        UserError: the cluster cannot be reached, or refuses the token; a local one does not start.
    """
    if ray.is_initialized():
        yield
        return
    address = parallel.address or os.environ.get("RAY_ADDRESS")
    quiet()
    leave_out_hints()
    variables = unset_variables(os.environ)
    os.environ.update(variables)
    alone = {} if address else {name: value for name, value in ALONE.items() if name not in os.environ}
    with _environment(alone):
        if address:
            _join(address, variables)
        else:
            _start(dashboard or _with_dashboard())
        try:
            yield
        finally:
            _leave()


def _join(address: str, variables: Mapping[str, str]) -> None:
    check_address(address)
    choose_authentication()
    try:
        ray.init(address=address, runtime_env={"env_vars": {**variables, **_python_path(), **_home()}}, **SETTINGS)
    except Exception as error:
        raise UserError(f"no Ray cluster could be joined at {address!r}: {_reason(error)}") from error


def _start(seen: bool) -> None:
    """Starts a local cluster; `seen`: with a dashboard."""
    # The token that Ray makes for a cluster of this process alone is nothing that a user need act on.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    try:
        with _environment(_of_local_cluster(seen)):
            ray.init(address="local", num_cpus=(os.cpu_count() or 1) + 1, include_dashboard=seen, **SETTINGS)
    except Exception as error:
        raise UserError(f"Ray could not be started on this machine (is it overloaded?): {str(error).splitlines()[0]}") from error
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    mark(session)
    remove_old(session.parent)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables of this process, which those that it starts inherit, for the time being."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _of_local_cluster(seen: bool) -> dict[str, str]:
    """What a cluster's processes inherit from this one while it starts them.

    A runtime environment would say the same, but every process that Ray starts for it first starts another one, and those that Ray starts
    with the cluster could not be used.

    Args:
        seen: the cluster has a dashboard.
    """
    port = str(_free_port())
    address = {PORT: port, "RAY_ADDRESS": f"{ray.util.get_node_ip_address()}:{port}"}
    asked = CLUSTER | ({} if seen else UNSEEN)
    return address | _python_path() | _home() | {name: value for name, value in asked.items() if name not in os.environ}


def unset_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of `VARIABLES` that the user has not set, nor said by another name, which they would overrule."""
    said = set(environment) | {ours for name, ours in OTHER_NAMES.items() if name in environment}
    return {name: value for name, value in VARIABLES.items() if name not in said}


def _home() -> dict[str, str]:
    """Where this process has its data and runs, for processes of a cluster that may have been started without it."""
    if "PERCEIVER_HOME" not in os.environ or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        return {}
    return {"PERCEIVER_HOME": str(home().absolute())}


def joining() -> dict[str, str]:
    """Environment of a process that is to join the cluster that this process has joined."""
    return {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}


def _leave() -> None:
    """Leaves the cluster; a local one ends. Where its own processes are lost, its others are not asked but ended: the raylet's agents
    would try to reach a lost GCS for a minute.
    """
    if lost_processes():
        import psutil  # which Ray brings along, and makes importable when it is imported

        below: list[psutil.Process] = []
        for pid in own_processes():
            with suppress(psutil.NoSuchProcess):
                below += psutil.Process(pid).children(recursive=True)
        ray._private.worker._global_node.kill_all_processes(check_alive=False, allow_graceful=False)
        for process in below:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    ray.shutdown()


def held(resource: str) -> float:
    """How much of a resource of the cluster ("CPU", "GPU") is held now: by other jobs, and by this process."""
    return max(0.0, ray.cluster_resources().get(resource, 0.0) - ray.available_resources().get(resource, 0.0))


def lost_processes() -> str | None:
    """Which of the processes that this process's local cluster rests on has ended; None where all run, or the cluster is another's."""
    node = ray._private.worker._global_node
    if node is None or not node.head:
        return None
    dead = {kind for kind, _ in node.dead_processes()}
    return next((kind for kind in ("raylet", "gcs_server") if kind in dead), None)


def own_processes() -> list[int]:
    """The ids of the processes that this process's local cluster rests on; none where the cluster is another's."""
    node = ray._private.worker._global_node
    if node is None or not node.head:
        return []
    return [info.process.pid for kind in ("raylet", "gcs_server") for info in node.all_processes.get(kind, [])]


def check_address(address: str) -> None:
    """Looks whether anything listens at HOST:PORT: Ray itself would try for minutes.

    Raises:
        UserError: nothing does.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        return  # "auto", or what only Ray knows to read
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ADDRESS_PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"no Ray cluster answers at {address!r} (--parallel.address or $RAY_ADDRESS): {error}; is it running, and the address right?"
        ) from None


def quiet() -> None:
    """Keeps Ray Data's execution plans and progress bars out of a job's output."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


def use_gpus(parallel: ParallelConfig) -> bool:
    """Whether workers get GPUs: as configured, or where the cluster has any, or may have: one at rest is a head without GPUs."""
    if parallel.device == "auto":
        return ray.cluster_resources().get("GPU", 0) > 0 or may_grow_to("GPU") > 0
    return parallel.device == "cuda"


def may_grow_to(resource: str) -> float:
    """How much of a resource the cluster's autoscaler may make there be at most; 0 where there is no autoscaler."""
    most = ray._private.state.state.get_max_resources_from_cluster_config()
    return (most or {}).get(resource, 0)


def _python_path() -> dict[str, str]:
    """Workers import the packages that this process runs, also from a source tree that is not installed."""
    if "site-packages" in PACKAGES.parts or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGES), os.environ.get("PYTHONPATH")]))}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def choose_authentication() -> None:
    """With an explicit address Ray does not look for a token by itself: use one where there is one."""
    token = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if "RAY_AUTH_MODE" not in os.environ and (token or Path("~/.ray/auth_token").expanduser().exists()):
        os.environ["RAY_AUTH_MODE"] = "token"


def _with_dashboard() -> bool:
    return os.environ.get("PERCEIVER_DASHBOARD", "0") == "1"


def _reason(error: Exception) -> str:
    """The first line of an error, and what to do about the usual ones."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "auth" in text.lower() or "token" in text.lower():
        return f"{text} (set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or ~/.ray/auth_token to the cluster's token)"
    return f"{text} (is it running, and the address right?)"


def draining_nodes() -> list[str]:
    """Ids of the cluster's nodes that are being drained; none where Ray does not answer."""
    try:
        return list(ray._private.state.state.get_draining_nodes())
    except ray.exceptions.RayError:
        return []
