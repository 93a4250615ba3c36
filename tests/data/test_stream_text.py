"""Training text that is not prepared: chunks are functions of the source alone, and order and resumption those of shards."""

import gzip
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from ray import cloudpickle

from perceiver.config import DataConfig, UserError
from perceiver.data.chunks import Size, chunks_of, cut_chunks, measure, open_chunks
from perceiver.data.pieces import Piece
from perceiver.data.read_documents import read_documents
from perceiver.data.sources import resolve
from perceiver.data.spans import Problems, Span
from perceiver.data.tables import Columns
from perceiver.datasets import Dataset, data_folder
from perceiver.tasks import build_task
from perceiver.training.batches import make_train_loader, read_here
from ray_jobs.data_task import Rest, read_units
from ray_jobs.ingest import _item
from ray_jobs.preprocess import prepare
from ray_jobs.shipping import Shipped
from tests.support.logged import logged
from tests.support.preparing import experiment, load_prepared, serially, texts, write_jsonl, write_parquet
from tests.support.small import text_experiment


def streamed(root, source, **data):
    """An experiment that streams a source, with small chunks."""
    small = text_experiment(global_batch_size=64)
    data = {"prepare": "stream", "val_fraction": 0.1, "rows_per_block": 8, "shuffle_window_blocks": 4} | data
    chosen = experiment("clm-wikitext", root, source, **data)
    return replace(chosen, model=small.model, task=small.task, training=small.training, parallel=small.parallel)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    rows = [{"text": text} for text in texts(600)]
    write_jsonl(folder / "a.jsonl.gz", rows[:250])
    write_jsonl(folder / "b.jsonl", rows[250:400])
    write_parquet(folder / "c.parquet", rows[400:580])
    for i in range(20):
        write_jsonl(folder / f"d{i:02}.jsonl", rows[580 + i : 581 + i])
    return folder


@pytest.fixture
def prepared(source, tmp_path, monkeypatch):
    serially(monkeypatch)
    chosen = streamed(tmp_path / "data", source)
    with logged() as said:
        manifest = prepare(chosen)
    return chosen, data_folder(chosen), manifest, said


def loader_of(prepared):
    chosen, folder, manifest, _ = prepared
    return make_train_loader(chosen, build_task(chosen), folder, manifest)


def documents(span: Span) -> list[str]:
    columns = Columns(text="text", label=None)
    return [text for found in read_documents(span, columns, Problems(skip=False)) for text in found.texts]


@pytest.mark.parametrize("step", [1, 333, 4000])
def test_parts_of_a_compressed_file_have_each_document_once(tmp_path, step):
    whole = texts(60)
    write_jsonl(tmp_path / "a.jsonl.gz", [{"text": text} for text in whole])
    (file,) = resolve(DataConfig(source=str(tmp_path)), "tokens").files
    size = len(gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()))
    assert measure(file) == Size(size, size)
    found = [text for a in range(0, size, step) for text in documents(Span(file, a, min(a + step, size), unpacked=True))]
    assert found == whole == documents(Span(file, 0, file.size))


@pytest.mark.parametrize("step", [1, 2, 3, 7, 50])
def test_parts_of_wikitext_in_rows_have_each_article_once(tmp_path, step):
    """As the hub has it: a line a row, "" for a blank one. Some lines only look like titles."""
    lines = ["", " = First = \n", "", " Text . \n", " = No title = \n", ""]
    for i, text in enumerate(texts(12)):
        lines += ["", f" = Article {i} = \n", "", f" {text} \n".replace("\n", " ") + "\n", " = = Section = = \n", ""][i % 2 :]
    whole = "".join(line or " \n" for line in lines)
    assert lines[-1] == ""
    (tmp_path / "a.raw").write_text(whole)
    write_parquet(tmp_path / "a.parquet", [{"text": line} for line in lines], rows_per_group=5)
    (file,), (rows,) = (resolve(DataConfig(source=str(tmp_path / name)), "tokens").files for name in ("a.raw", "a.parquet"))
    rows = replace(rows, format="wikitext-rows")
    expected = documents(Span(file, 0, file.size))
    size = measure(rows)
    assert size.units == len(lines) and len(expected) == 13 and "".join(expected) == whole
    assert [text for a in range(0, size.units, step) for text in documents(Span(rows, a, min(a + step, size.units)))] == expected


def test_chunks_are_equal_and_hold_the_text_of_all_files(source):
    files = list(resolve(DataConfig(source=str(source)), "tokens").files)
    sizes = [measure(file) for file in files]
    total = sum(size.bytes for size in sizes)
    for chunk_bytes in (30, 900, 9000, total / 2, total):  # from less than a document to more than a file
        pieces = cut_chunks(files, sizes, chunk_bytes)
        assert len(pieces) == total // chunk_bytes and {piece.size - total // len(pieces) for piece in pieces} <= {0, 1}
        assert [text for piece in pieces for span in piece.spans for text in documents(span)] == texts(600)
    assert cut_chunks(files, sizes, total + 1) == []


