"""What a run asks Ray for, given what the cluster has."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from perceiver.config import UserError
from perceiver.costs.devices import cpu_has_bf16
from perceiver.disk import local_file, local_folder
from ray_jobs.cli import parse_experiment
from ray_jobs.memory_check import check_float8, check_precision, is_out_of_memory, out_of_memory
from ray_jobs.preflight import plan_resources, say_cpu_precision
from ray_jobs.train_checks import warn_of_warmup
from tests.support.small import heard


def cluster(monkeypatch, *cpus: float, gpus: float = 0, types: tuple[str, ...] = (), grows_to: dict[str, float] | None = None) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": n}} for n in cpus] + [{"Alive": False, "Resources": {"CPU": 64.0}}]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    kinds = {f"accelerator_type:{name}": 1.0 for name in types}
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": sum(cpus), "GPU": gpus, **kinds})
    monkeypatch.setattr("ray._private.state.state.get_max_resources_from_cluster_config", lambda: grows_to)


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


def test_a_cluster_at_rest_that_may_get_gpus_is_none_without(monkeypatch):
    cluster(monkeypatch, 8.0, grows_to={"CPU": 64, "GPU": 8})
    with pytest.raises(UserError, match="the cluster has 0 GPUs: .*--parallel.wait-minutes for a cluster that grows"):
        plan()
    assert not plan("--parallel.device", "cpu").gpu
    cluster(monkeypatch, 8.0, grows_to={"CPU": 64})
    assert not plan().gpu


def test_threads_of_a_worker_are_those_of_its_own_node(monkeypatch):
    cluster(monkeypatch, 64.0)
    assert plan("--workers", "2").threads_per_worker is None
    assert plan("--workers", "2", "--parallel.threads-per-worker", "3").threads_per_worker == 3


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_bf16_is_refused_where_a_gpu_has_no_units_for_it(monkeypatch, precision):
    experiment = parse_experiment(["quickstart", "--training.precision", precision], "x")
    cluster(monkeypatch, 8.0, gpus=2, types=("A100",))
    check_precision(experiment, gpu=True)
    cluster(monkeypatch, 8.0, gpus=2, types=("A100", "T4"))
    check_precision(experiment, gpu=False)
    if precision == "bf16":
        with pytest.raises(UserError, match=r"--training.precision is 'bf16', but .* \(T4\): use --training.precision fp32"):
            check_precision(experiment, gpu=True)
    else:
        check_precision(experiment, gpu=True)


@pytest.mark.parametrize(
    ("units", "words", "said"),
    [
        (False, "clm-wikitext-small --training.precision bf16", "no units for bf16: --training.precision fp32 is faster"),
        (False, "clm-wikitext-small", None),
        (True, "clm-wikitext-small", "has units for bf16: --training.precision bf16 may take half the time"),
        (True, "clm-wikitext-small --training.precision bf16", None),
        (True, "quickstart", None),
        (None, "clm-wikitext-small --training.precision bf16", None),
        (False, "clm-wikitext-small --training.precision bf16 --parallel.address 10.0.0.1:6379", None),
    ],
)
def test_a_training_on_a_cpu_says_which_precision_would_be_faster(units, words, said, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray_jobs.preflight.cpu_has_bf16", lambda: units)
    experiment = parse_experiment(words.split(), "x")
    with heard() as lines:
        say_cpu_precision(experiment, gpu=True)
        assert lines == []
        say_cpu_precision(experiment, gpu=False)
    assert len(lines) == bool(said) and all(said in line for line in lines)


def test_a_cpu_with_units_for_bf16_is_known_by_its_features(tmp_path):
    described = tmp_path / "cpuinfo"
    for line, units in (("flags\t\t: fpu avx512f avx512_bf16", True), ("flags\t\t: fpu avx2", False), ("Features\t: asimd bf16", True)):
        described.write_text(f"processor\t: 0\n{line}\n")
        assert cpu_has_bf16(described) is units
    described.write_text("processor\t: 0\n")
    assert cpu_has_bf16(described) is None and cpu_has_bf16(tmp_path / "none") is None


def test_float8_is_refused_where_there_are_no_units_or_is_no_package_for_it(monkeypatch):
    experiment = parse_experiment(["quickstart", "--training.precision", "float8"], "x")
    for types, other in (({"T4"}, "fp32"), ({"A100-40G", "H100"}, "bf16")):
        cluster(monkeypatch, 8.0, gpus=2, types=types)
        with pytest.raises(UserError, match=f"'float8', but the cluster has GPUs without units for it .*use --training.precision {other}"):
            check_precision(experiment, gpu=True)
    cluster(monkeypatch, 8.0, gpus=2, types=("H100",))
    check_precision(experiment, gpu=True)
    with pytest.raises(UserError, match="CPUs have no units"):
        check_precision(experiment, gpu=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for found, message in ((None, r"needs torchao: pip install 'perceiver-ray\[float8\]'"), (object(), "CPUs have no units")):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=found: found)
        with pytest.raises(UserError, match=message):
            check_float8(experiment.training, experiment.parallel)
    check_float8(experiment.training, replace(experiment.parallel, address="10.0.0.1:6379"))
    check_float8(replace(experiment.training, precision="bf16"), experiment.parallel)


@pytest.mark.parametrize("change, size, offered", [
    ([], 64, ["--parallel.micro-batch-size 32", "--parallel.activation-checkpointing 1"]),
    (["--parallel.activation-checkpointing", "1"], 64, ["--parallel.micro-batch-size 32"]),
    (["--parallel.micro-batch-size", "1", "--parallel.activation-checkpointing", "1"], 1, ["--workers"]),
])  # fmt: skip
def test_a_full_device_is_told_with_what_a_step_was_expected_to_take_and_what_takes_less(change, size, offered):
    experiment = parse_experiment(["img-clf-mnist", "--training.global-batch-size", "64", *change], "x")
    said = out_of_memory(experiment, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"))
    assert f"a micro-batch of {size} was expected to take " in said and "more" not in said.partition(")")[0]
    assert [f for f in ("--parallel.micro-batch-size 32", "--parallel.activation-checkpointing 1", "--workers") if f in said] == offered
    sizes = [float(number) * {"GiB": 1024, "MiB": 1}[unit] for number, unit in re.findall(r"([\d.]+) (GiB|MiB)(?: of|\))", said)]
    assert all(less < sizes[0] for less in sizes[1:])


def test_full_memory_is_known_by_its_error_and_says_whose_it_is():
    experiment = parse_experiment(["img-clf-mnist"], "x")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    for error, whose in ((caught.value, "machine"), (MemoryError(), "machine"), (torch.OutOfMemoryError("CUDA out of memory."), "device")):
        assert is_out_of_memory(error) and f"the {whose}'s memory is full (" in out_of_memory(experiment, error)
    assert not is_out_of_memory(RuntimeError("connection closed by peer"))


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


@pytest.mark.parametrize("link", ["nowhere", "itself"])
def test_a_folder_that_is_a_link_to_nothing_is_refused(link, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / {"itself": "link"}.get(link, link))
    with pytest.raises(UserError, match="cannot be a folder: (No such file|Too many levels of symbolic links)"):
        local_folder("output", str(tmp_path / "link" / "x"))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("{file}/page.html", "must be a .html file in a folder that exists"),
        ("{folder}/page.htm", "must be a .html file in a folder that exists"),
        ("{folder}/folder.html", "which is a folder"),
        ("/proc/page.html", "which cannot be written"),
        ("~nosuchuser/page.html", "cannot be a file"),
        ("{folder}/a\0.html", "cannot be a file"),
    ],
)
def test_a_file_that_cannot_be_is_refused_with_what_is_in_the_way(path, reason, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UserError, match=reason) as error:
        local_file("out", path.format(file=tmp_path / "file", folder=tmp_path), ".html")
    assert str(error.value).startswith("--out is ")
    assert local_file("out", str(tmp_path / "page.html"), ".html") == tmp_path / "page.html" and not (tmp_path / "page.html").exists()


def test_to_look_at_a_folder_makes_nothing(tmp_path):
    assert local_folder("run.storage", str(tmp_path / "a" / "b")) == tmp_path / "a" / "b" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--optim.schedule", "onecycle"],
            "onecycle begins at 0.04 of optim.lr and rises by itself, after a warm-up of 50 steps: --optim.warm",
        ),
        (["--optim.schedule", "onecycle", "--optim.warmup-steps", "0"], ""),
        (["--optim.schedule", "warmrestarts"], ""),
        (["--training.max-steps", "40"], "warmup-steps is 50, but the run has 40 steps: the learning rate never reaches optim.lr"),
    ],
)
def test_a_warmup_that_does_not_go_with_the_run_is_said(words, message, caplog):
    manifest = SimpleNamespace(splits={"train": SimpleNamespace(rows=6400)})
    warn_of_warmup(parse_experiment(["quickstart", *words], "x"), manifest)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == bool(message) and all(message in text for text in said)
