"""Mixtures: shares, the same batches for every number of workers and after every restart, small sources that go round."""

import json
import pickle
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perceiver.config import DataConfig, Experiment, OptimConfig, ParallelConfig, RunConfig, TrainingConfig, UserError
from perceiver.data.components import Component, components, weighted
from perceiver.data.manifest import Manifest, Split
from perceiver.data.mixture import ROUND, Mixture, mixture_batches, mixture_plan, round_of
from perceiver.data.order import Order
from perceiver.data.sources import mixture_sources
from perceiver.datasets import data_folder
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.tasks.base import IGNORE_INDEX
from perceiver.training.batches import make_train_loader, make_val_loaders, read_here
from perceiver.training.metrics import evaluate
from perceiver.training.parallel import World, join_world
from perceiver.training.run import Training, save_experiment
from ray_jobs.evaluate import evaluate_run
from ray_jobs.preprocess import prepare
from tests.support.logged import logged
from tests.support.preparing import evaluating_here, experiment, load_prepared, serially, texts, write_jsonl
from tests.support.small import (
    classification_experiment,
    heard,
    loader_of,
    masked_experiment,
    text_experiment,
    write_documents,
    write_stream,
)
from tests.training.test_training import losses, run


def order(rows: int, batch: int = 8, seed: int = 0, block: int = 4, window: int = 2, lanes: int = 4) -> Order:
    return Order(rows=rows, rows_per_block=block, global_batch_size=batch, window_blocks=window, max_lanes=lanes, seed=seed)


def mixture(rows=(300, 41, 7), shares=(0.7, 0.25, 0.05), size: int = 10) -> Mixture:
    orders = tuple(order(n, batch=max(1, round(size * share))) for n, share in zip(rows, shares, strict=True))
    return Mixture(orders=orders, shares=shares, global_batch_size=size)


def tables(mixed: Mixture, rank: int, world: int, start: int, stop: int):
    """The rows of a worker's plan as (source, epoch, row), in uneven tables."""
    found = []
    for unit in mixture_plan(mixed, rank, world, start, stop):
        of = mixed.orders[unit.source]
        rows = of.window_rows(unit.unit.epoch, unit.unit.window)
        rows = rows[unit.unit.kept() - of.window_start(unit.unit.epoch, unit.unit.window)][unit.kept(mixed)]
        assert len(rows) == unit.num_rows > 0
        found += [{"source": unit.source, "epoch": unit.unit.epoch, "row": int(row)} for row in rows]
    return [pa.Table.from_pylist(found[i : i + 7]) for i in range(0, len(found), 7)]


def batches(mixed: Mixture, world: int, start: int, stop: int) -> list[list[tuple[int, int, int]]]:
    """The global batches, put together from the workers' parts."""
    steps = [[] for _ in range(start, stop)]
    for rank in range(world):
        parts = mixture_batches(mixed, rank, world, start, stop, tables(mixed, rank, world, start, stop))
        for found, part in zip(steps, parts, strict=True):
            found += [] if part is None else [tuple(row.values()) for row in part.to_pylist()]
    return steps


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 200), batch=st.integers(1, 24), block=st.integers(1, 9), window=st.integers(1, 4), lanes=st.integers(1, 8))
def test_places_are_the_batches_laid_end_to_end(rows, batch, block, window, lanes):
    chosen = order(rows, batch, 0, block, window, lanes)
    positions = [range(*span) for s in range(chosen.steps_per_epoch) for span in chosen.batch_ranges(s)]
    positions = np.concatenate([np.array(span) for span in positions])
    assert (chosen.places(positions) == np.arange(rows)).all()


@pytest.mark.parametrize("shares", [(0.7, 0.3), (1 / 3, 1 / 3, 1 / 3), (0.999, 0.001), (0.5, 0.3, 0.15, 0.05)])
def test_shares_are_exact_over_a_round_and_near_in_every_batch(shares):
    counts = np.bincount(round_of(shares), minlength=len(shares))
    assert counts.sum() == ROUND and np.abs(counts / ROUND - shares).max() < 1 / ROUND
    mixed = Mixture(orders=(order(50),) * len(shares), shares=shares, global_batch_size=64)
    for step in range(400):
        sources, _ = mixed.batch(step)
        assert np.abs(np.bincount(sources, minlength=len(shares)) - 64 * np.array(shares)).max() <= 2


