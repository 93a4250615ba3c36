"""`python -m ray_jobs.submit [options] JOB [arguments]`: checks a job, submits it to a Ray cluster, and follows it to its end.

The exit status is that of the job. Ctrl-C leaves the job running (or stops it, with `--on-interrupt stop`); `--follow ID` follows it again.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import requests
import yaml
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.runtime_env import RuntimeEnv
from ray.util.state import list_nodes

from perceiver.config import Experiment, UserError, nearest
from perceiver.terminal import CommandParser, number_of, summary
from ray_jobs.cli import JobFailed, main_entry, parse_experiment
from ray_jobs.main import COMMANDS, JOBS
from ray_jobs.preflight import check_experiment
from ray_jobs.program import program
from ray_jobs.ray_env import choose_authentication
from ray_jobs.seeds import parse_seeds, take_seeds

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
"""Where the dashboard of a cluster is, here or through an SSH tunnel."""
MOST_YAML = 1 << 20
"""Most bytes of a file with a runtime environment."""
NO_FIELDS = ("--allow-changed-code", "--verbose", "--quiet")
"""Arguments of a training that are no fields of an experiment."""
STOPPED = 130
"""Exit status of a job that was stopped, as after Ctrl-C."""


def main(argv: list[str]) -> int:
    parser = CommandParser(
        prog=program("ray_jobs.submit"), description=summary(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", help=f"address of the cluster's dashboard; default: $RAY_API_SERVER_ADDRESS or {DEFAULT_ADDRESS}")
    parser.add_argument("--id", help="submission id; default: derived from job, preset and time")
    parser.add_argument("--no-wait", action="store_true", help="return when the job is accepted")
    parser.add_argument("--on-interrupt", choices=("detach", "stop"), default="detach", help="what Ctrl-C does (%(default)s)")
    parser.add_argument("--follow", metavar="ID", help="follow a job that was submitted before")
    parser.add_argument("--working-dir", default=".", help="folder to upload, except what .rayignore lists (%(default)s)")
    parser.add_argument("--runtime-env", type=Path, help="YAML with packages, such as cluster/runtime_env.yaml")
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for a cluster that does not respond (%(default)g)")
    parser.add_argument("job", nargs="?", help=f"one of {', '.join(JOBS)}")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the job")
    args = parser.parse_args(argv)
    if args.job in COMMANDS and COMMANDS[args.job].job:  # scaling-laws for scaling_laws, and the like
        args.job = COMMANDS[args.job].module.rpartition(".")[2]
    if args.follow:
        client, name = connect(args.address), args.follow
    else:
        experiment = check_job(args.job, args.arguments)
        environment = read_environment(args.runtime_env, args.working_dir)
        client = connect(args.address)
        check_room(client, experiment)
        name = args.id or job_name(args.job, args.arguments)
        submit(client, name, args.job, args.arguments, environment)
        print(f"submitted {name} to {client.get_address()}", flush=True)
    address = f"--address {args.address} " if args.address else ""
    follow_command = f"{program('ray_jobs.submit')} {address}--follow {name}"
    if args.no_wait:
        print(f"follow it: {follow_command}")
        return 0
    try:
        return follow(client, name, args.patience)
    except KeyboardInterrupt:
        if args.on_interrupt == "detach":
            print(f"\nthe job continues; follow it: {follow_command}\nstop it: ray job stop {address}{name}", file=sys.stderr)
            return STOPPED
        print("\nstopping the job", file=sys.stderr)
        client.stop_job(name)
        return follow(client, name, args.patience, quiet=True)


def check_job(job: str | None, arguments: list[str]) -> Experiment | None:
    """Checks what can be known here: the job's name, and an experiment's fields; returns the experiment of a training.

    Raises:
        UserError: a mistake that would make the job fail at its start.
    """
    if job is None:
        raise UserError(f"say which job: {', '.join(JOBS)}")
    if job not in JOBS:
        raise UserError(f"job {job!r} does not exist{nearest(job, JOBS)}; jobs are {', '.join(JOBS)}")
    if job not in ("train", "preprocess"):
        return None
    given, words = take_seeds([word for word in arguments if word not in NO_FIELDS])
    experiment = parse_experiment(words, JOBS[job])
    check_experiment(experiment)
    if given is not None:
        parse_seeds(given, experiment.training.seed)
    return experiment if job == "train" else None


def read_environment(path: Path | None, working_dir: str) -> dict:
    """The job's runtime environment.

    Raises:
        UserError: there is no such file or folder, or the file holds no runtime environment.
    """
    if not Path(working_dir).is_dir():
        raise UserError(f"--working-dir {working_dir} is no folder")
    if path is not None and not path.is_file():
        raise UserError(f"--runtime-env {path} is no file; cluster/runtime_env.yaml is one")
    return {**(_environment(path) if path else {}), "working_dir": working_dir}


def _environment(path: Path) -> dict:
    """The content of a file that is a runtime environment, as Ray checks it."""
    what = f"--runtime-env {path} holds no runtime environment"
    if (size := path.stat().st_size) > MOST_YAML:
        raise UserError(f"{what}: it has {size:,} bytes")
    try:
        text = path.read_text()
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):  # a few lines of them unpack to gigabytes
            raise UserError(f"{what}: write out what it repeats by an alias (*NAME)")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, OSError, ValueError, RecursionError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        place = "" if line is None else f" in line {line + 1}"
        raise UserError(f"{what}: it is no YAML{place}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{what}: it is a {type(content).__name__} and must be a mapping of fields (pip: [...], env_vars: {{...}})")
    if unknown := next((name for name in content if name not in RuntimeEnv.known_fields), None):
        raise UserError(f"{what}: {unknown!r} is no field of one{nearest(str(unknown), RuntimeEnv.known_fields)}")
    try:
        RuntimeEnv(**content)
    except Exception as error:  # Ray's checks raise what comes, also AttributeError
        raise UserError(f"{what}: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from None
    return content


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the cluster's job server.

    Raises:
        UserError: it cannot be reached, or refuses the token.
    """
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    if not address.startswith(("http://", "https://")):
        raise UserError(f"the address {address!r} must be that of a dashboard, like {DEFAULT_ADDRESS}")
    choose_authentication()
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, requests.exceptions.RequestException):
        raise UserError(
            f"no cluster answers at {address}: is it up, and the tunnel to its dashboard open (ray dashboard CLUSTER)?"
        ) from None
    except Exception as error:
        if "auth" not in str(error).lower():
            raise
        raise UserError(
            f"the cluster at {address} refuses the authentication token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or "
            "~/.ray/auth_token) to the cluster's"
        ) from None


