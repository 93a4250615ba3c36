"""Sources: which files of a folder are used for what, and readers that give the same documents however files are
cut.
"""

import gzip
import json
import os
import socket
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perceiver.config import DataConfig, UserError
from perceiver.data import sources, spans
from perceiver.data.hub import why_unreachable
from perceiver.data.images import parse_idx
from perceiver.data.read_documents import read_documents
from perceiver.data.sources import SHIPPED, resolve, source_label
from perceiver.data.spans import Problems, Span
from perceiver.data.tables import Columns

COLUMNS = Columns(text="text", label=None)


def touch(folder, *names, content="x"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def used(source, kind="tokens", **settings):
    found = resolve(DataConfig(source=str(source), **settings), kind)
    return sorted((f.name.partition("/")[2], f.split) for f in found.files), [n.partition("/")[2] for n in found.ignored]


@pytest.mark.parametrize(
    ("names", "expected", "ignored"),
    [
        (["a.txt", "b.txt"], {"a.txt": "hash", "b.txt": "hash"}, []),
        (["w.train.raw", "w.valid.raw", "w.test.raw"], {"w.train.raw": "train", "w.valid.raw": "val"}, ["w.test.raw"]),
        (["train.txt", "test.txt"], {"train.txt": "train", "test.txt": "val"}, []),
        (["a.txt", "validation.txt"], {"a.txt": "train", "validation.txt": "val"}, []),
        (["train/a.txt", "dev/a.txt"], {"train/a.txt": "train", "dev/a.txt": "val"}, []),
        (["train.txt", "other.txt"], {"train.txt": "hash"}, ["other.txt"]),
        (["trained.txt", "b.txt"], {"trained.txt": "hash", "b.txt": "hash"}, []),
        (["a.jsonl", "README.md", ".hidden.txt"], {"a.jsonl": "hash"}, []),
    ],
)  # fmt: skip
def test_files_of_a_folder_are_used_as_their_names_say(tmp_path, names, expected, ignored):
    touch(tmp_path, *names)
    assert used(tmp_path) == (sorted(expected.items()), ignored)


def test_language_models_train_on_the_unsupervised_part(tmp_path):
    for name in ("train", "test", "unsupervised"):
        touch(tmp_path, f"{name}.parquet")
    assert used(tmp_path) == ([("test.parquet", "val"), ("unsupervised.parquet", "train")], ["train.parquet"])
    documents = used(tmp_path, "documents")
    assert documents == ([("test.parquet", "val"), ("train.parquet", "train")], ["unsupervised.parquet"])


def test_validation_files_are_given_apart(tmp_path):
    touch(tmp_path, "a/train.txt", "a/valid.txt", "b/one.txt", "b/two.txt")
    files, ignored = used(tmp_path / "a", val_source=str(tmp_path / "b"))
    assert files == [("one.txt", "val"), ("train.txt", "train"), ("two.txt", "val")] and ignored == ["valid.txt"]
    only_val = resolve(DataConfig(source="", val_source=str(tmp_path / "b")), "tokens")
    assert [f.split for f in only_val.files] == ["val", "val"]


def test_globs_and_single_files(tmp_path):
    touch(tmp_path, "in/a.txt", "in/b.txt", "in/c.jsonl")
    assert used(tmp_path / "in" / "*.txt")[0] == [("a.txt", "hash"), ("b.txt", "hash")]
    assert [f.name for f in resolve(DataConfig(source=str(tmp_path / "in" / "a.txt")), "tokens").files] == ["a.txt"]


def test_each_file_is_read_once_however_many_links_lead_to_it(tmp_path):
    touch(tmp_path, "in/a.txt", "in/deep/b.txt", "elsewhere/c.txt")
    (tmp_path / "in" / "deep" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in" / "deep")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "0.txt").symlink_to(tmp_path / "in" / "a.txt")
    expected = [("a.txt", "hash"), ("deep/b.txt", "hash"), ("more/c.txt", "hash")]
    assert used(tmp_path / "in") == (expected, ["0.txt"])
    assert used(f"{tmp_path}/in/**/*.txt")[0] == expected


def test_what_links_put_into_both_splits_is_refused(tmp_path):
    touch(tmp_path, "in/train/a.txt")
    (tmp_path / "in" / "valid").symlink_to(tmp_path / "in" / "train")
    with pytest.raises(UserError, match=r"train/a.txt and in/valid/a.txt hold the same, .* both for training"):
        used(tmp_path / "in")


def test_links_that_lead_nowhere_are_named(tmp_path):
    touch(tmp_path, "in/a.txt")
    (tmp_path / "in" / "b.txt").symlink_to(tmp_path / "none")
    with pytest.raises(UserError, match="has b.txt, a link to a file that does not exist"):
        used(tmp_path / "in")


def test_names_that_look_like_globs_and_endings_in_capitals_are_read(tmp_path):
    touch(tmp_path, "in/a[b].jsonl", "in/ab.jsonl", "x[1]/c.txt", "x1/d.txt")
    one = resolve(DataConfig(source=str(tmp_path / "in" / "a[b].jsonl")), "tokens").files
    assert [f.path for f in one] == [str(tmp_path / "in" / "a[b].jsonl")]
    assert used(tmp_path / "in")[0] == [("a[b].jsonl", "hash"), ("ab.jsonl", "hash")]
    assert used(f"{tmp_path}/x[1]/*.txt")[0] == [("c.txt", "hash")]
    (tmp_path / "X.JSONL.GZ").write_bytes(gzip.compress(b'{"text": "some"}\n'))
    (file,) = resolve(DataConfig(source=str(tmp_path / "X.JSONL.GZ")), "tokens").files
    (found,) = read_documents(Span(file, 0, file.size), COLUMNS, Problems(skip=False))
    assert found.texts == ["some"]


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("wikitext2", "tokens", "does not exist.*did you mean wikitext-2"),
        ("{}/none/*.txt", "tokens", "matches no file"),
        ("{}/empty", "tokens", "is a folder without files"),
        ("{}/notes.md", "tokens", "is of no known format"),
        ("{}/text", "documents", "holds nothing that documents are made from: .jsonl"),
        ("{}/valid", "tokens", "has no files to train on"),
        ("{}/idx", "images", "has no file of labels beside it: train-labels-idx1-ubyte is missing"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path, source, kind, message):
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "notes.md", "text/a.txt", "valid/valid.txt", "idx/train-images-idx3-ubyte")
    with pytest.raises(UserError, match=message):
        resolve(DataConfig(source=source.format(tmp_path)), kind)


def test_nothing_to_validate_on_is_refused(tmp_path):
    touch(tmp_path, "a.txt")
    with pytest.raises(UserError, match="has no validation files"):
        resolve(DataConfig(source=str(tmp_path), val_fraction=0), "tokens")


@pytest.mark.parametrize("reason", ["huggingface.co: Name or service not known", None], ids=["seen at once", "found by the library"])
def test_hub_names_without_a_network_say_what_to_do(reason, monkeypatch):
    def ask(*names):
        assert reason is None  # the library would try for half a minute
        raise ConnectionError("Couldn't reach 'stanfordnlp/imdb' on the Hub")

    monkeypatch.setattr(sources, "why_unreachable", lambda: reason)
    monkeypatch.setattr(datasets, "load_dataset_builder", ask)
    said = rf"data set stanfordnlp/imdb could not be found on the hub \({reason or 'Could.*'}\).*--data.source PATH"
    with pytest.raises(UserError, match=said):
        resolve(DataConfig(source="imdb"), "documents")


def test_whether_the_hub_is_there_shows_at_once_unless_a_proxy_knows(monkeypatch):
    def unknown(*args):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert why_unreachable().endswith(": Name or service not known")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert why_unreachable() is None
    monkeypatch.delenv("HTTPS_PROXY")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: [()])
    assert why_unreachable() is None


