"""The files for Slurm and SkyPilot: what the script does with programs that stand in for theirs, and what the task file says."""

import re
import shutil
import stat
import subprocess
import time

import pytest
import yaml

from ray_jobs.main import COMMANDS
from tests.support.cluster_files import CLUSTER

SCRIPT = CLUSTER / "slurm.sbatch"
STANDINS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$@" >> "$LOG"; fi',
    "srun": 'shift; echo "address $RAY_ADDRESS" >> "$LOG"; "$@"; exit 1',  # its own status is that of a node that was ended
    "ray": 'echo "ray $*" >> "$LOG"; if [ "$1" = symmetric-run ]; then while [ "$1" != -- ]; do shift; done; shift; "$@"; else mkdir -p ~/.ray; echo x > ~/.ray/auth_token; fi',  # noqa: E501
    "perceiver": 'printf "perceiver"; printf " <%s>" "$@"; echo; echo "command $*" >> "$LOG"; exit "${STATUS:-0}"',  # noqa: E501
}


@pytest.fixture
def slurm(tmp_path):
    """Runs the script as Slurm would: its output, its status and what the programs were called with."""
    for name, text in STANDINS.items():
        path = tmp_path / "env/bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    home, log = tmp_path / "home", tmp_path / "log"
    home.mkdir()

    def run(*words, **environment):
        log.unlink(missing_ok=True)
        env = {
            "PATH": "/usr/bin:/bin", "HOME": str(home), "LOG": str(log),
            "PERCEIVER_HOME": str(tmp_path), "PERCEIVER_ENV": str(tmp_path / "env"),
            "SLURM_JOB_ID": "31234", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_ON_NODE": "12", **environment,
        }  # fmt: skip
        result = subprocess.run(["bash", SCRIPT, *words], env=env, capture_output=True, text=True, timeout=60)
        return result, log.read_text() if log.exists() else ""

    return run


def test_the_command_runs_on_the_first_node_with_what_slurm_gave(slurm, tmp_path):
    result, log = slurm("train", "quickstart", "--name", "two words", SLURM_GPUS_ON_NODE="4")
    assert result.returncode == 0, result.stderr
    assert "perceiver <train> <quickstart> <--name> <two words>" in result.stdout
    assert "address node7:21234" in log
    assert "ray symmetric-run --address node7:21234 --min-nodes 2 --num-cpus 12 --num-gpus 4 -- bash -c" in log
    assert (tmp_path / "home/.ray/auth_token").stat().st_mode & 0o077 == 0
    assert not list(tmp_path.glob(".slurm-*"))


@pytest.mark.parametrize("status", [0, 2, 75])
def test_the_status_is_the_commands_own(slurm, status):
    result, log = slurm("train", "quickstart", STATUS=str(status))
    assert result.returncode == status and "requeue" not in log


def test_before_the_allocation_ends_the_command_is_asked_to_stop_and_the_job_is_queued_again(slurm, tmp_path):
    standin = tmp_path / "env/bin/timeout"  # as if the time were over
    standin.write_text('#!/bin/sh\necho "timeout $*" >> "$LOG"\nexit 124\n')
    standin.chmod(0o755)
    ends = int(time.time()) + 100_000
    result, log = slurm("train", "quickstart", SLURM_JOB_END_TIME=str(ends), PERCEIVER_NOTICE_SECONDS="5000")
    assert result.returncode == 124 and "requeue 31234" in log
    (seconds,) = re.findall(r"^timeout --signal=TERM (\d+) perceiver train quickstart$", log, flags=re.M)
    assert 0 < int(seconds) <= 95_000
    result, log = slurm("train", "quickstart", SLURM_JOB_END_TIME=str(ends), PERCEIVER_NOTICE_SECONDS="200000")
    assert result.returncode == 2 and "ask for more --time" in result.stderr and not log


@pytest.mark.parametrize("missing", ["PERCEIVER_HOME", "PERCEIVER_ENV"])
def test_what_the_script_needs_is_named(slurm, missing):
    result, log = slurm("train", "quickstart", **{missing: ""})
    assert result.returncode != 0 and missing in result.stderr and not log
    result, log = slurm()
    assert result.returncode == 2 and "usage" in result.stderr


def test_the_script_is_one_that_shells_and_slurm_read():
    text = SCRIPT.read_text()
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    options = [line for line in text.splitlines() if line.startswith("#SBATCH ")]
    first = next(line for line in text.splitlines() if line and not line.startswith("#"))
    assert len(options) > 5 and text.index(options[-1]) < text.index(first)  # Slurm reads none after the first command
    assert "--ntasks-per-node=1" in text
    if (shellcheck := shutil.which("shellcheck")) is not None:
        assert subprocess.run([shellcheck, SCRIPT]).returncode == 0


# ------------------------------------------------------------------------------------------------------------- SkyPilot


def test_the_task_of_skypilot_names_what_it_knows_and_shells_read_it():
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    assert task.keys() == {"name", "resources", "num_nodes", "workdir", "envs", "setup", "run"}
    assert task["resources"].keys() <= {"accelerators", "use_spot", "disk_size", "any_of", "infra", "cpus", "memory"}
    assert task["envs"]["COMMAND"].split()[0] in COMMANDS
    for part in ("setup", "run"):
        assert subprocess.run(["bash", "-n"], input=task[part], text=True).returncode == 0
    assert not [line for line in task["run"].splitlines() if "ray stop" in line and not line.startswith("#")]
    assert "REPLACE_WITH" in task["envs"]["BUCKET"]


def test_only_the_first_machine_of_skypilot_gives_the_command(tmp_path):
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    for path, text in (
        ("sky_templates/ray/start_cluster", 'echo "start $RAY_CMD $RAY_HEAD_PORT"'),
        ("perceiver-env/bin/perceiver", 'echo "perceiver $* at $RAY_ADDRESS"'),
    ):
        program = tmp_path / path
        program.parent.mkdir(parents=True)
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
    said = []
    for rank in "01":
        env = {
            "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "COMMAND": "train quickstart --workers 2", "BUCKET": "s3://b",
            "SKYPILOT_NODE_RANK": rank, "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        }  # fmt: skip
        said.append(subprocess.run(["bash", "-c", task["run"]], env={**env}, capture_output=True, text=True, check=True).stdout)
    start = f"start {tmp_path}/perceiver-env/bin/ray 6379\n"
    assert said[0] == f"{start}perceiver train quickstart --workers 2 --storage s3://b/runs --data.root s3://b/data at 10.0.0.1:6379\n"
    assert said[1] == start
