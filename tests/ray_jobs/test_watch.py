"""Workers that stand are found: those that do not answer, and those that the others wait for."""

import os
import threading
import time
from dataclasses import replace
from datetime import timedelta

import torch.distributed as dist

from ray_jobs.mailbox import Beat
from ray_jobs.watch import Steps, Watch, end_process, reporting, where

WORKING = Beat(rank=0, pid=10, node="a", host="h", step=5, place="loss (base.py, line 3)", together=False)
WAITING = replace(WORKING, place="all_sum (parallel.py, line 41)", together=True)


def watch_of(*beats: Beat) -> Watch:
    watch = Watch(stall=600, silence=60)
    for beat in beats:
        watch.hear(beat, now=0)
    return watch


def test_a_worker_that_does_not_answer_is_named_with_the_step_and_place_it_was_at():
    watch = watch_of(WORKING, replace(WAITING, rank=1, pid=11))
    watch.hear(WORKING, now=50)
    assert watch.overdue(now=59) is None
    beat, why = watch.overdue(now=61)
    assert beat.pid == 11 and why == "has not answered for 61 s (it was at step 5, in all_sum (parallel.py, line 41))"
    assert watch.overdue(now=62) is None  # it is ended once


def test_of_workers_that_all_stand_the_one_is_named_that_the_others_wait_for():
    beats = WAITING, replace(WORKING, rank=1), replace(WAITING, rank=2)
    watch = watch_of(*beats)
    for now in range(10, 610, 10):
        assert watch.overdue(now) is None
        for beat in beats:
            watch.hear(beat, now)
    beat, why = watch.overdue(601)
    assert beat.rank == 1 and "step 5, in loss (base.py, line 3); the others wait for it" in why


def test_one_that_says_nothing_is_named_before_those_that_wait_where_the_limit_for_standing_is_the_shorter_one():
    watch = Watch(stall=45, silence=60)
    for now in range(0, 50, 5):
        watch.hear(WORKING, now)
        if now < 5:
            watch.hear(replace(WAITING, rank=1, step=6), now)
    beat, why = watch.overdue(46)
    assert beat.rank == 1 and why.startswith("has not answered for 46 s (it was at step 6") and why.endswith("the others wait for it")


def test_those_that_waited_for_a_worker_that_is_ended_are_not_ended_with_it():
    """They cannot move before it is replaced, which takes its time, above all where its machine is cut off."""
    watch = Watch(stall=45, silence=60)
    watch.hear(WORKING, 0)
    for now in range(0, 90, 5):
        watch.hear(replace(WAITING, rank=1), now)
        ended = watch.overdue(now)
        assert (ended is not None and ended[0].rank == 0) == (now == 50)
    for now in range(90, 96):
        watch.hear(replace(WAITING, rank=1), now)
    assert watch.overdue(96)[0].rank == 1  # nobody came


def test_while_one_worker_moves_nobody_stands():
    watch = watch_of(WAITING, replace(WORKING, rank=1))
    for now in range(10, 2000, 10):
        watch.hear(WAITING, now)
        watch.hear(replace(WORKING, rank=1, step=now), now)
        assert watch.overdue(now) is None


def test_a_worker_that_has_ended_is_expected_no_more_and_a_restarted_one_is_another():
    watch = watch_of(WORKING)
    watch.hear(replace(WORKING, pid=20), now=50)
    watch.hear(replace(WORKING, ended=True), now=55)  # the old one's end, late
    assert watch.overdue(now=120)[0].pid == 20
    watch = watch_of(WORKING)
    watch.hear(replace(WORKING, ended=True), now=10)
    assert watch.overdue(now=10_000) is None


def test_time_in_which_nothing_could_be_heard_does_not_count():
    watch = watch_of(WORKING)
    watch.pause(50)
    assert watch.overdue(now=100) is None and watch.overdue(now=111)


def test_a_worker_reports_its_step_and_the_line_it_is_at_and_its_end():
    beats: list[Beat] = []
    enough = threading.Event()

    def send(beat: Beat) -> None:
        beats.append(beat)
        if len(beats) > 3:
            enough.set()

    steps = Steps()
    with reporting(send, 1, "a", "h", steps, every=0.01):
        steps.after_step(7, None)
        assert enough.wait(10)
    assert beats[-1].ended and {beat.rank for beat in beats} == {1}
    place = beats[2].place
    assert beats[2].step == 7 and place.startswith("test_a_worker_reports") and "test_watch.py, line" in place


def test_a_worker_in_a_collective_operation_waits_for_the_others():
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=5))

    def stand() -> None:
        try:
            dist.distributed_c10d._store_based_barrier(0, store, "x", 2, timedelta(seconds=2))
        except RuntimeError:  # nobody else comes
            pass

    thread = threading.Thread(target=stand)
    thread.start()
    time.sleep(0.5)
    assert where(thread.ident)[1]
    thread.join()
    assert not where(threading.get_ident())[1]


def test_only_a_worker_is_ended():
    assert not end_process(os.getpid()) and not end_process(2**22)
