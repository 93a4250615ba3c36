"""Every input and output over two workers: answers and gradients are those of one. Processes with gloo, as Ray's workers are."""

import multiprocessing
import socket
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from perceiver.config import ParallelConfig, TrainingConfig
from perceiver.models import EmbeddingOutput, PerceiverIOConfig, build_model
from perceiver.training.parallel import build_sharded, join_world
from tests.models.test_any_input import HEADS, INPUTS, OUTPUTS, POINTS, config_of
from tests.support.small import leave
from tests.support.weights import full

WORKERS = 2
CASES: dict[str, tuple[PerceiverIOConfig, Any]] = {
    **{f"input {name}": (config_of(given), x) for name, (given, x) in INPUTS.items()},
    **{f"output {name}": (config_of(POINTS[0], output), POINTS[1]) for name, (output, _) in OUTPUTS.items()},
    "output embedding": (config_of(POINTS[0], EmbeddingOutput(num_outputs=5, num_query_channels=8)), POINTS[1]),
    "several outputs": (config_of(POINTS[0], HEADS), POINTS[1]),
    "queries in parts": (config_of(POINTS[0], OUTPUTS["coordinates"][0], query_chunk=3), POINTS[1]),
}


def row(x: Any, number: int) -> Any:
    """One example of a batch."""
    return {name: row(part, number) for name, part in x.items()} if isinstance(x, Mapping) else x[number : number + 1]


def doubled(x: Any) -> Any:
    """Floats in double precision, so that the order of sums does not matter."""
    if isinstance(x, Mapping):
        return {name: doubled(part) for name, part in x.items()}
    return x.double() if x.is_floating_point() else x


def parts(answer: Any) -> list[Tensor]:
    return list(answer.values()) if isinstance(answer, Mapping) else [answer]


def worker(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORKERS)
    world = join_world(torch.device("cpu"))
    for name, (config, x) in CASES.items():
        x = doubled(x)
        whole = build_model(config, 0)
        with torch.device("meta"):
            sharded = build_model(config)
        sharded = build_sharded(sharded, world, ParallelConfig(workers=WORKERS), TrainingConfig(seed=0), sharded.layers())
        expected, found = parts(whole(x)), parts(sharded(row(x, rank)))
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other[0], one[rank], atol=1e-9, rtol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
        for answers in (expected, found):
            sum(answer.square().sum() for answer in answers).backward()
        gradients = dict(sharded.named_parameters())
        for label, parameter in whole.named_parameters():
            mean = full(gradients[label].grad)
            torch.testing.assert_close(
                WORKERS * mean, parameter.grad, atol=1e-8, rtol=1e-7, msg=lambda text, where=f"{name}, {label}": f"{where}: {text}"
            )
    leave()


@pytest.mark.slow
def test_two_workers_compute_what_one_does() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    processes = [context.Process(target=worker, args=(rank, port)) for rank in range(WORKERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * WORKERS
