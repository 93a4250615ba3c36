"""Photos as on ImageNet: kept encoded, decoded where they are used, changed and mixed by arithmetic, validated as the published models."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from perceiver.config import Experiment, FlatCosine, UserError
from perceiver.data.columns import fixed_array
from perceiver.data.images import decode_image
from perceiver.datasets import Dataset
from perceiver.inference.images import images_of
from perceiver.inference.trained import TrainedModel
from perceiver.models import ClassOutput, DecoderConfig, EncoderConfig, ImageInput, PerceiverIOConfig, build_model
from perceiver.presets import PRESETS
from perceiver.tasks import build_task
from perceiver.tasks.photo_classification import PhotoClassificationConfig
from perceiver.tasks.randaugment import CROP_DRAWS, OPERATIONS, mixed, operation, random_part
from perceiver.training.batches import make_loader
from ray_jobs.cli import parse_experiment
from ray_jobs.preprocess import prepare
from tests.support.preparing import rows_of, serially

SIZE = 24
MODEL = PerceiverIOConfig(
    num_latents=4, num_latent_channels=16, input=ImageInput(image_shape=(SIZE, SIZE, 3), num_frequency_bands=4),
    encoder=EncoderConfig(num_cross_attention_heads=1, num_self_attention_heads=2, num_self_attention_layers_per_block=1),
    decoder=DecoderConfig(num_cross_attention_heads=1), output=ClassOutput(num_classes=0, num_query_channels=16), init_scale=0.1,
)  # fmt: skip


def photo(number: int, height: int = 40, width: int = 56, form: str = "JPEG") -> bytes:
    """An encoded picture, all of them different."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    file = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, form)
    return file.getvalue()


def folder_of_classes(folder: Path) -> Path:
    for split, count in (("train", 9), ("val", 3)):
        for number, name in enumerate(("n01", "n02")):
            for i in range(count):
                path = folder / split / name / f"{i}.{'png' if i == 2 else 'jpg'}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(photo(100 * number + i + 50 * (split == "val"), 40 + i, 56, "PNG" if i == 2 else "JPEG"))
    return folder


def experiment(**task) -> Experiment:
    base = PRESETS["img-clf-imagenet"]()
    return replace(base, task=PhotoClassificationConfig(**task), model=replace(MODEL, output=replace(MODEL.output, num_classes=2)))


def prepared(tmp_path, source, monkeypatch, *words):
    serially(monkeypatch)
    given = ["img-clf-imagenet", "--data.source", str(source), "--data.root", str(tmp_path / "data"), "--model.output.num-classes", "0"]
    chosen = parse_experiment([*given, "--model.input.image-shape", str(SIZE), str(SIZE), "3", *words], "ray_jobs.preprocess")
    return chosen, prepare(chosen)


def table(count: int) -> pa.Table:
    """Decoded rows of random pixels."""
    rng = np.random.default_rng(0)
    images = pa.FixedSizeListArray.from_arrays(pa.array(rng.integers(0, 256, count * SIZE * SIZE * 3, np.uint8)), SIZE * SIZE * 3)
    labels, rows = pa.array(np.arange(count, dtype=np.int32) % 2), pa.array(np.arange(count) * 7)
    return pa.table({"image": images, "label": labels, "row": rows, "epoch": pa.array(np.zeros(count, np.int64))})


def test_photos_are_stored_as_their_files_are(tmp_path, monkeypatch):
    folder = folder_of_classes(tmp_path / "in")
    chosen, manifest = prepared(tmp_path, folder, monkeypatch)
    assert chosen.task.class_names == ("n01", "n02") and manifest.image_shape is None
    assert manifest.stats["labels"] == {"train": [9, 9], "val": [3, 3]} and manifest.num_classes == 2
    rows = rows_of(Dataset.find(chosen).folder, manifest, "train")
    files = {path.read_bytes(): path.parent.name for path in (folder / "train").rglob("*.*")}
    assert {row["image"]: f"n0{row['label'] + 1}" for row in rows.to_pylist()} == files


@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_tables_and_webdataset_give_the_same_photos(form, tmp_path, monkeypatch):
    contents = {split: [photo(i + 100 * (split == "val")) for i in range(6)] for split in ("train", "val")}
    (tmp_path / "in").mkdir()
    for split, found in contents.items():
        if form == "parquet":
            pq.write_table(pa.Table.from_pylist([{"image": {"bytes": c, "path": "x"}, "label": i % 2} for i, c in enumerate(found)]),
                           tmp_path / "in" / f"{split}-0.parquet")  # fmt: skip
            continue
        with tarfile.open(tmp_path / "in" / f"{split}-0.tar", "w") as archive:
            for i, content in enumerate(found):
                for ending, data in (("jpg", content), ("cls", str(i % 2).encode())):
                    member = tarfile.TarInfo(f"{i:03d}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    chosen, manifest = prepared(tmp_path, tmp_path / "in", monkeypatch)
    rows = rows_of(Dataset.find(chosen).folder, manifest, "train")
    assert rows["image"].to_pylist() == contents["train"] and rows["label"].to_pylist() == [0, 1] * 3


def test_a_damaged_photo_is_found_before_it_is_trained_on(tmp_path, monkeypatch):
    folder = folder_of_classes(tmp_path / "in")
    for name, content in (("cut.jpg", photo(1)[:600]), ("page.jpg", b"<html>"), ("cut.png", photo(1, form="PNG")[:900])):
        path = folder / "train" / "n01" / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"in/train/n01/{name}: it is "):
            prepared(tmp_path, folder, monkeypatch)
        path.unlink()


