"""Optical flow: what is trained on, what is measured, and how frames of any size get a flow."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from perceiver import presets
from perceiver.config import UserError, check_tree
from perceiver.data.flow_rows import FlowRows
from perceiver.data.make_flow import row_of_example
from perceiver.models import build_model
from perceiver.tasks import build_task
from perceiver.tasks.base import EACH, dummy_split
from perceiver.tasks.flow_augmentation import Augmentation, augmented, cut
from perceiver.tasks.flow_frames import corners, features, scale_flow, tile_weights, tiled_flow
from ray_jobs import preprocess
from tests.support.flow_files import chairs, kitti, pair, sintel
from tests.support.preparing import load_prepared, rows_of, serially

COUNT = 5


def experiment(**task):
    base = presets.PRESETS["optical-flow-small"]()
    input = replace(base.model.input, image_shape=(32, 48), num_patch_hidden_channels=8, num_frequency_bands=4)
    encoder = replace(base.model.encoder, num_self_attention_layers_per_block=1)
    model = replace(base.model, num_latents=8, num_latent_channels=16, input=input, encoder=encoder)
    return replace(base, task=replace(base.task, **task), model=model)


def stored(sizes=((32, 48),) * COUNT) -> pa.Table:
    return FlowRows().stack([row_of_example(pair(i, *size)) for i, size in enumerate(sizes)])


def rows(task, train=False, epoch=0, table=None):
    table = stored() if table is None else table
    found = task.examples(table, dummy_split(FlowRows(), table.num_rows), 0, epoch, train)
    number = pa.array(range(found.num_rows))
    return found.append_column("row", number).append_column("epoch", pa.array([epoch] * found.num_rows))


def sums_of(task, model, table, parts):
    total = {}
    for first, count, size in parts:
        batch = task.collate(table.slice(first, count), size, None, False, 0)
        with torch.no_grad():
            loss, sums = task.loss(model, batch)
        for key, value in {"loss": loss.double(), "targets": task.num_targets(batch), **sums}.items():
            if not key.startswith(EACH):
                total[key] = total.get(key, 0) + value.numpy()
    return total


# --------------------------------------------------------------------------------------------- frames and tiles, as published


def test_features_tiles_and_blending_are_those_of_the_published_model(shared) -> None:
    case = shared / "golden" / "optical_flow_processing"
    meta, tensors = json.loads(case.with_suffix(".json").read_text()), load_file(case.with_suffix(".safetensors"))
    images, size, overlap = tensors["images"], tuple(meta["patch_size"]), meta["patch_min_overlap"]
    seen = []

    def flows(tiles):
        seen.append(features(tiles))
        return tensors["patch_flow"] * meta["flow_scale_factor"]

    (flow,) = tiled_flow(flows, [images], size, overlap)
    torch.testing.assert_close(seen[0], tensors["expected.features"])
    torch.testing.assert_close(flow[None], tensors["expected.flow"], atol=1e-5, rtol=1e-5)


def test_tiles_cover_each_axis_and_overlap() -> None:
    for length, tile, overlap in ((436, 368, 20), (1024, 496, 20), (368, 368, 20), (8, 8, 3), (9, 8, 3)):
        starts = corners(length, tile, overlap)
        assert starts[0] == 0 and starts[-1] == length - tile and starts == sorted(set(starts))
        assert all(after - before <= tile - overlap for before, after in zip(starts, starts[1:], strict=False))
    assert tile_weights((3, 4))[..., 0].tolist() == [[1, 1, 1, 1], [1, 2, 2, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize("at_once", [None, 1, 2])
def test_a_flow_that_all_tiles_agree_on_is_that_of_the_frame(at_once) -> None:
    frames = [torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8) for size in ((20, 31), (8, 12), (5, 40))]
    found = tiled_flow(lambda tiles: tiles[:, 0, ..., :2].float() / 8, frames, (8, 12), 3, at_once)
    for flow, two in zip(found, frames, strict=True):
        torch.testing.assert_close(flow, two[0, ..., :2].float() / 8)


# ----------------------------------------------------------------------------------------------------------- augmentation


def test_augmentation_moves_the_flow_with_the_frames() -> None:
    """A flow that warps the second frame to the first does so after each change of shape."""
    made = pair(3, 96, 128)
    frames, flow = torch.from_numpy(np.stack([made["first"], made["second"]])), torch.from_numpy(made["flow"])
    how = Augmentation(scale=(-0.2, 0.5), stretch=0.3, mirror=0.5, mirror_vertical=0.5)
    plain = warp_error(frames, flow)
    for seed in range(6):
        drawn = np.random.default_rng(seed).random(32).tolist()
        changed, moved = augmented(frames, flow, (40, 56), how, drawn)
        assert changed.shape == (2, 40, 56, 3) and moved.shape == (40, 56, 2)
        assert warp_error(changed, moved) < plain + 4 < warp_error(changed, moved.flip(-1)), seed


def warp_error(frames, flow) -> float:
    height, width = flow.shape[:2]
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    grid = torch.stack([(x + flow[..., 0]) / width, (y + flow[..., 1]) / height], -1)[None] * 2 - 1
    images = frames.permute(0, 3, 1, 2).float()
    warped = torch.nn.functional.grid_sample(images[1:], grid, align_corners=False, padding_mode="border")
    return float((warped - images[:1]).abs().median())


def test_a_sparse_flow_stays_as_it_is_where_it_is_known() -> None:
    flow = torch.full((8, 10, 2), torch.nan)
    flow[::2, ::3] = 4.0
    frames = torch.zeros(2, 8, 10, 3, dtype=torch.uint8)
    _, moved = cut(frames, flow, (6, 6), Augmentation(scale=(1.0, 1.0)), [0.5] * 6)
    assert set(moved[~moved.isnan()].tolist()) == {8.0} and 0 < moved.isnan().float().mean() < 1
    small = scale_flow(flow, (4, 5))
    torch.testing.assert_close(small[~small.isnan()], torch.tensor(2.0).expand((~small.isnan()).sum()))
    assert not small.isnan().all()
    flow[:4] = torch.nan
    assert scale_flow(flow, (4, 5))[0].isnan().all(), "nothing near it is known"


def test_frames_smaller_than_the_model_are_enlarged() -> None:
    frames, flow = torch.zeros(2, 4, 6, 3, dtype=torch.uint8), torch.ones(4, 6, 2)
    _, moved = cut(frames, flow, (8, 6), Augmentation(), [0.5] * 6)
    assert moved.shape == (8, 6, 2) and moved[..., 1].unique().tolist() == [2.0] and moved[..., 0].unique().tolist() == [2.0]


def test_augmentation_is_a_function_of_seed_epoch_and_row() -> None:
    names = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "asymmetric": 0.5, "erase": 0.9, "stretch": 0.2}
    task = build_task(experiment(scale=(0.0, 0.5), **names))
    one, again, other = (rows(task, True, epoch)["frames"].to_pylist() for epoch in (1, 1, 2))
    assert one == again and all(a != b for a, b in zip(one, other, strict=True))


# ----------------------------------------------------------------------------------------------------- batches and measures


def test_metrics_are_the_same_however_rows_are_divided() -> None:
    sizes = ((32, 48), (40, 50), (20, 48), (33, 97), (32, 48))
    settings = experiment()
    task, model = build_task(settings), build_model(settings.model, seed=0).eval()
    table = rows(task, table=stored(sizes))
    whole = sums_of(task, model, table, [(0, 5, 5)])
    parts = sums_of(task, model, table, [(0, 2, 3), (2, 2, 2), (4, 1, 3), (0, 0, 2)])
    expected, got = (task.metrics(sums, None) for sums in (whole, parts))
    assert expected.keys() == got.keys() == task.metric_directions.keys()
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-5), name


def test_metrics_are_those_of_their_definitions() -> None:
    settings = experiment()
    task = build_task(settings)
    table = rows(task, table=stored(((32, 48), (32, 48))))
    truth = [np.frombuffer(flow, np.float32).reshape(32, 48, 2) for flow in table["flow"].to_pylist()]
    task.flows = lambda model, frames: torch.zeros(*frames.shape[:1], *frames.shape[2:4], 2)
    found = task.metrics(sums_of(task, torch.nn.Identity(), table, [(0, 2, 2)]), None)
    length = np.linalg.norm(np.stack(truth), axis=-1)
    hidden = np.stack([pair(i)["occluded"] for i in range(2)])
    assert found["epe"] == found["epe_zero"] == pytest.approx(length.mean(), rel=1e-5)
    assert found["loss"] == pytest.approx(length.mean(), rel=1e-5)
    assert found["fl_all"] == pytest.approx((length > 3).mean()) and found["within_1px"] == pytest.approx((length <= 1).mean())
    assert found["epe_occluded"] == pytest.approx(length[hidden].mean(), rel=1e-5)


def test_padding_and_unknown_flow_add_nothing() -> None:
    settings = experiment()
    task, model = build_task(settings), build_model(settings.model, seed=0)
    table = rows(task, train=True)
    batch, padded = (task.collate(table.slice(0, 2), size, None, True, 0) for size in (2, 4))
    assert task.num_targets(batch) == task.num_targets(padded) == 2 * 32 * 48
    torch.testing.assert_close(task.loss(model, batch)[0], task.loss(model, padded)[0])
    batch["flow"][:, :16] = torch.nan
    loss, _ = task.loss(model, batch)
    loss.backward()
    assert task.num_targets(batch) == 2 * 16 * 48 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_each_example_adds_what_it_adds_alone() -> None:
    settings = experiment()
    task, model = build_task(settings), build_model(settings.model, seed=0).eval()
    batch = task.collate(rows(task), 6, None, False, 0)
    with torch.no_grad():
        _, sums = task.loss(model, batch)
        said, alone = task.each(model, batch, sums), task.each(model, batch, {})
    for name in alone:
        torch.testing.assert_close(said[name].double(), alone[name].double(), rtol=1e-4, atol=1e-5)


def test_scaled_frames_are_measured_in_their_own_pixels() -> None:
    settings = experiment(fit="resize")
    task = build_task(settings)
    task.flows = lambda model, frames: torch.ones(*frames.shape[:1], *frames.shape[2:4], 2)
    (flow,) = task.whole_flows(torch.nn.Identity(), [torch.zeros(2, 64, 144, 3, dtype=torch.uint8)])
    assert flow.shape == (64, 144, 2) and flow[0, 0].tolist() == [3.0, 2.0]


@pytest.mark.parametrize(
    "settings, what",
    [
        ({"erase": 2.0}, "task.erase is 2.0"),
        ({"hue": 0.7}, "task.hue is 0.7 and must be from 0 to 0.5"),
        ({"fit": "resize", "stretch": 0.1}, "fit is resize"),
        ({"scale": (1.0, 0.0)}, "task.scale"),
        ({"patch_min_overlap": 32}, "task.patch-min-overlap is 32"),
    ],
)
def test_wrong_settings_are_named(settings: dict, what: str) -> None:
    with pytest.raises(UserError, match=what):
        wrong = experiment(**settings)
        check_tree(wrong)
        build_task(wrong).check()


def test_few_steps_learn_a_pair_that_is_seen_again_and_again() -> None:
    settings = experiment(mirror=0.0, mirror_vertical=0.0)
    task, model = build_task(settings), build_model(settings.model, seed=0)
    batch = task.collate(rows(task, True).slice(0, 1), 1, None, True, 0)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=5e-3), []
    for _ in range(60):
        loss = task.loss(model, batch)[0] / task.num_targets(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    sums = sums_of(task, model, rows(task).slice(0, 1), [(0, 1, 1)])
    (sample,) = task.samples(model, sums, None)
    assert sample.image.dtype == np.uint8 and sample.image.shape[2] == 3


# --------------------------------------------------------------------------------------------------------------- preparation


@pytest.mark.parametrize("layout", [chairs, sintel, kitti])
def test_prepared_pairs_are_those_of_the_files(layout, tmp_path, monkeypatch) -> None:
    serially(monkeypatch)
    layout(tmp_path / "frames", *(() if layout is sintel else (6,)))
    base = experiment()
    settings = replace(
        base, data=replace(base.data, source=str(tmp_path / "frames"), root=str(tmp_path / "data"), val_fraction=0.5, rows_per_block=2)
    )
    preprocess.prepare(settings)
    folder, manifest = load_prepared(settings)
    table = pa.concat_tables([rows_of(folder, manifest, split) for split in ("train", "val")])
    assert table.num_rows == (8 if layout is sintel else 6)
    truths = {pair(i)["flow"].tobytes() for i in (*range(8), 101, 102)}
    for row in table.to_pylist():
        flow = np.frombuffer(row["flow"], np.float32).reshape(*row["size"], 2)
        if layout is kitti:
            known = ~np.isnan(flow[..., 0])
            assert known.mean() == pytest.approx(1 / 3)
        else:
            assert row["flow"] in truths
        assert bool(row["occluded"]) == (layout is sintel)
    task = build_task(settings)
    for split in ("train", "val"):
        part = manifest.splits[split]
        found = rows(task, split == "train", table=rows_of(folder, manifest, split))
        assert found.num_rows == part.rows
        task.collate(found, part.rows, part, split == "train", 0)
    if layout is sintel:  # a scene in two passes is of one split
        flows = [set(rows_of(folder, manifest, split)["flow"].to_pylist()) for split in ("train", "val")]
        assert not flows[0] & flows[1]


def test_a_damaged_pair_is_named_or_counted(tmp_path, monkeypatch) -> None:
    serially(monkeypatch)
    chairs(tmp_path / "frames", 6)
    (tmp_path / "frames" / "FlyingChairs_train_val.txt").write_text("1\n1\n1\n1\n2\n2\n")
    (tmp_path / "frames" / "00002_flow.flo").write_bytes(b"PIEH")
    (tmp_path / "frames" / "00003_img2.ppm").write_bytes(b"P6\n2 2\n255\n" + bytes(12))
    base = experiment()
    data = replace(base.data, source=str(tmp_path / "frames"), root=str(tmp_path / "data"), val_fraction=0.5)
    with pytest.raises(UserError, match=r"00002_img1.ppm: its flow 00002_flow.flo cannot be read.*second frame has 2 x 2 pixels"):
        preprocess.prepare(replace(base, data=data))
    manifest = preprocess.prepare(replace(base, data=replace(data, on_error="skip")))
    assert manifest.stats["skipped"] == {"bad pair": 2}
    assert sum(split.rows for split in manifest.splits.values()) == 4
