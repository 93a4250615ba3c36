"""Preparation without Ray: what ends up in shards, however the input is cut, interrupted or damaged."""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perceiver import prepared_folders
from perceiver.config import UserError
from perceiver.data import source_hashes
from perceiver.data.columns import fixed_array
from perceiver.data.manifest import MANIFEST, Manifest
from perceiver.data.shards import read_block
from perceiver.data.source_hashes import HASHES
from perceiver.data.storage import file_hash
from perceiver.data.tokenizers import CLS, EOS, SEP, TOKENIZER, ByteTokenizer, load_tokenizer
from perceiver.datasets import Dataset, NotPrepared, data_folder, with_prepared_tokenizer, with_tokenizer
from perceiver.runs import Run
from perceiver.training.run import save_experiment
from ray_jobs import lr_find, passes, preprocess
from ray_jobs.cli import main_entry, parse_experiment
from tests.support import preparing
from tests.support.logged import logged
from tests.support.preparing import content, experiment, load_prepared, rows_of, stream_of, texts, write_idx, write_jsonl, write_parquet

BYTES = ByteTokenizer()


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    preparing.serially(monkeypatch)


def prepare(chosen, piece_bytes=1 << 20) -> tuple[str, Manifest]:
    preprocess.prepare(chosen, piece_bytes)
    return load_prepared(chosen)


def test_the_stream_is_the_text_byte_for_byte(tmp_path):
    text = "".join(f" = Title {i} = \n \n {body}\n \n" for i, body in enumerate(texts()))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "wiki.train.raw").write_text(text)
    (tmp_path / "in" / "wiki.valid.raw.gz").write_bytes(gzip.compress(text[:500].encode()))
    folder, manifest = prepare(experiment("clm-wikitext", tmp_path / "out", tmp_path / "in"))
    for split, expected in (("train", text), ("val", text[:500])):
        part = manifest.splits[split]
        assert BYTES.decode(stream_of(folder, manifest, split)) == expected
        assert (part.bytes, part.words) == (len(expected.encode()), len(expected.encode().split()))
        assert part.tokens == part.bytes and part.row_length == 16
    assert manifest.splits["train"].documents == 40


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6), length=st.integers(2, 20), piece=st.integers(1, 400),
    rows=st.integers(1, 5), blocks=st.integers(2, 6), mlm=st.booleans(),
)  # fmt: skip
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_all_token_rows_together_are_the_stream(tmp_path_factory, lengths, length, piece, rows, blocks, mlm):
    folder = tmp_path_factory.mktemp("stream")
    bodies = ["x" * n for n in lengths]
    write_jsonl(folder / "train.jsonl", [{"text": body} for body in bodies])
    write_jsonl(folder / "valid.jsonl", [{"text": body, "of": "valid"} for body in bodies[::-1]])
    chosen = experiment(
        "mlm-imdb" if mlm else "clm-wikitext",
        folder / "out",
        f"{folder}/*.jsonl",
        length,
        rows_per_block=rows,
        blocks_per_shard=blocks,
    )
    path, manifest = prepare(chosen, piece)
    for split, order in (("train", bodies), ("val", bodies[::-1])):
        ids = [[CLS, *BYTES.encode(body), SEP] if mlm else [*BYTES.encode(body), EOS] for body in order]
        assert stream_of(path, manifest, split).tolist() == [i for document in ids for i in document]
        part = manifest.splits[split]
        values = [fixed_array(read_block(path, part, b), "tokens") for b in range(part.num_blocks)]
        for b, (this, following) in enumerate(zip(values, values[1:], strict=False)):
            assert len(this) == rows + 1 and np.array_equal(this[-1], following[0]), b


