"""How far workers read ahead: their fair shares by arithmetic, Ray Data's executions within them."""

import time
from itertools import product
from types import SimpleNamespace

import pyarrow as pa
import pytest
import ray

from perceiver.config import ParallelConfig
from ray_jobs.ingest import read_with_ray
from ray_jobs.ray_env import connect
from ray_jobs.read_ahead import _LIMIT, DATA_CPUS, MOST_BYTES, STORE_SHARE, TASK_BYTES, Bounded, DataShare, ReadAhead, tasks_of_an_epoch

GIB = 2**30


@pytest.mark.parametrize(("workers", "cpus"), product([1, 2, 3, 8], [2, 3, 4, 8, 12]))
def test_all_workers_read_ahead_and_together_no_more_than_there_is_room_for(workers, cpus):
    held = min(1.0, (cpus - DATA_CPUS) / workers)  # what `plan_resources` gives each of them
    limit = DataShare(cpus_per_worker=held).of_a_worker(workers, cpus, 4 * GIB)
    slots = (cpus - held * workers) / DATA_CPUS
    assert limit.tasks >= 1
    assert limit.tasks == 1 or limit.tasks * workers <= slots + 1e-6
    assert limit.tasks * workers > slots - workers or limit.bytes < (limit.tasks + 1) * TASK_BYTES  # and no slot for all stays empty
    assert limit.bytes * workers <= 4 * GIB * STORE_SHARE


def test_where_ray_data_gives_no_cpu_at_all_each_worker_has_its_share():
    """8 CPUs, 3 workers that train and validate: Ray Data divides 5 CPUs by 6 executions, which is 0."""
    assert 5 // 6 == 0
    assert DataShare().of_a_worker(3, 8, 4 * GIB).tasks == 3


def test_cpus_of_other_jobs_are_not_counted_on():
    assert DataShare(others=4).of_a_worker(2, 8, 4 * GIB).tasks == 2
    assert DataShare(others=100).of_a_worker(2, 8, 4 * GIB).tasks == 1


def test_bytes_are_bounded_by_the_object_store_and_absolutely():
    assert DataShare().of_a_worker(512, 8192, 512 * 200 * GIB).bytes == MOST_BYTES
    small = DataShare().of_a_worker(8, 200, GIB)
    assert small.bytes == GIB * STORE_SHARE / 8 and small.tasks == small.bytes // TASK_BYTES == 2


def test_an_epoch_is_read_in_tasks_of_about_one_size_and_each_worker_reads():
    assert tasks_of_an_epoch(1, 1) == 1 and tasks_of_an_epoch(0, 4) == 4
    assert tasks_of_an_epoch(10 * TASK_BYTES, 2) == 10
    assert tasks_of_an_epoch(10 * TASK_BYTES, 3) == 12  # of a third each


@pytest.mark.parametrize("task_mib", [1, 16, 100, 600])
def test_reading_stops_at_the_limit_and_goes_on_however_large_a_task_is(task_mib):
    limit, size = ReadAhead(tasks=4, bytes=256 << 20), task_mib << 20
    running = waiting = finished = most = 0
    for turn in range(400):
        while limit.may_start(running, waiting, size):
            running += 1
        most = max(most, running * size + waiting)
        assert running <= 4
        if running and turn % 3:
            running, waiting = running - 1, waiting + size
        elif waiting:
            waiting, finished = waiting - size, finished + 1
    assert finished > 90
    assert most <= max(limit.bytes, size)


def test_an_operator_starts_no_task_beyond_its_limit():
    context = SimpleNamespace(get_config=lambda name: {_LIMIT: (ReadAhead(tasks=2, bytes=100), 30)}[name])
    waiting = {"bytes": 0}
    policy = Bounded(context, None, SimpleNamespace(get_mem_op_outputs=lambda op: waiting["bytes"]))

    def may_start(running, waiting_bytes, measured=None):
        waiting["bytes"] = waiting_bytes
        metrics = SimpleNamespace(average_bytes_outputs_per_task=measured)
        return policy.can_add_input(SimpleNamespace(metrics=metrics, num_active_tasks=lambda: running))

    assert may_start(0, 0) and may_start(1, 0)
    assert not may_start(2, 0)
    assert may_start(1, 40) and not may_start(1, 41)
    assert not may_start(1, 0, measured=51)


class SlowReader:
    """Units of which each takes a while to read, and whose rows say from when to when it was read."""

    unit_type = dict

    def read(self, unit):
        start = time.time()
        time.sleep(0.25)
        return pa.table({"number": [unit["window"]], "start": [start], "stop": [time.time()]})

    def pieces(self):
        return ()

    def with_pieces(self, pieces):
        return self


class SlowLoader:
    row_bytes = TASK_BYTES  # a task each
    reader = SlowReader()


def most_at_once(spans):
    moments = sorted([(start, 1) for start, _ in spans] + [(stop, -1) for _, stop in spans])
    running = most = 0
    for _, change in moments:
        running += change
        most = max(most, running)
    return most


QUICK = [(1, 2), (3, 8)]
OTHERS = [pair for pair in product([1, 2, 3, 8], [2, 3, 4, 8, 12]) if pair not in QUICK]


@pytest.mark.parametrize(
    ("workers", "cpus"),
    [*(pytest.param(*pair, marks=pytest.mark.slow) for pair in QUICK), *(pytest.param(*pair, marks=pytest.mark.long) for pair in OTHERS)],
)
def test_tasks_at_once_in_training_and_in_a_validation_while_the_training_is_open(workers, cpus, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: cpus - 1)  # a local cluster has one more

    held = min(1.0, (cpus - DATA_CPUS) / workers)  # what `plan_resources` gives each of them

    @ray.remote(num_cpus=held)
    class Worker:
        def read(self, share):
            from perceiver.data.order import ReadTask

            units = [ReadTask(0, i, 0, 1, 0, 1, 0, 1, 0, i) for i in range(16)]
            train = read_with_ray(SlowLoader(), iter(units), share, workers)
            first = [next(train).to_pylist()[0]]
            val = [table.to_pylist()[0] for table in read_with_ray(SlowLoader(), iter(units), share, workers)]
            return first + [table.to_pylist()[0] for table in train], val

    with connect(ParallelConfig()):
        actors = [Worker.remote() for _ in range(workers)]
        share = DataShare(cpus_per_worker=held)
        limit = share.here(workers)
        found = ray.get([actor.read.remote(share) for actor in actors])
    for train, val in found:
        assert len(train) == len(val) == 16
        for rows in (train, val):
            assert [row["number"] for row in rows] == list(range(16))
            assert most_at_once([(row["start"], row["stop"]) for row in rows]) <= limit.tasks
        # 16 tasks of 0.25 s one after the other would take 4 s.
        assert limit.tasks == 1 or most_at_once([(row["start"], row["stop"]) for row in val]) > 1