def check_room(client: JobSubmissionClient, experiment: Experiment | None) -> None:
    """Refuses a training whose workers the cluster cannot hold, unless it is to wait for the cluster to grow.

    Raises:
        UserError: with what is there and what is asked for.
    """
    if experiment is None or experiment.parallel.wait_minutes > 0:
        return
    parallel = experiment.parallel
    nodes = [node.resources_total for node in list_nodes(address=client.get_address()) if node.state == "ALIVE"]
    total = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    kind = "GPU" if parallel.device == "cuda" or (parallel.device == "auto" and total["GPU"]) else "CPU"
    field, least = ("parallel.min-workers", parallel.min_workers) if parallel.min_workers else ("parallel.workers", parallel.workers)
    if total[kind] < least:
        raise UserError(
            f"{field} is {least} but the cluster has {number_of(total[kind], kind)} on {number_of(len(nodes), 'node')}: use fewer "
            "workers, or --parallel.wait-minutes for a cluster that grows"
        )


def subject(arguments: list[str]) -> list[str]:
    """What a job is about, if its arguments begin with that: a preset, a sweep, the name of a run's folder."""
    return [Path(argument).name for argument in arguments[:1] if not argument.startswith("-")]


def job_name(job: str, arguments: list[str]) -> str:
    """A submission id that tells what the job is."""
    return "-".join([job, *subject(arguments), time.strftime("%Y%m%d-%H%M%S")])