def test_documents_keep_their_labels_and_order(tmp_path):
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts())]
    write_parquet(tmp_path / "train.parquet", rows)
    write_jsonl(tmp_path / "test.jsonl.gz", rows[:5])
    chosen = experiment("txt-clf-imdb-all", tmp_path / "out", f"{tmp_path}/t*", length=42)
    for piece in (1 << 20, 1):
        folder, manifest = prepare(replace(chosen, data=replace(chosen.data, root=f"{tmp_path}/out{piece}")), piece)
        table = rows_of(folder, manifest, "train")
        stored = [np.array(ids) for ids in table["tokens"].to_pylist()]
        assert [ids.tolist() for ids in stored] == [BYTES.encode(row["text"])[:40].tolist() for row in rows]
        assert table["label"].to_pylist() == [row["label"] for row in rows]
        assert manifest.splits["val"].rows == 5 and manifest.stats["labels"] == {"train": [20, 20], "val": [3, 2]}
        assert manifest.splits["train"].tokens == sum(map(len, stored)) and manifest.num_classes == 2


def test_images_keep_their_pixels_and_labels(tmp_path):
    write_idx(tmp_path / "in", "train", 30)
    write_idx(tmp_path / "in", "t10k", 7, seed=1)
    folder, manifest = prepare(experiment("img-clf-mnist", tmp_path / "out", tmp_path / "in"))
    pixels = np.frombuffer((tmp_path / "in" / "train-images-idx3-ubyte").read_bytes(), np.uint8, offset=16).reshape(30, 784)
    labels = gzip.decompress((tmp_path / "in" / "train-labels-idx1-ubyte.gz").read_bytes())[8:]
    table = rows_of(folder, manifest, "train")
    assert np.array_equal(fixed_array(table, "image"), pixels) and table["label"].to_pylist() == list(labels)
    assert manifest.image_shape == (28, 28, 1) and manifest.splits["val"].rows == 7
    assert [len(split.shards) for split in manifest.splits.values()] == [3, 1]


def test_images_in_parquet_are_decoded(tmp_path):
    import io

    from PIL import Image

    def png(value):
        file = io.BytesIO()
        Image.fromarray(np.full((28, 28), value, np.uint8)).save(file, "png")
        return {"bytes": file.getvalue(), "path": None}

    write_parquet(tmp_path / "train.parquet", [{"image": png(i), "label": i % 10} for i in range(20)])
    write_parquet(tmp_path / "test.parquet", [{"image": png(i), "label": i} for i in range(3)])
    folder, manifest = prepare(experiment("img-clf-mnist", tmp_path / "out", f"{tmp_path}/*.parquet"))
    assert fixed_array(rows_of(folder, manifest, "train"), "image")[:, 0].tolist() == list(range(20))


def test_sentencepiece_documents_end_with_its_end_id(shared, tmp_path):
    model = shared / "data" / "sentencepiece" / "spiece.model"
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one two"}, {"text": "three"}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "four"}])
    folder, manifest = prepare(
        experiment("clm-c4", tmp_path / "out", tmp_path / "a.jsonl", tokenizer=str(model), val_source=str(tmp_path / "b.jsonl"))
    )
    pieces = load_tokenizer(str(model))
    expected = [*pieces.encode("one two"), pieces.eos_id, *pieces.encode("three"), pieces.eos_id]
    assert stream_of(folder, manifest, "train").tolist() == expected
    assert manifest.tokenizer == pieces.fingerprint and manifest.tokenizer["sha256"]
    assert (Path(folder) / TOKENIZER).read_bytes() == model.read_bytes()


def test_data_of_a_sentencepiece_model_needs_the_models_file_no_more(shared, tmp_path):
    model = tmp_path / "elsewhere" / "my.model"
    model.parent.mkdir()
    model.write_bytes((shared / "data" / "sentencepiece" / "spiece.model").read_bytes())
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one two"}, {"text": "three"}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "four"}])
    own = {"tokenizer": str(model), "val_source": str(tmp_path / "b.jsonl")}
    chosen = experiment("clm-c4", tmp_path / "out", tmp_path / "a.jsonl", **own)
    folder, manifest = prepare(chosen)
    copy = f"{folder}/{TOKENIZER}"
    model.unlink()

    found = with_tokenizer(chosen)
    assert found.data.tokenizer == copy and load_prepared(found) == (folder, manifest)
    assert found.identity == chosen.identity != replace(chosen, data=replace(chosen.data, tokenizer="bytes")).identity
    assert prepare(found) == (folder, manifest)
    assert with_prepared_tokenizer(chosen, folder, manifest).data.tokenizer == copy
    save_experiment(Run(tmp_path / "run"), chosen, manifest, folder)
    assert load_tokenizer(str(tmp_path / "run" / TOKENIZER)).fingerprint == manifest.tokenizer

    other = tmp_path / "other.model"  # another tokenizer, of other bytes: now it cannot be known which is meant
    other.write_bytes(tiny_sentencepiece_model())
    prepare(replace(chosen, data=replace(chosen.data, tokenizer=str(other))))
    with pytest.raises(UserError, match="is not there, and data was prepared with 2 others: give --data.tokenizer"):
        with_tokenizer(chosen)
    Path(copy).write_bytes(b"damaged")
    with pytest.raises(UserError, match="tokenizer.model is missing or damaged: run `perceiver preprocess"):
        load_prepared(replace(chosen, data=replace(chosen.data, tokenizer=str(shared / "data/sentencepiece/spiece.model"))))


