"""Each loss that a run restarts after is a line with the reason; one that ends the run is none."""

from __future__ import annotations

import logging

import pytest
from ray.train import ControllerError, WorkerGroupError

from ray_jobs.driver import _describe
from ray_jobs.restarts import SayRestarts, reason_of

DEAD = "The actor is dead because its worker process has died. Worker exit type: {} Worker exit detail: {}"


class Mailbox:
    def __init__(self) -> None:
        self.items: list[tuple[int, str]] = []
        self.put = self
        self.remote = self.items.append


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "A worker health check failed.\nThe actor died unexpectedly before finishing this task.\n"
            + DEAD.format("SYSTEM_ERROR", "Worker unexpectedly exits with a connection error code 2. End of file. There are some "
                          "potential root causes. (1) The process is killed by SIGKILL by OOM killer due to high memory usage."),
            "its process ended, or was ended",
        ),
        (DEAD.format("INTENDED_SYSTEM_EXIT", "since its placement group was removed."), "Ray took its place in the cluster away"),
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [192.0.2.2]:53211: Connection reset by peer",
         "its connection to another worker broke"),
        ("Task was killed due to the node running low on memory. Memory on the node was 7.6GB / 8GB",
         "the machine had no memory left"),
        ("The actor died because its node has died. NodeDiedError: node was terminated unexpectedly", "its machine was lost"),
        ("Traceback:\nRuntimeError: Connection closed by peer [10.0.0.2]:1234", "RuntimeError: Connection closed by peer [10.0.0.2]:1234"),
        ("", "RuntimeError"),
    ],
)  # fmt: skip
def test_a_reason_is_a_few_words(text, reason):
    assert reason_of(RuntimeError(text)) == reason


def test_each_restart_is_a_line_and_the_end_of_the_run_is_none():
    mailbox = Mailbox()
    say = SayRestarts(mailbox, max_failures=2)
    for _ in range(3):
        say.after_exception(None, {1: RuntimeError("b"), 0: RuntimeError("a")})
    assert mailbox.items == [
        (logging.WARNING, f"worker 0: a; worker 1: b; the run restarts from its last checkpoint (failure {count} of 2 that are allowed)")
        for count in (1, 2)
    ]


def test_a_run_that_may_fail_for_ever_tells_no_limit():
    mailbox = Mailbox()
    SayRestarts(mailbox, max_failures=-1).after_exception(None, {0: RuntimeError("a")})
    assert mailbox.items[0][1].endswith("checkpoint (failure 1)")


def test_an_end_for_good_is_a_sentence_though_ray_says_pages():
    """Ray's text on memory lists every process, and ends in advice on variables of the environment."""
    pages = "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.2) was 22.39GB used / 23.54GB\n"
    pages += "Top 10 memory users:\n255 0.55 ray::RayTrainWorker\nRefer to the documentation on how to address the out of memory issue: ..."
    assert (
        _describe(WorkerGroupError("Training failed", {0: RuntimeError(pages), 1: RuntimeError(pages)})) == "the machine had no memory left"
    )
    while_they_start = _describe(ControllerError(RuntimeError(pages)))
    assert while_they_start == "the machine had no memory left; the same command continues from the last checkpoint"