def describe(job: str, arguments: list[str], git: str) -> dict[str, str]:
    """What the dashboard is to show of a job: `job_name`, that of the run or sweep, in its list, and all on the job's page."""
    names = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    names.add_argument("--name", "--run.name")
    about = "".join(subject(arguments))
    name = names.parse_known_args(arguments)[0].name or about or job
    return {"job_name": name, "job": job, "experiment": about, "git": git, "arguments": shlex.join(arguments)}


def submit(client: JobSubmissionClient, name: str, job: str, arguments: list[str], environment: dict) -> None:
    """Hands the job to the cluster, with what the dashboard is to show of it.

    Raises:
        UserError: the cluster does not accept it, as when there is a job of this id.
    """
    command = shlex.join(["python", "-m", JOBS[job], *arguments])
    metadata = describe(job, arguments, git_version(environment["working_dir"]))
    try:
        client.submit_job(entrypoint=command, submission_id=name, runtime_env=environment, metadata=metadata)
    except (RuntimeError, ValueError) as error:
        line = next((part for part in reversed(str(error).strip().splitlines()) if part.strip()), "without a reason")
        raise UserError(f"the cluster does not accept job {name}: {line.strip()}") from None


def git_version(folder: str) -> str:
    """The commit of a folder and whether it has changes, or "unknown"."""
    command = ["git", "-C", folder, "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def follow(client: JobSubmissionClient, name: str, patience: float, quiet: bool = False) -> int:
    """Prints a job's output until it has ended, whatever happens to the connection, and returns its exit status.

    Args:
        patience: seconds without an answer after which the cluster counts as lost.
        quiet: print nothing, only wait.

    Raises:
        UserError: there is no such job.
        JobFailed: the job failed, or the cluster is lost.
    """
    printed, answered = 0, time.monotonic()
    while True:
        try:
            info = client.get_job_info(name)
            answered = time.monotonic()
            if not quiet and info.status != JobStatus.PENDING:
                printed = asyncio.run(_print_from(client, name, printed))
                info = client.get_job_info(name)
        except (OSError, RuntimeError) as error:  # requests' errors are OSErrors
            if "404" in str(error) or "does not exist" in str(error):
                raise UserError(f"job {name!r} does not exist on the cluster; ray job list shows those there are") from None
            if time.monotonic() - answered > patience:
                raise JobFailed(
                    f"the cluster has not answered for {patience:g} seconds and the job's end is unknown: when it is back, "
                    f"{program('ray_jobs.submit')} --follow {name}, or the same command, which continues a training"
                ) from None
        else:
            if info.status.is_terminal():
                break
        time.sleep(1)
    print(f"job {name} {info.status.value.lower()}", flush=True)
    if info.status == JobStatus.FAILED:
        lines = (info.message or "").strip().splitlines()
        print(f"failed: {lines[0] if lines else 'without a message'}", file=sys.stderr)
        return info.driver_exit_code or 1
    return 0 if info.status == JobStatus.SUCCEEDED else STOPPED


async def _print_from(client: JobSubmissionClient, name: str, printed: int) -> int:
    """Prints a job's output from a character on, until it ends or the connection does; returns the characters printed so far."""
    seen = 0
    try:
        async for text in client.tail_job_logs(name):
            new = text[max(0, printed - seen) :]
            seen += len(text)
            if new:
                print(new, end="", flush=True)
                printed = max(printed, seen)
    except (RuntimeError, OSError, aiohttp.ClientError):
        pass  # the connection is lost; the next question about the job's status tells whether the cluster is
    return printed


if __name__ == "__main__":
    main_entry(main)