def test_files_that_are_a_little_larger_than_a_chunk_lose_no_text(tmp_path):
    for i in range(6):
        write_jsonl(tmp_path / f"{i}.jsonl", [{"text": text} for text in texts(40, seed=i)])
    files = list(resolve(DataConfig(source=str(tmp_path)), "tokens").files)
    sizes = [measure(file) for file in files]
    pieces = cut_chunks(files, sizes, max(size.bytes for size in sizes) * 0.6)
    assert [text for piece in pieces for span in piece.spans for text in documents(span)] == sum((texts(40, seed=i) for i in range(6)), [])


def test_a_file_that_cannot_be_cut_is_refused(source):
    files = list(resolve(DataConfig(source=str(source)), "tokens").files)[:2]
    described = {"rows": 10, "ids_per_byte": 1.0, "val_fraction": 0.1, "sizes": [[5000, 5000], [1, 5000]]}
    with pytest.raises(UserError, match="b.jsonl cannot be streamed: it is a single row with the text of 31 chunks: prepare it"):
        chunks_of(files, described, 16)


def test_something_is_left_to_train_on_whatever_is_held_out(source):
    files = list(resolve(DataConfig(source=str(source)), "tokens").files)[:1]
    described = {"rows": 10, "ids_per_byte": 1.0, "val_fraction": 0.99, "sizes": [[500, 500]]}
    train, val = chunks_of(files, described, 16)
    assert len(train) == 1 and len(val) == 2


def test_every_chunk_gives_its_rows_from_its_own_text(prepared, source):
    chosen, folder, manifest, said = prepared
    chunks = open_chunks(chosen.data, str(source), manifest)
    split = manifest.splits["train"]
    assert split.rows == chunks.rows * len(chunks.pieces) and split.rows_per_block == chunks.rows
    for number, piece in enumerate(chunks.pieces):
        block = chunks.read(folder, split, number)
        assert block.equals(chunks.read(folder, split, number)) and block.num_rows == chunks.rows + 1
        ids = np.array(block["tokens"].to_pylist()).reshape(-1)
        text = "\x02".join(text for span in piece.spans for text in documents(span)) + "\x02"
        expected = np.frombuffer(text.encode(), np.uint8).astype(int)
        expected = np.where(expected == 2, 2, expected + 6)
        assert np.array_equal(ids, np.resize(expected, len(ids))), "end to end, with the id of a document's end"
    total = sum(len(text.encode()) + 1 for text in texts(600))
    held_out = manifest.splits["val"].tokens
    assert held_out > 0 and 0.75 * total < split.tokens + held_out < 1.05 * total
    assert load_prepared(chosen) == (folder, manifest) and "ready to stream" in " ".join(said)


def test_a_document_longer_than_a_chunk_is_no_fault(tmp_path, monkeypatch):
    serially(monkeypatch)
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in (*texts(100), "x" * 3000, *texts(100, seed=1))])
    chosen = streamed(tmp_path / "data", tmp_path / "a.jsonl")
    manifest = prepare(chosen)
    chunks = open_chunks(chosen.data, chosen.data.source, manifest)
    empty = [i for i, piece in enumerate(chunks.pieces) if not documents(piece.spans[0])]
    split = manifest.splits["train"]
    assert empty and chunks.read("", split, empty[0]).equals(chunks.read("", split, empty[0] - 1))


def test_no_document_is_on_both_sides(prepared):
    chosen, _, manifest, _ = prepared
    files = list(resolve(chosen.data, "tokens").files)
    train, val = chunks_of(files, manifest.stream, 16)
    sides = [{(s.file.name, s.start, s.stop) for piece in side for s in piece.spans} for side in (train, val)]
    assert sides[1] and not sides[0] & sides[1]


def rows_of_steps(loader, rank: int, world: int, start: int, stop: int) -> list[list[dict]]:
    """A worker's rows of each step."""
    tables = map(loader.reader.read, loader.plan(rank, world, start, stop))
    return [[] if table is None else table.to_pylist() for table in loader.batches(rank, world, start, stop, tables)]


@pytest.mark.parametrize("world", [2, 3])
def test_every_number_of_workers_and_every_start_gives_the_same_batches(prepared, world):
    loader = loader_of(prepared)
    whole = rows_of_steps(loader, 0, 1, 0, 30)
    assert 15 < loader.order.steps_per_epoch < 30, "a second epoch begins"
    parts = [rows_of_steps(loader, rank, world, 11, 30) for rank in range(world)]
    assert [sum(found, []) for found in zip(*parts, strict=True)] == whole[11:]


