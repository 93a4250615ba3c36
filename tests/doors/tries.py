"""The doors of the package, each with good things that are damaged at random before they go through it.

What is refused is refused as a mistake of the user's (`UserError`, or exit status 2 of a parser); what is accepted works: a configuration
trains a step that leaves finite weights, data can be prepared and read, a run or a model is loaded with the weights that it had.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

import perceiver
from perceiver.config import Experiment, UserError, flatten, from_dict, to_dict
from perceiver.data.manifest import Manifest
from perceiver.data.shards import read_block
from perceiver.experiments import find_experiment
from perceiver.inference.export import export
from perceiver.presets import PRESETS
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.tasks.masked_lm import MaskedLMConfig
from perceiver.training.loop import fit
from perceiver.training.not_finite import NotFinite
from perceiver.training.parallel import join_world
from perceiver.training.run import build_state
from ray_jobs.cli import parse_experiment
from ray_jobs.main import COMMANDS
from ray_jobs.main import main as perceiver_command
from ray_jobs.preflight import check_experiment
from tests.doors.test_configuration import changed, places
from tests.doors.test_files import mutate, prepare, without_ray
from tests.doors.test_files import write as write_data
from tests.support.preparing import experiment as small_data
from tests.support.preparing import load_prepared
from tests.support.trained import experiment as small_experiment
from tests.support.trained import write_run

Attempt = Callable[[random.Random | None], str]
"""Goes through the door with something damaged at random (None: with nothing damaged, which must work), and says what it was, as far as
that helps to find a fault again.

