"""Files of optical flow: their formats, and which files belong together."""

import struct

import numpy as np
import pytest

from perceiver.config import DataConfig, UserError
from perceiver.data.flow_formats import NotFlow, read_flow, write_flo
from perceiver.data.flow_pairs import consecutive
from perceiver.data.sources import resolve
from tests.support.flow_files import chairs, kitti, kitti_png, pair, pfm, sintel, things, write

FLOW = np.arange(24, dtype=np.float32).reshape(3, 4, 2) / 4 - 2


def test_a_flo_file_is_read_by_its_published_bytes() -> None:
    data = b"PIEH" + struct.pack("<2i", 2, 1) + struct.pack("<4f", 1.5, -2, 1e10, 0)
    np.testing.assert_array_equal(read_flow(data), np.array([[[1.5, -2], [np.nan, np.nan]]], np.float32))
    np.testing.assert_array_equal(read_flow(write_flo(read_flow(data))), read_flow(data))


@pytest.mark.parametrize("little", [True, False])
def test_a_pfm_file_is_read_from_the_bottom_up(little: bool) -> None:
    np.testing.assert_array_equal(read_flow(pfm(FLOW, little)), FLOW)


def test_a_kitti_png_has_flow_where_its_third_channel_says_so() -> None:
    known = np.arange(12).reshape(3, 4) % 2 == 0
    np.testing.assert_array_equal(read_flow(kitti_png(FLOW, known)), np.where(known[..., None], FLOW, np.nan))


def test_files_are_read_as_torchvision_reads_them(tmp_path) -> None:
    module = pytest.importorskip("torchvision.datasets._optical_flow")
    for name, data, read in (
        ("a.flo", write_flo(FLOW), module._read_flo),
        ("a.pfm", pfm(FLOW), module._read_pfm),
        ("a.png", kitti_png(FLOW, np.ones((3, 4))), lambda path: module._read_16bits_png_with_flow_and_valid_mask(path)[0]),
    ):
        write(tmp_path / name, data)
        np.testing.assert_array_equal(read_flow(data), np.transpose(read(str(tmp_path / name)), (1, 2, 0)))


@pytest.mark.parametrize(
    "data, what",
    [
        (b"", "empty"),
        (b"GIF89a", "no .flo, .pfm or 16-bit .png"),
        (write_flo(FLOW)[:-1], "take 108"),
        (b"PIEH" + struct.pack("<2i", -1, 5), "-1 x 5"),
        (b"PIEH" + struct.pack("<2i", 1 << 30, 1 << 30), "says"),
        (b"Pf\n2 2\n-1.0\n" + bytes(16), "one channel"),
        (pfm(FLOW)[:-4], "take"),
        (kitti_png(FLOW, np.ones((3, 4)))[:60], "damaged PNG"),
    ],
)
def test_damaged_files_say_what_is_wrong(data: bytes, what: str) -> None:
    with pytest.raises(NotFlow, match=what):
        read_flow(data)


def found(folder, **data):
    return resolve(DataConfig(source=str(folder), **data), "flow").files


def names(folder) -> list[tuple[str, ...]]:
    root = f"{folder}/"
    return [tuple(path.removeprefix(root) for path in (*file.beside, file.path)) for file in found(folder)]


def test_flying_chairs_are_pairs_by_name(tmp_path) -> None:
    chairs(tmp_path / "data", 2)
    assert names(tmp_path / "data") == [(f"0000{i}_img1.ppm", f"0000{i}_img2.ppm", f"0000{i}_flow.flo") for i in (1, 2)]


def test_flying_chairs_list_says_what_is_for_validation(tmp_path) -> None:
    chairs(tmp_path / "data", 3)
    (tmp_path / "FlyingChairs_train_val.txt").write_text("1\n2\n1\n")
    assert [file.split for file in found(tmp_path)] == ["train", "train", "val"]
    (tmp_path / "FlyingChairs_train_val.txt").write_text("1\n2\n")
    with pytest.raises(UserError, match="2 lines for 3 pairs"):
        found(tmp_path)


def test_sintel_has_both_passes_with_one_flow_and_its_occlusions(tmp_path) -> None:
    sintel(tmp_path, frames=3)
    files = names(tmp_path)
    assert len(files) == 8 and {len(file) for file in files} == {4}
    place = "training/{}/alley_1/frame_000{}{}".format
    assert files[0] == (
        place("clean", 1, ".png"), place("clean", 2, ".png"), place("occlusions", 1, ".png"), place("flow", 1, ".flo")
    )  # fmt: skip
    assert {file.group for file in found(tmp_path)} == {"training/flow/alley_1", "training/flow/bamboo_2"}


def test_kitti_takes_all_that_is_known_and_each_pair_once(tmp_path) -> None:
    kitti(tmp_path, 2)
    assert names(tmp_path)[0] == tuple(
        f"training/{name}" for name in ("image_2/000000_10.png", "image_2/000000_11.png", "flow_occ/000000_10.png")
    )
    assert len(names(tmp_path)) == 2


def test_things_go_into_the_future_and_the_past(tmp_path) -> None:
    things(tmp_path)
    ends = {(first[-8:], second[-8:]) for first, second, _ in names(tmp_path)}
    assert ends == {("0006.png", "0007.png"), ("0007.png", "0006.png")} and len(names(tmp_path)) == 4


def test_any_folder_of_numbered_frames_will_do(tmp_path) -> None:
    made = pair(0)
    from tests.support.flow_files import write_image

    for number in (9, 10):
        write_image(tmp_path / f"shot{number:02d}.png", made["first"])
    write(tmp_path / "shot09.flo", write_flo(made["flow"]))
    assert names(tmp_path) == [("shot09.png", "shot10.png", "shot09.flo")]


def test_flow_without_frames_and_frames_without_flow_are_named(tmp_path) -> None:
    write(tmp_path / "a" / "frame_0001.flo", write_flo(FLOW))
    with pytest.raises(UserError, match="frames are missing, such as frame_0001.flo"):
        found(tmp_path / "a")
    chairs(tmp_path / "b", 1)
    (tmp_path / "b" / "00001_flow.flo").unlink()
    with pytest.raises(UserError, match="has no optical flow"):
        found(tmp_path / "b")


def test_frames_without_flow_are_paired_by_their_names() -> None:
    assert consecutive(["b_img2.png", "b_img1.png", "a-img1.png", "a-img0.png"]) == [
        ("a-img0.png", "a-img1.png"), ("b_img1.png", "b_img2.png")
    ]  # fmt: skip
    assert consecutive(["frame_0001.png", "frame_0002.png", "frame_0004.png", "frame_0003.png"]) == [
        ("frame_0001.png", "frame_0002.png"), ("frame_0002.png", "frame_0003.png"), ("frame_0003.png", "frame_0004.png")
    ]  # fmt: skip