def test_a_mixture_may_be_streamed(source, tmp_path, monkeypatch):
    serially(monkeypatch)
    write_jsonl(tmp_path / "more.jsonl", [{"text": text.upper()} for text in texts(200, seed=3)])
    mixture = (f"{source}=1", f"{tmp_path / 'more.jsonl'}=1")
    chosen = streamed(tmp_path / "data", "", mixture=mixture)
    manifest = prepare(chosen)
    loader = loader_of((chosen, data_folder(chosen), manifest, None))
    whole = [batch["ids"] for (batch,) in loader.steps(read_here, 0, 1, 0, 12)]
    halves = [loader.steps(read_here, rank, 2, 5, 12) for rank in range(2)]
    for step, found in enumerate(zip(*halves, strict=True), 5):
        assert torch.equal(torch.cat([batch["ids"] for (batch,) in found]), whole[step])


def test_files_that_have_changed_are_refused(prepared, source):
    chosen, folder, manifest, _ = prepared
    with logged() as again:
        assert prepare(chosen) == manifest and "nothing to do" in again[0]
    write_jsonl(source / "b.jsonl", [{"text": "other"}])
    with pytest.raises(UserError, match="has other files now"):
        open_chunks(chosen.data, str(source), manifest)
    with logged() as said:
        other = prepare(chosen)
    assert other != manifest and "was prepared from other content" in said[0]
    assert Dataset.find(chosen, manifest.digest).manifest == other, "streamed text is read from the files as they are now"


def test_validation_files_are_prepared_whole(tmp_path, monkeypatch):
    serially(monkeypatch)
    write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in texts(300)])
    write_jsonl(tmp_path / "val.jsonl", [{"text": text} for text in texts(30, seed=1)])
    manifest = prepare(streamed(tmp_path / "data", tmp_path))
    assert manifest.splits["val"].documents == 30
    assert manifest.splits["val"].tokens == sum(len(text.encode()) + 1 for text in texts(30, seed=1))


def test_what_cannot_be_streamed_is_named(tmp_path, monkeypatch):
    serially(monkeypatch)
    write_jsonl(tmp_path / "train.jsonl", [{"text": "few", "label": 0}])
    with pytest.raises(UserError, match="too little text to be streamed"):
        prepare(streamed(tmp_path / "data", tmp_path))
    with pytest.raises(UserError, match="language models alone"):
        prepare(experiment("txt-clf-imdb-all", tmp_path / "data", tmp_path, prepare="stream"))


def test_a_data_task_is_sent_its_own_byte_ranges_and_reads_the_same_rows(prepared, monkeypatch):
    loader = loader_of(prepared)
    units = list(loader.plan(0, 1, 0, 3))
    fetched = []
    monkeypatch.setattr("ray_jobs.data_task.ray.put", lambda value: value)
    monkeypatch.setattr("ray_jobs.data_task.ray.get", lambda value: fetched.append(value) or value)
    reader = loader.reader
    rest = Rest(reader.pieces())
    shipped = Shipped(reader.with_pieces([()]))
    whole = len(cloudpickle.dumps(reader.pieces()))
    for unit in units:
        item = _item(reader, unit)
        assert len(cloudpickle.loads(item["pieces"])[1]) == 1 and len(item["pieces"]) < whole / 5
        (table,) = read_units(pa.Table.from_pylist([item]), shipped, rest)
        assert table.equals(reader.read(unit))
    assert not fetched


def test_a_task_whose_chunk_begins_no_document_gets_the_others(prepared, monkeypatch):
    loader = loader_of(prepared)
    unit = next(loader.plan(0, 1, 0, 3))
    (block,) = loader.reader.pieces_of(unit)[1]
    pieces = list(loader.reader.pieces()[0])
    pieces[block] = Piece((), 0)  # nothing begins in it
    changed = loader.reader.with_pieces([pieces])
    monkeypatch.setattr("ray_jobs.data_task.ray.put", lambda value: value)
    monkeypatch.setattr("ray_jobs.data_task.ray.get", lambda value: value)
    (table,) = read_units(pa.Table.from_pylist([_item(changed, unit)]), Shipped(changed.with_pieces([()])), Rest(changed.pieces()))
    assert table.equals(changed.read(unit))


def test_chunks_of_a_file_share_what_they_say_of_it(prepared):
    files = {id(span.file): span.file for piece in loader_of(prepared).reader.pieces()[0] for span in piece.spans}
    assert len(files) == len({file.path for file in files.values()})
