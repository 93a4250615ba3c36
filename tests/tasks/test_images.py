"""Image classification: batches hold the images as they were stored, cropped where asked for."""

from dataclasses import replace

import numpy as np
import pyarrow as pa

from perceiver.data.manifest import Manifest, Split
from perceiver.data.rows import fixed_column
from perceiver.models import ImageInput
from perceiver.tasks import build_task
from tests.support.small import image_experiment

PIXELS = np.random.default_rng(0).integers(0, 256, (50, 4, 9, 3), np.uint8)


def collated(crop: int | None, train: bool) -> np.ndarray:
    """The images of a batch of 4 x 9 pictures."""
    experiment = image_experiment()
    shape = (4, 9, 3) if crop is None else (crop, crop, 3)
    model = replace(experiment.model, input=replace(experiment.model.input, image_shape=shape))
    assert isinstance(model.input, ImageInput)
    experiment = replace(experiment, model=model, task=replace(experiment.task, random_crop=crop))
    split = Split(
        name="train", kind="images", rows=50, tokens=0, bytes=0, words=0, documents=50, row_length=108, rows_per_block=8,
        blocks_per_shard=3, lookahead=0, shards=(),
    )  # fmt: skip
    manifest = Manifest(kind="images", settings={}, settings_digest="", splits={"train": split}, image_shape=(4, 9, 3))
    rows = pa.table({
        "image": fixed_column(PIXELS.reshape(50, 108)), "label": pa.array(np.zeros(50, np.int32)),
        "row": pa.array(np.arange(50)), "epoch": pa.array(np.zeros(50, np.int64)),
    })  # fmt: skip
    return build_task(experiment).collate(rows, 50, manifest.splits["train"], train, 0)["images"].numpy()


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