def tiny_sentencepiece_model() -> bytes:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three", "four five six"]), model_writer=model, vocab_size=20, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def test_held_out_documents_do_not_depend_on_order_and_equal_ones_stay_together(tmp_path):
    bodies = texts(300)
    for name, order in (("a", bodies), ("b", bodies[::-1] + bodies)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": body} for body in order])
    held_out = []
    for name in ("a", "b"):
        folder, manifest = prepare(experiment("clm-wikitext", tmp_path / "out", tmp_path / f"{name}.jsonl", val_fraction=0.2))
        val = BYTES.decode(stream_of(folder, manifest, "val"), skip_special=False).split("[EOS]")[:-1]
        train = BYTES.decode(stream_of(folder, manifest, "train"), skip_special=False).split("[EOS]")[:-1]
        held_out.append(set(val))
        assert not set(val) & set(train) and len(val) + len(train) == manifest.splits["val"].documents + manifest.splits["train"].documents
    assert held_out[0] == held_out[1] and 30 < len(held_out[0]) < 90


def test_a_single_text_file_is_held_out_by_sections(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"line {i}\n" for i in range(100_000)))
    chosen = experiment("clm-wikitext", tmp_path / "out", tmp_path / "book.txt", 1024, val_fraction=0.2, rows_per_block=256)
    folder, manifest = prepare(chosen)
    lines = [BYTES.decode(stream_of(folder, manifest, split)).splitlines() for split in ("train", "val")]
    assert all(lines) and sorted(lines[0] + lines[1]) == sorted(f"line {i}" for i in range(100_000))
    assert (stream_of(folder, manifest, "train") == EOS).sum() + (stream_of(folder, manifest, "val") == EOS).sum() == 1


def mixed_input(folder: Path) -> Path:
    folder.mkdir()
    rows = [{"text": text} for text in texts(60)]
    write_jsonl(folder / "a.jsonl", rows)
    write_jsonl(folder / "b.jsonl.gz", rows[:20])
    write_parquet(folder / "c.parquet", rows)
    (folder / "d.txt").write_text("some text\n" * 30)
    return folder


def test_any_cutting_gives_the_same_bytes(tmp_path):
    source = mixed_input(tmp_path / "in")
    results = []
    for piece in (1, 100, 1000, 1 << 30):
        folder, _ = prepare(experiment("clm-wikitext", tmp_path / f"out{piece}", source, val_fraction=0.2), piece)
        results.append(content(folder))
    assert len(results[0]) > 4 and all(result == results[0] for result in results)


class Stopped(BaseException):
    """Stands for the end of the process."""


