"""Tasks on whole sequences: every target is scored once and sees all before it; copies; images pixel by pixel."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from perceiver.config import DataConfig, Experiment, UserError
from perceiver.data.columns import fixed_column
from perceiver.data.manifest import Split
from perceiver.models import PerceiverARConfig, build_model
from perceiver.tasks import build_task
from perceiver.tasks.base import IGNORE_INDEX, dummy_split
from perceiver.tasks.copying import CopyingConfig, ShortSequences
from perceiver.tasks.image_generation import BEGIN, ImageGenerationConfig, side_by_side

SYMBOLS, LATENTS = 5, 8
AR = PerceiverARConfig(
    vocab_size=SYMBOLS + 1, max_seq_len=24, max_latents=LATENTS, num_channels=16, num_heads=2, num_self_attention_layers=1,
    cross_attention_dropout=0.0,
)  # fmt: skip
PIXELS = replace(AR, vocab_size=257)


def copying(**settings):
    return build_task(Experiment(task=CopyingConfig(**settings), model=AR, data=DataConfig()))


def images(**settings):
    return build_task(Experiment(task=ImageGenerationConfig(image_shape=(4, 6, 1), **settings), model=PIXELS, data=DataConfig()))


def rows(task, number):
    """Random rows of a task, and their split."""
    rng = np.random.default_rng(0)
    table = {"row": np.arange(number), "epoch": np.zeros(number, np.int64)}
    if task.config.kind == "images":
        values = rng.integers(0, 256, (number, 24), dtype=np.uint8)
        split = Split(
            name="val", kind="images", rows=number, tokens=0, bytes=0, words=0, documents=number, row_length=0, rows_per_block=number,
            blocks_per_shard=1, lookahead=0, shards=(), image_shape=(4, 6, 1),
        )  # fmt: skip
        return pa.table({"image": fixed_column(values), **table}), split
    values = rng.integers(0, SYMBOLS, (number, 12), dtype=np.uint8)
    return pa.table({"symbols": fixed_column(values), **table}), dummy_split(task.rows, number)


@pytest.mark.parametrize("make", [copying, images])
def test_validation_scores_every_target_once_with_all_that_is_before_it(make):
    task = make()
    table, split = rows(task, 3)
    batch = task.collate(table, 4, split, False, 0)
    whole = task.sequences(table, split)
    windows = len(batch["ids"]) // 4
    seen = []
    for i, (ids, labels) in enumerate(zip(batch["ids"].numpy(), batch["labels"].numpy(), strict=True)):
        padding = batch["pad_mask"][i].numpy() if "pad_mask" in batch else np.zeros(len(ids), bool)
        for j in np.flatnonzero(labels != IGNORE_INDEX):
            shown = ids[: len(ids) - LATENTS + j + 1]
            shown = shown[padding[: len(shown)].sum() :]
            sequence = whole[i // windows]
            assert np.array_equal(shown, sequence[: len(shown)]) and labels[j] == sequence[len(shown)]
            seen.append((i // windows, len(shown)))
    assert sorted(seen) == [(row, place) for row in range(3) for place in range(task.first_target, 25)]


@pytest.mark.parametrize("make", [copying, images])
def test_training_ends_sequences_where_each_target_is_scored_equally_often(make):
    task = make()
    table, split = rows(task, 3)
    whole, first = task.sequences(table, split), task.first_target
    counts, lengths = dict.fromkeys(range(first, 25), 0), []
    for step in range(600):
        batch = task.collate(table, 4, split, True, step)
        ids, labels = batch["ids"].numpy(), batch["labels"].numpy()
        padding = batch["pad_mask"][0].numpy().sum() if "pad_mask" in batch else 0
        lengths.append(ids.shape[1])
        assert np.array_equal(ids[:3, padding:], whole[:, : ids.shape[1] - padding])
        scored = np.flatnonzero(labels[0] != IGNORE_INDEX)
        for place, column in zip(scored + ids.shape[1] + 1 - LATENTS - padding, scored, strict=True):
            assert np.array_equal(labels[:3, column], whole[:, place]) and (labels[3] == IGNORE_INDEX).all()
            counts[place] += 1
    share = np.array(list(counts.values())) / 600
    assert share == pytest.approx(LATENTS / (24 + LATENTS - first), abs=0.07)
    assert task._mean_length == pytest.approx(np.mean(lengths), abs=1)  # a whole number


def test_a_copy_is_its_sequence_mirrored():
    task = copying()
    table, split = rows(task, 2)
    for sequence in task.sequences(table, split):
        assert sequence[0] == SYMBOLS and np.array_equal(sequence[1:13], sequence[:12:-1])


def test_accuracy_counts_the_right_targets_and_stands_beside_guessing_a_symbol():
    task = copying()
    table, split = rows(task, 4)
    batch = task.collate(table, 4, split, False, 0)
    model = build_model(AR, seed=0)
    with torch.no_grad():
        _, sums = task.loss(model, batch)
        logits = model(batch["ids"], 24 - LATENTS, batch["pad_mask"]) if "pad_mask" in batch else model(batch["ids"], 24 - LATENTS)
    expected = sum(
        int(logits[i, j].argmax() == label) for i, labels in enumerate(batch["labels"]) for j, label in enumerate(labels) if label >= 0
    )
    assert int(sums["right"]) == expected
    assert task.metrics({"loss": 1.0, "targets": 48, "right": sums["right"].numpy()}, split)["acc"] == expected / 48
    guess = task.guess(None, None)
    assert task.metrics(guess.sums, split) == pytest.approx({"loss": np.log(SYMBOLS), "acc": 1 / SYMBOLS})


def test_a_model_learns_to_look_back_over_its_whole_prefix():
    """Two symbols; the last targets stand up to 23 places behind what they copy."""
    torch.manual_seed(0)
    config = replace(AR, vocab_size=3, num_channels=64, num_heads=4)
    task = build_task(Experiment(task=CopyingConfig(val_windows=1), model=config, data=DataConfig()))
    model, rng = build_model(config, seed=0), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(300):
        values = rng.integers(0, 2, (32, 12), dtype=np.uint8)
        table = pa.table({"symbols": fixed_column(values), "row": np.arange(32), "epoch": np.zeros(32, np.int64)})
        batch = task.collate(table, 32, dummy_split(task.rows, 32), True, step)
        loss, _ = task.loss(model, batch)
        optimizer.zero_grad()
        (loss / task.num_targets(batch)).backward()
        optimizer.step()
    batch = task.collate(table, 32, dummy_split(task.rows, 32), False, 0)
    with torch.no_grad():
        _, sums = task.loss(model, batch)
    assert int(sums["right"]) / int(task.num_targets(batch)) > 0.95


def test_made_symbols_are_the_same_each_time_and_other_ones_in_each_part_and_split():
    source = ShortSequences()
    first = [[example["symbols"].tolist() for example in source.examples(split, part)] for split in source.splits for part in (0, 1)]
    again = [[example["symbols"].tolist() for example in source.examples(split, part)] for split in source.splits for part in (0, 1)]
    assert first == again and len({str(part[0]) for part in first}) == 4
    assert all(len(example) == ShortSequences.length for example in first[0]) and len(first[0]) == 1024


def test_drawn_images_are_completed_from_the_pixels_that_are_given():
    task = images(num_samples=2)
    model = build_model(PIXELS, seed=0).eval()
    given = torch.arange(10).repeat(2, 1)
    completed = task.complete(model, given)
    assert completed.shape == (2, 4, 6, 1) and completed.dtype == np.uint8
    assert np.array_equal(completed.reshape(2, -1)[:, :10], given.numpy())
    assert np.array_equal(completed, task.complete(model, given))
    (sample,) = task.samples(model, {}, None)
    assert sample.image is not None and sample.image.shape[2] == 3
    assert side_by_side(np.zeros((3, 8, 8, 3), np.uint8)).shape == (8 * 14 + 8, 3 * (8 * 14 + 8), 3)


def test_an_image_begins_with_an_id_that_is_no_level_and_bits_are_the_loss():
    task = images()
    table, split = rows(task, 2)
    assert task.sequences(table, split)[:, 0].tolist() == [BEGIN, BEGIN]
    assert task.metrics({"loss": np.log(2.0) * 6, "targets": 2}, split)["bits_per_dim"] == pytest.approx(3)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (copying, {"val_windows": 3}, r"task\.val-windows is 3 and must be from 1 to 2"),
        (images, {"val_windows": 0}, r"task\.val-windows is 0 and must be from 1 to 3"),
        (images, {"num_samples": -1}, r"task\.num-samples is -1"),
    ],
)
def test_settings_that_cannot_be_are_named(make, settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings).check()


def test_models_that_do_not_fit_are_named():
    for model, message in (
        (replace(AR, max_seq_len=25), r"model\.max-seq-len is 25 and must be even"),
        (replace(AR, vocab_size=300), r"model\.vocab-size is 300 and must be from 3 to 257"),
    ):
        with pytest.raises(UserError, match=message):
            build_task(Experiment(task=CopyingConfig(), model=model, data=DataConfig())).check()
    for model, message in (
        (replace(PIXELS, max_seq_len=25), r"model\.max-seq-len is 25, but images of task\.image-shape \(4, 6, 1\) have 24 tokens"),
        (replace(PIXELS, vocab_size=256), r"model\.vocab-size is 256 and must be at least 257"),
    ):
        with pytest.raises(UserError, match=message):
            build_task(Experiment(task=ImageGenerationConfig(image_shape=(4, 6, 1)), model=model, data=DataConfig())).check()
