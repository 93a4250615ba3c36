"""Weights of other projects and of other runs: read without running anything, compared, and started from."""

import json
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from perceiver.checkpoints import choose_checkpoint
from perceiver.config import ParallelConfig, UserError, to_dict
from perceiver.costs.flops import training_flops
from perceiver.data.train_tokenizer import train_sentencepiece
from perceiver.interop import pretrained
from perceiver.interop.comparison import resolved_architecture
from perceiver.interop.lightning import read_lightning
from perceiver.interop.pretrained import read_pretrained
from perceiver.models import build_model
from perceiver.presets import PRESETS
from perceiver.runs import Run
from perceiver.training.init_from import find_start
from perceiver.training.optim import build_optimizer
from perceiver.training.state import load_model
from tests.data.test_train_tokenizer import CONFIG as SMALL_TOKENIZER
from tests.data.test_train_tokenizer import documents
from tests.support.small import classification_experiment, masked_experiment, write_documents, write_stream
from tests.tasks.test_text import text_ids
from tests.training.test_training import losses, run

CASES = ["masked_lm", "text_classifier", "causal_lm", "image_classifier"]


def logits_of(source: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    found = read_pretrained(source)
    model = build_model(found.config).eval()
    model.load_state_dict(found.weights)
    with torch.no_grad():
        if "images" in inputs:
            return model(inputs["images"])
        if "pad_mask" in inputs:
            return model(inputs["input_ids"], inputs["pad_mask"].bool())
        return model(inputs["input_ids"], inputs["input_ids"].shape[1] - found.config.max_latents)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["ckpt", "hub"])
def test_checkpoints_of_the_reference_give_its_outputs(shared, name, form):
    folder = shared / "golden" / "lightning"
    source = folder / (f"{name}.ckpt" if form == "ckpt" else f"hub_{name}")
    if not source.exists():
        pytest.skip(f"no {source.name} among the vectors")
    expected = load_file(folder / f"{name}.expected.safetensors")
    torch.testing.assert_close(logits_of(source, expected), expected["logits"], atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------- hostile files


class Hostile:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def lightning_file(path: Path, hyper_parameters) -> Path:
    torch.save({"state_dict": {"model.x": torch.zeros(1)}, "hyper_parameters": hyper_parameters}, path)
    return path


@pytest.mark.parametrize("function, name", [(os.system, "posix.system"), (eval, "builtins.eval"), (os.makedirs, "os.makedirs")])
def test_a_hostile_lightning_checkpoint_is_refused_and_nothing_runs(tmp_path, function, name):
    victim = tmp_path / "ran"
    argument = str(victim) if function is os.makedirs else f"touch {victim}" if function is os.system else f"open({str(victim)!r}, 'w')"
    for place in ({"encoder": Hostile(function, argument)}, Hostile(function, argument)):
        path = lightning_file(tmp_path / "hostile.ckpt", place)
        with pytest.raises(UserError, match="is not loaded") as error:
            read_pretrained(path)
        assert name.rpartition(".")[2] in str(error.value)
        assert not victim.exists()


def test_a_stand_in_runs_nothing_whatever_its_name_promises(tmp_path):
    """Classes of the reference's namespace are read, but as bags of fields: neither their code nor a namesake's runs."""
    path = lightning_file(tmp_path / "a.ckpt", {"encoder": "PLACE"})
    # Written by hand: the result of calling perceiver.config.home("x"), then given the field a = 1.
    call = b"cperceiver.config\nhome\n(X\x01\x00\x00\x00xtR}X\x01\x00\x00\x00aK\x01sb"
    content = b"\x80\x02}(X\x0a\x00\x00\x00state_dict}X\x10\x00\x00\x00hyper_parameters}X\x07\x00\x00\x00encoder" + call + b"su."
    replaced = tmp_path / "b.ckpt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(replaced, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, content if entry.filename.endswith("data.pkl") else old.read(entry))
    with pytest.raises(UserError, match="decoder, num_latent_channels, num_latents missing"):
        read_lightning(replaced)


@pytest.mark.parametrize("suffix", ["bin", "ckpt"])
def test_weights_that_hold_more_than_tensors_are_refused(tmp_path, suffix):
    victim = tmp_path / "ran"
    path = tmp_path / f"pytorch_model.{suffix}"
    torch.save({"x": torch.zeros(1), "y": Hostile(os.makedirs, str(victim))}, path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["PerceiverForMaskedLM"]}))
    with pytest.raises(UserError, match="not loaded"):
        read_pretrained(path)
    assert not victim.exists()


