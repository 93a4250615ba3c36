"""Audio classification: spectrograms, random changes, learning, prediction."""

from dataclasses import replace
from functools import cache

import numpy as np
import pyarrow as pa
import pytest
import torch

from perceiver.config import Experiment, UserError
from perceiver.data.columns import fixed_column
from perceiver.data.made_sounds import RATE, SAMPLES, SOUNDS, Sounds
from perceiver.data.order import uniforms
from perceiver.data.sounds import from_stored, to_stored
from perceiver.inference.trained import TrainedModel
from perceiver.models import AudioInput, LogMelInput, build_model
from perceiver.presets import PRESETS
from perceiver.tasks import build_task
from perceiver.tasks.sound_changes import DRAWS, changed, kept
from ray_jobs.cli import parse_experiment

INPUT = LogMelInput(num_samples=SAMPLES)


@cache
def experiment() -> Experiment:
    return parse_experiment(["audio-clf-small"], "ray_jobs.train")


@cache
def rows(count: int = 20) -> pa.Table:
    found = [example for example, _ in zip(Sounds().examples("train", 0), range(count), strict=False)]
    samples = np.stack([to_stored(example["audio"]) for example in found])
    numbers = pa.array(np.arange(count))
    columns = {"audio": fixed_column(samples), "label": pa.array([example["label"] for example in found], pa.int32())}
    return pa.table({**columns, "row": numbers, "epoch": pa.array(np.zeros(count, np.int64))})


def test_classes_and_length_come_from_code_that_says_them() -> None:
    assert experiment().task.class_names == SOUNDS and experiment().model.output.num_classes == len(SOUNDS)
    assert experiment().model.input.num_samples == SAMPLES and experiment().task.sample_rate == RATE


def test_mel_filters_are_those_of_transformers() -> None:
    utils = pytest.importorskip("transformers.audio_utils")
    from perceiver.models.mel_input import mel_filters

    for num, rate, low, high in ((64, 16000, 0.0, 8000.0), (80, 44100, 200.0, 16000.0)):
        theirs = utils.mel_filter_bank(257, num, low, high, rate, norm="slaney", mel_scale="slaney")
        np.testing.assert_allclose(mel_filters(257, num, rate, low, high).numpy(), theirs, atol=1e-6)


def test_the_spectrogram_is_that_of_a_few_lines() -> None:
    adapter = INPUT.build()
    samples = torch.from_numpy(from_stored(rows().column("audio").chunk(0).values.to_numpy().reshape(20, -1)[:2]))
    padded = np.pad(samples.numpy().astype(np.float64), ((0, 0), (256, 256)))
    window = np.pad(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400), (56, 56))
    frames = np.stack([padded[:, start : start + 512] * window for start in range(0, 160 * INPUT.num_frames, 160)], 1)
    power = np.abs(np.fft.rfft(frames)) ** 2
    expected = np.log(power @ adapter.filters.double().numpy() + 1e-6)
    np.testing.assert_allclose(adapter.spectrogram(samples).numpy(), expected, atol=2e-3)
    points = adapter.points(samples)
    assert points.shape == (2, INPUT.num_positions(), 32) and abs(float(points.mean())) < 1e-4 and abs(float(points.std()) - 1) < 1e-2
    normed = (expected - expected.mean((1, 2), keepdims=True)) / expected.std((1, 2), keepdims=True)
    np.testing.assert_allclose(points[1, 8 * 3 + 2].numpy().reshape(4, 8), normed[1, 12:16, 16:24], atol=5e-3)


def test_16_bit_samples_are_the_floats_that_they_stand_for() -> None:
    adapter, stored = INPUT.build(), torch.from_numpy(to_stored(next(iter(Sounds().examples("val", 0)))["audio"]))[None]
    torch.testing.assert_close(adapter.points({"samples": stored}), adapter.points(stored.float() / 32767))


def test_what_is_masked_does_not_matter() -> None:
    """A mask over all frames but the first patch's leaves of a sound nothing but that patch and the statistics of the whole."""
    adapter, samples = INPUT.build(), torch.randn(1, SAMPLES, generator=torch.Generator().manual_seed(0))
    keep = torch.zeros(1, INPUT.num_frames, dtype=torch.bool)
    keep[:, :4] = True
    bands = torch.ones(1, INPUT.num_bands, dtype=torch.bool)
    masked, whole = adapter.points({"samples": samples, "keep_frames": keep, "keep_bands": bands}), adapter.points(samples)
    assert torch.equal(masked[:, :8], whole[:, :8]) and not masked[:, 8:].any()


def test_random_changes_are_functions_of_the_row_alone() -> None:
    sounds = from_stored(rows().column("audio").chunk(0).values.to_numpy().reshape(20, -1))
    draws = uniforms(3, np.zeros(20, np.int64), np.arange(20), DRAWS)
    whole = changed(sounds, draws, 0.3, 6.0, 20.0)
    parts = [changed(sounds[i : i + 7], draws[i : i + 7], 0.3, 6.0, 20.0) for i in range(0, 20, 7)]
    assert np.array_equal(whole, np.concatenate(parts)) and not np.array_equal(whole, sounds)


