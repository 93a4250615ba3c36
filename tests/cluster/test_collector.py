"""Reports of hundreds of workers: how many messages reach the driver, counted with stand-ins for workers and nodes."""

from types import SimpleNamespace

import pytest

from ray_jobs import watch
from ray_jobs.collector import DIRECTLY, Collector, beats_to
from ray_jobs.collector import EVERY as NODE_EVERY
from ray_jobs.mailbox import Beat, Mailbox
from ray_jobs.watch import Watch


class Counted:
    """The driver's mailbox, with its messages counted."""

    def __init__(self):
        self.mailbox = Mailbox.__ray_metadata__.modified_class()
        self.messages = 0
        self.put_all = SimpleNamespace(remote=self._put_all)

    def _put_all(self, items):
        self.messages += 1
        self.mailbox.put_all(items)


def beat(rank, step=0, ended=False):
    return Beat(rank, 1000 + rank, f"node-{rank // 8}", "host", step, "a line", False, ended)


@pytest.mark.parametrize("workers", [64, 512])
def test_a_node_sends_one_message_for_all_of_its_workers(workers):
    driver = Counted()
    nodes = [Collector(driver, every=0) for _ in range(workers // 8)]
    minutes = 2
    for turn in range(round(60 * minutes / watch.EVERY)):
        for rank in range(workers):
            nodes[rank // 8].put(beat(rank, turn))
        for node in nodes:
            node.send()
    a_second = driver.messages / (60 * minutes)
    assert a_second == workers / 8 / NODE_EVERY < 13
    assert len(driver.mailbox.take()) == workers * minutes * 60 / watch.EVERY


def test_a_worker_that_stands_is_found_through_its_nodes_messages():
    driver, watched = Counted(), Watch(stall=1800)
    node = Collector(driver, every=0)
    for now in range(0, 300, 5):
        for rank in range(8):
            if rank != 3 or now < 50:  # worker 3 is stopped then
                node.put(beat(rank, now))
        node.send()
        for item in driver.mailbox.take():
            watched.hear(item, now)
        if found := watched.overdue(now):
            break
    assert found[0].rank == 3 and 50 + watch.SILENCE - 5 <= now <= 50 + watch.SILENCE + 10


def test_the_end_of_a_worker_is_sent_at_once_and_nothing_is_sent_where_nothing_came():
    driver = Counted()
    node = Collector(driver, every=0)
    node.put(beat(0))
    node.put(beat(1, ended=True))
    assert driver.messages == 1 and {item.rank for item in driver.mailbox.take()} == {0, 1}
    node.send()
    assert driver.messages == 1


def test_few_workers_report_to_the_driver_themselves():
    mailbox = object()
    assert beats_to(mailbox, SimpleNamespace(size=DIRECTLY, rank=0)) is mailbox
    assert DIRECTLY / watch.EVERY < 7
