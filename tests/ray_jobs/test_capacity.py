"""How many trainings run side by side."""

import pytest
import ray

from perceiver.config import ParallelConfig, UserError
from ray_jobs import capacity


def cluster(monkeypatch, held: float = 0.0, **resources: float) -> None:
    """A cluster with these resources, of which other jobs hold some CPUs."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    monkeypatch.setattr(ray, "available_resources", lambda: {**resources, "CPU": resources["CPU"] - held})
    monkeypatch.setattr(capacity, "cluster_cores", lambda: int(resources["CPU"]))


@pytest.mark.parametrize("cpus, workers, asked, fits", [(3, 1, None, 2), (3, 2, None, 1), (16, 2, None, 6), (16, 2, 3, 3)])
def test_as_many_trainings_run_at_once_as_their_workers_and_data_tasks_fit(monkeypatch, cpus, workers, asked, fits):
    cluster(monkeypatch, CPU=float(cpus))
    monkeypatch.setattr("ray._private.state.state.get_max_resources_from_cluster_config", lambda: None)
    found = capacity.plan_capacity(ParallelConfig(workers=workers), asked)
    assert found.concurrent == fits and found.threads_per_worker == max(1, cpus // (fits * workers))


def test_trials_that_do_not_fit_are_refused_with_the_sum(monkeypatch):
    cluster(monkeypatch, CPU=4.0)
    monkeypatch.setattr(capacity, "use_gpus", lambda parallel: False)
    with pytest.raises(UserError, match="4.5 CPUs in all; the cluster has 4 CPUs .* room for 0"):
        capacity.plan_capacity(ParallelConfig(workers=4), None)
    with pytest.raises(UserError, match="room for 2 at once: lower"):
        capacity.plan_capacity(ParallelConfig(workers=1), 3)


@pytest.mark.parametrize(("held", "fits"), [(0.0, 5), (4.0, 2), (7.5, 1), (8.0, 1)])
def test_beside_other_jobs_as_many_run_at_once_as_find_room_now_and_one_waits_where_none_does(monkeypatch, held, fits):
    cluster(monkeypatch, held=held, CPU=8.0)
    monkeypatch.setattr(capacity, "use_gpus", lambda parallel: False)
    found = capacity.plan_capacity(ParallelConfig(), None)
    assert found.concurrent == fits and ("beside what other jobs hold now" in found.why) == (fits < 5)
    assert capacity.plan_capacity(ParallelConfig(), 5).concurrent == 5, "as many as are asked for, as they find room one after the other"
    assert capacity.most_at_once(ParallelConfig(), 3).concurrent == min(3, fits)