def test_each_change_is_what_its_setting_says() -> None:
    sounds, draws = np.sin(np.arange(4000, dtype=np.float32))[None], np.full((1, DRAWS), 0.75, np.float32)
    assert np.array_equal(changed(sounds, draws, 0.5, 0, None), np.roll(sounds, 1000, axis=1)), "half of 0.5 of the length, later"
    np.testing.assert_allclose(changed(sounds, draws, 0, 12, None), sounds * 10 ** (6 / 20), rtol=1e-5)
    noise = changed(sounds, draws, 0, 0, 10.0) - sounds
    assert 20 * np.log10(sounds.std() / noise.std()) == pytest.approx(40, abs=0.5), "10 and three quarters of 40 decibels below"


def test_masks_have_at_most_their_width() -> None:
    masks = ~kept(uniforms(0, np.zeros(500, np.int64), np.arange(500), 2), 50, 12)
    assert masks.sum(1).max() == 12 and masks.sum(1).min() == 0 and masks.any(0).all()
    assert all(len(np.flatnonzero(mask)) == 0 or np.ptp(np.flatnonzero(mask)) + 1 == mask.sum() for mask in masks)


def test_training_batches_change_with_the_epoch_and_validation_batches_never() -> None:
    task = build_task(replace(experiment(), task=replace(experiment().task, num_masks=1)))
    later = rows().set_column(3, "epoch", pa.array(np.ones(20, np.int64)))
    first, second = (task.collate(table, 24, None, True, 0) for table in (rows(), later))
    assert not torch.equal(first["audio"], second["audio"]) and not torch.equal(first["keep_frames"], second["keep_frames"])
    once, again = (task.collate(table, 24, None, False, 0) for table in (rows(), later))
    assert torch.equal(once["audio"], again["audio"]) and "keep_frames" not in once
    assert (once["labels"][20:] == -100).all() and not once["audio"][20:].any()


@pytest.mark.parametrize("kind", ["log-mel", "raw"])
def test_a_few_sounds_are_learned_and_predicted(kind: str) -> None:
    """Loss falls to nearly nothing on 10 sounds, and `classify` says of each, as a file or as samples, what it was learned as."""
    base = experiment()
    task = replace(base.task, random_noise=None, random_gain=0.0, random_shift=0.0)
    inputs = {"log-mel": LogMelInput(num_samples=2560), "raw": AudioInput(num_samples=2560, group=80, num_frequency_bands=8)}
    model = replace(base.model, input=inputs[kind])
    built, network = build_task(replace(base, task=task, model=model)), build_model(model, 0)
    sounds = rows(10).column("audio").chunk(0).values.to_numpy().reshape(10, -1)[:, 6720:9280]
    batch = built.collate(rows(10).set_column(0, "audio", fixed_column(sounds)), 10, None, True, 0)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    torch.set_num_threads(1)
    for _ in range(50):
        loss, _ = built.loss(network, batch)
        optimizer.zero_grad()
        (loss / 10).backward()
        optimizer.step()
    assert loss.item() / 10 < 0.3
    trained = TrainedModel(model=network.eval(), config=model, task=task)
    said = [found.label for found in trained.classify(list(sounds))]
    assert sum(one == other for one, other in zip(said, SOUNDS, strict=True)) >= 9
    assert trained.embed(list(sounds[:2]))[0].shape == (64,)


def test_a_file_of_another_rate_is_classified_as_its_samples(tmp_path) -> None:
    soundfile = pytest.importorskip("soundfile")
    base = experiment()
    trained = TrainedModel(model=build_model(base.model, 0).eval(), config=base.model, task=base.task)
    tone = 0.3 * np.sin(2 * np.pi * 500 * np.arange(RATE * 2) / (RATE * 2))
    soundfile.write(tmp_path / "a.wav", tone, RATE * 2, subtype="FLOAT")
    one, other = trained.classify(str(tmp_path / "a.wav")), trained.classify(0.3 * np.sin(2 * np.pi * 500 * np.arange(RATE) / RATE))
    np.testing.assert_allclose(one.probabilities, other.probabilities, atol=2e-3)
    with pytest.raises(UserError, match="there is no sound file nowhere.wav"):
        trained.classify("nowhere.wav")


def test_settings_that_do_not_fit_are_named() -> None:
    with pytest.raises(UserError, match="num-bands is 256, and some bands are narrower than what window 400 tells apart"):
        LogMelInput(num_samples=SAMPLES, num_bands=256).check("")
    base = experiment()
    with pytest.raises(UserError, match=r"model.input.sample-rate is 8000 and must be task.sample-rate, 16000"):
        build_task(replace(base, model=replace(base.model, input=replace(base.model.input, sample_rate=8000))))
    with pytest.raises(UserError, match=r"task.num-masks is 1, which needs a model with a LogMelInput, not AudioInput"):
        build_task(replace(base, task=replace(base.task, num_masks=1), model=replace(base.model, input=AudioInput(num_samples=SAMPLES))))
    assert "audio-clf-esc50" in PRESETS


def test_a_step_is_counted_whatever_the_input() -> None:
    """What a step costs is known before a training, by running it where there are shapes alone."""
    base = experiment()
    for given, masks in (
        (base.model.input, 0),
        (base.model.input, 2),
        (AudioInput(num_samples=SAMPLES, group=80, num_frequency_bands=8), 0),
    ):
        task = build_task(replace(base, task=replace(base.task, num_masks=masks), model=replace(base.model, input=given)))
        assert task.flops_per_example() > 1e6
