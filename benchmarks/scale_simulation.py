"""A training on 8, 64 and 512 GPUs by arithmetic: step with FSDP's and HSDP's traffic, checkpoints, start, reads, messages, memory.

    python -m benchmarks.scale_simulation [clm-c4] [--device h100] [--mfu 0.45] [--gpus 8 64 512] [--network 50] [--storage 20]
        [--weak] [--check] [--out results.json] [--plot scale.png]

No device is needed and nothing is trained. The global batch stays that of the preset, unless --weak lets it grow with the GPUs from
eight on. `--check` measures on this machine what can be measured on it, and prints it beside what the same formulas say: collectives
(two processes, gloo), writing a checkpoint, messages of workers (counted), rows read (counted).

Not checked by anything here: latency and bandwidth of NCCL, contention on a network or in an object store, the share of traffic that
computation hides, how fast Ray starts hundreds of actors, memory of a head with hundreds of workers.
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from perceiver.costs.devices import DEVICES, GIB
from perceiver.costs.scale import GB, Cluster, checkpoint_time, collective_seconds
from perceiver.data.order import Order, lanes_and_window
from perceiver.data.reading import read_ratio
from perceiver.plots import color, frame, log_scale, new_figure, png
from perceiver.presets import PRESETS
from perceiver.training.safetensors_file import write_safetensors
from ray_jobs import watch
from ray_jobs.collector import Collector
from ray_jobs.memory_check import usable
from ray_jobs.recomputation import resolve
from ray_jobs.scale import Scale, messages, on, simulate
from ray_jobs.watch import Steps, reporting

C4_ROWS, ROWS_PER_BLOCK = 164_500_000, 256
COLUMNS = (
    ("GPUs", lambda s: f"{s.workers}"),
    ("layout", lambda s: f"{s.workers // s.replicas} x {s.replicas}"),
    ("step s", lambda s: f"{s.step.total:.3f}"),
    ("computing", lambda s: f"{s.step.efficiency:.0%}"),
    ("traffic s", lambda s: f"{s.step.traffic:.3f}"),
    ("M units/s", lambda s: f"{s.units_per_second / 1e6:.2f}"),
    ("ckpt write s", lambda s: f"{s.checkpoint.writing:.1f}"),
    ("load s", lambda s: f"{s.checkpoint.loading:.1f}"),
    ("start s", lambda s: f"{s.startup:.0f}"),
    ("read MB/s", lambda s: f"{s.reads.bytes_per_second / 1e6:.0f}"),
    ("GET/s", lambda s: f"{s.reads.requests_per_second:.0f}"),
    ("to driver/s", lambda s: f"{s.messages.to_driver:.1f}"),
    ("polls/s", lambda s: f"{s.messages.polls:.0f}"),
    ("head GiB", lambda s: f"{s.head_memory / GIB:.1f}"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="clm-c4")
    parser.add_argument("--device", default="h100", choices=sorted(DEVICES))
    parser.add_argument("--mfu", type=float, default=0.45, help="of one device alone (%(default)s)")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--network", type=float, default=50.0, metavar="GB/S", help="a node gets from others (%(default)g)")
    parser.add_argument("--storage", type=float, default=20.0, metavar="GB/S", help="storage gives all nodes together (%(default)g)")
    parser.add_argument("--weak", action="store_true", help="the global batch grows with the GPUs")
    parser.add_argument("--rows", type=int, default=C4_ROWS, help="of the data set (%(default)s: C4 in windows of 1,024 ids)")
    parser.add_argument("--check", action="store_true", help="measure here what can be")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    cluster = Cluster(inter_node=args.network * GB, storage=args.storage * GB)
    found = simulations(args.preset, args.device, args.mfu, cluster, args.gpus, args.rows, args.weak)
    print_table([[name for name, _ in COLUMNS], *([text(s) for _, text in COLUMNS] for s in found)])
    results = {"cluster": asdict(cluster), "arguments": {k: str(v) for k, v in vars(args).items()}, "scales": [asdict(s) for s in found]}
    if args.plot:
        args.plot.write_bytes(picture(found, f"{args.preset} on {args.device}, {args.network:g} GB/s between nodes"))
    if args.check:
        results["checks"] = checks()
        print()
        print_table([["checked here", "measured", "by the formula", "ratio"], *results["checks"]])
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


def simulations(preset: str, device: str, mfu: float, cluster: Cluster, gpus: list[int], rows: int, weak: bool) -> list[Scale]:
    """Of each number of GPUs with parameters sharded over all of them, and where there are several nodes, over those of a node."""
    base, found = PRESETS[preset](), []
    base = replace(base, parallel=replace(base.parallel, activation_checkpointing="auto", device="cuda"))
    row_bytes = 2 * getattr(base.model, "max_seq_len", 1024)
    for workers in gpus:
        batch = base.training.global_batch_size * (max(1, workers // 8) if weak else 1)
        for replicas in dict.fromkeys((1, max(1, workers // cluster.gpus_per_node))):
            experiment, _ = resolve(on(base, workers, replicas, batch), usable(DEVICES[device].memory))
            found.append(
                simulate(
                    experiment, DEVICES[device], mfu, cluster, row_bytes=row_bytes, rows_per_block=ROWS_PER_BLOCK,
                    read_ratio=read_ratio(order_of(rows, batch, row_bytes), workers, 40),
                )
            )  # fmt: skip
    return found


def order_of(rows: int, batch: int, row_bytes: int) -> Order:
    lanes, window = lanes_and_window(-(-rows // ROWS_PER_BLOCK), ROWS_PER_BLOCK * row_bytes, batch)
    return Order(rows=rows, rows_per_block=ROWS_PER_BLOCK, global_batch_size=batch, window_blocks=window, max_lanes=lanes, seed=0)


def print_table(rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def picture(found: list[Scale], title: str) -> bytes:
    """Throughput and the parts of a step, over the number of GPUs."""
    figure = new_figure(1100, 420, title)
    left, right = figure.subplots(1, 2)
    node = [s for s in found if s.workers // s.replicas == 8]
    for number, (name, chosen) in enumerate([("sharded over all", [s for s in found if s.replicas == 1]), ("over a node (HSDP)", node)]):
        gpus = [s.workers for s in chosen]
        left.plot(gpus, [s.units_per_second / s.workers for s in chosen], marker="o", color=color(number), label=name)
        right.plot(gpus, [s.step.total for s in chosen], marker="o", color=color(number), label=f"step, {name}")
        right.plot(gpus, [s.step.traffic for s in chosen], marker="x", ls="--", color=color(number), label=f"traffic, {name}")
    right.plot([s.workers for s in found], [s.step.computing for s in found], color="0.4", ls=":", label="computing")
    frame(left, "throughput of a GPU", "GPUs", "tokens or examples per second")
    frame(right, "a step", "GPUs", "seconds")
    log_scale(left, "x")
    log_scale(right, "x", "y")
    left.legend(fontsize="small", loc="lower left")
    right.legend(fontsize="small", loc="upper center")
    return png(figure)


# -------------------------------------------------------------------------------------------------------------- checks


def checks() -> list[list[str]]:
    return [*check_collectives(), check_checkpoint(), check_messages(8), check_messages(64)]


def line(name: str, measured: float, expected: float, unit: str) -> list[str]:
    return [name, f"{measured:.4g} {unit}", f"{expected:.4g} {unit}", f"{measured / expected:.2f}"]


def check_collectives() -> list[list[str]]:
    """Two processes with gloo: latency from a small collective, bandwidth from one of 16 MiB; the others are predicted."""
    sizes = [1 << 10, 1 << 20, 4 << 20, 64 << 20, 16 << 20]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=_collectives, args=(rank, port, sizes, answers)) for rank in range(2)]
    for process in processes:
        process.start()
    gathered, reduced = answers.get(timeout=240)
    for process in processes:
        process.join()
    found = []
    for name, times, factor in (("all-gather", gathered, 1), ("all-reduce", reduced, 2)):
        received = {size: factor * size / 2 for size in sizes}
        bandwidth = received[sizes[-1]] / (times[sizes[-1]] - times[sizes[0]])
        here = Cluster(gpus_per_node=2, intra_node=bandwidth, latency=times[sizes[0]])
        found += [
            line(f"{name} of {size >> 20} MiB, gloo", 1e3 * times[size], 1e3 * collective_seconds(here, received[size], 2), "ms")
            for size in sizes[1:-1]
        ]
    return found


def _collectives(rank: int, port: int, sizes: list[int], answers: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    gathered, reduced = {}, {}
    for size in sizes:
        whole, part = torch.zeros(size // 4), torch.zeros(size // 8)
        gathered[size] = _least(lambda whole=whole, part=part: dist.all_gather_into_tensor(whole, part))
        reduced[size] = _least(lambda whole=whole: dist.all_reduce(whole))
    if rank == 0:
        answers.put((gathered, reduced))
    dist.barrier()
    dist.destroy_process_group()


def _least(action, repeats: int = 15) -> float:
    """What others on the machine did not stretch."""
    times = []
    for _ in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def check_checkpoint() -> list[str]:
    """Writing (with hash and fsync) of 64 MiB tells the rate, by which 256 MiB are predicted."""

    def write(size: int) -> float:
        tensors = {str(i): torch.rand(size // 16) for i in range(4)}
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            write_safetensors(Path(folder) / "x.safetensors", tensors, {})
            return time.perf_counter() - start

    small = statistics.median(write(64 << 20) for _ in range(3))
    rate = (64 << 20) / small
    cluster = Cluster(storage=1e15, storage_node=1e15, worker_write=rate)
    return line(
        f"a checkpoint's 256 MiB written at {rate / 1e6:.0f} MB/s", write(256 << 20), checkpoint_time(256 << 20, 1, cluster).writing, "s"
    )


def check_messages(workers: int, seconds: float = 2.0) -> list[str]:
    """The workers' own reports, a hundred times as often as they are made, to a driver that counts its messages."""
    faster, count = 100.0 if workers <= 8 else 20.0, [0]

    def received(*_) -> None:
        count[0] += 1

    driver = SimpleNamespace(put_all=SimpleNamespace(remote=received))
    nodes = [Collector(driver, every=watch.EVERY / faster) for _ in range(workers // 8)]
    direct = workers <= 32
    contexts = []
    for rank in range(workers):
        send = received if direct else nodes[rank // 8].put
        contexts.append(reporting(send, rank, "node", "host", Steps(), every=watch.EVERY / faster))
    for context in contexts:
        context.__enter__()
    time.sleep(0.2)
    start, before = time.perf_counter(), count[0]
    time.sleep(seconds)
    rate = (count[0] - before) / (time.perf_counter() - start) / faster
    for context in contexts:
        context.__exit__(None, None, None)
    return line(f"reports of {workers} workers to the driver", rate, messages(workers, workers // 8, 1.0, 10).reports, "a second")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
