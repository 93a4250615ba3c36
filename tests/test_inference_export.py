"""Exported models: written, read again, as transformers has them, and back."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import perceiver
from perceiver import hub
from perceiver.config import UserError
from perceiver.inference.batches import images_of
from perceiver.inference.export import export, upload
from perceiver.inference.trained import TrainedModel
from perceiver.models import build_model
from perceiver.models.configs import PerceiverARConfig
from perceiver.presets import PRESETS
from tests import golden
from tests.trained import experiment, same_weights, write_run

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
    trained = TrainedModel(model=build_model(config), task=experiment("causal").task, tokenizer=tokenizer)
    again = perceiver.load(trained.export(tmp_path / "out"), device="cpu")
    assert again.tokenizer.fingerprint["sha256"] == tokenizer.fingerprint["sha256"]
    assert again.generate("The meaning", max_new_tokens=5, seed=0) == trained.generate("The meaning", max_new_tokens=5, seed=0)


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path):
    loaded = perceiver.load(write_run(tmp_path / "run", "images"), device="cpu")
    loaded.export(tmp_path / "out")
    loaded.export(tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="is no exported model"):
        loaded.export(tmp_path / "mine")
    with pytest.raises(UserError, match="format is 'onnx'"):
        loaded.export(tmp_path / "out", format="onnx")
    with pytest.raises(UserError, match="holds no exported model"):
        upload(tmp_path / "mine", "me/model")


def test_a_damaged_export_is_one_sentence(tmp_path):
    folder = perceiver.load(write_run(tmp_path / "run", "images"), device="cpu").export(tmp_path / "out")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="does not hold the weights"):
        perceiver.load(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        perceiver.load(folder)


# --------------------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("preset", ["mlm-imdb", "img-clf-imagenet", "optical-flow"])
def test_the_official_architectures_can_be_written_as_transformers_has_them(preset):
    config = PRESETS[preset]().model
    written = hub.config_to_transformers(config)
    with torch.device("meta"):
        ours = build_model(config).state_dict()
        theirs = hub_class(written["architectures"][0])(hub_config(written)).state_dict()
    assert {n: t.shape for n, t in hub.to_transformers(ours, config).items()} == {n: t.shape for n, t in theirs.items()}


@pytest.mark.parametrize("preset", ["img-clf-mnist", "txt-clf-imdb-all", "clm-wikitext"])
def test_what_transformers_has_not_is_refused(preset):
    with pytest.raises(UserError, match="transformers"):
        hub.config_to_transformers(PRESETS[preset]().model)


@pytest.mark.parametrize("name", HUB_MODELS)
def test_official_names_there_and_back_are_the_same(shared, name):
    model, case, tensors = golden.load_model(shared / "golden", name)
    official = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
    back = hub.to_transformers(model.state_dict(), model.config)
    assert back.keys() == official.keys()
    assert all(torch.equal(back[key], official[key]) for key in official)


def test_transformers_computes_the_same_from_an_export(shared, tmp_path):
    from transformers import AutoTokenizer, PerceiverForMaskedLM

    model, _, _ = golden.load_model(shared / "golden", "hf_masked_lm")
    trained = TrainedModel(model=model.eval(), task=experiment("masked").task, tokenizer=loaded_bytes())
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
    export(TrainedModel(model=model.eval(), task=task, photos=True), tmp_path / "out", "transformers")
    theirs = PerceiverForImageClassificationFourier.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.id2label == dict(enumerate(names))
    ours = perceiver.load(tmp_path / "out", device="cpu")
    assert ours.photos and ours.class_names == names
    path = sorted((shared / "data" / "photos").glob("*.JPEG"))[0]
    prepared = PerceiverImageProcessor()(Image.open(path).convert("RGB"), return_tensors="pt").pixel_values
    mine = torch.from_numpy(images_of([path], model.config.input, photos=True))
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
