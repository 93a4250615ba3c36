"""Running jobs as a user does, in processes of their own, and killing parts of them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from perceiver.runs import Run
from perceiver.training.checkpoint_files import read_tensors, reader_of
from tests.conftest import ROOT

QUICK = [
    "--training.max-epochs", "None", "--training.max-steps", "150", "--training.global-batch-size", "32",
    "--run.checkpoint-every", "20", "--run.val-every", "75", "--run.log-every", "1", "--run.val-batches", "4",
]  # fmt: skip
"""150 small steps of the quickstart model, with checkpoints often enough to lose little."""

WITHOUT_DROPOUT = ["--model.encoder.dropout", "0", "--model.decoder.dropout", "0"]


class Job:
    """`python -m MODULE ARGS`, or a script, with its own home; knows its processes by a mark in their environment."""

    inside: Callable[..., list[str]] | None = None
    """The command line that runs a command elsewhere than in this machine's own names; see `hosts.Host.inside`."""

    def __init__(self, module: str, *args: str, home: Path, folder: Path = ROOT, **environment: str) -> None:
        self.mark = f"PERCEIVER_TEST_MARK={home}/{time.time_ns()}"
        name, _, value = self.mark.partition("=")
        env = {**os.environ, "PERCEIVER_HOME": str(home), "RAY_worker_niceness": "0", name: value, **environment}
        self.log = home / f"log-{time.time_ns()}.txt"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *([] if module.endswith(".py") else ["-m"]), module, *args]
        if self.inside is not None:
            command = self.inside(*command)
        with open(self.log, "w") as output:
            self.process = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT)

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait(self, timeout: float = 300) -> int:
        """The exit status."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"no end after {timeout} s:\n{self.output}") from None

    def finish(self, timeout: float = 300) -> str:
        """Waits for exit status 0; the output."""
        status = self.wait(timeout)
        assert status == 0, self.output
        return self.output

    def pids(self, name: str) -> list[int]:
        """Processes of this job whose command line starts with `name`."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and (folder / "cmdline").read_text().startswith(name):
                    if self.mark in (folder / "environ").read_text():
                        found.append(int(folder.name))
            except OSError:
                continue  # it ended meanwhile
        return found

    def wait_for_step(self, run: Path, step: int, timeout: float = 240) -> None:
        """Until the run's metrics have reached a step."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            records = Run(run).metrics()
            if records and records[-1]["step"] >= step:
                return
            assert self.process.poll() is None, self.output
            time.sleep(0.1)
        raise AssertionError(f"step {step} not reached:\n{self.output}")

    def kill_worker(self) -> None:
        """Ends one training worker without a word."""
        os.kill(self.pids("ray::RayTrainWorker")[0], signal.SIGKILL)

    def kill_driver(self) -> None:
        """Ends the driver without a word, and waits until its workers have noticed. Ray's agents of the node may take longer."""
        self.process.kill()
        self.process.wait()
        end = time.monotonic() + 60
        while (left := self._working()) and time.monotonic() < end:
            time.sleep(0.2)
        assert not left, f"still running a minute after the driver's end: {left}"

    def _working(self) -> list[str]:
        names = []
        for pid in self.pids("ray::"):
            try:
                names.append((Path("/proc") / str(pid) / "cmdline").read_text().rstrip("\0"))
            except OSError:
                continue  # it ended meanwhile
        return [name for name in names if not name.endswith("Agent")]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Model and optimizer in a checkpoint, by name."""
    metadata = reader_of(checkpoint).read_metadata().state_dict_metadata
    tensors = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in metadata.items() if hasattr(m, "size")}
    read_tensors(checkpoint, tensors)
    return tensors


def losses(run: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in Run(run).metrics() if "loss" in record]
