"""How many trainings run side by side."""

import pytest
import ray

from perceiver.config import ParallelConfig, UserError
from ray_jobs import capacity


@pytest.mark.parametrize("cpus, workers, asked, fits", [(3, 1, None, 2), (3, 2, None, 1), (16, 2, None, 6), (16, 2, 3, 3)])
def test_as_many_trainings_run_at_once_as_their_workers_and_data_tasks_fit(monkeypatch, cpus, workers, asked, fits):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(cpus)})
    monkeypatch.setattr("ray._private.state.state.get_max_resources_from_cluster_config", lambda: None)
    monkeypatch.setattr(capacity, "cluster_cores", lambda: cpus)
    found = capacity.plan_capacity(ParallelConfig(workers=workers), asked)
    assert found.concurrent == fits and found.threads_per_worker == max(1, cpus // (fits * workers))


def test_trials_that_do_not_fit_are_refused_with_the_sum(monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(capacity, "cluster_cores", lambda: 4)
    monkeypatch.setattr(capacity, "use_gpus", lambda parallel: False)
    with pytest.raises(UserError, match="4.5 CPUs in all; the cluster has 4 CPUs .* room for 0"):
        capacity.plan_capacity(ParallelConfig(workers=4), None)
    with pytest.raises(UserError, match="room for 2 at once: lower"):
        capacity.plan_capacity(ParallelConfig(workers=1), 3)