def test_stopped_anywhere_and_started_again_gives_the_same_bytes(tmp_path, monkeypatch):
    source = mixed_input(tmp_path / "in")
    expected = content(prepare(experiment("clm-wikitext", tmp_path / "whole", source, val_fraction=0.2), 500)[0])
    chosen = experiment("clm-wikitext", tmp_path / "stopped", source, val_fraction=0.2)
    runs = 0
    ran = []

    def stopping(function, items):
        for n, i in enumerate(items):
            if n == 3:
                raise Stopped
            ran.append(i)
            yield i, function(i)

    monkeypatch.setattr(passes, "in_parallel", stopping)
    while True:
        try:
            preprocess.prepare(chosen, 500)
            break
        except Stopped:
            runs += 1
            assert not (Path(data_folder(chosen)) / MANIFEST).exists()
            with pytest.raises(UserError, match="is not prepared"):
                load_prepared(chosen)
    assert runs > 5 and len(ran) == len(set(ran)) + len([i for i in set(ran) if ran.count(i) == 2])  # pieces, then shards
    assert content(data_folder(chosen)) == expected
    left = sorted(path.name for path in Path(chosen.data.root).iterdir())
    assert left == sorted([HASHES, Path(data_folder(chosen)).name])


def test_a_second_preparation_has_nothing_to_do(tmp_path):
    source = mixed_input(tmp_path / "in")
    chosen = experiment("clm-wikitext", tmp_path / "out", source, val_fraction=0.2)
    first = preprocess.prepare(chosen)
    before = content(data_folder(chosen))
    with logged() as lines:
        assert preprocess.prepare(chosen) == first
    assert len(lines) == 1 and "nothing to do" in lines[0] and content(data_folder(chosen)) == before


def test_the_manifest_holds_no_places_and_no_times(tmp_path):
    results = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        source = mixed_input(tmp_path / name / "in")
        folder, _ = prepare(experiment("clm-wikitext", tmp_path / name / "out", source, val_fraction=0.2))
        results.append(content(folder))
        assert str(tmp_path) not in (Path(folder) / MANIFEST).read_text()
    assert results[0] == results[1]


def test_data_of_a_source_that_was_edited_is_prepared_beside_that_of_before(tmp_path):
    source = mixed_input(tmp_path / "in")
    chosen = experiment("clm-wikitext", tmp_path / "out", source, val_fraction=0.2)
    folder, before = prepare(chosen)
    kept = content(folder)
    (source / "d.txt").write_text("other text\n" * 30)
    with pytest.raises(NotPrepared, match=rf"is not prepared: run `.*` \({folder} was prepared from other content: in/d.txt\)"):
        Dataset.find(chosen)
    with logged() as lines:
        again, after = prepare(chosen)
    assert lines[0] == f"{folder} was prepared from other content: in/d.txt; this data has a folder of its own"
    assert again.startswith(f"{folder}-") and after.digest != before.digest and content(folder) == kept
    assert Dataset.find(chosen, before.digest).folder == folder, "a run keeps what it began with"
    (source / "d.txt").write_text("some text\n" * 30)
    assert Dataset.find(chosen).folder == folder, "as it was: the data is there"
    assert not list((tmp_path / "out").glob(".staging*"))


def test_sources_of_one_name_have_a_folder_each_which_every_spelling_finds(tmp_path, monkeypatch):
    """Two tables that are both called train.csv, say: what counts is what they hold, not where they lie."""
    roots = {}
    for name in ("one", "two", "copy"):
        (tmp_path / name).mkdir()
        source = mixed_input(tmp_path / name / "in")
        if name == "two":
            (source / "d.txt").write_text((source / "d.txt").read_text()[::-1])  # of the same size
        roots[name] = experiment("clm-wikitext", tmp_path / "out", source, val_fraction=0.2)
    first, _ = prepare(roots["one"])
    second, other = prepare(roots["two"])
    assert second.startswith(f"{first}-") and other.digest != Manifest.load(first).digest
    fresh, _ = prepare(replace(roots["two"], data=replace(roots["two"].data, root=str(tmp_path / "elsewhere"))))
    assert content(fresh) == content(second), "the content does not depend on the folder's name"
    monkeypatch.chdir(tmp_path / "two")
    for source, folder in {
        str(tmp_path / "copy" / "in"): first,
        "../one/in/": first,
        "in": second,
        "./in": second,
        "../two/in": second,
    }.items():
        chosen = experiment("clm-wikitext", tmp_path / "out", source, val_fraction=0.2)
        assert Dataset.find(chosen).folder == data_folder(chosen) == folder
        with logged() as lines:
            prepare(chosen)
        assert len(lines) == 1 and lines[0].endswith(f"nothing to do: {folder}")
    for name in ("one", "two", "copy"):
        shutil.rmtree(tmp_path / name)
    with pytest.raises(UserError, match=r"one/in is not on this machine, and data was prepared from 2 sources of that name \("):
        Dataset.find(roots["one"])
    assert Dataset.find(roots["one"], other.digest).folder == second
    shutil.rmtree(second)
    assert Dataset.find(roots["two"]).folder == first, "on another machine there may be nothing but the prepared data"


