"""What is said of the time to the first step."""

from types import SimpleNamespace

import pytest

from ray_jobs import first_step
from ray_jobs.first_step import Begun, FirstStep
from tests.support.logged import logged


class Mailbox:
    """Counts starts, as the driver's does."""

    def __init__(self, before):
        self.count = before
        self.start = SimpleNamespace(remote=self._start)

    def _start(self):
        self.count += 1
        return self.count


@pytest.mark.parametrize(("rank", "before", "lines"), [(0, 0, 1), (1, 0, 0), (0, 1, 0)])
def test_the_first_worker_says_once_where_the_time_went_and_those_that_replace_others_do_not(rank, before, lines, monkeypatch):
    clock = iter([112.0, 115.5])
    monkeypatch.setattr(first_step.time, "time", lambda: next(clock, 1000.0))
    monkeypatch.setattr(first_step.ray, "wait", lambda refs, timeout: (refs, []))
    monkeypatch.setattr(first_step.ray, "get", lambda ref: ref)
    callback = FirstStep(Begun(command=100.0, workers=103.0), 110.0, Mailbox(before))
    callback.on_start(SimpleNamespace(world=SimpleNamespace(rank=rank)))
    with logged() as said:
        callback.after_step(1, None)
        callback.after_step(2, None)
    assert len(said) == lines
    if lines:
        assert said[0].startswith("first step after 15.5 s: 3.0 until Ray was there and all was checked, 7.0 until the workers ran, 2.0 ")