def test_hub_names_give_the_files_of_their_splits(tmp_path):
    touch(tmp_path, "data/train-0.jsonl", "data/validation-0.jsonl", content='{"text": "a"}\n')
    splits = "".join(f"  - split: {name}\n    path: data/{name}-*\n" for name in ("train", "validation"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: en\n  data_files:\n{splits}---\n")
    found = resolve(DataConfig(source=f"hub:{tmp_path}:en"), "tokens")
    assert [(f.name.rpartition("/")[2], f.split, f.format) for f in found.files] == [
        ("train-0.jsonl", "train", "jsonl"), ("validation-0.jsonl", "val", "jsonl"),
    ]  # fmt: skip


def test_labels_of_sources_do_not_hold_their_place():
    assert source_label("/some/where/corpus/") == "files:corpus"
    assert source_label("/some/where/corpus/*.txt") == "files:corpus/*.txt"
    assert source_label("mnist") == "mnist" and source_label("hub:a/b:c") == "hub:a/b:c" and source_label("") is None


def test_shipped_digits_are_the_first_of_each_class(shared):
    for split, num in (("train", 400), ("t10k", 80)):
        whole, mini = (
            [parse_idx(gzip.decompress((folder / f"{split}-{name}-ubyte.gz").read_bytes()), ndim, name)
             for name, ndim in (("images-idx3", 3), ("labels-idx1", 1))]
            for folder in (shared / "data" / "mnist", SHIPPED)
        )  # fmt: skip
        first = np.sort(np.concatenate([np.flatnonzero(whole[1] == digit)[:num] for digit in range(10)]))
        assert np.array_equal(mini[0], whole[0][first]) and np.array_equal(mini[1], whole[1][first])
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 1_000_000


# -------------------------------------------------------------------------------------------------------------- reading


def documents(path, kind="tokens", skip=False, columns=COLUMNS, cuts=()):
    """All documents of a file, read in spans cut at the given places."""
    file = resolve(DataConfig(source=str(path)), kind).files[0]
    size = pq.read_metadata(path).num_rows if file.format == "parquet" else file.size
    problems = Problems(skip)
    edges = [0, *cuts, size]
    result = []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        for batch in read_documents(Span(file, start, stop), columns, problems):
            labels = batch.labels.tolist() if batch.labels is not None else [None] * len(batch.texts)
            result += zip(batch.texts, labels, batch.begins.tolist(), batch.complete.tolist(), strict=True)
    return result, dict(problems.counts)


ARTICLES = " \n = One = \n \n Text of one . \n = = Part = = \n \n More \n \n = Two = 2 = \n \n x = y \n \n = Not = = \n \n"


def test_wikitext_is_cut_before_titles_alone(tmp_path):
    (tmp_path / "wiki.raw").write_text(ARTICLES)
    texts = [text for text, *_ in documents(tmp_path / "wiki.raw")[0]]
    assert "".join(texts) == ARTICLES
    assert [text.strip().splitlines()[0] for text in texts] == ["= One = ", "= Two = 2 = "]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_real_wikitext_is_kept_byte_for_byte(shared, tmp_path, suffix):
    data = gzip.decompress((shared / "data" / "wikitext-2-v1" / "wiki.valid.tokens.gz").read_bytes())
    path = tmp_path / f"wiki.valid.tokens{suffix}"
    path.write_bytes(gzip.compress(data) if suffix else data)
    found, _ = documents(path)
    assert "".join(text for text, *_ in found).encode() == data and len(found) == 60
    assert all(text.lstrip().startswith("= ") for text, *_ in found)


@pytest.mark.parametrize("name", ["a.txt", "a.raw", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize("slab", [100, 1 << 20])
def test_documents_are_the_same_however_a_file_is_cut(tmp_path, monkeypatch, name, slab):
    monkeypatch.setattr(spans, "SECTION", 64)
    monkeypatch.setattr(spans, "SLAB", slab)
    rng = np.random.default_rng(0)
    lines = ["word " * int(n) for n in rng.integers(0, 40, 60)]
    path = tmp_path / name
    if name == "a.txt":
        path.write_text("\n".join(lines))
    elif name == "a.raw":
        path.write_text("".join(f" = Title {i} = \n \n {line}\n \n" for i, line in enumerate(lines)))
    elif name == "a.jsonl":
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    else:
        pq.write_table(pa.table({"text": lines}), path, row_group_size=7)
    whole, _ = documents(path)
    size = len(lines) if name == "a.parquet" else path.stat().st_size
    for num in (1, 2, 5, 20):
        cuts = sorted({int(c) // (64 if name == "a.txt" else 1) * (64 if name == "a.txt" else 1) for c in rng.integers(1, size, num)} - {0})
        assert documents(path, cuts=cuts)[0] == whole
    if name in ("a.txt", "a.raw"):
        assert "".join(text for text, *_ in whole).encode() == path.read_bytes()
    else:
        assert [text for text, *_ in whole] == lines
    if name == "a.txt":
        assert [begin for *_, begin, _ in whole] == [True] + [False] * (len(whole) - 1)
        assert [end for *_, end in whole] == [False] * (len(whole) - 1) + [True]


def faulty(folder, name):
    good = {"text": "fine", "label": 1}
    lines = [json.dumps(good)] * 3
    path = folder / name
    if name == "json.jsonl":
        lines[1] = '{"text": '
    elif name == "utf8.jsonl":
        path.write_bytes(lines[0].encode() + b'\n{"text": "\xff", "label": 0}\n')
        return path
    elif name == "surrogate.jsonl":
        lines[1] = '{"text": "\\ud800", "label": 0}'
    elif name == "list.jsonl":
        lines[1] = "[1]"
    elif name == "field.jsonl":
        lines[1] = '{"body": "b", "label": 0}'
    elif name == "null.jsonl":
        lines[1] = '{"text": null, "label": 0}'
    elif name == "label.jsonl":
        lines[1] = '{"text": "t", "label": 2}'
    elif name == "utf8.txt":
        path.write_bytes(b"line\n" * 20_000 + b"caf\xe9\n" + b"line\n" * 20_000)
        return path
    elif name == "null.parquet":
        pq.write_table(pa.table({"text": ["a", None, "b"], "label": [0, 1, 1]}), path)
        return path
    elif name == "utf8.parquet":
        column = pa.array([b"a", b"\xff", b"b"], pa.binary()).view(pa.string())
        pq.write_table(pa.table({"text": column, "label": [0, 1, 1]}), path)
        return path
    elif name == "label.parquet":
        pq.write_table(pa.table({"text": ["a", "b", "c"], "label": [0, -1, 1]}), path)
        return path
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    ("name", "reason", "message", "left"),
    [
        ("json.jsonl", "not JSON", r"json.jsonl line 2: is not one JSON object a line", 2),
        ("utf8.jsonl", "not UTF-8", r"utf8.jsonl line 2: is not UTF-8: byte 0xff at byte 39 of the file", 1),
        ("surrogate.jsonl", "not UTF-8", r"surrogate.jsonl line 2: field 'text' has a lone surrogate", 2),
        ("list.jsonl", "wrong type", r"list.jsonl line 2: is not one JSON object a line", 2),
        ("field.jsonl", "missing field", r"field.jsonl line 2: has no field 'text' \(it has: body, label\)", 2),
        ("null.jsonl", "wrong type", r"null.jsonl line 2: field 'text' is no text", 2),
        ("label.jsonl", "bad label", r"label.jsonl line 2: label 2 must be 0 .. 1 or no, yes", 2),
        ("utf8.txt", "not UTF-8", r"utf8.txt is not UTF-8: byte 0xe9 at byte 100,003", 3),
        ("null.parquet", "missing text", r"null.parquet row 1: column 'text' is null", 2),
        ("utf8.parquet", "not UTF-8", r"utf8.parquet row 1: column 'text' is not UTF-8", 2),
        ("label.parquet", "bad label", r"label.parquet row 1: label -1 must be 0 .. 1 or no, yes", 2),
    ],
)  # fmt: skip
def test_faulty_rows_are_named_or_skipped_and_counted(tmp_path, name, reason, message, left):
    path = faulty(tmp_path, name)
    text = name.endswith("txt")
    columns = COLUMNS if text else replace(COLUMNS, label="label", num_classes=2, class_names=("no", "yes"))
    kind = "tokens" if text else "documents"
    with pytest.raises(UserError, match=message):
        documents(path, kind, columns=columns)
    found, counts = documents(path, kind, skip=True, columns=columns)
    assert len(found) == left and counts == {reason: 1}


def test_labels_may_be_the_names_of_classes(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": "yes"}\n{"text": "b", "label": 0}\n')
    columns = Columns(text="text", label="label", num_classes=2, class_names=("no", "yes"))
    assert [label for _, label, *_ in documents(tmp_path / "a.jsonl", "documents", columns=columns)[0]] == [1, 0]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
@pytest.mark.parametrize("damage", ["truncated", "corrupt"])
def test_damaged_compressed_files_are_skipped_as_a_whole(tmp_path, name, damage):
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": "".join(map(chr, rng.integers(97, 123, 50)))}) for _ in range(2000)]
    data = bytearray(gzip.compress("\n".join(lines).encode()))
    if damage == "truncated":
        del data[-1000:]
    else:
        data[len(data) // 2] ^= 0xFF
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{name} is {damage}"):
        documents(path)
    found, counts = documents(path, skip=True)
    assert found == [] and counts == {f"{damage} file": 1}


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.raw", "a.parquet"])
def test_empty_files_are_named_or_skipped(tmp_path, name):
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    else:
        path.write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    with pytest.raises(UserError, match=f"{name} (is empty|has no rows)"):
        documents(path)
    assert documents(path, skip=True) == ([], {"empty file": 1})


def test_other_columns_are_named(tmp_path):
    pq.write_table(pa.table({"body": ["a"], "url": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet has no column 'text' \(it has: body, url\)"):
        documents(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b.parquet column 'text' holds int64, not text"):
        documents(tmp_path / "b.parquet")


def test_a_file_behind_an_address_of_the_web_is_read_as_a_local_one(tmp_path):
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    from perceiver.inference.parts import list_inputs, plan_parts, read_part
    from ray_jobs.data import look

    rows = "".join(f"some words {i} of a text,{i % 2}\n" for i in range(30))
    (tmp_path / "in.csv").write_text(f"text,label\n{rows}")
    content = (tmp_path / "in.csv").read_bytes()

    class Server(BaseHTTPRequestHandler):
        """Answers requests for parts of the file, as servers of files do."""

        def do_GET(self):
            first, _, last = self.headers.get("Range", f"bytes=0-{len(content) - 1}").removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last) + 1]
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(part)

        do_HEAD = do_GET

        def log_message(self, *args):
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/in.csv"
        there, here = (
            [line.replace(place, "in.csv") for line in look(place)[1:] if not line.startswith("time to prepare")]
            for place in (address, str(tmp_path / "in.csv"))
        )
        assert there == here
        (part,) = plan_parts(list_inputs([address]), 50, "text", None)
        assert [row.value for row in read_part(part, "text", "text", None)][:2] == ["some words 0 of a text", "some words 1 of a text"]
    finally:
        server.shutdown()