def test_a_damaged_manifest_of_one_of_two_sources_is_prepared_again_in_its_place(tmp_path):
    chosen = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        source = mixed_input(tmp_path / name / "in")
        (source / "d.txt").write_text(f"{name}\n" * 30)
        chosen.append(experiment("clm-wikitext", tmp_path / "out", source, val_fraction=0.2))
    folders = [prepare(each)[0] for each in chosen]
    before = [content(folder) for folder in folders]
    for each, folder in zip(chosen, folders, strict=True):
        (Path(folder) / MANIFEST).write_text("{")
        assert prepare(each)[0] == folder
    assert [content(folder) for folder in folders] == before


def test_a_mixture_finds_the_data_of_its_sources_as_they_are_now(tmp_path):
    write_jsonl(tmp_path / "more.jsonl", [{"text": text.upper()} for text in texts(60)])
    source = mixed_input(tmp_path / "in")
    mixture = (f"{source}=1", f"{tmp_path / 'more.jsonl'}=1")
    chosen = experiment("clm-wikitext", tmp_path / "out", "", val_fraction=0.2, mixture=mixture)
    first, before = prepare(chosen)
    (source / "d.txt").write_text("other text\n" * 30)
    with pytest.raises(NotPrepared, match="was prepared from other content: in/d.txt"):
        Dataset.find(chosen)
    second, after = prepare(chosen)
    old, new = Dataset.find(chosen, before.digest), Dataset.find(chosen)
    assert (old.folder, new.folder) == (first, second) and second.startswith(f"{first}-")
    assert [a.folder == b.folder for a, b in zip(old.parts, new.parts, strict=True)] == [False, True]
    (source / "d.txt").write_text("some text\n" * 30)
    assert prepare(chosen)[0] == first


def test_a_job_that_prepares_nothing_says_that_data_was_prepared_from_other_content(tmp_path):
    source = mixed_input(tmp_path / "in")
    small = ["--data.val-fraction", "0.2", "--model.max-seq-len", "16", "--model.max-latents", "8", "--task.sample-tokens", "0"]
    words = ["clm-wikitext-small", "--data.source", str(source), "--data.root", str(tmp_path / "out"), *small]
    prepared = prepare(parse_experiment(words, "ray_jobs.lr_find"))[1]
    with open(source / "d.txt", "a") as file:
        file.write("more\n")
    with pytest.raises(UserError, match=r"is not prepared: .* was prepared from other content: in/d.txt"):
        lr_find.main(words)
    chosen = parse_experiment(words, "ray_jobs.train")
    assert Dataset.find_early(chosen) is None, "a training prepares it at once"
    begun = Dataset.find_early(chosen, prepared.digest)
    with logged() as lines:
        begun.warn_of_changes()
    assert len(lines) == 1 and lines[0].endswith("(in/d.txt): the training continues with what it was prepared from")


def test_very_large_files_are_read_only_where_names_and_sizes_do_not_decide(tmp_path, monkeypatch):
    source = mixed_input(tmp_path / "in")
    chosen = experiment("clm-wikitext", tmp_path / "out", source, val_fraction=0.2)
    first, _ = prepare(chosen)
    read = []

    def hashed(*place):
        read.append(place)
        return file_hash(*place)

    monkeypatch.setattr(prepared_folders, "CHECKED_BYTES", 0)
    monkeypatch.setattr(source_hashes, "file_hash", hashed)
    (tmp_path / "out" / HASHES).unlink()
    assert Dataset.find(chosen).folder == first and not read
    (source / "d.txt").write_text("text some\n" * 30)
    assert Dataset.find(chosen).folder == first, "of the same size"
    second, _ = prepare(chosen)
    (tmp_path / "out" / HASHES).unlink()
    read.clear()
    assert Dataset.find(chosen).folder == second != first and read
    with open(source / "d.txt", "a") as file:
        file.write("more\n")
    with pytest.raises(NotPrepared):
        Dataset.find(chosen)