Raises UserError, or SystemExit with status 2, where the door refuses; anything else that is raised is a fault of the door's.
"""

MOST_FLOPS = 2e9
"""Of an example: what costs more is tried on the meta device, by its shapes alone."""
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 12, 2**31, 2**40, 2**64, 10**400, -0.5, 0.5, 1e-300, 1e300, math.nan, math.inf),
    *("", " ", "a", "x" * 300, "ü", "a/b", "..", "\0", "3", "nan", "perceiver.models:TextInput", "os:system", "best", "cosine"),
    *([], [1, 2], ["a"], [[]], {}, {"type": "x"}, {"a": 1}),
)
SMALL = {
    "images": lambda: small_experiment("images"),
    "causal": lambda: small_experiment("causal"),
    "masked": lambda: replace(small_experiment("masked"), task=MaskedLMConfig(sample_texts=("a[ b] c.",))),
    "sentiment": lambda: small_experiment("sentiment"),
    "points": PRESETS["points-shapes"],
    "series": PRESETS["forecast-seasons"],
    "copying": PRESETS["copy-small"],
}


class Fault(AssertionError):
    """What was accepted does not work."""


# ------------------------------------------------------------------------------------------------------------ configurations


def use(experiment: Experiment) -> None:
    """Takes a training step on two examples, or one of shapes alone where that is too much for here.

    Raises:
        UserError: the experiment is refused before it starts, or ends for a reason that is named.
        Fault: it is accepted, and weights are not finite after a step, or it is another one after it was saved.
    """
    check_experiment(experiment)
    if from_dict(json.loads(json.dumps(to_dict(experiment)))) != experiment:
        raise Fault("what is saved of it is another experiment")
    experiment = replace(experiment, parallel=replace(experiment.parallel, compile=False))  # which takes a minute
    task = build_task(experiment)
    with torch.device("meta"):
        model = task.build_model()
    batch = task.dummy_batch(2)
    if task.flops_per_example() > MOST_FLOPS or sum(p.numel() for p in model.parameters()) > 5_000_000:
        task.loss(model, {name: tensor.to("meta") for name, tensor in batch.items()})
        return
    world = join_world(torch.device("cpu"))
    state = build_state(experiment, task, world)
    found: list[Any] = []
    fit(experiment.optim, experiment.training.seed, task, state, [[batch]], world, 100, lambda result: found.append(result) or True)
    if not math.isfinite(float(found[0].loss_sum)) or not math.isfinite(float(found[0].grad_norm)):
        raise NotFinite("the first step's loss or gradient is not finite")
    if not all(bool(torch.isfinite(p).all()) for p in state.model.parameters()):
        raise Fault("its weights are not finite after a step")


def configurations(folder: Path) -> Attempt:
    """Trees of experiments of which values are replaced, left out or added."""
    trees = {name: to_dict(make()) for name, make in SMALL.items()}

    def attempt(rng: random.Random | None) -> str:
        if rng is None:
            return _trying(["images"], lambda: use(from_dict(trees["images"])))
        name = rng.choice(list(trees))
        tree, words = trees[name], [name]
        for _ in range(rng.randint(1, 2)):
            where, how = rng.choice(places(tree)), rng.choice(["set", "set", "set", "drop", "add"])
            value = _value(_at(tree, where), rng)
            tree = changed(tree, where, how, value)
            words.append(f"{'.'.join(map(str, where))} {how} {value!r:.40}")
        return _trying(words, lambda: use(from_dict(tree)))

    return attempt


def _at(tree: Any, where: tuple[Any, ...]) -> Any:
    for key in where:
        tree = tree[key]
    return tree


def _value(old: Any, rng: random.Random) -> Any:
    """Another value: near the old one, which may well do, or of any kind."""
    if rng.random() < 0.5:
        if isinstance(old, bool):
            return not old
        if isinstance(old, (int, float)):
            return rng.choice([old * 2, old // 2 if isinstance(old, int) else old / 2, old + 1, type(old)(0), -old])
        if old is None:
            return rng.choice([1, 2, 0.5, "loss", True])
    return rng.choice(VALUES)


def command_lines(folder: Path) -> Attempt:
    """`train` with fields of any values, of two presets that are small."""
    names = ["points-shapes", "forecast-seasons", "copy-small"]
    trees = {name: flatten(to_dict(PRESETS[name]())) for name in names}

    def attempt(rng: random.Random | None) -> str:
        if rng is None:
            return _trying(names, lambda: use(parse_experiment([names[0], "--optim.lr", "1e-3"], "ray_jobs.train")))
        name = rng.choice(names)
        words = [name]
        for _ in range(rng.randint(1, 3)):
            field = rng.choice([field for field in trees[name] if field != "preset"])
            value = _value(trees[name][field], rng)
            words += [f"--{field.replace('_', '-')}", value if isinstance(value, str) else str(value)]
        return _trying(words, lambda: use(parse_experiment(words, "ray_jobs.train")))

    return attempt


def experiment_files(folder: Path) -> Attempt:
    """YAML files with damaged text."""
    texts = {name: yaml.safe_dump(to_dict(make())) for name, make in SMALL.items()}

    def attempt(rng: random.Random | None) -> str:
        name, path = rng.choice(list(texts)) if rng else "images", folder / "experiment.yaml"
        path.write_bytes(_damaged(texts[name].encode(), rng))
        return _trying([name], lambda: use(find_experiment(str(path))))

    return attempt


# ----------------------------------------------------------------------------------------------------------------- files


def data_files(kind: str) -> Callable[[Path], Attempt]:
    """Data of a kind in which one file is damaged, prepared and read again."""

    def make(folder: Path) -> Attempt:
        good = write_data(folder / "good", kind)
        content = good.read_bytes()

        def attempt(rng: random.Random | None) -> str:
            for name in ("in", "out"):
                shutil.rmtree(folder / name, ignore_errors=True)
            shutil.copytree(folder / "good", folder / "in")
            (folder / "in" / good.relative_to(folder / "good")).write_bytes(_damaged(content, rng))
            with without_ray():
                return _trying([good.name], lambda: prepare(folder / "in", folder / "out", kind))

        return attempt

    return make


def prepared_data(folder: Path) -> Attempt:
    """Prepared data sets of which one file is damaged: refused, or every block holds what it held."""
    source = write_data(folder / "source", "jsonl").parent
    chosen = small_data("txt-clf-imdb-all", folder / "good", source, length=20)
    with without_ray():
        _trying([], lambda: prepare(source, folder / "good", "jsonl"))
    place = Path(load_prepared(chosen)[0])
    files = sorted(path.relative_to(folder / "good") for path in place.iterdir() if path.is_file())
    expected = _blocks(str(place), Manifest.load(str(place)))

    def attempt(rng: random.Random | None) -> str:
        shutil.rmtree(folder / "data", ignore_errors=True)
        shutil.copytree(folder / "good", folder / "data")
        name = rng.choice(files) if rng else files[0]
        (folder / "data" / name).write_bytes(_damaged((folder / "good" / name).read_bytes(), rng))
        damaged = small_data("txt-clf-imdb-all", folder / "data", source, length=20)

        def read() -> None:
            if _blocks(*load_prepared(damaged)) != expected:
                raise Fault("its rows are others, and nothing was said")

        return _trying([name], read)

    return attempt


def _blocks(folder: str, manifest: Manifest) -> list[Any]:
    return [
        read_block(folder, split, block).to_pydict() for _, split in sorted(manifest.splits.items()) for block in range(split.num_blocks)
    ]


def run_folders(folder: Path) -> Attempt:
    """Folders of runs of which one file is damaged: refused, or the weights are those that were saved; and lists of runs go on."""
    good = write_run(folder / "good" / "run", "images")
    files = sorted(path.relative_to(good) for path in good.rglob("*") if path.is_file())
    expected = _weights(good)

    def attempt(rng: random.Random | None) -> str:
        shutil.rmtree(folder / "runs", ignore_errors=True)
        shutil.copytree(folder / "good", folder / "runs")
        name = rng.choice(files) if rng else files[0]
        (folder / "runs" / "run" / name).write_bytes(_damaged((good / name).read_bytes(), rng))

        def load() -> None:
            perceiver_command(["runs", str(folder / "runs")])
            Run(folder / "runs" / "run").load()
            _compare(_weights(folder / "runs" / "run"), expected)

        return _trying([name], load)

    return attempt


def model_folders(folder: Path) -> Attempt:
    """Exported models of which one file is damaged."""
    good = export(perceiver.load(write_run(folder / "run", "sentiment")), folder / "good")
    files = sorted(path.relative_to(good) for path in good.rglob("*") if path.is_file())
    expected = _weights(good)

    def attempt(rng: random.Random | None) -> str:
        shutil.rmtree(folder / "model", ignore_errors=True)
        shutil.copytree(good, folder / "model")
        name = rng.choice(files) if rng else files[0]
        (folder / "model" / name).write_bytes(_damaged((good / name).read_bytes(), rng))
        return _trying([name], lambda: _compare(_weights(folder / "model"), expected, name.suffix == ".safetensors"))

    return attempt


def _weights(source: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in perceiver.load(source).model.state_dict().items()}


def _compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], of_weights: bool = False) -> None:
    """A configuration that was damaged may be that of another model; the weights of the same one must be the same, unless their own
    file was damaged, which has no hash: then they are finite.
    """
    if not all(bool(torch.isfinite(tensor.float()).all()) for tensor in found.values()):
        raise Fault("its weights are not finite")
    same = found.keys() == expected.keys() and all(found[key].shape == expected[key].shape for key in expected)
    if same and not of_weights and not all(found[key].equal(expected[key]) for key in expected):
        raise Fault("its weights are others, and nothing was said")


# --------------------------------------------------------------------------------------------------------------- commands


class Started(BaseException):
    """A command has come as far as the cluster that it would start or join."""


LEFT_OUT = ("rm", "prune", "archive", "push", "submit", "serve", "play", "flow", "sweep", "scaling-laws")
"""Commands that remove or send something, or that need more than one run to say anything."""
OPTIONS = (
    *("--checkpoint", "--source", "--workers", "--out", "--output", "--input", "--mode", "--batch-size", "--metric", "--by", "--sort"),
    *("--where", "--json", "--temperature", "--top-k", "--num-tokens", "--seed", "--format", "--column", "--help", "--storage", "--name"),
    *("--training.max-steps", "--optim.lr", "--task.class-names", "--parallel.address", "--run.name", "--data.source", "--seeds"),
)


def commands(folder: Path) -> Attempt:
    """All other commands, with options that they have or have not, and values of every kind."""
    run = write_run(folder / "run", "sentiment")
    rows = write_data(folder / "data", "jsonl")
    names = [name for name in COMMANDS if name not in LEFT_OUT]
    texts = [str(run), str(rows), str(folder), "points-shapes", "2", "0", "-1", "1e9", "nan", "best", "loss", "csv", "a b", "ü", "..", ""]

    def attempt(rng: random.Random | None) -> str:
        if rng is None:
            return _trying(["plan", "points-shapes"], lambda: perceiver_command(["plan", "points-shapes"]))
        words = [rng.choice(names)]
        if rng.random() < 0.9:
            words.append(rng.choice(texts[:4] if rng.random() < 0.8 else texts))
        for _ in range(rng.randint(0, 3)):
            words.append(rng.choice(OPTIONS))
            if rng.random() < 0.9:
                value = rng.choice(VALUES) if rng.random() < 0.3 else rng.choice(texts)
                words.append(value if isinstance(value, str) else str(value))

        def call() -> None:
            with mock.patch("ray_jobs.ray_env.connect", _started), contextlib.suppress(Started):
                if (status := perceiver_command(words)) not in (0, None):
                    raise SystemExit(status)

        return _trying(words, call)

    return attempt


@contextlib.contextmanager
def _started(*ignored: Any, **others: Any) -> Iterator[None]:
    raise Started
    yield


def _damaged(content: bytes, rng: random.Random | None) -> bytes:
    return content if rng is None else mutate(content, rng)


def _trying(words: list[Any], action: Callable[[], object]) -> str:
    """Calls a door without showing what it prints; any error carries what had been tried."""
    text = " ".join(map(str, words))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            action()
    except BaseException as error:
        error.add_note(text)
        raise
    return text


DOORS: dict[str, Callable[[Path], Attempt]] = {
    "configurations": configurations,
    "command lines of train": command_lines,
    "experiment files (YAML)": experiment_files,
    "other commands": commands,
    **{f"data files ({kind})": data_files(kind) for kind in ("jsonl", "parquet", "idx", "pictures")},
    "prepared data": prepared_data,
    "run folders": run_folders,
    "exported models": model_folders,
}
REFUSALS = (UserError, NotFinite)
"""What says that something is refused: a mistake of the user's, or a loss that the settings make infinite."""
