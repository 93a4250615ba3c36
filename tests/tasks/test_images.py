"""Image classification: batches hold the images as they were stored, cropped where asked for."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from perceiver.config import UserError
from perceiver.data.columns import fixed_column
from perceiver.data.manifest import Manifest, Split
from perceiver.models import ImageInput
from perceiver.tasks import build_task
from perceiver.tasks.base import IGNORE_INDEX
from perceiver.tasks.distortion import distorted
from tests.support.small import image_experiment

PIXELS = np.random.default_rng(0).integers(0, 256, (50, 4, 9, 3), np.uint8)


def collated(crop: int | None, train: bool, first: int = 0, **distortion: float) -> np.ndarray:
    """The images of a batch of 4 x 9 pictures, from the given one on."""
    experiment = image_experiment()
    shape = (4, 9, 3) if crop is None else (crop, crop, 3)
    model = replace(experiment.model, input=replace(experiment.model.input, image_shape=shape))
    assert isinstance(model.input, ImageInput)
    experiment = replace(experiment, model=model, task=replace(experiment.task, random_crop=crop, **distortion))
    split = Split(
        name="train", kind="images", rows=50, tokens=0, bytes=0, words=0, documents=50, row_length=108, rows_per_block=8,
        blocks_per_shard=3, lookahead=0, shards=(),
    )  # fmt: skip
    manifest = Manifest(kind="images", settings={}, settings_digest="", splits={"train": split}, image_shape=(4, 9, 3))
    rows = pa.table({
        "image": fixed_column(PIXELS.reshape(50, 108)), "label": pa.array(np.zeros(50, np.int32)),
        "row": pa.array(np.arange(50)), "epoch": pa.array(np.zeros(50, np.int64)),
    }).slice(first)  # fmt: skip
    return build_task(experiment).collate(rows, 50 - first, manifest.splits["train"], train, 0)["images"].numpy()


def test_pictures_that_are_not_square_stay_as_they_are():
    assert np.array_equal(collated(None, True), PIXELS)


def test_crops_of_pictures_that_are_not_square_are_squares_of_them():
    places = set()
    for crop, picture in zip(collated(3, True), PIXELS, strict=True):
        found = [(i, j) for i in range(2) for j in range(7) if np.array_equal(picture[i : i + 3, j : j + 3], crop)]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) > 8
    assert np.array_equal(collated(3, False), PIXELS[:, 1:4, 3:6])


def middle(**changed: float) -> np.ndarray:
    """The numbers of a distortion that leaves 50 pictures as they are, but for what is given."""
    return np.array([[changed.get(name, 0.5) for name in ("angle", "size", "right", "down")]] * 50)


def test_distortions_turn_scale_and_move_pictures():
    square = PIXELS[:, :, :4]
    assert np.array_equal(distorted(PIXELS, middle(), 30, 0.2, 0.1), PIXELS)
    turned = distorted(square, middle(angle=1.0), 90, 0, 0)
    assert np.array_equal(turned, np.rot90(square, -1, axes=(1, 2)))  # with the clock
    moved = distorted(PIXELS, middle(right=1.0, down=0.0), 0, 0, 1 / 3)  # 3 pixels to the right; a third of 4 rows up, between two rows
    assert np.array_equal(distorted(PIXELS, middle(right=1.0), 0, 0, 1 / 3)[:, :, 3:], PIXELS[:, :, :6])
    assert not np.array_equal(moved[:, :, 3:], PIXELS[:, :, :6])
    half = np.zeros((50, 8, 8, 1), np.uint8)
    half[:, 2:6, 2:6] = 255
    assert distorted(half, middle(size=1.0), 0, 0.5, 0).sum() > 1.8 * half.sum() > 5 * distorted(half, middle(size=0.0), 0, 0.5, 0).sum()


def test_a_picture_of_another_shape_is_turned_without_being_sheared():
    bar = np.zeros((1, 9, 21, 1), np.uint8)
    bar[:, 4, 6:15] = 255
    upright = distorted(bar, np.array([[1.0, 0.5, 0.5, 0.5]]), 90, 0, 0)
    assert upright[0, :, 10, 0].tolist() == [255] * 9 and upright.sum() == bar.sum()


def test_distortions_depend_on_the_picture_alone_and_leave_validation_as_it_is():
    distortion = {"random_rotation": 20.0, "random_scaling": 0.1, "random_shift": 0.2}
    whole = collated(None, True, **distortion)
    assert np.array_equal(collated(None, True, first=30, **distortion), whole[30:])
    assert not np.array_equal(whole, PIXELS)
    assert np.array_equal(collated(None, False, **distortion), PIXELS)


@pytest.mark.parametrize(("field", "value"), [("random_rotation", -1.0), ("random_scaling", 1.0), ("random_shift", 2.0)])
def test_distortions_out_of_range_are_refused(field, value):
    with pytest.raises(UserError, match=f"task.{field.replace('_', '-')} is {value} and must be from 0 to"):
        replace(image_experiment().task, **{field: value}).check("task.")


def test_pictures_that_got_a_wrong_class_are_shown_once():
    task = build_task(image_experiment())
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 6, 6, 1)
    batch = {"images": images, "labels": torch.tensor([0, 1, 2, IGNORE_INDEX])}
    logits = torch.tensor([[5.0, 0, 0], [9.0, 0, 0], [0, 5.0, 0], [5.0, 0, 0]])

    def model(x: torch.Tensor) -> torch.Tensor:
        return logits

    with torch.no_grad():
        task.loss(model, batch)
    assert [(int(image.max()), label, guess) for image, label, guess, _ in task._mistakes] == [(1, 1, 0), (2, 2, 1)]
    sums = {"confusion": np.eye(3)}
    assert [sample.name for sample in task.samples(model, sums, None)] == ["classes", "confusion", "mistakes"]
    assert [sample.name for sample in task.samples(model, sums, None)] == ["classes", "confusion"]  # a new pass begins with none
    task.loss(model, batch)
    assert not task._mistakes  # training keeps nothing
