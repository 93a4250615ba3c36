"""Optical flow of new frames: in this process, by the command, and of many pairs."""

from pathlib import Path

import numpy as np
import pytest

from perceiver.config import UserError
from perceiver.data.flow_formats import read_flow
from perceiver.data.made_flow import MovingShapes
from perceiver.data.make_flow import as_png
from perceiver.inference import flow
from perceiver.inference.frames import FRAMES
from perceiver.inference.load import task_of
from perceiver.inference.parts import list_inputs, plan_parts, read_part
from perceiver.inference.predict import PredictOptions, predict_rows
from perceiver.inference.rows import rows_from_table, rows_to_table
from perceiver.inference.trained import TrainedModel
from perceiver.models import build_model
from tests.support.flow_files import chairs, pair, write_image
from tests.tasks.test_optical_flow import experiment


@pytest.fixture(scope="module")
def model() -> TrainedModel:
    settings = experiment()
    return TrainedModel(model=build_model(settings.model, seed=0).eval(), config=settings.model, task=settings.task)


def test_frames_of_any_size_get_a_flow(model: TrainedModel) -> None:
    made = pair(0, 40, 100)
    whole = model.flow((made["first"], made["second"]))
    assert whole.shape == (40, 100, 2) and whole.dtype == np.float32 and np.isfinite(whole).all()
    (again,) = model.flow([(as_png(made["first"]), as_png(made["second"]))], batch_size=1)
    np.testing.assert_allclose(again, whole, atol=1e-5)


def test_frames_that_are_no_pair_are_refused(model: TrainedModel) -> None:
    one, other = pair(0)["first"], pair(0, 40, 48)["first"]
    with pytest.raises(UserError, match="48 x 32 and 48 x 40 pixels"):
        model.flow((one, other))
    with pytest.raises(UserError, match="two images"):
        model.flow([(one,)])
    with pytest.raises(UserError, match="cannot classify: its task is OpticalFlow, which can flow"):
        model.classify(one)


def test_published_weights_are_used_as_published(model: TrainedModel) -> None:
    found = task_of(model.config)
    assert (found.flow_scale, found.patch_min_overlap, found.fit) == (20.0, 20, "crop")


def test_many_pairs_are_rows_of_a_table(model: TrainedModel, tmp_path: Path) -> None:
    chairs(tmp_path, 3)
    (tmp_path / "00002_img2.ppm").write_bytes(b"nothing")
    parts = plan_parts(list_inputs([str(tmp_path)], "frames"), 2, "", None, FRAMES)
    assert [part.rows for part in parts] == [2, 1]
    rows = [row for part in parts for row in read_part(part, "frames", "", None, FRAMES)]
    rows = rows_from_table(rows_to_table(rows, FRAMES), "frames", FRAMES)
    table = predict_rows(model, rows, PredictOptions(mode="flow", batch_size=2))
    assert table["id"].to_pylist() == [f"0000{i}_img1.ppm" for i in (1, 2, 3)]
    assert table["error"].is_null().to_pylist() == [True, False, True]
    made = pair(1)
    expected = model.flow((made["first"], made["second"]))
    assert (table["height"][0].as_py(), table["width"][0].as_py()) == (32, 48)
    np.testing.assert_allclose(np.array(table["flow"][0].as_py()).reshape(32, 48, 2), expected, atol=1e-5)


def test_frames_that_do_not_follow_each_other_are_named(tmp_path: Path) -> None:
    write_image(tmp_path / "cat.png", pair(0)["first"])
    with pytest.raises(UserError, match="no two frames that follow each other, only cat.png"):
        plan_parts(list_inputs([str(tmp_path)], "frames"), 2, "", None, FRAMES)


def test_the_command_writes_a_file_and_a_picture_for_each_frame_but_the_last(model, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("perceiver.load", lambda *args, **options: model)
    for i, made in enumerate([pair(0)["first"], pair(0)["second"], pair(1)["first"]]):
        write_image(tmp_path / f"{i}.png", made)
    frames = [str(tmp_path / f"{i}.png") for i in range(3)]
    assert flow.main(["run", *frames, "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.flo", "0.png", "1.flo", "1.png"]
    np.testing.assert_array_equal(read_flow((tmp_path / "out" / "1.flo").read_bytes()), model.flow((frames[1], frames[2])))
    assert flow.main(["run", frames[0], "--out", str(tmp_path / "out")]) == 2
    assert flow.main(["run", frames[0], "missing.png", "--out", str(tmp_path / "out")]) == 2
    assert "there is no image file missing.png" in capsys.readouterr().err


def test_made_pairs_are_the_same_each_time_and_differ_between_splits() -> None:
    source = MovingShapes(train=16, val=8)
    assert sum(len(list(source.examples("train", part))) for part in range(source.parts("train"))) == 16
    one, again, other = (next(iter(source.examples(split, 0)))["flow"] for split in ("train", "train", "val"))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