def test_which_row_is_a_sources_nth_is_the_inverse_of_counting():
    mixed = mixture()
    sources = mixed.sources(np.arange(3 * ROUND))
    for source in range(3):
        numbers = np.flatnonzero(sources == source)
        assert (mixed.numbers(source, np.arange(len(numbers))) == numbers).all()
        for number in (0, 1, 17, ROUND - 1, ROUND, 2 * ROUND + 5):
            assert mixed.given(source, number) == np.count_nonzero(numbers < number)


@pytest.mark.parametrize("size", [1, 4, 10, 33])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_number_of_workers_gives_the_same_batches(world, size):
    mixed = mixture(size=size)
    assert batches(mixed, world, 0, 60) == [mixed.batch_rows(step) for step in range(60)]


@pytest.mark.parametrize("start", [1, 2, 13, 29, 1000, 12_345])
def test_any_step_can_be_the_first(start):
    mixed = mixture()
    assert batches(mixed, 2, start, start + 12) == [mixed.batch_rows(step) for step in range(start, start + 12)]


@pytest.mark.parametrize("size", [1, 10, 33])
def test_the_slot_of_a_row_is_where_its_batch_has_it(size):
    mixed = mixture(rows=(300, 41, 7, 3), shares=(0.6, 0.25, 0.1, 0.05), size=size)
    for step in (*range(40), 999, 5000):
        sources, counts = mixed.batch(step)
        for source in range(4):
            assert mixed.slots(source, counts[sources == source]).tolist() == np.flatnonzero(sources == source).tolist()


@pytest.mark.parametrize("shares", [(0.7, 0.3), (0.9, 0.1), (0.5, 0.3, 0.2)])
def test_workers_read_few_windows_of_each_other(shares):
    orders = tuple(order(40_000, batch=8, block=16, window=16, lanes=8) for _ in shares)
    mixed = Mixture(orders=orders, shares=shares, global_batch_size=256)
    read = [unit for rank in range(8) for unit in mixture_plan(mixed, rank, 8, 30, 80)]
    assert sum(unit.num_rows for unit in read) == 50 * 256
    alone = [unit for unit in mixture_plan(mixed, 0, 1, 30, 80)]
    assert len(read) < 2.2 * len(alone)


def test_a_small_source_goes_round_and_is_shuffled_anew():
    mixed = mixture(rows=(1000, 23), shares=(0.6, 0.4))
    rows = [row for step in range(60) for row in mixed.batch_rows(step)]
    small = [(epoch, row) for source, epoch, row in rows if source == 1]
    assert len(small) == 240 and small[-1][0] == 239 // 23
    passes = [[row for epoch, row in small if epoch == e] for e in range(10)]
    assert all(sorted(one) == list(range(23)) for one in passes), "each pass has every row once"
    assert len({tuple(one) for one in passes}) == 10
    large = [row for source, epoch, row in rows if source == 0]
    assert len(set(large)) == len(large) == 360, "no row of the large source comes twice before it has been read whole"


def test_a_later_start_reads_no_more_than_a_worker_needs():
    mixed = mixture(rows=(100_000, 5_000), shares=(0.9, 0.1), size=20)
    units = list(mixture_plan(mixed, 0, 2, 50_000, 50_010))
    assert sum(unit.num_rows for unit in units) == 100 and len(units) < 60


