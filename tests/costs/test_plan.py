"""The plan as a user sees it, and the check of memory that a training makes before it holds anything."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest

from perceiver.config import ParallelConfig, UserError
from perceiver.costs.devices import DEVICES, GIB, device_named
from perceiver.presets import PRESETS
from ray_jobs.memory_check import check_fits, check_memory, layout_of, usable
from ray_jobs.plan import main


def plan(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def number(text: str, pattern: str) -> float:
    return float(re.search(pattern, text)[1].replace(",", ""))


def test_the_plan_of_the_large_run(capsys):
    text = plan(capsys, "clm-c4", "--workers", "8", "--device", "a100-40gb")
    assert "453,950,720" in text and "78,643,200,000 tokens" in text and ": fits" in text
    kinds = ("parameters", "gradients", "optimizer", "activations", "loss", "gathered", "reduced")
    assert sum(number(text, rf"{kind} +([\d.]+) GiB") for kind in kinds) == pytest.approx(number(text, r"together +([\d.]+)"), abs=0.04)
    flops = number(text, r"([\d.]+) PFLOP per step")
    hours = number(text, r": ([\d.,]+) hours")
    assert hours == pytest.approx(50_000 * flops * 1e15 / (8 * DEVICES["a100-40gb"].bf16 * 0.4) / 3600, rel=0.01)
    assert number(text, r"([\d,]+) GPU-hours") == pytest.approx(8 * hours, rel=0.01)


def test_the_plan_of_a_small_run_is_in_small_units(capsys):
    """Not 0.00 GiB of everything: Adam's two fp32 numbers for each of half the parameters."""
    text = plan(capsys, "quickstart", "--workers", "2", "--training.max-steps", "10")
    assert number(text, r"optimizer +([\d.]+) MiB") == pytest.approx(2 * 4 * number(text, r"parameters +([\d,]+)\n") / 2 / 2**20, abs=0.01)
    assert re.search(r"\d [mµ]s per step", text) and re.search(r"\d kB gathered", text)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A10G", "a10g"),
        ("Tesla V100-SXM2-16GB", "v100-16gb"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ],
)
def test_a_gpu_is_known_by_the_whole_words_of_its_drivers_name(name, kind):
    assert device_named(name) == DEVICES[kind]


@pytest.mark.parametrize("name", ["NVIDIA L400", "NVIDIA T400", "NVIDIA A1000", "Some Accelerator"])
def test_a_gpu_whose_name_only_resembles_a_known_one_is_not_taken_for_it(name):
    assert device_named(name) is None


def test_tf32_has_a_peak_of_its_own(capsys):
    def speed(device, precision):
        return number(plan(capsys, "clm-c4", "--device", device, "--training.precision", precision), r"step, ([\d,]+) tokens/s")

    assert speed("h100", "bf16") == pytest.approx(2 * speed("h100", "tf32"), rel=0.01)
    assert speed("h100", "fp32") < speed("h100", "tf32")
    assert speed("t4", "tf32") == speed("t4", "fp32")


def test_a_device_that_is_not_known_is_given_by_memory_and_peak(capsys):
    text = plan(capsys, "clm-c4", "--device-memory", "39.4", "--device-flops", "312", "--mfu", "0.2")
    known = plan(capsys, "clm-c4", "--device", "a100-40gb", "--mfu", "0.2")
    assert text.splitlines()[1:] == known.splitlines()[1:]
    with pytest.raises(UserError, match="device 'abacus' is not known: use one of h200, .*--device-memory GIB and --device-flops"):
        main(["clm-c4", "--device", "abacus"])
    with pytest.raises(UserError, match="--mfu is 40.0 and must be"):
        main(["clm-c4", "--mfu", "40"])


def test_memory_or_peak_of_a_known_device_may_be_another(capsys):
    known, slower = (plan(capsys, "clm-c4", "--device", "h100", *more) for more in ([], ["--device-flops", "494.5"]))
    speeds = [number(text, r"step, ([\d,]+) tokens/s") for text in (known, slower)]
    assert speeds[0] == pytest.approx(2 * speeds[1], rel=0.01) and slower.splitlines()[0] == known.splitlines()[0]
    assert "(20.0 GiB)" in plan(capsys, "clm-c4", "--device", "h100", "--device-memory", "20")
    for option in ("--device-memory", "--device-flops"):
        with pytest.raises(UserError, match=f"{option} is 0 and must be above 0"):
            main(["clm-c4", option, "0"])


