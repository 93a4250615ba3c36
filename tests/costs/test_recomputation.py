"""`--parallel.activation-checkpointing auto`: the fewest recomputed layers that fit, counted on the model that is built."""

from dataclasses import replace

import pytest
import torch

from perceiver.config import ParallelConfig, UserError, from_dict, to_dict
from perceiver.costs.devices import GIB
from perceiver.costs.memory import step_memory
from perceiver.presets import PRESETS
from perceiver.tasks import build_task
from perceiver.training import parallel as parallel_module
from perceiver.training.parallel import build_sharded, join_world
from ray_jobs.memory_check import layout_of, step_of
from ray_jobs.plan import main
from ray_jobs.recomputation import fit_memory, least, resolve, settings


def c4(**parallel):
    return replace(PRESETS["clm-c4"](), parallel=ParallelConfig(workers=8, activation_checkpointing="auto", **parallel))


def recomputed(every, num_layers):
    return sum(number % every == 0 for number in range(num_layers)) if every else 0


@pytest.mark.parametrize("num_layers", [1, 2, 7, 21])
def test_each_setting_recomputes_more_layers_than_the_one_before_and_none_is_left_out(num_layers):
    counts = [recomputed(every, num_layers) for every in settings(num_layers)]
    possible = {recomputed(every, num_layers) for every in range(num_layers + 2)}
    assert counts == sorted(possible) and counts[0] == 0 and counts[-1] == num_layers


@pytest.mark.parametrize("gib", [20, 34, 65, 80, 95, 110, 200])
def test_no_setting_with_fewer_recomputed_layers_would_fit(gib):
    experiment, limit = c4(), gib * GIB
    step, layout = step_of(experiment), layout_of(experiment)
    memory = {n: step_memory(step, replace(layout, checkpoint_every=n)).total for n in settings(21)}
    every = least(step, layout, limit)
    if min(memory.values()) > limit:
        assert every == 1
        return
    assert memory[every] <= limit
    assert all(size > limit for n, size in memory.items() if recomputed(n, 21) < recomputed(every, 21))


def test_more_memory_means_less_recomputing():
    step, layout = step_of(c4()), layout_of(c4())
    low, high = (step_memory(step, replace(layout, checkpoint_every=n)).total for n in (1, 0))
    counts = [recomputed(least(step, layout, low + (high - low) * part / 10), 21) for part in range(11)]
    assert counts == sorted(counts, reverse=True) and counts[0] == 21 and counts[-1] == 0 and len(set(counts)) > 4


def test_as_many_layers_of_the_model_are_recomputed_as_was_chosen(monkeypatch):
    made = replace(PRESETS["clm-c4-small"](), parallel=ParallelConfig(activation_checkpointing="auto"))
    step, layout = step_of(made), layout_of(made, cuda=False)
    sizes = [step_memory(step, replace(layout, checkpoint_every=n)).total for n in (0, 2, 1)]
    chosen, line = resolve(made, (sizes[0] + sizes[1]) / 2, cuda=False)
    count = []
    monkeypatch.setattr(parallel_module, "checkpoint", count.append)
    with torch.device("meta"):
        model = build_task(chosen).build_model()
    build_sharded(model, join_world(torch.device("cpu")), chosen.parallel, chosen.training, model.layers())
    assert 0 < len(count) == recomputed(chosen.parallel.recompute_every, len(model.layers())) < len(model.layers())
    assert line.startswith(f"--parallel.activation-checkpointing auto: {chosen.parallel.recompute_every} (one in ")


def test_what_fits_no_way_is_refused_with_what_would_and_an_unknown_memory_is_asked_for(monkeypatch):
    with pytest.raises(UserError, match="needs .* but a GPU of 8.0 GiB .* fits"):
        fit_memory(c4(device_memory_gib=8.0), gpu=True)
    monkeypatch.setattr("ray_jobs.memory_check._gpu_memory", lambda: None)
    with pytest.raises(UserError, match="activation-checkpointing is 'auto', but the memory .* --parallel.device-memory-gib"):
        fit_memory(c4(), gpu=True)


def test_an_elastic_run_is_chosen_for_its_least_workers():
    few, _ = fit_memory(c4(min_workers=2, micro_batch_size=128, device_memory_gib=40.0), gpu=True)
    fixed, _ = fit_memory(replace(c4(micro_batch_size=128, device_memory_gib=40.0)), gpu=True)
    two = replace(c4(), parallel=ParallelConfig(workers=2, micro_batch_size=128, activation_checkpointing="auto", device_memory_gib=40.0))
    assert few.parallel.activation_checkpointing == fit_memory(two, gpu=True)[0].parallel.activation_checkpointing
    assert few.parallel.workers == fixed.parallel.workers == 8


def test_the_plan_says_what_is_chosen_and_what_is_neither_is_refused(capsys):
    assert main(["clm-c4", "--device", "a100-40gb", "--parallel.activation-checkpointing", "auto"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("--parallel.activation-checkpointing auto: ") and "without recomputing" in first
    assert any("fits" in line and "together" in line for line in rest)
    with pytest.raises(UserError, match="parallel.activation-checkpointing is -1 and must be auto or not negative"):
        main(["clm-c4", "--parallel.activation-checkpointing", "-1"])
    saved = to_dict(c4())
    assert from_dict(saved).parallel.activation_checkpointing == "auto"
