"""Time and peak memory of commands that only look something up, against `python -c "import numpy"`; or time to a first step.

    python -m benchmarks.startup [--repeats 7] [--out benchmarks/results/startup_2_cores.json]
    python -m benchmarks.startup --train [--repeats 3] [--tree FOLDER ...]

Rounds of all commands follow each other, so that all of them see the same machine; the first round only warms the file cache, and
makes the help that is kept. Prints the median and least time, the processor's time (which others on the machine do not stretch) and
the peak memory of each. The list of runs has 20, made for the occasion.

With --train it is `perceiver train quickstart` from the command to the first step's metrics, on prepared data, alternately with the code
of each tree: seconds, the processor's seconds of all processes together, and how much of the first step's time was waiting for its batch.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = [sys.executable, "-c", "from ray_jobs.main import entry; entry()"]
"""What the console script does; that itself is there only where the package is installed."""
EXPERIMENT = """import json
from perceiver.config import to_dict
from perceiver.presets import PRESETS
print(json.dumps(to_dict(PRESETS["quickstart"]())))"""
"""Prints that of the runs."""
MEASURED = {
    "python -c 'import numpy'": [sys.executable, "-c", "import numpy"],
    "perceiver --help": [*COMMAND, "--help"],
    "perceiver presets": [*COMMAND, "presets"],
    "perceiver runs (20 runs)": [*COMMAND, "runs"],
    "perceiver completion --words train": [*COMMAND, "completion", "--words", "train"],
    "perceiver train quickstart --help": [*COMMAND, "train", "quickstart", "--help"],
    "perceiver train quickstrat (a mistake)": [*COMMAND, "train", "quickstrat"],
}
FIRST = "perceiver train quickstart --help, first time"
"""With a home of its own, in which no help is kept."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count (%(default)s)")
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    parser.add_argument("--train", action="store_true", help="measure the way to a training's first step")
    parser.add_argument("--preset", default="quickstart", help="what is trained (%(default)s)")
    parser.add_argument("--tree", type=Path, nargs="+", default=[Path.cwd()], help="folders with the code (this one)")
    args = parser.parse_args()
    if args.train:
        first_steps(args.preset, args.tree, args.repeats, args.out)
        return
    # In a process of its own: a process counts as its own peak what the one that starts it has in memory at that moment.
    experiment = subprocess.run([sys.executable, "-c", EXPERIMENT], capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as home:
        for number in range(20):
            make_run(Path(home) / "runs" / f"run-{number}", experiment)
        environment = {**os.environ, "PERCEIVER_HOME": home}
        rounds = [
            {name: measure(words, environment) for name, words in MEASURED.items()} | {FIRST: measure_first(Path(home) / str(number))}
            for number in range(args.repeats + 1)
        ][1:]
    results = {}
    for name in rounds[0]:
        seconds, processor, mebibytes = zip(*(measured[name] for measured in rounds), strict=True)
        results[name] = {
            "median_s": round(statistics.median(seconds), 3),
            "min_s": round(min(seconds), 3),
            "median_cpu_s": round(statistics.median(processor), 3),
            "peak_mib": round(max(mebibytes), 1),
        }
        print(f"{name:46}  " + "  ".join(f"{key} {value:g}" for key, value in results[name].items()))
    if args.out:
        machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "load_at_end": round(os.getloadavg()[0], 1)}
        args.out.write_text(json.dumps({"machine": machine, "repeats": args.repeats, "commands": results}, indent=1) + "\n")


def first_steps(preset: str, trees: list[Path], repeats: int, out: Path | None) -> None:
    """Prints and writes the seconds to the first step, by tree."""
    found: dict[str, list[dict[str, float]]] = {str(tree): [] for tree in trees}
    with tempfile.TemporaryDirectory() as home:
        for number in range(repeats + 1):  # the first one prepares the data and warms the file cache
            for tree in trees:
                environment = {**os.environ, "PERCEIVER_HOME": home, "PYTHONPATH": str(tree)}
                measured = first_step(preset, f"{tree.name}-{number}", tree, environment, Path(home) / "runs")
                if number:
                    found[str(tree)].append(measured)
                    print(f"{tree}: " + "  ".join(f"{key} {value:.2f}" for key, value in measured.items()), flush=True)
    results = {tree: {key: statistics.median(one[key] for one in all_of) for key in all_of[0]} for tree, all_of in found.items()}
    for tree, medians in results.items():
        print(f"{tree}, median of {repeats}: " + "  ".join(f"{key} {value:.2f}" for key, value in medians.items()))
    if out:
        machine = {"cpus": os.cpu_count(), "load_at_end": round(os.getloadavg()[0], 1)}
        out.write_text(
            json.dumps(
                {
                    "machine": machine,
                    "preset": preset,
                    "trees": [tree.name for tree in trees],
                    "medians": list(results.values()),
                    "all": list(found.values()),
                },
                indent=1,
            )
        )


def first_step(preset: str, name: str, tree: Path, environment: dict[str, str], runs: Path) -> dict[str, float]:
    """Seconds from a command to its first step's metrics, the processor's seconds of all its processes, and what the step waited for."""
    words = [*COMMAND, "train", preset, "--name", name, "--training.max-steps", "3", "--run.log-every", "1", "--run.val-batches", "1"]
    metrics, started = runs / name / "metrics.jsonl", time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:  # a pipe that nobody reads would stop the training when it is full
        process = subprocess.Popen(words, env=environment, cwd=tree, stdout=subprocess.DEVNULL, stderr=errors, text=True)
        used: dict[int, float] = {}
        while not (metrics.exists() and metrics.read_text().strip()):
            if process.poll() is not None and not (metrics.exists() and metrics.read_text().strip()):
                errors.seek(0)
                raise SystemExit(f"the training ended without a step: {errors.read()[-500:]}")
            used |= processor_seconds(process.pid)
            time.sleep(0.1)
        seconds = time.perf_counter() - started
        process.wait()
    first = json.loads(metrics.read_text().splitlines()[0])
    return {
        "first_step_s": seconds,
        "cpu_s": sum(used.values()),
        "its_seconds": first["step_seconds"],
        "waiting_s": first["step_seconds"] * first["data_wait"],
    }


def processor_seconds(root: int) -> dict[int, float]:
    """The processor's seconds so far of a process and all that it started, by their numbers (Linux)."""
    found, parents = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            fields = stat.read_text().rpartition(")")[2].split()
            parents[int(stat.parent.name)] = int(fields[1])
            found[int(stat.parent.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    family, size = {root}, 0
    while len(family) > size:
        size = len(family)
        family |= {number for number, parent in parents.items() if parent in family}
    return {number: found[number] for number in family if number in found}


def measure_first(home: Path) -> tuple[float, float, float]:
    """The same of a preset's help where it is not kept yet."""
    return measure(MEASURED["perceiver train quickstart --help"], {**os.environ, "PERCEIVER_HOME": str(home)})


def measure(words: list[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """Seconds, the processor's seconds, and MiB at most of a process, from its start to its end."""
    started = time.perf_counter()
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0  # it is waited for
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def make_run(folder: Path, experiment: str) -> None:
    """A run's folder with 1,000 lines of metrics and three checkpoints."""
    folder.mkdir(parents=True)
    (folder / "experiment.json").write_text(json.dumps({"experiment": json.loads(experiment), "data": "none"}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1000)))
    for step in (250, 500, 750):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "checkpoint.json").write_text(json.dumps({"step": step, "metrics": {"val_loss": 1.0}}))


if __name__ == "__main__":
    main()
