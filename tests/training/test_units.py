"""Units of sharding: how many messages a step has, counted where two processes send them."""

import multiprocessing
import socket
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from perceiver.config import ParallelConfig
from perceiver.costs.memory import FormulaStep, step_memory
from perceiver.costs.traffic import gathers, step_traffic
from perceiver.models import build_model
from perceiver.models.weights import neighbours
from perceiver.training.parallel import build_sharded, join_world
from ray_jobs.memory_check import layout
from tests.support.small import image_experiment, leave, text_experiment

AR = replace(text_experiment(), model=replace(text_experiment().model, num_self_attention_layers=5))
IO = image_experiment()
IO = replace(IO, model=replace(IO.model, encoder=replace(IO.model.encoder, num_self_attention_layers_per_block=3)))
LAYOUTS = [
    ParallelConfig(workers=2, layers_per_unit=size, reshard_after_forward=reshard, activation_checkpointing=every)
    for size, reshard, every in product((1, 2, 3), (True, False), (0, 1))
]


def count(rank: int, port: int, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    world = join_world(torch.device("cpu"))
    found = []
    for chosen, parallel in product((AR, IO), LAYOUTS):
        with torch.device("meta"):
            model = build_model(chosen.model)
        build_sharded(model, world, parallel, chosen.training, model.layers())
        inputs = (torch.randint(6, 60, (2, 16)), 8) if chosen is AR else (torch.rand(2, 6, 6, 1),)
        with CommDebugMode() as counted:
            model(*inputs).square().mean().backward()
        counts = {str(name): number for name, number in counted.get_comm_counts().items()}
        found.append([sum(n for name, n in counts.items() if kind in name) for kind in ("gather", "reduce")])
    if rank == 0:
        results.put(found)
    results.close()
    results.join_thread()  # what is put is sent by a thread, which the end of the process would not wait for
    leave()


@pytest.mark.slow
def test_a_step_sends_as_many_messages_as_the_plan_counts():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=count, args=(rank, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = results.get(timeout=300)
    for process in processes:
        process.join(timeout=60)
    for (chosen, parallel), (gathered, _) in zip(product((AR, IO), LAYOUTS), found, strict=True):
        planned = gathers(FormulaStep(chosen.model), layout(chosen.training, parallel, chosen.optim, cuda=False))
        assert gathered == planned, parallel
    reduced = {parallel.layers_per_unit: number for parallel, (_, number) in zip(LAYOUTS, found, strict=False)}
    assert reduced == {1: 7, 2: 5, 3: 4}  # of five layers in a list, one that is in none, and the rest


def test_only_neighbours_of_one_block_are_gathered_together():
    assert neighbours(["", "a", "a", "a", "b", "b", ""], 2) == [[0], [1, 2], [3], [4, 5], [6]]
    assert neighbours(["", ""], 4) == [[0], [1]]
    assert neighbours(["a"] * 3, 1) == [[0], [1], [2]]


def test_keeping_layers_gathered_costs_their_memory_and_saves_the_second_gathering():
    step = FormulaStep(AR.model)
    freed, kept = (
        layout(AR.training, ParallelConfig(workers=2, reshard_after_forward=reshard), AR.optim, cuda=True) for reshard in (True, False)
    )
    *layers, root = step.units(2)
    saved = step_traffic(step, freed).gathered - step_traffic(step, kept).gathered
    assert saved == pytest.approx(4 * sum(layer.size for layer in layers) / 2)
    more = step_memory(step, kept).total - step_memory(step, freed).total
    assert 0 < more <= 4 * sum(layer.size for layer in layers)