def test_prepared_data_that_cannot_be_written_to_is_trained_on(tmp_path, monkeypatch):
    source = mixed_input(tmp_path / "in")
    chosen = experiment("clm-wikitext", tmp_path / "out", source, val_fraction=0.2)
    prepare(chosen)
    (tmp_path / "out" / HASHES).unlink()

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(source_hashes, "write_file", refuse)
    Dataset.find(chosen)


def test_a_damaged_data_set_is_refused_and_prepared_again(tmp_path):
    chosen = experiment("clm-wikitext", tmp_path / "out", mixed_input(tmp_path / "in"), val_fraction=0.2)
    folder, _ = prepare(chosen)
    expected = content(folder)
    (Path(folder) / "train-00001.parquet").write_bytes(b"half")
    with pytest.raises(UserError, match=r"train-00001.parquet is missing or damaged: run `perceiver preprocess"):
        load_prepared(chosen)
    prepare(chosen)
    assert content(folder) == expected


def test_two_preparations_of_the_same_data_do_not_run_at_once(tmp_path, monkeypatch):
    chosen = experiment("clm-wikitext", tmp_path / "out", mixed_input(tmp_path / "in"), val_fraction=0.2)

    def meanwhile(function, items):
        with pytest.raises(UserError, match="is being prepared by another process"):
            preprocess.prepare(chosen)
        raise Stopped

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(passes, "in_parallel", meanwhile)
        prepare(chosen)
    assert prepare(chosen)[1].splits["val"].rows


def test_validation_files_alone_make_a_data_set_for_evaluation(tmp_path):
    (tmp_path / "other.txt").write_text("other text\n" * 9)
    folder, manifest = prepare(experiment("clm-wikitext", tmp_path / "out", "", val_source=str(tmp_path / "other.txt")))
    assert list(manifest.splits) == ["val"] and BYTES.decode(stream_of(folder, manifest, "val")) == "other text\n" * 9


# ------------------------------------------------------------------------------------------------------------- mistakes


