"""`python -m benchmarks.serving RUN [--requests N] [--clients C] [--replicas R] [--kill]`: requests a second and their times, of a served
model, beside the plain loop over the same rows; with --kill a replica is ended without a word in the middle.

The requests have one row each, a text. A request counts as lost where its answer is not 200: nothing is sent twice.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import numpy as np

import perceiver
from perceiver.inference.load import describe
from perceiver.inference.predict import PredictOptions, predict_rows
from perceiver.inference.rows import Row
from perceiver.inference.served import mode_of

WORDS = "the a film was quiet and long but never dull with some good music in it".split()


def texts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, int(length))) for length in rng.integers(5, 60, count)]


def plain(run: str, rows: list[str], batch_size: int) -> float:
    """Rows a second of `predict_rows` in this process."""
    model = perceiver.load(run, device="cpu")
    options = PredictOptions(mode=mode_of(model.abilities, None, model.name), batch_size=batch_size)
    made = [Row(str(number), text) for number, text in enumerate(rows)]
    predict_rows(model, made[: 2 * batch_size], options)
    started = time.perf_counter()
    predict_rows(model, made, options)
    return len(made) / (time.perf_counter() - started)


def replicas_of(mark: str) -> list[int]:
    """Processes of the server's model replicas, known by a mark in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if (folder / "cmdline").read_text().startswith("ray::ServeReplica:perceiver:model") and mark in (
                folder / "environ"
            ).read_text():
                found.append(int(folder.name))
        except OSError:
            continue  # no process, or one that has ended
    return found


async def load(url: str, rows: list[str], column: str, clients: int, kill_at: int | None, mark: str) -> tuple[list[float], int, float]:
    """Seconds of each request, how many were lost, and seconds of all. `column` is the field of a row with its text."""
    times, lost, waiting = [], 0, iter(enumerate(rows))

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal lost
        for number, text in waiting:
            if number == kill_at:
                os.kill(replicas_of(mark)[0], signal.SIGKILL)
            started = time.perf_counter()
            async with session.post(url, json={"rows": [{column: text, "id": str(number)}]}) as reply:
                answer = await reply.json()
                lost += reply.status != 200 or answer["rows"][0]["id"] != str(number) or answer["rows"][0]["error"] is not None
            times.append(time.perf_counter() - started)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:
        started = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        return times, lost, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--port", type=int, default=18432)
    parser.add_argument("--kill", action="store_true")
    args = parser.parse_args()
    column = describe(args.run).data.text_column
    rows, mark = texts(args.requests), f"PERCEIVER_BENCHMARK_MARK={time.time_ns()}"
    name, _, value = mark.partition("=")
    command = [sys.executable, "-m", "ray_jobs.serve", args.run, "--replicas", str(args.replicas), "--port", str(args.port)]
    command += ["--batch-size", str(args.batch_size)]
    server = subprocess.Popen(command, env={**os.environ, name: value}, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        if not any("serving" in line for line in server.stdout):
            raise SystemExit("the server did not start")
        url = f"http://127.0.0.1:{args.port}/predict"
        if asyncio.run(load(url, rows[:100], column, args.clients, None, mark))[1]:
            raise SystemExit("the server refuses these requests: has the run texts?")
        times, lost, seconds = asyncio.run(load(url, rows, column, args.clients, len(rows) // 3 if args.kill else None, mark))
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
    p50, p99 = (1000 * float(np.percentile(times, share)) for share in (50, 99))
    result = {
        "requests": len(times), "clients": args.clients, "replicas": args.replicas, "killed": int(args.kill), "lost": lost,
        "requests_per_second": round(len(times) / seconds, 1), "p50_ms": round(p50, 1), "p99_ms": round(p99, 1),
        "longest_ms": round(1000 * max(times), 1), "plain_rows_per_second": round(plain(args.run, rows, args.batch_size), 1),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