# ---------------------------------------------------------------------------------------------------- with prepared data


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A prepared mixture of two sources: the experiment, its folder and its manifest."""
    serially(monkeypatch)
    write_jsonl(tmp_path / "web.jsonl", [{"text": text} for text in texts(300)])
    write_jsonl(tmp_path / "books.jsonl", [{"text": text.upper()} for text in texts(30, seed=1)])
    sources = (f"{tmp_path / 'web.jsonl'}=3", f"{tmp_path / 'books.jsonl'}=1")
    chosen = experiment("clm-wikitext", tmp_path / "data", "", mixture=sources, val_fraction=0.2)
    small = text_experiment(global_batch_size=8)
    chosen = replace(chosen, model=small.model, task=small.task, training=small.training, parallel=small.parallel)
    with logged() as said:
        manifest = prepare(chosen)
    return chosen, data_folder(chosen), manifest, said


def test_a_mixture_is_prepared_once_and_its_sources_are_data_sets_of_their_own(prepared, tmp_path):
    chosen, folder, manifest, said = prepared
    assert load_prepared(chosen) == (folder, manifest)
    assert "mixture of 75.0% web.jsonl and 25.0% books.jsonl" in said[-1]
    parts = components(folder, manifest)
    alone = experiment("clm-wikitext", tmp_path / "data", tmp_path / "books.jsonl", val_fraction=0.2)
    assert load_prepared(alone)[0] == parts[1].folder
    assert manifest.splits["train"].rows == sum(part.manifest.splits["train"].rows for part in parts)
    with logged() as again:
        assert prepare(chosen) == manifest
    assert sum("nothing to do" in line for line in again) == 2
    other = replace(chosen, data=replace(chosen.data, mixture=tuple(s.replace("=3", "=2") for s in chosen.data.mixture)))
    with pytest.raises(UserError, match=r"mixture\.web\.jsonl: 0\.75 -> 0\.666667"):
        load_prepared(other)


def test_a_mistake_in_the_last_source_is_found_before_the_first_is_prepared(prepared, tmp_path):
    chosen, *_ = prepared
    mixture = (f"{tmp_path / 'web.jsonl'}=1", f"{tmp_path / 'nothing.jsonl'}=1")
    other = replace(chosen, data=replace(chosen.data, mixture=mixture, root=str(tmp_path / "other")))
    with pytest.raises(UserError, match="nothing.jsonl does not exist"):
        prepare(other)
    assert not (tmp_path / "other").exists()


def test_a_mixture_whose_source_was_prepared_anew_is_refused(prepared):
    chosen, folder, manifest, _ = prepared
    part = components(folder, manifest)[1]
    replace(part.manifest, stats={"skipped": {"x": 1}}).save(part.folder)
    command = "perceiver preprocess clm-wikitext .*--data.mixture .*=3 .*=1"
    with pytest.raises(UserError, match=f"missing or damaged: run `{command}"):
        load_prepared(chosen)


def test_workers_batches_have_the_sources_own_windows(prepared):
    chosen, folder, manifest, _ = prepared
    loader = make_train_loader(chosen, build_task(chosen), folder, manifest)
    whole = [batch["ids"] for (batch,) in loader.steps(read_here, 0, 1, 0, 40)]
    halves = [loader.steps(read_here, rank, 2, 7, 40) for rank in range(2)]
    for step, parts in enumerate(zip(*halves, strict=True), 7):
        assert np.array_equal(np.concatenate([batch["ids"] for (batch,) in parts]), whole[step])
    upper = [bytes((ids[ids > 5] - 6).byte().numpy()).isupper() for batch in whole for ids in batch]
    assert abs(np.mean(upper) - 0.25) < 0.02


def test_a_feed_and_its_units_travel_to_data_tasks(prepared):
    """As `ray_jobs.ingest` sends them: units as plain data, the reader pickled."""
    chosen, folder, manifest, _ = prepared
    loader = make_train_loader(chosen, build_task(chosen), folder, manifest)
    there = pickle.loads(pickle.dumps(loader.reader))
    for unit in loader.plan(1, 2, 3, 9):
        rows = there.read(there.unit_type(**json.loads(json.dumps(asdict(unit)))))
        assert rows.num_rows == unit.num_rows and rows.equals(loader.reader.read(unit))


def test_metrics_are_those_of_all_sources_by_their_shares():
    parts, sums = [], []
    for name, share, tokens, size, loss in (("a", 0.75, 100, 100, 2.0), ("b", 0.25, 1000, 4000, 1.0)):
        split = Split(
            name="val", kind="tokens", rows=1, tokens=tokens, bytes=size, words=tokens, documents=1, row_length=8,
            rows_per_block=4, blocks_per_shard=4, lookahead=1, shards=(),
        )  # fmt: skip
        manifest = Manifest(kind="tokens", settings={}, settings_digest="", splits={"val": split})
        parts.append(Component(name, share, "", manifest))
        sums.append({"loss": np.array(loss * tokens), "targets": np.array(float(tokens))})
    together, split = weighted(parts, sums)
    assert together["loss"] / together["targets"] == pytest.approx(0.75 * 2 + 0.25 * 1)
    assert split.bytes / split.tokens == pytest.approx(0.75 * 1 + 0.25 * 4, rel=1e-2), "bytes a token, as in the mixture"


def test_validation_names_each_source(prepared):
    chosen, folder, manifest, _ = prepared
    task = build_task(chosen)
    loaders = make_val_loaders(chosen, task, folder, manifest)
    metrics, _, _ = evaluate(task, task.build_model(), loaders, World(0, 1, torch.device("cpu"), None), read_here)
    web, books = (metrics[f"val_loss/{name}"] for name in ("web.jsonl", "books.jsonl"))
    assert web != books and metrics["val_loss"] == pytest.approx(0.75 * web + 0.25 * books)
    assert {f"val_perplexity{suffix}" for suffix in ("", "/web.jsonl", "/books.jsonl")} < metrics.keys()


@pytest.mark.parametrize("kind", ["causal", "masked", "classification"])
def test_the_loss_of_a_source_is_that_of_its_examples(kind, tmp_path):
    make = {"causal": text_experiment, "masked": masked_experiment, "classification": classification_experiment}[kind]
    chosen = make(global_batch_size=12)
    chosen = replace(chosen, task=replace(chosen.task, whole_words=False)) if kind == "masked" else chosen
    if kind == "classification":
        manifest = write_documents(tmp_path)
    else:
        ids = np.random.default_rng(0).integers(6, 262, 1000).astype(np.uint16)
        manifest = write_stream(tmp_path, ids, ids, length=16 if kind == "causal" else 32)
    task = build_task(chosen)
    model = task.build_model().eval()
    (batch,) = next(loader_of(chosen, task, str(tmp_path), manifest.splits["train"], train=True).steps(read_here, 0, 1, 0, 1))
    assert task.loss(model, batch)[1] == {}, "nothing to tell apart"
    batch["sources"] = torch.arange(12)[:, None] % 3 == torch.arange(3)
    _, sums = task.loss(model, batch)
    for source in range(3):
        others = batch["sources"][:, source].logical_not().view(-1, *[1] * (batch["labels"].ndim - 1))
        alone = {**batch, "labels": batch["labels"].masked_fill(others, IGNORE_INDEX)}
        torch.testing.assert_close(sums["source_loss"][source], task.loss(model, alone)[0].double(), rtol=1e-5, atol=1e-5)
        assert sums["source_targets"][source] == task.num_targets(alone) > 0


def settings_of(chosen: Experiment, **run) -> Experiment:
    """Twelve steps of 12 examples on a mixture."""
    return replace(
        chosen,
        optim=OptimConfig(lr=5e-3),
        training=TrainingConfig(global_batch_size=12, max_steps=12),
        run=RunConfig(**{"log_every": 1, "val_every": 6, "checkpoint_every": 3} | run),
    )


def test_the_losses_of_the_sources_by_their_targets_are_the_training_loss(prepared, tmp_path):
    """Over several steps, accumulated micro-batches and padding (5 + 5 + 2 of 5)."""
    chosen, folder, manifest, _ = prepared
    chosen = replace(settings_of(chosen, log_every=4), parallel=ParallelConfig(micro_batch_size=5))
    task = build_task(chosen)
    world = join_world(torch.device("cpu"))
    with heard() as said:
        Training(chosen, task, folder, manifest, world, tmp_path / "run", read_here).run()
    records = [record for record in Run(tmp_path / "run").metrics() if "loss" in record]
    assert [record["step"] for record in records] == [3, 4, 6, 8, 9, 12]
    loader, first = make_train_loader(chosen, task, folder, manifest), 0
    for record in records:
        targets = np.zeros(2)
        for micro_batches in loader.steps(read_here, 0, 1, first, record["step"]):
            for batch in micro_batches:
                targets += ((batch["labels"] != IGNORE_INDEX).sum(1) @ batch["sources"].long()).numpy()
        reported = np.array([record["loss/web.jsonl"], record["loss/books.jsonl"]])
        assert reported @ targets / targets.sum() == pytest.approx(record["loss"], rel=1e-6) and reported[0] != reported[1]
        first = record["step"]
    last = records[-1]
    shown = f"loss {last['loss']:.4f} (web.jsonl {last['loss/web.jsonl']:.4f}, books.jsonl {last['loss/books.jsonl']:.4f})"
    assert any(shown in line for line in said)


def test_a_killed_run_on_a_mixture_continues_with_another_number_of_workers(prepared, tmp_path):
    chosen, folder, _, _ = prepared
    run(settings_of(chosen), folder, tmp_path / "whole", world=1)
    run(settings_of(chosen), folder, tmp_path / "run", world=2, stop_at=6)
    run(settings_of(chosen), folder, tmp_path / "run", world=1)
    whole, killed = Run(tmp_path / "whole").metrics(), Run(tmp_path / "run").metrics()
    assert [record.keys() for record in killed] == [record.keys() for record in whole] and len(losses(tmp_path / "run")) == 12
    for name in ("loss", "loss/web.jsonl", "loss/books.jsonl", "val_loss/books.jsonl"):
        found, expected = ([record[name] for record in records if name in record] for records in (killed, whole))
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_run_on_a_mixture_is_evaluated_by_source(prepared, tmp_path, monkeypatch):
    chosen, folder, manifest, _ = prepared
    chosen, run_folder = settings_of(chosen, val_batches=None), tmp_path / "run"
    save_experiment(Run(run_folder), chosen, manifest, folder)
    world = join_world(torch.device("cpu"))
    result = Training(chosen, build_task(chosen), folder, manifest, world, run_folder, read_here).run()
    evaluating_here(monkeypatch)
    with logged() as said:
        metrics = evaluate_run(run_folder, "last")
    assert metrics == pytest.approx({name: value for name, value in result.items() if name != "step"})
    table = dict(line.split()[:2] for line in said[1:-1])
    assert table == {name: f"{value:.4f}" for name, value in metrics.items()}
    assert json.loads(next((run_folder / "evaluations").glob("*.json")).read_text())["metrics"] == metrics
    other = evaluate_run(run_folder, "last", ["--data.source", str(tmp_path / "books.jsonl")])
    assert {name.count("/") for name in other} == {0} and other["val_loss"] != metrics["val_loss/books.jsonl"], "all of the file"


def test_the_source_that_a_mixture_took_the_place_of_may_be_evaluated(prepared, tmp_path, monkeypatch):
    chosen, folder, manifest, _ = prepared
    books = str(tmp_path / "books.jsonl")
    chosen, run_folder = settings_of(replace(chosen, data=replace(chosen.data, source=books))), tmp_path / "run"
    save_experiment(Run(run_folder), chosen, manifest, folder)
    world = join_world(torch.device("cpu"))
    Training(chosen, build_task(chosen), folder, manifest, world, run_folder, read_here, stop_at=3).run()
    evaluating_here(monkeypatch)
    with logged() as said:
        assert "val_loss/books.jsonl" not in evaluate_run(run_folder, "last", ["--data.source", books])
    assert any(f"on {books}: " in line for line in said)


MISTAKES = {
    "no weight": (("c4",), "SOURCE=WEIGHT"),
    "no number": (("c4=x",), "SOURCE=WEIGHT"),
    "weight of zero": (("c4=0", "imdb=1"), "above 0"),
    "tiny": (("c4=1", "imdb=0.0001"), "imdb less than 0.001"),
    "twice": (("a/x=1", "b/x=1"), "two sources called x"),
}


@pytest.mark.parametrize("entries, part", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_mixture_is_named(entries, part):
    with pytest.raises(UserError, match=part):
        mixture_sources(DataConfig(mixture=entries))


def test_a_mixtures_validation_data_are_its_sources_own():
    with pytest.raises(UserError, match="data.mixture and data.val-source"):
        mixture_sources(DataConfig(mixture=("c4=1",), val_source="imdb"))
