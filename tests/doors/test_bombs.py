"""Files made to fill the memory, names made to lead out of a folder: refused in a sentence at each door; nothing is written elsewhere."""

import bz2
import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perceiver.checkpoints import DamagedCheckpoint, parse_marker
from perceiver.config import UserError
from perceiver.config.core import digest
from perceiver.data import spans, storage
from perceiver.data.manifest import DamagedData, Manifest
from perceiver.evaluations import Evaluation
from perceiver.interop.lightning import read_lightning
from perceiver.interop.tensors import read_tensors
from ray_jobs import preprocess
from ray_jobs.submit import read_environment
from tests.support import preparing
from tests.support.small import write_images

ENDLESS = b"a" * (24 << 20)
"""A row without an end, which packs to some KiB."""


@pytest.fixture
def small_limits(monkeypatch):
    preparing.serially(monkeypatch)
    monkeypatch.setattr(spans, "MOST_RECORD", 1 << 20)
    monkeypatch.setattr(spans, "MOST_WHOLE", 1 << 20)


def prepare(folder: Path, source: Path, preset: str = "txt-clf-imdb-all", **data) -> None:
    preprocess.prepare(preparing.experiment(preset, folder / "out", source, length=20, **data))


@pytest.mark.parametrize(
    "name, content",
    [
        ("train.jsonl.gz", gzip.compress(b'{"text": "' + ENDLESS)),
        ("train.jsonl.bz2", bz2.compress(b'{"text": "' + ENDLESS)),
        ("train.json.gz", gzip.compress(b'[{"text": "' + ENDLESS)),
        ("train.csv.gz", gzip.compress(b"text,label\n" + ENDLESS)),
    ],
)
def test_a_packed_file_whose_row_has_no_end_is_refused_before_it_fills_the_memory(name, content, small_limits, tmp_path):
    assert len(content) < 100_000
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} has a row of more than 1 MiB"):
        prepare(tmp_path, tmp_path / "in")


def test_a_packed_file_of_images_that_unpacks_without_end_is_refused(small_limits, tmp_path):
    preparing.write_idx(tmp_path, "t10k", 4)
    for kind, head in (("images-idx3", (8 << 8 | 3, 1000, 28, 28)), ("labels-idx1", (8 << 8 | 1, 1000))):
        (tmp_path / f"train-{kind}-ubyte.gz").write_bytes(gzip.compress(b"".join(n.to_bytes(4) for n in head) + ENDLESS))
    with pytest.raises(UserError, match="unpacks to more than 0.000977 GiB"):
        prepare(tmp_path, tmp_path, "img-clf-mnist")