def broken(folder: Path, name: str) -> tuple[str, Path]:
    """A preset, and an input for it with one fault."""
    folder.mkdir()
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts(10))]
    if name.startswith("idx"):
        write_idx(folder, "train", 10)
        write_idx(folder, "t10k", 5)
        images, labels = folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte.gz"
        if name == "idx-magic":
            images.write_bytes(b"\0\0\x08\x04" + images.read_bytes()[4:])
        elif name == "idx-short":
            images.write_bytes(images.read_bytes()[:-1])
        elif name == "idx-count":
            write_idx(folder / "more", "train", 9)
            (folder / "more" / "train-labels-idx1-ubyte.gz").replace(labels)
            (folder / "more" / "train-images-idx3-ubyte").unlink()
        elif name == "idx-label":
            labels.write_bytes(gzip.compress(gzip.decompress(labels.read_bytes())[:-1] + b"\x0a"))
        return "img-clf-mnist", folder
    write_jsonl(folder / "test.jsonl", rows)
    data = "\n".join(json.dumps(row) for row in rows).encode()
    if name == "truncated":
        (folder / "train.jsonl.gz").write_bytes(gzip.compress(data)[:-20])
    elif name == "utf8":
        (folder / "train.jsonl").write_bytes(data.replace(b"label", b"l\xffbel", 1))
    elif name == "empty":
        (folder / "train.jsonl").write_bytes(b"")
    elif name == "json":
        (folder / "train.jsonl").write_bytes(data[:-3])
    elif name == "column":
        write_parquet(folder / "train.parquet", [{"body": "a", "label": 0}])
    elif name == "parquet":
        (folder / "train.parquet").write_bytes(b"PAR1 and no more")
    elif name == "label":
        write_jsonl(folder / "train.jsonl", [{"text": "a", "label": 2}])
    elif name == "nested":
        (folder / "train.jsonl").write_bytes(data + b'\n{"text": "a", "label": 1, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    elif name == "digits":
        (folder / "train.jsonl").write_bytes(data + b'\n{"text": "a", "label": ' + b"1" * 5_000 + b"}")
    return "txt-clf-imdb-all", folder


FAULTS = {
    "idx-magic": r"train-images-idx3-ubyte is no idx file of unsigned bytes in 3 dimensions: magic 2052, expected 2051",
    "idx-short": r"train-images-idx3-ubyte has 7,855 bytes, its head .* asks for 7,856",
    "idx-count": r"train-images-idx3-ubyte has 10 images, but its labels file has 9 labels",
    "idx-label": r"train-images-idx3-ubyte image 9: label 10 must be 0 .. 9",
    "truncated": r"train.jsonl.gz is truncated: its gzip data ends early",
    "utf8": r"train.jsonl line 1: is not UTF-8: byte 0xff at byte",
    "empty": r"train.jsonl is empty",
    "json": r"train.jsonl line 10: is not one JSON object a line",
    "column": r"train.parquet has no column 'text' \(it has: body, label\)",
    "parquet": r"train.parquet is no readable parquet file",
    "nested": r"train.jsonl line 11: is not one JSON object a line \(it is nested too deep\)",
    "digits": r"train.jsonl line 11: is not one JSON object a line \(it has a number of too many digits\)",
    "label": r"train.jsonl line 1: label 2 must be 0 .. 1 or negative, positive",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_end_with_one_sentence_and_no_data_set(tmp_path, capsys, fault):
    import re

    preset, source = broken(tmp_path / "in", fault)
    arguments = [preset, "--data.source", str(source), "--data.root", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main_entry(preprocess.main, arguments)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and re.search(FAULTS[fault], lines[0])
    assert not list((tmp_path / "out").rglob(MANIFEST)) and not list((tmp_path / "out").rglob("*.parquet"))


@pytest.mark.parametrize("fault", ["truncated", "utf8", "empty", "json", "column", "parquet", "label", "idx-label", "nested", "digits"])
def test_faults_are_skipped_and_counted_where_told(tmp_path, capsys, fault):
    preset, source = broken(tmp_path / "in", fault)
    if not fault.startswith("idx"):
        write_jsonl(source / "train-more.jsonl", [{"text": "good", "label": 1}] * 3)
    arguments = [preset, "--data.source", str(source), "--data.root", str(tmp_path / "out"), "--data.on-error", "skip"]
    with pytest.raises(SystemExit) as stop:
        main_entry(preprocess.main, arguments)
    assert stop.value.code == 0 and "skipped: 1 x " in capsys.readouterr().out
    manifest = Manifest.load(next((tmp_path / "out").rglob(MANIFEST)).parent)
    assert sum(manifest.stats["skipped"].values()) == 1
    assert manifest.splits["train"].rows == {"utf8": 12, "json": 12, "idx-label": 9, "nested": 13, "digits": 13}.get(fault, 3)


def test_the_same_files_for_training_and_validation_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "some.jsonl", [{"text": text} for text in texts(9)])
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a" / "some.jsonl")
    for val in ("a/some.jsonl", "a", "link.jsonl", "b/some.jsonl"):
        with pytest.raises(UserError, match=r"some.jsonl .*both for training \(data.source\) and for validation"):
            prepare(experiment("clm-wikitext", tmp_path / "out", tmp_path / "a" / "some.jsonl", val_source=str(tmp_path / val)))
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_documents_that_are_in_both_splits_are_counted(tmp_path):
    bodies = texts(50)
    write_jsonl(tmp_path / "train.jsonl", [{"text": body, "label": 0} for body in ["", *bodies]])
    write_jsonl(tmp_path / "valid.jsonl", [{"text": body, "label": 1} for body in ["", *bodies[10:13], bodies[10], "a new one"]])
    for preset, piece in (("clm-wikitext", 1 << 20), ("clm-wikitext", 50), ("txt-clf-imdb-all", 50)):
        chosen = experiment(preset, tmp_path / f"{preset}{piece}", f"{tmp_path}/*.jsonl")
        with logged() as lines:
            manifest = preprocess.prepare(chosen, piece)
        assert manifest.stats["shared_documents"] == 4
        assert "  shared: 4 of the 6 validation documents occur in training, too (--data.duplicates skip leaves them out)" in lines
        assert manifest.stats["empty_documents"] == {"train": 1, "val": 1}
        assert "  empty: 1 train and 1 val documents have no text" in lines
    held_out = preprocess.prepare(experiment("clm-wikitext", tmp_path / "o", tmp_path / "train.jsonl", val_fraction=0.3))
    assert "shared_documents" not in held_out.stats  # equal ones are on the same side


def test_images_that_are_in_both_splits_are_counted(tmp_path):
    write_idx(tmp_path / "in", "train", 9)
    write_idx(tmp_path / "in", "t10k", 4)  # the first ones of the same random numbers
    with logged() as lines:
        manifest = preprocess.prepare(experiment("img-clf-mnist", tmp_path / "out", tmp_path / "in"))
    assert manifest.stats["shared_documents"] == 4
    assert "  shared: 4 of the 4 validation images occur in training, too (--data.duplicates skip leaves them out)" in lines


@pytest.mark.parametrize(
    ("preset", "length", "message"),
    [
        ("txt-clf-imdb-all", 2, r"model.input.max-seq-len is 2 and must be at least 3: a document stands between"),
        ("mlm-imdb", 1, r"model.input.max-seq-len is 1 and must be at least 2"),
        ("clm-wikitext", 1, r"model.max-seq-len is 1 and must be at least 2"),
    ],
)
def test_lengths_that_hold_nothing_are_refused_and_the_least_is_not(tmp_path, preset, length, message):
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts(20))]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", rows[:9])
    with pytest.raises(UserError, match=message):
        prepare(experiment(preset, tmp_path / "out", f"{tmp_path}/*.jsonl", length))
    folder, manifest = prepare(experiment(preset, tmp_path / "out", f"{tmp_path}/*.jsonl", length + 1))
    assert manifest.splits["train"].row_length > 0 and rows_of(folder, manifest, "train")["tokens"][0].as_py()


