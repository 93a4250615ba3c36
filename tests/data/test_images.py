"""Images: idx files with exact faults, scaling, cropping."""

import struct

import numpy as np
import pytest

from perceiver.config import UserError
from perceiver.data.images import parse_idx, random_crop, scale

IMAGES = struct.pack(">4i", 2051, 2, 3, 4) + bytes(range(24))


def test_idx_arrays_have_the_shape_of_their_head():
    assert np.array_equal(parse_idx(IMAGES, 3, "a"), np.arange(24).reshape(2, 3, 4))
    assert parse_idx(struct.pack(">2i", 2049, 3) + b"\1\2\3", 1, "a").tolist() == [1, 2, 3]
    assert parse_idx(IMAGES[:20], 3, "a", head_only=True) == (3, 4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0\0", "a has 2 bytes|a is no idx file: it has 2 bytes"),
        (struct.pack(">4i", 2049, 2, 3, 4) + bytes(24), "magic 2049, expected 2051"),
        (IMAGES[:-1], "a has 39 bytes, its head .* asks for 40"),
        (IMAGES + b"x", "a has 41 bytes, its head .* asks for 40"),
        (struct.pack(">4i", 2051, -2, 3, 4), "its head says shape"),
    ],
)
def test_faulty_idx_files_are_named_with_their_fault(data, message):
    with pytest.raises(UserError, match=message):
        parse_idx(data, 3, "a")


def test_scaling_reaches_both_ends():
    assert scale(np.array([0, 255], np.uint8)).tolist() == [-1, 1] and scale(np.zeros(1, np.uint8)).dtype == np.float32


def test_crops_are_parts_of_their_images_and_reach_all_places():
    images = np.arange(500 * 5 * 6 * 2, dtype=np.int64).reshape(500, 5, 6, 2)
    places = np.random.default_rng(0).random((500, 2))
    crops = random_crop(images, 4, places)
    assert crops.shape == (500, 4, 4, 2)
    seen = set()
    for image, crop, place in zip(images, crops, places, strict=True):
        top, left = int(place[0] * 2), int(place[1] * 3)
        assert np.array_equal(crop, image[top : top + 4, left : left + 4])
        seen.add((top, left))
    assert len(seen) == 6
    assert np.array_equal(random_crop(images, 5, np.zeros((500, 2))), images[:, :, :5])
    with pytest.raises(ValueError, match="squares of 6"):
        random_crop(images, 6, places)