def test_another_number_of_classes_is_named_with_what_to_say(tmp_path):
    folder = folder_of_classes(tmp_path / "in")
    with pytest.raises(UserError, match=r"has 2 classes, and model.output.num-classes is 1000: give --model.output.num-classes 0"):
        parse_experiment(["img-clf-imagenet", "--data.source", str(folder)], "ray_jobs.train")
    with pytest.raises(UserError, match="data.image-size is 64, and this task keeps photos as they are"):
        parse_experiment(["img-clf-imagenet", "--data.source", str(folder), "--data.image-size", "64"], "ray_jobs.train")


def test_batches_are_the_same_whoever_reads_them_and_change_with_the_epoch(tmp_path, monkeypatch):
    """Two workers together have the batch of one, with RandAugment, MixUp and CutMix; the next epoch has other pixels."""
    words = ["--training.global-batch-size", "4", "--data.rows-per-block", "5", "--task.mixup", "0.5", "--task.cutmix", "0.5"]
    chosen, manifest = prepared(tmp_path, folder_of_classes(tmp_path / "in"), monkeypatch, *words)
    task, folder = build_task(chosen), Dataset.find(chosen).folder
    loader = make_loader(task, folder, manifest.splits["train"], True, data=chosen.data, training=chosen.training)

    def steps(rank: int, world: int) -> list[dict[str, torch.Tensor]]:
        return [batch for (batch,) in loader.steps(lambda own, units: map(own.reader.read, units), rank, world, 0, 8)]

    one, two = steps(0, 1), list(zip(steps(0, 2), steps(1, 2), strict=True))
    for whole, parts in zip(one, two, strict=True):
        for name, values in whole.items():
            assert torch.equal(values, torch.cat([part[name] for part in parts])), name
    assert (one[0]["share"] < 1).any() and one[4]["images"][-1].any() == 0, "the epoch's last batch is filled up"
    assert not any(torch.equal(one[0]["images"], later["images"]) for later in one[1:])


def test_validation_sees_a_photo_as_a_prediction_does(tmp_path):
    task = build_task(experiment())
    data = photo(3)
    row = pa.table({"image": pa.array([data], pa.binary()), "label": pa.array([0], pa.int32()), "row": [0], "epoch": [0]})
    batch = task.collate(task.decode(row, None, False), 1, None, False, 0)
    model = build_model(experiment().model, 0).eval()
    seen = (batch["images"].float() - 255 * torch.tensor([0.485, 0.456, 0.406])) / (255 * torch.tensor([0.229, 0.224, 0.225]))
    torch.testing.assert_close(seen, torch.from_numpy(images_of([data], MODEL.input.image_shape, photos=True)), atol=1e-5, rtol=1e-5)
    trained = TrainedModel(model=model, config=experiment().model, task=experiment().task, photos=True)
    with torch.no_grad():
        np.testing.assert_allclose(trained.classify(data).probabilities, task.logits(model, batch).softmax(-1)[0], atol=1e-5)


def test_a_random_part_lies_in_the_picture_and_has_its_share_and_shape():
    rng = np.random.default_rng(0)
    parts = [random_part(300, 500, rng.random(CROP_DRAWS, np.float32), 0.2) for _ in range(500)]
    for top, left, height, width in parts:
        assert top >= 0 <= left and top + height <= 300 and left + width <= 500
        assert 0.19 <= height * width / 150000 <= 1 and 0.74 <= width / height <= 1.35
    assert min(p[2] * p[3] for p in parts) < 40000 and max(p[2] * p[3] for p in parts) > 100000
    assert random_part(100, 1000, np.full(CROP_DRAWS, 0.999, np.float32), 1.0) == (0, 433, 100, 133), "none fits: the middle, 4:3"


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_those_of_torchvision(name):
    from torchvision.transforms import v2

    image = torch.from_numpy(decode_image(photo(5, 37, 51))).permute(2, 0, 1).contiguous()
    theirs = v2.RandAugment(num_magnitude_bins=11)
    magnitudes, signed = theirs._AUGMENTATION_SPACE[name]
    for bin_number in (2, 5, 10):
        for sign in (1, -1) if signed else (1,):
            values = magnitudes(11, 37, 51)
            magnitude = 0.0 if values is None else float(values[bin_number]) * sign
            expected = theirs._apply_image_or_video_transform(image, name, magnitude, theirs.interpolation, theirs._fill)
            found = operation(image, name, sign * bin_number / 10)
            # A pixel's place may round the other way, and its value.
            assert ((found.int() - expected.int()).abs() > 1).float().mean() < 1e-3, (name, bin_number, sign)


