"""What a run asks Ray for, given what the cluster has."""

import pytest

from perceiver.config import UserError
from ray_jobs.cli import parse_experiment
from ray_jobs.preflight import local_folder, plan_resources


def cluster(monkeypatch, *cpus: float, gpus: float = 0) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": n}} for n in cpus] + [{"Alive": False, "Resources": {"CPU": 64.0}}]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": sum(cpus), "GPU": gpus})


def plan(*args: str):
    return plan_resources(parse_experiment(["quickstart", *args], "x"))


@pytest.mark.parametrize("sizes", [(2.0,), (4.0, 8.0), (16.0, 16.0), (96.0, 16.0)])
def test_workers_of_an_elastic_run_leave_room_for_data_on_every_node_they_fill(monkeypatch, sizes):
    cluster(monkeypatch, 0.0, *sizes)
    resources = plan("--workers", "2..100")
    assert (resources.min_workers, resources.workers) == (2, 100)
    for cpus in sizes:
        fitting = int(cpus / resources.cpus_per_worker)
        assert fitting >= cpus - 1 and cpus - fitting * resources.cpus_per_worker >= 0.5


def test_where_not_every_node_can_keep_room_for_data_the_smallest_do(monkeypatch):
    cluster(monkeypatch, 2.0, 3.0)
    share = plan("--workers", "1..4").cpus_per_worker
    assert 2 - 2 // share * share >= 0.5 and 2 // share >= 1


def test_an_elastic_run_needs_room_for_its_least_workers_alone(monkeypatch):
    cluster(monkeypatch, 4.0)
    assert plan("--workers", "1..8").min_workers == 1
    with pytest.raises(UserError, match="parallel.min-workers is 5 but the cluster has 4 CPUs"):
        plan("--workers", "5..8")
    with pytest.raises(UserError, match="parallel.workers is 8 but the cluster has 4 CPUs"):
        plan("--workers", "8")


def test_an_elastic_run_on_nodes_too_small_for_worker_and_data_is_refused(monkeypatch):
    cluster(monkeypatch, 1.0, 1.0)
    with pytest.raises(UserError, match="would leave none for its data tasks: set parallel.cpus-per-worker"):
        plan("--workers", "1..2")
    assert plan("--workers", "1..2", "--parallel.cpus-per-worker", "0.5").cpus_per_worker == 0.5


def test_gpu_workers_are_counted_by_gpus(monkeypatch):
    cluster(monkeypatch, 16.0, gpus=2)
    assert plan("--workers", "1..8").gpu and plan("--workers", "1..8").cpus_per_worker == 1.0
    with pytest.raises(UserError, match="parallel.min-workers is 3 but the cluster has 2 GPUs"):
        plan("--workers", "3..8")


@pytest.mark.parametrize(
    "path, reason",
    [
        ("{file}/runs", "is a file"),
        ("/proc/runs", "/proc cannot be written to"),
        ("~nosuchuser/runs", "cannot be a folder"),
        ("{folder}/" + "x" * 300, "cannot be a folder: File name too long"),
        ("{folder}/a\0b", "cannot be a folder"),
    ],
)
def test_a_folder_that_cannot_be_is_refused_with_what_is_in_the_way(path, reason, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=reason) as error:
        local_folder("run.storage", path.format(file=tmp_path / "file", folder=tmp_path))
    assert str(error.value).startswith("--run.storage is ")


def test_to_look_at_a_folder_makes_nothing(tmp_path):
    assert local_folder("run.storage", str(tmp_path / "a" / "b")) == tmp_path / "a" / "b" and not list(tmp_path.iterdir())
