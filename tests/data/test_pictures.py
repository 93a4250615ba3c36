"""Pictures of every kind of pixel: read right, or refused by name, and never the end of the others."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from perceiver.config import UserError
from perceiver.data.columns import fixed_array
from perceiver.data.images import BadImage, decode_image
from perceiver.inference.images import _pixels
from ray_jobs import preprocess
from tests.support import preparing
from tests.support.preparing import experiment, load_prepared, rows_of, write_parquet

GRADIENT = (np.arange(36 * 28) * 65).astype(np.uint16).reshape(28, 36)
GREY = (np.arange(30, dtype=np.uint8) * 8).reshape(5, 6)
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], -1)


def saved(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png(pixels: np.ndarray, colour_type: int, bits: int, more: bytes = b"") -> bytes:
    """A PNG file written by hand: what Pillow cannot write, it must read."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = pixels.astype(">u2" if bits == 16 else np.uint8)
    head = struct.pack(">2I5B", rows.shape[1], rows.shape[0], bits, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + more + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def huge_png() -> bytes:
    """A file of some bytes whose head promises 100,000 x 100,000 pixels."""
    data = png(np.zeros((1, 1)), 0, 8)
    head = struct.pack(">2I5B", 100_000, 100_000, 8, 0, 0, 0, 0)
    return data[:16] + head + struct.pack(">I", zlib.crc32(b"IHDR" + head)) + data[33:]


def test_grey_of_16_bits_keeps_its_upper_8(tmp_path):
    image = Image.fromarray(GRADIENT)
    for data in (saved(image, "png"), saved(image, "jpeg2000", irreversible=False), saved(image, "ppm")):
        assert np.array_equal(decode_image(data), (GRADIENT >> 8).astype(np.uint8)[..., None])
    tens = (np.arange(37, dtype=np.uint16) * 7 << 8).reshape(1, 37)
    assert decode_image(saved(Image.fromarray(tens), "png"))[0, :4, 0].tolist() == [0, 7, 14, 21]


def tiff(values: np.ndarray, order: str, bits: int, photometric: int) -> bytes:
    """An uncompressed TIFF file of grey pixels, of either byte order."""
    data = values.astype(f"{order}u2").tobytes() if bits == 16 else bytes(values.size * bits // 8)
    tags = [(256, values.shape[1]), (257, values.shape[0]), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1),
            (278, values.shape[0]), (279, len(data))]  # fmt: skip
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def test_tiff_files_of_16_bits_are_read_whatever_their_byte_order_and_what_zero_means():
    for order in "<>":
        assert np.array_equal(decode_image(tiff(GRADIENT, order, 16, 1))[..., 0], GRADIENT >> 8)
    assert np.array_equal(decode_image(tiff(GRADIENT, "<", 16, 0))[..., 0], 255 - (GRADIENT >> 8))
    with pytest.raises(BadImage, match="has 12 bits a pixel"):
        decode_image(tiff(GRADIENT, "<", 12, 1))


def test_colour_of_16_bits_keeps_its_upper_8():
    colour = np.stack([GRADIENT, GRADIENT[::-1], GRADIENT // 2], -1)
    assert np.array_equal(decode_image(png(colour, 2, 16)), colour >> 8)
    opaque = np.concatenate([colour, np.full((28, 36, 1), 65535)], -1)
    assert np.array_equal(decode_image(png(opaque, 6, 16)), colour >> 8)


def test_what_is_transparent_is_seen_before_white():
    alpha = np.linspace(0, 255, 30).astype(np.uint8).reshape(5, 6)
    expected = np.rint((COLOUR * alpha[..., None].astype(float) + 255.0 * (255 - alpha[..., None])) / 255)
    rgba, la = np.dstack([COLOUR, alpha]), np.dstack([GREY, alpha])
    assert np.array_equal(decode_image(saved(Image.fromarray(rgba), "png")), expected)
    assert np.array_equal(decode_image(saved(Image.fromarray(la), "png"))[..., 0], expected[..., 0])
    marked = png(GREY, 0, 8, b"\0\0\0\2tRNS\0\x10" + struct.pack(">I", zlib.crc32(b"tRNS\0\x10")))
    assert np.array_equal(decode_image(marked)[..., 0], np.where(GREY == 16, 255, GREY))
    marked = png(GRADIENT, 0, 16, b"\0\0\0\2tRNS\0\x41" + struct.pack(">I", zlib.crc32(b"tRNS\0\x41")))
    assert np.array_equal(decode_image(marked)[..., 0], np.where(GRADIENT == 65, 255, GRADIENT >> 8))


def test_palettes_cmyk_and_two_colours_become_the_colours_they_show():
    indexed = Image.fromarray(np.arange(30, dtype=np.uint8).reshape(5, 6), "P")
    indexed.putpalette(COLOUR.reshape(-1).tolist())
    assert np.array_equal(decode_image(saved(indexed, "png")), COLOUR)
    seen = decode_image(saved(indexed, "png", transparency=3)).reshape(-1, 3)
    assert seen[3].tolist() == [255] * 3 and np.array_equal(np.delete(seen, 3, 0), np.delete(COLOUR.reshape(-1, 3), 3, 0))
    cmyk = np.dstack([255 - COLOUR, np.zeros((5, 6), np.uint8)])
    assert np.array_equal(decode_image(saved(Image.fromarray(cmyk, "CMYK"), "tiff")), COLOUR)
    assert np.array_equal(decode_image(saved(Image.fromarray(GREY > 100), "png"))[..., 0], np.where(GREY > 100, 255, 0))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_data_say(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    turned = {1: GREY, 2: GREY[:, ::-1], 3: GREY[::-1, ::-1], 4: GREY[::-1], 5: GREY.T, 6: np.rot90(GREY, -1),
              7: np.rot90(GREY, 2).T, 8: np.rot90(GREY)}[orientation]  # fmt: skip
    assert np.array_equal(decode_image(saved(Image.fromarray(GREY), "png", exif=exif))[..., 0], turned)


REFUSED = {
    "real numbers": (saved(Image.fromarray(GREY.astype(np.float32)), "tiff"), "mode F.*no known range"),
    "32 bits": (saved(Image.fromarray(GREY.astype(np.int32)), "tiff"), "mode I.*no known range"),
    "a huge head": (huge_png(), "too large"),
    "cut": (saved(Image.fromarray(COLOUR), "png")[:50], "damaged"),
    "another file": (b"no picture", "no image file"),
    "nothing": (None, "there is no image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_its_reason_at_every_door(name):
    data, reason = REFUSED[name]
    with pytest.raises(BadImage, match=reason):
        decode_image(data)
    if data is not None:
        with pytest.raises(UserError, match=reason):
            _pixels(data)


def test_pillow_images_are_read_as_files_are():
    assert np.array_equal(_pixels(Image.fromarray(GRADIENT))[0][..., 0], GRADIENT >> 8)
    with pytest.raises(UserError, match="no known range"):
        _pixels(Image.fromarray(GREY.astype(np.float32)))


def test_bad_pictures_cost_their_rows_alone_and_are_named(tmp_path, monkeypatch):
    preparing.serially(monkeypatch)
    good = [saved(Image.fromarray(np.full((28, 28), i, np.uint8)), "png") for i in range(6)]
    bad = [data for data, _ in REFUSED.values()]
    rows = [{"image": {"bytes": data}, "label": 1} for data in [*bad, *good]]
    write_parquet(tmp_path / "train.parquet", rows)
    write_parquet(tmp_path / "test.parquet", rows[-2:])
    chosen = experiment("img-clf-mnist", tmp_path / "out", f"{tmp_path}/*.parquet", on_error="skip")
    preprocess.prepare(chosen)
    folder, manifest = load_prepared(chosen)
    assert fixed_array(rows_of(folder, manifest, "train"), "image")[:, 0].tolist() == list(range(6))
    assert manifest.stats["skipped"] == {"bad image": len(bad)}
    with pytest.raises(UserError, match=r"train.parquet row 0: no readable image \(its pixels"):
        preprocess.prepare(experiment("img-clf-mnist", tmp_path / "other", f"{tmp_path}/*.parquet"))