def test_offloaded_shards_are_counted_for_the_host(capsys):
    text = plan(capsys, "clm-c4", "--parallel.cpu-offload", "True")
    assert number(text, r"parameters +([\d.]+) GiB") == 0
    assert number(text, r"in the host's memory ([\d.]+) GiB") == pytest.approx(16 * 453_950_720 / 8 / 2**30, abs=0.01)


def test_what_does_not_fit_is_said_and_what_would_fits(capsys):
    wide = ["clm-c4", "--device", "t4", "--parallel.activation-checkpointing", "0"]
    text = plan(capsys, *wide)
    assert "does NOT fit" in text
    size = re.search(r"recomputing no layer: (\d+)", text)[1]
    assert ": fits" in plan(capsys, *wide, "--parallel.micro-batch-size", size)


def test_the_whole_length_is_not_known_before_the_data_is_prepared(capsys, tmp_path):
    root = ["--data.root", str(tmp_path)]
    assert "unknown before the data is prepared" in plan(capsys, "img-clf-mnist", *root)
    assert "whole training     100 steps, 25,600 examples" in plan(capsys, "img-clf-mnist", *root, "--training.max-steps", "100")


def test_a_plan_starts_no_ray(tmp_path):
    code = "import sys; from ray_jobs.plan import main; main(['quickstart']); import ray; sys.exit(ray.is_initialized())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def c4(**parallel):
    return replace(PRESETS["clm-c4"](), parallel=replace(PRESETS["clm-c4"]().parallel, **parallel))


def test_a_training_that_cannot_fit_is_refused_with_the_least_change_that_would():
    def refusal(gib: float, **parallel) -> str:
        with pytest.raises(UserError) as error:
            check_fits(c4(**parallel), gib * GIB)
        return str(error.value)

    check_fits(c4(), 36 * GIB)
    text = refusal(36, activation_checkpointing=0)
    assert re.fullmatch(r"a step with a micro-batch of 256 needs \d+\.\d GiB but a device has 36.0 GiB for it: .* fits", text)
    size = int(re.search(r"--parallel.micro-batch-size (\d+) fits", text)[1])
    check_fits(c4(activation_checkpointing=0, micro_batch_size=size), 36 * GIB)
    text = refusal(3.05, activation_checkpointing=0, micro_batch_size=8)
    print(text)
    size = int(re.search(r"--parallel.activation-checkpointing 1 with --parallel.micro-batch-size (\d+) fits", text)[1])
    check_fits(c4(micro_batch_size=size), 3.05 * GIB)
    assert "--workers 2 with" in refusal(8, workers=1)
    assert "it takes devices with more memory" in refusal(0.1)


def test_the_memory_of_a_device_may_be_told():
    limited = c4(activation_checkpointing=0, device_memory_gib=16.0)
    with pytest.raises(UserError, match=r"a GPU of 16.0 GiB has 13.7 GiB for it: --parallel.micro-batch-size \d+ fits"):
        check_memory(limited, gpu=True)
    with pytest.raises(UserError, match="each worker has 16.0 GiB for it"):
        check_memory(limited, gpu=False)
    check_memory(c4(device_memory_gib=80.0), gpu=True)
    assert usable(80 * GIB) < 80 * GIB


def test_an_elastic_run_must_fit_with_its_least_workers():
    check_memory(c4(workers=8, micro_batch_size=64, device_memory_gib=10.0), gpu=True)
    with pytest.raises(UserError, match="a GPU of 10.0 GiB .where parallel.min-workers, 1, are all there are. has 8.0 GiB for it: "):
        check_memory(c4(workers=8, min_workers=1, micro_batch_size=64, device_memory_gib=10.0), gpu=True)
    check_memory(c4(workers=8, min_workers=4, micro_batch_size=64, device_memory_gib=10.0), gpu=True)


def test_the_layout_is_that_of_the_feed():
    layout = layout_of(replace(c4(), parallel=ParallelConfig(workers=6, replicas=2, micro_batch_size=100)))
    # 342 examples of 2,048 at most for one of 6 workers, in 4 micro-batches of 86.
    assert (layout.shards, layout.accumulated, layout.micro_batch_size) == (3, 4, 86)
