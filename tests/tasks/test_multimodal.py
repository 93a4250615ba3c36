"""Multimodal autoencoding: what is asked for, what is measured, and what comes out."""

import io
import wave
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

import perceiver
from perceiver.config import UserError
from perceiver.data.made_video import CLASSES, SAMPLES, SoundingShapes
from perceiver.inference.trained import TrainedModel
from perceiver.models import ClassInput, build_model
from perceiver.presets import PRESETS
from perceiver.tasks import build_task
from perceiver.tasks.base import EACH, dummy_split
from perceiver.tasks.check import check_task
from perceiver.tasks.multimodal_autoencoding import wav

COUNT = 5


def experiment(**task):
    base = PRESETS["multimodal-small"]()
    return replace(base, task=replace(base.task, **task))


@cache
def rows():
    base = experiment()
    examples = [example for example, _ in zip(SoundingShapes().examples("val", 0), range(COUNT), strict=False)]
    table = base.task.rows(base.model, base.data).table(examples, "here")
    return table.append_column("row", [list(range(COUNT))]).append_column("epoch", [[0] * COUNT])


def collated(task, first=0, count=COUNT, size=COUNT, train=False, step=0):
    return task.collate(rows().slice(first, count), size, dummy_split(task.rows, COUNT), train, step)


def sums_of(task, model, parts):
    total = {}
    for first, count, size in parts:
        batch = collated(task, first, count, size)
        with torch.no_grad():
            loss, sums = task.loss(model, batch)
        for key, value in {"loss": loss.double(), "targets": task.num_targets(batch), **sums}.items():
            if not key.startswith(EACH):
                total[key] = total.get(key, 0) + value.numpy()
    return total


def test_the_task_keeps_its_contract() -> None:
    check_task(experiment())


def test_a_step_is_counted_by_the_points_that_it_asks_for() -> None:
    few, all_points = (build_task(experiment(asked_video=asked)).flops_per_example() for asked in (256, 0))
    assert 0 < 2 * few < all_points


def test_the_points_that_are_asked_for_depend_on_seed_and_step_alone() -> None:
    task = build_task(experiment(asked_audio=16))
    one, again, next_step = (collated(task, first, 2, 3, True, step) for first, step in ((0, 4), (2, 4), (0, 5)))
    for name in ("asked_video", "asked_audio"):
        assert torch.equal(one[name], again[name]) and not torch.equal(one[name], next_step[name])
        assert (one[name] == one[name][0]).all() and len(one[name][0].unique()) == one[name].shape[1]
    validated = [collated(build_task(experiment(validated_video=9)), 0, 2, 2, False, step)["asked_video"] for step in (0, 7)]
    assert torch.equal(*validated) and validated[0].shape == (2, 9)
    assert "asked_video" not in collated(task)


def test_points_asked_for_in_parts_are_those_of_all_at_once() -> None:
    settings = experiment()
    task, model = build_task(settings), build_model(settings.model, seed=0).eval()
    batch = collated(task)
    with torch.no_grad():
        whole = task.said(model, batch)
        asked = torch.tensor([3, 2000, 77])
        part = task.said(model, {**batch, "asked_video": asked.repeat(COUNT, 1), "asked_audio": torch.tensor([[1]] * COUNT)})
        chunked = replace(settings.model, decoder=replace(settings.model.decoder, query_chunk=100))
        again = build_model(chunked, seed=0).eval()({"video": batch["video"] / 255, "audio": batch["audio"], "label": batch["labels"]})
    torch.testing.assert_close(part["video"], whole["video"][:, asked])
    torch.testing.assert_close(part["audio"], whole["audio"][:, 1:2])
    torch.testing.assert_close(again["video"], whole["video"], atol=1e-5, rtol=1e-4)
    pixels = task.reconstructed(model, batch)["video"]
    assert torch.equal(pixels.flatten(1, 3), (whole["video"] * 255).round().clamp(0, 255).to(torch.uint8))


def test_metrics_are_the_same_however_rows_are_divided() -> None:
    settings = experiment()
    task, model = build_task(settings), build_model(settings.model, seed=0).eval()
    expected, got = (task.metrics(sums_of(task, model, parts), None) for parts in ([(0, 5, 5)], [(0, 2, 4), (2, 3, 3), (0, 0, 1)]))
    assert expected == pytest.approx(got, rel=1e-5) and expected.keys() == task.metric_directions.keys()


