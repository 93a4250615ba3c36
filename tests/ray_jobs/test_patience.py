"""A cluster that starves is not taken for a dead one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from ray_jobs.patience import LOST_AFTER, STARVED_AFTER, Patience, Work, work_of


class Waiting:
    """Asks every second, and answers when and why the cluster was lost."""

    def __init__(self, look, pids=(7,), load=20.0) -> None:
        self.now, self.said = 0.0, []
        self.patience = Patience(pids, self.said.append, lambda pid: look(self.now), lambda: load, lambda: self.now)

    def until_lost(self, at_most: float = 10_000) -> tuple[float, str | None]:
        while self.now < at_most:
            self.now += 1
            if why := self.patience.is_lost():
                return self.now, why
        return self.now, None


def idle(now: float) -> Work:
    return Work(3.0, wants=False)


@pytest.mark.parametrize(
    ("look", "pids"),
    [(idle, ()), (idle, (7,)), (lambda now: None, (7,)), (lambda now: Work(now, True) if now < 1 else None, (7,))],
    ids=["it is elsewhere", "it hangs", "it was stopped", "it ended"],
)
def test_a_cluster_that_does_nothing_is_lost_after_a_minute(look, pids):
    now, why = Waiting(look, pids).until_lost()
    assert LOST_AFTER < now <= LOST_AFTER + 2 and why == f"Ray has not answered for {now:.0f} s"


@pytest.mark.parametrize(
    "look",
    [lambda now: Work(now / 100, wants=False), lambda now: Work(0.0, wants=True), lambda now: Work(now // 50, wants=False)],
    ids=["it works slowly", "it wants a core", "it works now and then"],
)
def test_a_cluster_that_starves_is_waited_for_with_a_line_now_and_then_but_not_for_ever(look):
    waiting = Waiting(look)
    assert waiting.until_lost(STARVED_AFTER) == (STARVED_AFTER, None)
    assert waiting.until_lost()[1] is not None
    assert len(waiting.said) >= 10
    assert waiting.said[0] == "Ray has not answered for 31 s: for each core of this machine there are 20 processes that want it; waiting"


def test_a_cluster_that_stops_working_after_a_while_is_lost_a_minute_later():
    now, _ = Waiting(lambda now: Work(min(now, 200), wants=False)).until_lost()
    assert 200 + LOST_AFTER < now <= 202 + LOST_AFTER


def test_where_there_are_cores_to_spare_nothing_starves():
    now, _ = Waiting(lambda now: Work(now, wants=True), load=1.0).until_lost()
    assert LOST_AFTER < now <= LOST_AFTER + 2


def test_an_answer_that_comes_soon_is_not_spoken_of():
    waiting = Waiting(lambda now: Work(now, wants=True))
    waiting.until_lost(25)
    assert waiting.said == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_a_process_does_is_read_from_the_system():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        end = time.monotonic() + 30
        while (found := work_of(busy.pid)) is None or found.seconds == 0:
            assert time.monotonic() < end
            time.sleep(0.05)
        os.kill(busy.pid, signal.SIGSTOP)
        while work_of(busy.pid) is not None:
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        busy.kill()
        busy.wait()
    assert work_of(busy.pid) is None