def picture(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((28, 28), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def pictures(prefix: str, labels: tuple[bytes, bytes] = (b"0", b"1"), ending: str = "cls") -> dict[str, bytes]:
    return {
        f"{prefix}{number}.{end}": content
        for number in range(8)
        for end, content in (("png", picture(number)), (ending, labels[number % 2]))
    }


@pytest.mark.parametrize("prefix", ["../../outside/", "/tmp/outside-of-all/", "a/../../../outside/"])
def test_members_of_an_archive_are_read_and_never_written_whatever_their_names(prefix, small_limits, tmp_path):
    source = tmp_path / "deep" / "in"
    source.mkdir(parents=True)
    write_tar(source / "train-0.tar", pictures(prefix))
    write_tar(source / "test-0.tar", pictures("t"))
    prepare(tmp_path, source, "img-clf-mnist")
    assert not list(tmp_path.rglob("outside*")) and not Path("/tmp/outside-of-all").exists()


def test_a_member_of_an_archive_that_claims_a_terabyte_is_refused(small_limits, tmp_path):
    member = tarfile.TarInfo("0.png")
    member.size = 1 << 40
    (tmp_path / "train-0.tar").write_bytes(member.tobuf() + bytes(4096))
    write_tar(tmp_path / "test-0.tar", pictures("t"))
    with pytest.raises(UserError, match=r"member '0.png' of 1,099,511,627,776 bytes, more than 1 MiB"):
        prepare(tmp_path, tmp_path, "img-clf-mnist")


def test_a_label_nested_beyond_measure_costs_its_example_alone(small_limits, tmp_path):
    labels = (b'{"label": 0}', b'{"label": 1}')
    write_tar(tmp_path / "train-0.tar", {**pictures("", labels, "json"), "9.png": picture(9), "9.json": b"[" * 100_000})
    write_tar(tmp_path / "test-0.tar", pictures("t", labels, "json"))
    with pytest.raises(UserError, match="9.png"):
        prepare(tmp_path, tmp_path, "img-clf-mnist")
    prepare(tmp_path, tmp_path, "img-clf-mnist", on_error="skip")


@pytest.mark.parametrize("name", ["../elsewhere.parquet", "/etc/passwd", "train-00000.parquet/../../x"])
def test_a_manifest_that_names_files_outside_is_damaged(name, tmp_path):
    write_images(tmp_path)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    del content["digest"]
    content["splits"]["train"]["shards"][0]["file"] = name
    path.write_text(json.dumps({**content, "digest": digest(content)}))
    with pytest.raises(DamagedData, match="manifest.json is damaged"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", ""])
def test_a_marker_that_names_files_outside_is_damaged(name, tmp_path):
    content = {"step": 5, "metrics": {}, "higher_is_better": [], "files": {name: {"bytes": 1, "sha256": "0"}}}
    with pytest.raises(DamagedCheckpoint, match="checkpoint.json is damaged"):
        parse_marker(tmp_path / "step-00000005", json.dumps(content).encode())


def test_names_in_an_object_store_that_lead_out_of_a_run_are_refused():
    store, path = storage.open_folder("memory://bombs/run")
    store.handler.fs.store[f"/{path.strip('/')}/tensorboard/../../../.bashrc"] = store.handler.fs.open("/bombs/x", "wb")
    store.create_dir(path, recursive=True)
    with pytest.raises(UserError, match=r"holds a file named .*\.\./\.\./\.\./\.bashrc.*outside"):
        storage.list_tree("memory://bombs/run")


def test_examples_of_an_evaluation_that_unpack_without_end_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("perceiver.evaluations.MOST_BYTES", 1 << 20)
    with zipfile.ZipFile(tmp_path / "e.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("loss.npy", ENDLESS)
    with pytest.raises(UserError, match="it unpacks to 25,165,824 bytes"):
        Evaluation(tmp_path / "e.json", 1, "", False, {}).examples()


def test_examples_that_claim_more_than_there_is_are_refused(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 46,)})
    with zipfile.ZipFile(tmp_path / "e.npz", "w") as archive:
        archive.writestr("loss.npy", header.getvalue())
    with pytest.raises(UserError, match="e.npz is damaged"):
        Evaluation(tmp_path / "e.json", 1, "", False, {}).examples()


@pytest.mark.parametrize("name", ["weights.bin", "model.ckpt"])
def test_weights_that_unpack_to_more_than_they_are_are_not_loaded(name, tmp_path):
    path = tmp_path / name
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", ENDLESS)
    with pytest.raises(UserError, match="is not loaded: it unpacks from .* to 25,165,8.. bytes"):
        (read_lightning if name.endswith("ckpt") else read_tensors)(path)
    torch.save({"weight": torch.zeros(300_000)}, path)
    assert name.endswith("ckpt") or read_tensors(path)["weight"].numel() == 300_000


@pytest.mark.parametrize(
    "text, message",
    [
        ("- pip\n", "it is a list and must be a mapping"),
        ("just words", "it is a str and must be a mapping"),
        ("pip: [a\nenv_vars: 3", "it is no YAML in line"),
        ("a: &a [x, x]\nb: &b [*a, *a]\npip: [*b, *b]\n", "by an alias"),
        ("piip: [numpy]\n", "'piip' is no field of one, did you mean"),
        ("env_vars: [A]\n", "holds no runtime environment: "),
        ("env_vars: {A: 3}\n", "holds no runtime environment: "),
        ("pip: 3\n", "holds no runtime environment: "),
        ("? [1, 2]\n: 3\n", "holds no runtime environment"),
        ("!!python/object/apply:os.system ['touch /tmp/ran-by-yaml']", "it is no YAML"),
        ("x" * (2 << 20), "it has 2,097,152 bytes"),
    ],
)
def test_a_runtime_environment_of_another_shape_is_refused_in_a_sentence(text, message, tmp_path):
    path = tmp_path / "env.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_environment(path, str(tmp_path))
    assert str(path) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)
    assert not Path("/tmp/ran-by-yaml").exists()


def test_an_empty_runtime_environment_is_none(tmp_path):
    (tmp_path / "env.yaml").write_text("# nothing\n")
    assert read_environment(tmp_path / "env.yaml", str(tmp_path)) == {"working_dir": str(tmp_path)}
