"""Exported models: written, read again, as transformers has them, and back."""

import fcntl
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import perceiver
from perceiver.config import UserError
from perceiver.inference.export import export, upload
from perceiver.inference.images import images_of
from perceiver.inference.load import describe
from perceiver.inference.trained import TrainedModel
from perceiver.interop import transformers
from perceiver.models import PerceiverARConfig, build_model
from perceiver.presets import PRESETS
from tests.support import golden
from tests.support.trained import experiment, same_weights, write_run

USE = {
    "causal": lambda m: (m.generate(["a prompt", "b"], max_new_tokens=20, seed=3), m.score("some text")),
    "masked": lambda m: m.fill_mask("a <mask>", top_k=5),
    "sentiment": lambda m: m.classify(["some text", "other"]),
    "images": lambda m: m.classify(np.arange(36, dtype=np.uint8).reshape(6, 6)),
}
HUB_MODELS = ("hf_masked_lm", "hf_image_fourier", "hf_optical_flow")


@pytest.mark.parametrize("task", USE)
def test_run_to_export_and_back_is_bitwise_the_same(task, tmp_path):
    loaded = perceiver.load(write_run(tmp_path / "run", task), device="cpu")
    folder = loaded.export(tmp_path / "out")
    again = perceiver.load(folder, device="cpu")
    assert same_weights(again.model, loaded.model)
    assert (again.task, again.config, again.name) == (loaded.task, loaded.config, loaded.name)
    assert USE[task](again) == USE[task](loaded)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_a_sentencepiece_model_travels_with_the_export(shared, tmp_path):
    from perceiver.data.tokenizers import load_tokenizer

    (path,) = sorted((shared / "data" / "sentencepiece").glob("*.model"))[:1]
    tokenizer = load_tokenizer(str(path))
    config = PerceiverARConfig(
        vocab_size=tokenizer.vocab_size,
        max_seq_len=16,
        max_latents=8,
        num_channels=8,
        num_heads=2,
        num_self_attention_layers=1,
    )
    trained = TrainedModel(model=build_model(config), config=config, task=experiment("causal").task, tokenizer=tokenizer)
    again = perceiver.load(trained.export(tmp_path / "out"), device="cpu")
    assert again.tokenizer.fingerprint["sha256"] == tokenizer.fingerprint["sha256"]
    assert again.generate("The meaning", max_new_tokens=5, seed=0) == trained.generate("The meaning", max_new_tokens=5, seed=0)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return perceiver.load(write_run(tmp_path_factory.mktemp("runs") / "run", "masked", {1: 1.0}), device="cpu")