def test_metrics_are_those_of_their_definitions() -> None:
    task = build_task(experiment())
    batch = collated(task)
    video, audio = batch["video"].flatten(1, 3) / 255, batch["audio"].unflatten(1, (-1, 16))
    label = torch.nn.functional.one_hot(batch["labels"], len(CLASSES)).float()
    label[0] = label[0].roll(1)
    task.said = lambda model, batch: {"video": video + 0.1, "audio": audio - 0.01, "label": 50 * label}
    found = task.metrics(sums_of(task, torch.nn.Identity(), [(0, 5, 5)]), None)
    assert found["psnr_video"] == pytest.approx(20, abs=1e-3) and found["psnr_audio"] == pytest.approx(40, abs=1e-3)
    assert found["acc"] == 0.8
    rest = video - video.mean(1, keepdim=True)
    assert found["psnr_video_mean"] == pytest.approx((-10 * rest.square().mean((1, 2)).log10()).mean().item(), abs=1e-3)
    assert found["psnr_audio_silence"] == pytest.approx((-10 * audio.square().mean((1, 2)).log10()).mean().item(), abs=1e-3)
    assert found["baseline_acc"] == batch["labels"].bincount().max() / 5
    beside = task.measured_baselines({f"val_{name}": value for name, value in found.items()})
    assert {name: baseline.value for name, baseline in beside.items()} == {
        "val_psnr_video": found["psnr_video_mean"], "val_psnr_audio": found["psnr_audio_silence"], "val_acc": found["baseline_acc"],
    }  # fmt: skip
    weights = task.config
    nats = 50 / 5 * weights.label_weight
    assert found["loss"] == pytest.approx(0.1 * weights.video_weight + 0.01 * weights.audio_weight + nats, rel=1e-4)


def test_the_class_is_hidden_from_the_input() -> None:
    settings = experiment()
    task, model = build_task(settings), build_model(settings.model, seed=0).eval()
    batch = collated(task)
    with torch.no_grad():
        said, other = (task.said(model, {**batch, "labels": labels}) for labels in (batch["labels"], batch["labels"].flip(0)))
    assert all(torch.equal(said[name], other[name]) for name in said)


def test_each_example_adds_what_it_adds_alone() -> None:
    settings = experiment(validated_video=50)
    task, model = build_task(settings), build_model(settings.model, seed=0).eval()
    batch = collated(task, size=6)
    with torch.no_grad():
        _, sums = task.loss(model, batch)
        said, alone = task.each(model, batch, sums), task.each(model, batch, {})
    for name in alone:
        torch.testing.assert_close(said[name].double(), alone[name].double(), rtol=1e-4, atol=1e-6)


def test_samples_are_a_picture_and_two_sounds() -> None:
    settings = experiment()
    task, model = build_task(settings), build_model(settings.model, seed=0).eval()
    video, before, after = task.samples(model, sums_of(task, model, [(0, 5, 5)]), None)
    assert video.image.dtype == np.uint8 and video.image.shape[2] == 3
    for sound in (before, after):
        with wave.open(io.BytesIO(sound.file)) as file:
            assert file.getnframes() == SAMPLES and file.getsampwidth() == 2
    assert task.samples(model, {}, None) == [], "a worker that saw nothing shows nothing"
    samples = np.array([0, 1, -1, 2], np.float32)
    with wave.open(io.BytesIO(wav(samples))) as file:
        assert np.frombuffer(file.readframes(4), "<i2").tolist() == [0, 32767, -32767, 32767]


def test_new_videos_come_out_whole_without_their_class() -> None:
    settings = experiment()
    trained = TrainedModel(model=build_model(settings.model, seed=0).eval(), config=settings.model, task=settings.task)
    found = trained.predict(rows().select(["video", "audio"]), batch_size=2)
    assert found["video"].shape == (COUNT, 4, 24, 24, 3) and found["audio"].shape == (COUNT, SAMPLES)
    np.testing.assert_allclose(found["probabilities"].sum(1), 1, rtol=1e-5)
    with pytest.raises(UserError, match="the rows have no audio"):
        trained.predict(rows().select(["video"]))


def test_an_exported_model_says_the_same(tmp_path) -> None:
    settings = experiment()
    trained = TrainedModel(model=build_model(settings.model, seed=0).eval(), config=settings.model, task=settings.task)
    again = perceiver.load(trained.export(tmp_path / "out"), device="cpu")
    given = rows().select(["video", "audio"]).slice(0, 2)
    for name, values in trained.predict(given).items():
        np.testing.assert_array_equal(again.predict(given)[name], values)


@pytest.mark.parametrize(
    "change, what",
    [
        (lambda e: replace(e, task=replace(e.task, asked_audio=33)), "task.asked-audio is 33 and must be at most 32"),
        (lambda e: replace(e, task=replace(e.task, class_names=("one",))), "task.class-names has 1 names"),
        (lambda e: replace(e, model=replace(e.model, input=ClassInput())), "needs a Perceiver IO model with a MultimodalInput"),
        (
            lambda e: replace(e, model=replace(e.model, output=replace(e.model.output, num_classes=9))),
            "num-classes is 9, but .* input is 6",
        ),
    ],
)
def test_wrong_settings_are_named(change, what: str) -> None:
    with pytest.raises(UserError, match=what):
        build_task(change(experiment(class_names=())) if "class-names" not in what else change(experiment()))


def test_made_videos_are_the_same_each_time_and_hold_all_classes() -> None:
    source = SoundingShapes(train=12, val=4)
    made = [example for part in range(source.parts("train")) for example in source.examples("train", part)]
    assert {example["label"] for example in made} == set(range(len(CLASSES)))
    again = next(iter(source.examples("train", 0)))
    np.testing.assert_array_equal(made[0]["video"], again["video"])
    assert np.abs(made[0]["audio"]).max() <= 1