def test_mixed_photos_have_what_their_shares_say():
    images = np.stack([np.full((20, 20, 3), value, np.uint8) for value in (0, 200, 40, 90, 10)])
    draws = np.random.default_rng(1).random((5, 5), np.float32)
    by_mixup, shares, partners = mixed(images, draws, 0.2, 0.0)
    assert partners.tolist() == [1, 0, 3, 2, 4] and shares[4] == 1 and (by_mixup[4] == 10).all()
    for i in range(4):
        expected = shares[i] * images[i].astype(float) + (1 - shares[i]) * images[partners[i]]
        np.testing.assert_allclose(by_mixup[i], expected, atol=0.51)
    by_cutmix, shares, _ = mixed(images, draws, 0.0, 1.0)
    for i in range(4):
        assert (by_cutmix[i] == images[i]).mean() == pytest.approx(shares[i]) and 0 < shares[i] < 1
        assert ((by_cutmix[i] == images[i]) | (by_cutmix[i] == images[partners[i]])).all()


def test_the_loss_of_mixed_photos_with_smoothed_labels_is_that_of_soft_targets():
    chosen = experiment(mixup=0.4, cutmix=0.4, label_smoothing=0.1)
    task, model = build_task(chosen), build_model(chosen.model, 0)
    batch = task.collate(table(7), 8, None, True, 5)
    loss, _ = task.loss(model, batch)
    hard = torch.stack([F.one_hot(batch[name].clamp(min=0), 2).double() for name in ("labels", "partner")])
    soft = batch["share"][:, None] * hard[0] + (1 - batch["share"][:, None]) * hard[1]
    logits = task.logits(model, batch).double()
    expected = -((0.9 * soft + 0.05) * logits.log_softmax(-1)).sum(-1)[:7].sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and int(task.num_targets(batch)) == 7
    with torch.no_grad():
        plain, _ = task.loss(model, task.collate(table(7), 8, None, False, 5))
        expected = F.cross_entropy(task.logits(model, task.collate(table(7), 8, None, False, 5))[:7], batch["labels"][:7], reduction="sum")
    assert plain.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_weights_of_classes_count_for_both_of_mixed_photos():
    chosen = experiment(mixup=0.4, label_smoothing=0.1)
    model = build_model(chosen.model, 0)
    weighted = build_task(replace(chosen, task=replace(chosen.task, class_weights=("3", "0.5"))))
    batch = weighted.collate(table(7), 8, None, True, 5)
    weights = torch.tensor([3.0, 0.5]).double()
    hard = torch.stack([F.one_hot(batch[name].clamp(min=0), 2).double() for name in ("labels", "partner")])
    log_p = weighted.logits(model, batch).double().log_softmax(-1)
    each = [-((0.9 * h + 0.05) * log_p).sum(-1) * (h @ weights) for h in hard]
    expected = (batch["share"] * each[0] + (1 - batch["share"]) * each[1])[:7].sum()
    assert weighted.loss(model, batch)[0].item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(UserError, match="--task.class-weights has 3 numbers, but there are 2 classes"):
        build_task(replace(chosen, task=replace(chosen.task, class_weights=("1", "2", "3")))).check()


def test_mixing_depends_on_step_and_row_and_not_on_the_rows_beside_a_pair():
    task = build_task(experiment(mixup=0.4, cutmix=0.4))
    whole, half = (task.collate(rows, rows.num_rows, None, True, 3) for rows in (table(8), table(8).slice(4, 4)))
    assert all(torch.equal(whole[name][4:], half[name]) for name in whole)
    assert not torch.equal(whole["images"], task.collate(table(8), 8, None, True, 4)["images"])


def test_a_step_is_counted() -> None:
    assert build_task(experiment(mixup=0.2, label_smoothing=0.1)).counted_step.flops_per_example() > 1e5


def test_the_published_schedule_is_flat_and_then_a_cosine():
    factors = [FlatCosine().factor(step, 100) for step in (0, 49, 50, 75, 100)]
    assert factors == pytest.approx([1, 1, 1, 0.5, 0])


def test_the_preset_says_the_published_recipe():
    chosen = PRESETS["img-clf-imagenet"]()
    assert chosen.optim.lr == 5e-4 * chosen.training.global_batch_size / 256 and chosen.training.max_epochs == 110
    assert chosen.optim.weight_decay == 0.1 and chosen.optim.max_grad_norm == 10 and chosen.optim.optimizer.betas == (0.9, 0.999)
    assert fixed_array(table(2), "image").shape == (2, SIZE * SIZE * 3)