def test_documents_without_any_text_are_refused(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "", "label": 0}] * 3)
    write_jsonl(tmp_path / "test.jsonl", [{"text": "some", "label": 0}])
    with pytest.raises(UserError, match=r"has no text for the train split: all of its documents are empty"):
        prepare(experiment("txt-clf-imdb-all", tmp_path / "out", f"{tmp_path}/*.jsonl"))


def test_too_few_documents_to_hold_any_out_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(UserError, match="none fell into the val split"):
        prepare(experiment("clm-wikitext", tmp_path / "out", tmp_path / "a.txt"))


def test_images_of_another_shape_are_refused_before_any_work(tmp_path):
    write_idx(tmp_path / "in", "train", 3)
    write_idx(tmp_path / "in", "t10k", 3, seed=1)
    chosen = experiment("img-clf-mnist", tmp_path / "out", tmp_path / "in")
    model = replace(chosen.model, input=replace(chosen.model.input, image_shape=(32, 32, 1)))
    with pytest.raises(UserError, match=r"image-shape is \(32, 32, 1\), but the images are \(28, 28, 1\)"):
        prepare(replace(chosen, model=model))


def test_data_may_be_read_from_and_written_to_object_stores(tmp_path):
    import fsspec

    source = mixed_input(tmp_path / "in")
    expected = content(prepare(experiment("clm-wikitext", tmp_path / "out", source, val_fraction=0.2))[0])
    store = fsspec.filesystem("memory")
    store.put(str(source), "/bucket/in", recursive=True)
    chosen = experiment("clm-wikitext", "memory://bucket/out", "memory://bucket/in", val_fraction=0.2)
    folder, manifest = prepare(chosen)
    stored = {name: store.cat_file(f"/bucket/out/{folder.rpartition('/')[2]}/{name}") for name in expected}
    del stored[MANIFEST], expected[MANIFEST]  # has no hashes of files that are not local
    assert stored == expected and stream_of(folder, manifest, "val").size