def contents(folder):
    """Everything below a folder: names, and the bytes of files."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def test_an_earlier_export_is_replaced_whatever_its_format(loaded, tmp_path):
    for format in ("perceiver", "transformers", "perceiver", "perceiver"):
        try:
            loaded.export(tmp_path / "out", format=format)
        except UserError:  # transformers has not this model
            assert format == "transformers"
        assert same_weights(perceiver.load(tmp_path / "out", device="cpu").model, loaded.model)
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "link").symlink_to(tmp_path / "out")
    loaded.export(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "empty").mkdir()
    written = sorted(p.name for p in loaded.export(tmp_path / "empty").iterdir())
    assert written == ["README.md", "config.json", "export.json", "model.safetensors"]


@pytest.mark.parametrize(
    "spoil, named",
    [
        (lambda out: (out / "thesis.txt").write_text("all of it"), "thesis.txt"),
        (lambda out: (out / ".hidden").write_text("all of it"), ".hidden"),
        (lambda out: (out / "notes").mkdir(), "notes"),
        (lambda out: (out / "config.json").write_text("{}"), "config.json"),
        (lambda out: (out / "model.safetensors").write_bytes(b"mine"), "model.safetensors"),
        (lambda out: (out / "export.json").unlink(), "README.md, config.json, model.safetensors"),
        (lambda out: (out / "export.json").write_text("[" * 100_000), "README.md, config.json, export.json"),
        (
            lambda out: (out / "export.json").write_text('{"format": "perceiver export", "files": {"config.json": 3}}'),
            "README.md, config.json",
        ),
        (lambda out: [(out / "a").write_text("a"), (out / "export.json").rename(out / "model.safetensors")], "README.md, a, config.json"),
    ],
)
def test_a_folder_with_anything_else_in_it_is_left_as_it_is(loaded, tmp_path, spoil, named):
    loaded.export(tmp_path / "out")
    spoil(tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"not from an export, or has been changed since .{named}"):
        loaded.export(tmp_path / "out")
    assert contents(tmp_path) == before


def test_a_folder_of_someone_else_is_left_as_it_is(loaded, tmp_path):
    """Also one with a config.json."""
    (tmp_path / "mine" / "chapters").mkdir(parents=True)
    (tmp_path / "mine" / "config.json").write_text("{}")
    (tmp_path / "mine" / "chapters" / "thesis.txt").write_text("all of it")
    (tmp_path / "file").write_text("all of it")
    before = contents(tmp_path)
    for path in (tmp_path / "mine", tmp_path / "file", tmp_path / "file" / "below", "", " ", tmp_path / "n\0l", tmp_path / ("x" * 300)):
        with pytest.raises(UserError):
            loaded.export(path)
    assert contents(tmp_path) == before


class Crash(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("exchange", [True, False])
def test_a_crash_leaves_the_old_export_or_the_new_one_or_none_that_loads(loaded, tmp_path, monkeypatch, exchange):
    """At whichever operation on files it comes. Only without an exchange of folders there is a time without a model."""
    from perceiver.inference import export as module

    new = TrainedModel(
        model=build_model(loaded.config, seed=5), config=loaded.config, task=loaded.task, tokenizer=loaded.tokenizer, name="new"
    )
    if not exchange:
        monkeypatch.setattr(module, "_exchange", lambda one, other: False)
    names, crashed = ("os.replace", "pathlib.Path.unlink", "os.fsync", "os.chmod", "pathlib.Path.mkdir"), 0
    for at in range(60):
        out = tmp_path / str(at) / "out"
        loaded.export(out)
        left = at

        def counted(real):
            def call(*arguments, **options):
                nonlocal left
                left -= 1
                if left < 0:
                    raise Crash
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as context:
            for name in names:
                owner, _, function = name.rpartition(".")
                context.setattr(name, counted(getattr({"os": os, "pathlib.Path": Path}[owner], function)))
            try:
                new.export(out)
            except Crash:
                crashed += 1
            else:
                assert crashed > 5
                break
        try:
            model = perceiver.load(out, device="cpu").model
        except UserError:
            assert not exchange
            continue
        assert same_weights(model, loaded.model) or same_weights(model, new.model)
    assert same_weights(perceiver.load(out, device="cpu").model, new.model)


def test_what_a_killed_export_left_is_removed_and_what_another_is_at_work_on_is_not(loaded, tmp_path):
    for name in ("killed", "working", "foreign"):
        folder = tmp_path / f".export.{name}.tmp"
        folder.mkdir()
        (folder / ("config.json" if name != "foreign" else "thesis.tex")).write_text("{")
    descriptor = os.open(tmp_path / ".export.working.tmp", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        export(loaded, tmp_path / "out")
    finally:
        os.close(descriptor)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".export.foreign.tmp", ".export.working.tmp", "out"]
    assert (tmp_path / ".export.foreign.tmp" / "thesis.tex").exists()


def test_exported_files_can_be_read_by_whom_the_umask_lets(loaded, tmp_path):
    before = os.umask(0o027)
    try:
        out = loaded.export(tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in out.iterdir()} == dict.fromkeys(
        ("README.md", "config.json", "export.json", "model.safetensors"), "0o640"
    )
    assert out.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_neither_exported_nor_loaded(loaded, tmp_path, value):
    model = build_model(loaded.config)
    folder = TrainedModel(model=model, config=model.config, task=loaded.task, tokenizer=loaded.tokenizer).export(tmp_path / "out")
    with torch.no_grad():
        model.encoder.latents[1, 2] = value
    with pytest.raises(UserError, match="weight encoder.latents of spoiled has values that are not finite"):
        TrainedModel(model=model, config=model.config, task=loaded.task, tokenizer=loaded.tokenizer, name="spoiled").export(
            tmp_path / "other"
        )
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    with pytest.raises(UserError, match="weight encoder.latents of .*model.safetensors has values that are not finite"):
        perceiver.load(folder)


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.uint8, torch.complex64])
def test_weights_that_are_no_floating_point_numbers_are_refused(loaded, tmp_path, kind):
    folder = loaded.export(tmp_path / "out")
    weights = dict(loaded.model.state_dict())
    weights["encoder.latents"] = torch.ones_like(weights["encoder.latents"]).to(kind)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"weight encoder.latents of .*model.safetensors has values of type {str(kind)[6:]}"):
        perceiver.load(folder)


SHAPES = {
    "a list": lambda c: [c],
    "null": lambda c: None,
    "a number": lambda c: 7,
    **{f"no {name}": lambda c, name=name: {k: v for k, v in c.items() if k != name} for name in ("model", "task", "name", "photos")},
    **{
        f"{name} is a list": lambda c, name=name: c | {name: [1]} for name in ("model", "task", "name", "photos", "tokenizer", "provenance")
    },
    "model is a task": lambda c: c | {"model": c["task"]},
    "task is a model": lambda c: c | {"task": c["model"]},
    "type is a list": lambda c: c | {"model": c["model"] | {"type": [1]}},
    "a foreign tokenizer": lambda c: c | {"tokenizer": "/etc/passwd"},
    "channels are text": lambda c: c | {"model": c["model"] | {"num_latent_channels": "16"}},
    "channels are a fraction": lambda c: c | {"model": c["model"] | {"num_latent_channels": 16.0}},
    "channels are an object": lambda c: c | {"model": c["model"] | {"num_latent_channels": c["task"]}},
    "an input is null": lambda c: c | {"model": c["model"] | {"input": None}},
    "an input is an output": lambda c: c | {"model": c["model"] | {"input": c["model"]["output"]}},
    "a scale that is not finite": lambda c: c | {"model": c["model"] | {"init_scale": float("inf")}},
    "2**40 channels": lambda c: c | {"model": c["model"] | {"num_latent_channels": 2**40}},
    "2**70 latents": lambda c: c | {"model": c["model"] | {"num_latents": 2**70}},
    "10**12 layers": lambda c: (
        c | {"model": c["model"] | {"encoder": c["model"]["encoder"] | {"num_self_attention_layers_per_block": 10**12}}}
    ),
    "10**12 blocks": lambda c: c | {"model": c["model"] | {"encoder": c["model"]["encoder"] | {"num_self_attention_blocks": 10**12}}},
    "a longer input": lambda c: c | {"model": c["model"] | {"input": c["model"]["input"] | {"max_seq_len": 33}}},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_config_of_another_shape_is_one_sentence_at_once(loaded, tmp_path, shape):
    folder = loaded.export(tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(SHAPES[shape](config)))
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        perceiver.load(folder, device="cpu")
    assert time.monotonic() - started < 5
    assert "out" in str(caught.value) and "\n" not in str(caught.value)


def test_constants_that_no_weight_bounds_are_refused_before_they_are_built(tmp_path):
    folder = perceiver.load(write_run(tmp_path / "run", "images"), device="cpu").export(tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["model"]["input"]["image_shape"] = [100_000, 100_000, 1]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="constants of its model are"):
        perceiver.load(folder)


def test_what_cannot_be_exported_or_uploaded_is_one_sentence(loaded, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="format is 'gguf'"):
        loaded.export(tmp_path / "out", format="gguf")
    with pytest.raises(UserError, match="holds no exported model"):
        upload(tmp_path / "mine", "me/model")


def test_an_upload_without_a_network_is_one_sentence_and_other_errors_are_not_hidden(loaded, tmp_path, monkeypatch):
    class TransportError(Exception):
        """As the library for HTTP has it, which is no OSError."""

    def fails(error):
        def create_repo(self, *args, **options):
            raise error

        monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create_repo)

    folder = loaded.export(tmp_path / "out")
    fails(type("ConnectError", (TransportError,), {})("Name or service not known"))
    with pytest.raises(UserError, match="the hub did not take me/model .Name or service not known"):
        upload(folder, "me/model")
    fails(ZeroDivisionError("of our own"))
    with pytest.raises(ZeroDivisionError):
        upload(folder, "me/model")


def test_a_damaged_export_is_one_sentence(tmp_path):
    folder = perceiver.load(write_run(tmp_path / "run", "images"), device="cpu").export(tmp_path / "out")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    for door in (perceiver.load, describe):  # the latter is what jobs look at before Ray starts
        with pytest.raises(UserError, match="is no safetensors file, or a damaged one"):
            door(folder)
    (folder / "model.safetensors").write_bytes(weights)
    assert describe(folder).name == "run"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        perceiver.load(folder)


# --------------------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("preset", ["mlm-imdb", "img-clf-imagenet", "optical-flow", "multimodal-kinetics"])
def test_the_official_architectures_can_be_written_as_transformers_has_them(preset):
    config = PRESETS[preset]().model
    written = transformers.config_to_transformers(config)
    with torch.device("meta"):
        ours = build_model(config).state_dict()
        theirs = hub_class(written["architectures"][0])(hub_config(written)).state_dict()
    assert {n: t.shape for n, t in transformers.to_transformers(ours, config).items()} == {n: t.shape for n, t in theirs.items()}


@pytest.mark.parametrize("preset", ["img-clf-mnist", "txt-clf-imdb-all", "clm-wikitext"])
def test_what_transformers_has_not_is_refused(preset):
    with pytest.raises(UserError, match="transformers"):
        transformers.config_to_transformers(PRESETS[preset]().model)


@pytest.mark.parametrize("name", HUB_MODELS)
def test_official_names_there_and_back_are_the_same(shared, name):
    model, case, tensors = golden.load_model(shared / "golden", name)
    official = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
    back = transformers.to_transformers(model.state_dict(), model.config)
    assert back.keys() == official.keys()
    assert all(torch.equal(back[key], official[key]) for key in official)


def test_transformers_computes_the_same_from_an_export(shared, tmp_path):
    from transformers import AutoTokenizer, PerceiverForMaskedLM

    model, _, _ = golden.load_model(shared / "golden", "hf_masked_lm")
    trained = TrainedModel(model=model.eval(), config=model.config, task=experiment("masked").task, tokenizer=loaded_bytes())
    export(trained, tmp_path / "out", "transformers")
    theirs = PerceiverForMaskedLM.from_pretrained(tmp_path / "out").eval()
    length = model.config.input.max_seq_len
    ids = torch.randint(6, 262, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits
        torch.testing.assert_close(model(ids, mask == 0), expected, atol=1e-4, rtol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("dé").input_ids == trained.tokenizer.encode("dé", special=True).tolist()
    # And back: what transformers writes is read as ours again.
    theirs.save_pretrained(tmp_path / "theirs")
    again = perceiver.load(tmp_path / "theirs", device="cpu")
    assert same_weights(again.model, model) and again.fill_mask("a <mask>") == trained.fill_mask("a <mask>")


def test_published_image_models_see_photos_as_transformers_prepares_them(shared, tmp_path):
    from PIL import Image
    from transformers import PerceiverForImageClassificationFourier, PerceiverImageProcessor

    model, _, _ = golden.load_model(shared / "golden", "hf_image_fourier")
    names = tuple(f"thing {i}" for i in range(10))
    task = replace(experiment("images").task, class_names=names)
    export(TrainedModel(model=model.eval(), config=model.config, task=task, photos=True), tmp_path / "out", "transformers")
    theirs = PerceiverForImageClassificationFourier.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.id2label == dict(enumerate(names))
    ours = perceiver.load(tmp_path / "out", device="cpu")
    assert ours.photos and ours.class_names == names
    path = sorted((shared / "data" / "photos").glob("*.JPEG"))[0]
    prepared = PerceiverImageProcessor()(Image.open(path).convert("RGB"), return_tensors="pt").pixel_values
    mine = torch.from_numpy(images_of([path], model.config.input.image_shape, photos=True))
    # Bicubic scaling is rounded to 8 bits here and there; a few pixels at sharp edges differ by more.
    assert float((mine.permute(0, 3, 1, 2) - prepared).abs().mean()) < 0.01
    with torch.no_grad():
        expected = theirs(inputs=mine.permute(0, 3, 1, 2)).logits.softmax(-1)[0]
    np.testing.assert_allclose(ours.classify(path).probabilities, expected.numpy(), rtol=1e-3, atol=1e-5)


def loaded_bytes():
    from perceiver.data.tokenizers import load_tokenizer

    return load_tokenizer("bytes")


def hub_config(values):
    from transformers import PerceiverConfig

    return PerceiverConfig(**values)


def hub_class(name):
    import transformers

    return getattr(transformers, name)


def test_the_export_job_writes_what_load_reads(tmp_path, capsys):
    from ray_jobs.export import main

    write_run(tmp_path / "run", "masked", {1: 2.0, 2: 1.0})
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--checkpoint", "1"]) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert same_weights(perceiver.load(tmp_path / "out", device="cpu").model, build_model(experiment("masked").model, seed=1))
