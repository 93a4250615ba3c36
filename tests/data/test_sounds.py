"""Sounds: reading, rates, lengths, folders and tables of classes, what cannot be read."""

import csv
from pathlib import Path

import numpy as np
import pytest

from perceiver.config import UserError
from perceiver.data.columns import fixed_array
from perceiver.data.shards import read_block
from perceiver.data.sounds import BadSound, as_samples, decode_sound, resampled, resampled_length, with_length
from perceiver.datasets import data_folder
from ray_jobs.cli import parse_experiment
from ray_jobs.data import look
from ray_jobs.preprocess import prepare
from tests.support.preparing import serially

soundfile = pytest.importorskip("soundfile")


def sound(path: Path, hertz: float = 440, rate: int = 8000, seconds: float = 0.5, channels: int = 1, loud: float = 0.5) -> None:
    """A tone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tone = loud * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    soundfile.write(path, np.stack([tone] * channels, 1) if channels > 1 else tone, rate)


def folder_of_classes(folder: Path, **kinds) -> Path:
    for i in range(8):
        for number, name in enumerate(("high", "low")):
            sound(folder / name / f"{i}.wav", 300 * (3 - number) + 7 * i, **kinds)
    return folder


def esc50(folder: Path) -> Path:
    """A folder as ESC-50 is unpacked."""
    (folder / "meta").mkdir(parents=True)
    with open(folder / "meta" / "esc50.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["filename", "fold", "target", "category", "esc10", "src_file", "take"])
        for i in range(20):
            name = f"{i % 5 + 1}-{i}-A-{i % 2}.wav"
            sound(folder / "audio" / name, 200 + 31 * i)
            table.writerow([name, i % 5 + 1, i % 2, ("dog", "rain")[i % 2], "True", i, "A"])
    return folder


def prepared(tmp_path, source, monkeypatch, *words):
    serially(monkeypatch)
    given = ["audio-clf-small", "--data.source", str(source), "--data.root", str(tmp_path / "data"), *words]
    chosen = parse_experiment(given, "ray_jobs.preprocess")
    return chosen, prepare(chosen)


def rows(chosen, manifest, split):
    """Samples (n, length) and labels (n,) of a split."""
    part = manifest.splits[split]
    blocks = [read_block(data_folder(chosen), part, block) for block in range(part.num_blocks)]
    return np.concatenate([fixed_array(b, "audio") for b in blocks]), np.concatenate([b["label"].to_numpy() for b in blocks])


def test_sounds_of_a_folder_have_its_classes_one_rate_and_one_length(tmp_path, monkeypatch):
    folder = folder_of_classes(tmp_path / "in", rate=44100, channels=2)
    sound(folder / "low" / "short.wav", 100, seconds=0.25)
    chosen, manifest = prepared(tmp_path, folder, monkeypatch)
    assert chosen.task.class_names == ("high", "low") and chosen.model.input.num_samples == 8000
    samples, labels = rows(chosen, manifest, "train")
    others, _ = rows(chosen, manifest, "val")
    assert samples.shape[1] == 8000 and samples.dtype == np.int16 and len(samples) + len(others) == 17
    for row, label in zip(samples, labels, strict=True):
        peak = np.abs(np.fft.rfft(row[:4000])).argmax() * 4
        assert (880 if label == 0 else 580) <= peak <= (960 if label == 0 else 660) or (row[4000:] == 0).all()
    assert 16000 <= np.abs(samples).max() <= 17000, "half of full scale, whatever the rate"
    assert sum(found["filled"] for found in manifest.stats["fitted"].values()) == 1


def test_a_table_says_classes_and_the_fold_that_is_held_out(tmp_path, monkeypatch):
    folder = esc50(tmp_path / "ESC-50-master")
    chosen, manifest = prepared(tmp_path, folder, monkeypatch, "--data.label-column", "category")
    assert chosen.task.class_names == ("dog", "rain") and manifest.splits["train"].rows == 16 and manifest.splits["val"].rows == 4
    val, _ = rows(chosen, manifest, "val")
    other, second = prepared(tmp_path, folder, monkeypatch, "--data.label-column", "category", "--data.val-fold", "1")
    others, _ = rows(other, second, "val")
    assert others.shape == val.shape and not (others[:, None] == val[None]).all(-1).any(), "another fold has other sounds"
    with pytest.raises(UserError, match=r"--data.val-fold is 7, and data.source .* has the folds 1, 2, 3, 4, 5"):
        prepared(tmp_path, folder, monkeypatch, "--data.label-column", "category", "--data.val-fold", "7")
    with pytest.raises(UserError, match=r"esc50.csv has no column --data.label-column label \(it has: filename, fold"):
        prepared(tmp_path, folder, monkeypatch)


def test_a_sound_that_a_table_names_must_be_there(tmp_path, monkeypatch):
    folder = esc50(tmp_path / "esc")
    (folder / "audio" / "1-0-A-0.wav").unlink()
    with pytest.raises(UserError, match=r"meta/esc50.csv row 1 names 1-0-A-0.wav, which is not there"):
        prepared(tmp_path, folder, monkeypatch, "--data.label-column", "category")


@pytest.mark.parametrize(
    ("content", "what"), [(b"<html>", "it is no sound file that can be read"), (b"", "it is no sound file that can be read")]
)
def test_what_is_no_sound_is_named_or_skipped_and_counted(content, what, tmp_path, monkeypatch):
    folder = folder_of_classes(tmp_path / "in")
    (folder / "low" / "a page.wav").write_bytes(content)
    with pytest.raises(UserError, match=rf"in/low/a page.wav: {what}"):
        prepared(tmp_path, folder, monkeypatch, "--model.input.num-samples", "8000")
    _, manifest = prepared(tmp_path, folder, monkeypatch, "--data.on-error", "skip")
    assert manifest.stats["skipped"] == {"bad sound": 1}


def test_a_sound_without_samples_and_one_with_nan_are_none(tmp_path):
    for name, samples, what in (("empty", np.zeros(0), "no samples"), ("nan", np.array([0, np.nan]), "NaN")):
        soundfile.write(tmp_path / f"{name}.wav", samples, 8000, subtype="FLOAT")
        with pytest.raises(BadSound, match=what):
            decode_sound((tmp_path / f"{name}.wav").read_bytes())
    with pytest.raises(BadSound, match="int32"):
        as_samples(np.zeros(4, np.int32))


def test_another_rate_keeps_pitch_and_loudness_and_loses_what_it_cannot_hold():
    for rate, wanted in ((44100, 16000), (8000, 16000), (11025, 16000)):
        time = np.arange(rate) / rate
        sound = resampled(np.sin(2 * np.pi * 1000 * time).astype(np.float32), rate, wanted)
        assert len(sound) == resampled_length(rate, rate, wanted)
        np.testing.assert_allclose(sound[2000:-2000], np.sin(2 * np.pi * 1000 * np.arange(len(sound)) / wanted)[2000:-2000], atol=5e-3)
    high = resampled(np.sin(2 * np.pi * 12000 * np.arange(44100) / 44100).astype(np.float32), 44100, 16000)
    assert np.abs(high[2000:-2000]).max() < 0.01, "12 kHz is above half of 16 kHz"


def test_longer_sounds_lose_both_ends_alike_and_shorter_ones_end_in_silence():
    assert with_length(np.arange(10), 4).tolist() == [3, 4, 5, 6] and with_length(np.arange(1, 3), 4).tolist() == [1, 2, 0, 0]


def test_sounds_without_classes_are_refused(tmp_path, monkeypatch):
    sound(tmp_path / "in" / "a.wav")
    with pytest.raises(UserError, match="has sounds without a class, such as a.wav: put those of each class into a folder"):
        prepared(tmp_path, tmp_path / "in", monkeypatch)


def test_data_says_rates_lengths_and_classes_and_its_command_is_right(tmp_path):
    folder = esc50(tmp_path / "esc")
    lines = look(str(folder))
    assert "sounds: 20, 0.50 to 0.50 s, half of them at most 0.50 s" in lines and "rates: 8,000 Hz (20); channels: 1 (20)" in lines
    assert "classes in val: dog (2), rain (2)" in lines and lines[-1].endswith("--data.label-column category")
    assert "classes in all (a part is held out for validation): high (8), low (8)" in look(str(folder_of_classes(tmp_path / "in")))


def test_a_folder_of_new_sounds_is_classified_a_file_a_row(tmp_path):
    from perceiver.inference.parts import list_inputs, plan_parts, read_part
    from perceiver.inference.predict import PredictOptions, predict_rows
    from perceiver.inference.trained import TrainedModel
    from perceiver.models import build_model

    folder = esc50(tmp_path / "esc")
    (folder / "audio" / "z.wav").write_bytes(b"no sound")
    chosen = parse_experiment(["audio-clf-small", "--data.source", str(folder), "--data.label-column", "category"], "ray_jobs.train")
    trained = TrainedModel(model=build_model(chosen.model, 0).eval(), config=chosen.model, task=chosen.task)
    parts = plan_parts(list_inputs([str(folder)], "audio"), 8, "audio", None)
    tables = [predict_rows(trained, read_part(part, "audio", "audio", None), PredictOptions(mode="classify")) for part in parts]
    rows = [row for table in tables for row in table.to_pylist()]
    assert len(rows) == 21 and rows[0]["id"] == "audio/1-0-A-0.wav" and rows[0]["label"] in ("dog", "rain")
    assert "no sound file that can be read" in rows[-1]["error"] and all(row["error"] is None for row in rows[:-1])