def test_a_bare_pickle_is_refused(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(pickle.dumps(Hostile(os.makedirs, str(tmp_path / "ran"))))
    with pytest.raises(UserError, match="no Lightning checkpoint"):
        read_pretrained(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"x" * 1000])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_files_are_one_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["PerceiverForMaskedLM"]}))
    with pytest.raises(UserError, match=name):
        read_pretrained(tmp_path)


def test_what_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="neither a file or folder nor a name on the hub"):
        read_pretrained("nothing")
    with pytest.raises(UserError, match="holds no weights"):
        read_pretrained(tmp_path)
    with pytest.raises(UserError, match="could not be had from the hub"):
        read_pretrained("nobody/no-such-model")
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no config.json"):
        read_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------------- official Perceivers

OFFICIAL = {
    "language-perceiver": ("mlm-imdb", {
        "architectures": ["PerceiverForMaskedLM"], "d_latents": 1280, "d_model": 768, "num_latents": 256, "num_blocks": 1,
        "num_self_attends_per_block": 26, "num_self_attention_heads": 8, "num_cross_attention_heads": 8, "qk_channels": 256,
        "v_channels": 1280, "vocab_size": 262, "max_position_embeddings": 2048,
    }),
    "vision-perceiver-fourier": ("img-clf-imagenet", {
        "architectures": ["PerceiverForImageClassificationFourier"], "d_latents": 1024, "d_model": 261, "num_latents": 512,
        "num_blocks": 8, "num_self_attends_per_block": 6, "num_self_attention_heads": 8, "num_cross_attention_heads": 1,
        "qk_channels": None, "v_channels": None, "id2label": {str(i): str(i) for i in range(1000)},
    }),
    "optical-flow-perceiver": ("optical-flow", {
        "architectures": ["PerceiverForOpticalFlow"], "d_latents": 512, "d_model": 322, "num_latents": 2048, "num_blocks": 1,
        "num_self_attends_per_block": 24, "num_self_attention_heads": 16, "num_cross_attention_heads": 1,
        "qk_channels": None, "v_channels": None, "train_size": [368, 496],
    }),
    "multimodal-perceiver": ("multimodal-kinetics", {
        "architectures": ["PerceiverForMultimodalAutoencoding"], "d_latents": 512, "d_model": 704, "num_latents": 784, "num_blocks": 1,
        "num_self_attends_per_block": 8, "num_self_attention_heads": 8, "num_cross_attention_heads": 1, "qk_channels": None,
        "v_channels": None, "num_frames": 16, "image_size": 56, "audio_samples_per_frame": 1920, "samples_per_patch": 16,
        "output_shape": [1, 16, 224, 224], "id2label": {str(i): str(i) for i in range(700)},
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", OFFICIAL)
def test_presets_are_the_official_models(name):
    """Sizes of the published models (their config.json): weights of the hub fit the presets."""
    preset, config = OFFICIAL[name]
    ours, theirs = PRESETS[preset]().model, pretrained.transformers.config_from_transformers(config)
    assert resolved_architecture(ours) == resolved_architecture(theirs)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


SMALL = {
    "num_latents": 6, "d_latents": 32, "num_blocks": 2, "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
    "num_cross_attention_heads": 1, "attention_probs_dropout_prob": 0.1,
}  # fmt: skip


def official(transformers, name: str, folder: Path, safe: bool, **config):
    """A random model of transformers, saved as it saves, also in the format of its earlier versions."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.PerceiverConfig(**(SMALL | config))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    if not safe:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    found = read_pretrained(folder)
    ours = build_model(found.config).eval()
    ours.load_state_dict(found.weights)
    return model, ours


@pytest.mark.parametrize("safe", [True, False])
def test_the_official_language_model_gives_the_same_logits_with_padding(transformers, tmp_path, safe):
    theirs, ours = official(
        transformers, "PerceiverForMaskedLM", tmp_path, safe, d_model=16, qk_channels=256, v_channels=32, vocab_size=262,
        max_position_embeddings=24, num_cross_attention_heads=8,
    )  # fmt: skip
    ids = torch.randint(0, 262, (3, 24), generator=torch.Generator().manual_seed(0))
    pad_mask = torch.arange(24) >= torch.tensor([24, 11, 17])[:, None]
    with torch.no_grad():
        expected = theirs(ids, attention_mask=(~pad_mask).long()).logits
        logits = ours(ids, pad_mask)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert (expected[1] - theirs(ids).logits[1]).abs().max() > 1e-3  # the padding matters


@pytest.mark.parametrize("safe", [True, False])
def test_the_official_image_classifier_gives_the_same_logits(transformers, tmp_path, safe):
    theirs, ours = official(transformers, "PerceiverForImageClassificationFourier", tmp_path, safe, num_labels=7, d_latents=32, d_model=261)
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = theirs(pixel_values=images).logits
        logits = ours(images.permute(0, 2, 3, 1))
    assert logits.shape == (1, 7)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("safe", [True, False])
def test_the_official_optical_flow_model_gives_the_same_flow(transformers, tmp_path, safe):
    size = (16, 24)
    theirs, ours = official(transformers, "PerceiverForOpticalFlow", tmp_path, safe, train_size=size, d_model=322, num_blocks=1)
    frames = torch.randn(1, 2, 27, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(inputs=frames).logits
        flow = ours(frames)
    torch.testing.assert_close(flow, expected, atol=1e-5, rtol=1e-4)


def test_the_official_multimodal_model_says_the_same_of_any_points(transformers, tmp_path):
    theirs, ours = official(
        transformers, "PerceiverForMultimodalAutoencoding", tmp_path, True, d_model=405, num_blocks=1, num_frames=2, image_size=4,
        audio_samples_per_frame=64, output_shape=[1, 2, 16, 16], output_num_channels=24, num_labels=5,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    video, audio = torch.rand(2, 2, 16, 16, 3, generator=generator), torch.rand(2, 128, generator=generator) * 2 - 1
    points = {"video": torch.tensor([0, 3, 100, 511]), "audio": torch.tensor([7, 1])}
    inputs = {"image": video.permute(0, 1, 4, 2, 3), "audio": audio[..., None], "label": torch.zeros(2, 5)}
    with torch.no_grad():
        asked = {"image": points["video"], "audio": points["audio"], "label": None}
        expected = theirs(inputs=inputs, subsampled_output_points=asked).logits
        x = {"video": video, "audio": audio, "label": torch.full((2,), -1), "asked_video": points["video"], "asked_audio": points["audio"]}
        said = ours(x)
    for name, their in (("video", "image"), ("audio", "audio"), ("label", "label")):
        torch.testing.assert_close(said[name].flatten(1), expected[their].flatten(1), atol=1e-5, rtol=1e-4)
    back = pretrained.transformers.to_transformers(ours.state_dict(), ours.config)
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())


def test_another_kind_of_model_of_transformers_is_refused(transformers, tmp_path):
    transformers.PerceiverConfig(**SMALL).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["PerceiverForSequenceClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="PerceiverForSequenceClassification cannot be read"):
        read_pretrained(tmp_path)


CONFIGS = {
    "a list": "[1]",
    "null": "null",
    "nested deeply": "[" * 100_000,
    "empty": "{}",
    "architectures are a number": {"architectures": 3},
    "architectures are empty": {"architectures": []},
    "channels are text": {"architectures": ["PerceiverForMaskedLM"], "d_latents": "many"},
    "channels are an object": {"architectures": ["PerceiverForMaskedLM"], "d_latents": {"a": 1}},
    "heads are 0": {"architectures": ["PerceiverForMaskedLM"], "num_cross_attention_heads": 0},
    "labels are a number": {"architectures": ["PerceiverForImageClassificationFourier"], "id2label": 7},
    "sizes are a number": {"architectures": ["PerceiverForOpticalFlow"], "train_size": 7},
    "model_config is null": {"model_config": None},
    "model_config is a list": {"model_config": [1]},
    "model_config is empty": {"model_config": {}},
    "encoder is text": {"model_config": {"num_latents": 2, "num_latent_channels": 8, "encoder": "x", "decoder": {}}},
    "latents are text": {"model_config": {"max_latents": "8"}},
    "our model is null": {"format": "perceiver", "model": None},
    "our model is a task": {"format": "perceiver", "model": {"type": "CausalLMConfig"}},
    "our model's type is a list": {"format": "perceiver", "model": {"type": ["PerceiverARConfig"]}},
}


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_of_another_shape_is_one_sentence_with_its_file(tmp_path, content):
    (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        read_pretrained(tmp_path)
    assert "config.json" in str(caught.value) or "transformers Perceiver" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("parameters", [None, 3, [1], {}, {"max_latents": "8"}, {"max_latents": 8, "num_heads": 2**70}, {"encoder": 1}])
def test_hyperparameters_of_another_shape_are_one_sentence(tmp_path, parameters):
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {"model.x": torch.zeros(1)}, "hyper_parameters": parameters}, path)
    with pytest.raises(UserError, match="x.ckpt|hyperparameters") as caught:
        read_pretrained(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value", [torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.inf]), torch.tensor([1, 2]), torch.tensor([True])]
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "x.ckpt"])
def test_weights_that_are_no_finite_numbers_are_refused_by_tensor_and_file(tmp_path, name, value):
    weights = {"good": torch.zeros(2), "bad": value}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["PerceiverForMaskedLM"]}))
    if name.endswith("safetensors"):
        save_file(weights, tmp_path / name)
    else:
        torch.save({"state_dict": weights, "hyper_parameters": {}} if name == "x.ckpt" else weights, tmp_path / name)
    with pytest.raises(UserError, match=f"weight bad of .*{name} has values"):
        read_pretrained(tmp_path / name)


def test_half_precision_weights_are_taken(tmp_path):
    experiment = masked_experiment()
    weights = {name: value.bfloat16() for name, value in build_model(experiment.model, seed=7).state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"format": "perceiver", "model": to_dict(experiment.model)}))
    assert read_pretrained(tmp_path).weights.keys() == weights.keys()


# ----------------------------------------------------------------------------------------------- starting from other runs


def shapes(experiment) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in build_model(experiment.model).named_parameters()}


def begun(experiment, **training):
    """The experiment with a start."""
    return replace(experiment, training=replace(experiment.training, **training))


def started(experiment, folder: Path, data: Path, world: int) -> dict[str, np.ndarray]:
    """The weights that a fresh run of the experiment starts from: on a plain model, or sharded over workers."""
    if world == 1:
        model = build_model(experiment.model, seed=experiment.training.seed)
        start = find_start(experiment, shapes(experiment))
        start.apply(model)
        start.save(Run(folder))
        return {name: p.detach().numpy() for name, p in model.named_parameters()}
    training = replace(experiment.training, max_steps=1)
    optim = replace(experiment.optim, warmup_steps=1)  # the first step has the learning rate 0
    return run(replace(experiment, training=training, optim=optim), data, folder, world=world)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A masked language model's run, its last weights, and documents to go on with."""
    folder = tmp_path_factory.mktemp("chain")
    write_stream(folder / "stream", text_ids(1001, 0), text_ids(300, 1), length=32)
    write_documents(folder / "documents")
    weights = run(masked_experiment(), folder / "stream", folder / "mlm")
    # It is the job that starts the workers who writes the run's description.
    (folder / "mlm" / "experiment.json").write_text(json.dumps({"experiment": to_dict(masked_experiment()), "data": ""}))
    return folder, weights


@pytest.mark.parametrize("world", [1, 2])
def test_the_encoder_of_a_run_is_taken_and_the_decoder_is_new(chain, tmp_path, world):
    folder, weights = chain
    experiment = begun(classification_experiment(), init_encoder_from=str(folder / "mlm"), init_checkpoint="last")
    found = started(experiment, tmp_path / "run", folder / "documents", world)
    fresh = dict(build_model(experiment.model, seed=experiment.training.seed).named_parameters())
    for name, value in found.items():
        expected = weights[name] if name.startswith("encoder.") else fresh[name].detach().numpy()
        np.testing.assert_array_equal(value, expected, err_msg=name)
    report = json.loads((tmp_path / "run" / "start.json").read_text())
    assert report["loaded"] == sorted(n for n in found if n.startswith("encoder."))
    assert report["new"] == sorted(n for n in found if not n.startswith("encoder."))
    assert report["unused"] == sorted(n for n in weights if not n.startswith("encoder."))
    assert report["origin"] == "run mlm, step 12"


def test_a_whole_model_is_taken_from_a_run_by_name_and_checkpoint(chain, tmp_path, monkeypatch):
    folder, weights = chain
    monkeypatch.setenv("PERCEIVER_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "runs").symlink_to(folder)
    last = started(begun(masked_experiment(), init_from="mlm", init_checkpoint="last"), tmp_path, folder, 1)
    assert all(np.array_equal(last[name], weights[name]) for name in weights)
    model = build_model(masked_experiment().model)
    load_model(choose_checkpoint(folder / "mlm" / "checkpoints", "9", "val_loss").path, model)
    earlier = started(begun(masked_experiment(), init_from="mlm", init_checkpoint="9"), tmp_path, folder, 1)
    assert all(np.array_equal(earlier[name], value.detach().numpy()) for name, value in model.named_parameters())
    assert not all(np.array_equal(earlier[name], weights[name]) for name in weights)


@pytest.mark.parametrize("field", ["init_from", "init_encoder_from"])
@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_start_is_refused_and_not_random_weights(field, value):
    experiment = begun(masked_experiment(), **{field: value})
    with pytest.raises(UserError, match=f"--training.{field.replace('_', '-')} is empty"):
        find_start(experiment, shapes(experiment))


def test_a_run_that_ended_in_nan_starts_no_other(chain, tmp_path):
    folder, _ = chain
    experiment = begun(masked_experiment(), init_from=str(folder / "mlm"), init_checkpoint="last")
    start = find_start(experiment, shapes(experiment))
    model = build_model(experiment.model)
    start.apply(model)
    with torch.no_grad():
        model.decoder.cross_attention.mlp.norm.weight[0] = torch.nan
    damaged = tmp_path / "step-00000012"
    dcp.save({"model": model.state_dict()}, checkpoint_id=str(damaged), no_dist=True)
    with pytest.raises(UserError, match="run mlm, step 12 has values in decoder.cross_attention.mlp.norm.weight that are not finite"):
        replace(start, checkpoint=damaged).apply(build_model(experiment.model))


@pytest.mark.parametrize("world", [1, 2])
def test_weights_of_a_file_reach_every_shard(chain, tmp_path, world):
    folder, _ = chain
    experiment = masked_experiment()
    model = build_model(experiment.model, seed=7)
    (tmp_path / "export").mkdir()
    save_file(dict(model.state_dict()), tmp_path / "export" / "model.safetensors")
    (tmp_path / "export" / "config.json").write_text(json.dumps({"format": "perceiver", "model": to_dict(experiment.model)}))
    experiment = begun(experiment, init_from=str(tmp_path / "export"))
    found = started(experiment, tmp_path / "run", folder / "stream", world)
    for name, value in model.named_parameters():
        np.testing.assert_array_equal(found[name], value.detach().numpy())


def test_a_continued_run_does_not_start_again(chain, tmp_path):
    folder, _ = chain
    experiment = classification_experiment()
    experiment = replace(experiment, training=replace(experiment.training, init_encoder_from=str(folder / "mlm")))
    run(experiment, folder / "documents", tmp_path / "plain")
    run(experiment, folder / "documents", tmp_path / "run", stop_at=6)
    moved = replace(experiment, training=replace(experiment.training, init_encoder_from="no longer there"))
    run(moved, folder / "documents", tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


def test_what_does_not_fit_is_refused_with_the_reason(chain):
    folder, _ = chain
    mlm = str(folder / "mlm")
    base = classification_experiment()

    def refused(match, experiment=base, **training):
        experiment = replace(experiment, training=replace(experiment.training, **training))
        with pytest.raises(UserError, match=match):
            find_start(experiment, shapes(experiment))

    refused("both set", init_from=mlm, init_encoder_from=mlm)
    refused("its encoder fits: start from that alone with --init-encoder-from", init_from=mlm)
    refused("nothing to start from at 'nowhere'", init_from="nowhere")
    refused("checkpoint '5' does not exist", init_encoder_from=mlm, init_checkpoint="5")
    wider = replace(base, model=replace(base.model, num_latents=5))
    refused("another encoder .*num_latents: 4 -> 5", wider, init_encoder_from=mlm)
    heads = replace(base, model=replace(base.model, encoder=replace(base.model.encoder, num_self_attention_heads=4)))
    refused("num_self_attention_heads: 2 -> 4", heads, init_encoder_from=mlm)
    dropout = replace(base, model=replace(base.model, encoder=replace(base.model.encoder, dropout=0.3, freeze=True)))
    dropout = replace(dropout, training=replace(dropout.training, init_encoder_from=mlm))
    assert find_start(dropout, shapes(dropout)).loaded


def test_a_run_of_another_tokenizer_is_refused(chain, tmp_path):
    """Of the same size even: nothing else would tell."""
    for number in range(2):
        (tmp_path / f"{number}.model").write_bytes(train_sentencepiece(documents(100, number), SMALL_TOKENIZER))
    shutil.copytree(chain[0] / "mlm", tmp_path / "mlm")
    shutil.copy(tmp_path / "0.model", tmp_path / "mlm" / "tokenizer.model")
    experiment = begun(classification_experiment(), init_encoder_from=str(tmp_path / "mlm"))
    for tokenizer in ("bytes", str(tmp_path / "1.model")):
        other = replace(experiment, data=replace(experiment.data, tokenizer=tokenizer))
        with pytest.raises(UserError, match=f"was trained with another: give --data.tokenizer {tmp_path}/mlm/tokenizer.model"):
            find_start(other, shapes(other))
    same = replace(experiment, data=replace(experiment.data, tokenizer=str(tmp_path / "0.model")))
    assert find_start(same, shapes(same)).loaded


def test_weights_of_another_shape_than_their_configuration_are_refused(chain, tmp_path):
    experiment = masked_experiment()
    state = dict(build_model(experiment.model).state_dict())
    (tmp_path / "config.json").write_text(json.dumps({"format": "perceiver", "model": to_dict(experiment.model)}))
    experiment = replace(experiment, training=replace(experiment.training, init_from=str(tmp_path)))
    for change, match in (
        ({"encoder.latents": torch.zeros(3, 16)}, r"encoder.latents is \(3, 16\), not \(4, 16\)"),
        ({"encoder.more": torch.zeros(1)}, "has weights that this model has not: encoder.more"),
    ):
        save_file(state | change, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=match):
            find_start(experiment, shapes(experiment))
    save_file(OrderedDict((k, v) for k, v in state.items() if k != "encoder.latents"), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="lacks weights of this model: encoder.latents"):
        find_start(experiment, shapes(experiment))


# -------------------------------------------------------------------------------------------------------- frozen encoder


def test_a_frozen_encoder_stays_as_it_was_and_its_decoder_learns(chain, tmp_path):
    """Two workers, a crash and activation checkpointing in between: weights as loaded, bit by bit."""
    folder, weights = chain
    experiment = frozen(classification_experiment(init_encoder_from=str(folder / "mlm"), init_checkpoint="last"))
    experiment = replace(experiment, parallel=ParallelConfig(activation_checkpointing=1))
    run(experiment, folder / "documents", tmp_path / "run", world=2, stop_at=6)
    after = run(experiment, folder / "documents", tmp_path / "run", world=2)
    fresh = dict(build_model(experiment.model, seed=experiment.training.seed).named_parameters())
    for name, value in after.items():
        if name.startswith("encoder."):
            np.testing.assert_array_equal(value, weights[name], err_msg=name)
        elif not name.endswith("k_proj.bias"):  # whose gradient is 0
            assert np.abs(value - fresh[name].detach().numpy()).max() > 1e-4, name


def frozen(experiment, freeze=True):
    return replace(experiment, model=replace(experiment.model, encoder=replace(experiment.model.encoder, freeze=freeze)))


def test_a_frozen_encoder_has_no_gradients_no_optimizer_state_and_keeps_no_activations():
    saved = {}
    for freeze in (False, True):
        experiment = frozen(classification_experiment(), freeze)
        model = build_model(experiment.model)
        optimizer = build_optimizer(model, experiment.optim)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            loss = model(torch.randint(6, 262, (5, 32))).sum()
        loss.backward()
        optimizer.step()
        saved[freeze] = sum(sizes)
        named = {p: name for name, p in model.named_parameters()}
        if freeze:
            assert all(named[p].startswith("decoder.") for group in optimizer.param_groups for p in group["params"])
            assert all(named[p].startswith("decoder.") for p in optimizer.state)
        assert all((p.grad is None) is (freeze and name.startswith("encoder.")) for name, p in model.named_parameters())
        latents = model.encode(torch.randint(6, 262, (5, 32)))
        assert latents.requires_grad is not freeze
    # All that is kept lies behind the latents (5 x 4 x 16): nothing of the 5 x 32 inputs, nothing of three layers.
    assert saved[True] < saved[False] / 3


def test_a_frozen_model_computes_what_it_does_unfrozen():
    base = classification_experiment()
    ids = torch.randint(6, 262, (5, 32), generator=torch.Generator().manual_seed(0))
    plain, freezing = (build_model(frozen(base, freeze).model)(ids) for freeze in (False, True))
    torch.testing.assert_close(freezing, plain)  # attention may choose another kernel where nothing needs gradients


def test_a_whole_step_costs_more_than_2_5_steps_of_the_decoder_alone():
    """By count of FLOPs."""
    decoder, whole = (PRESETS[f"txt-clf-imdb-{name}"]().model for name in ("decoder", "all"))
    assert training_flops(whole) > 2.5 * training_flops(decoder)
