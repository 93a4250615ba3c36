"""Masked language modelling and text classification: batches, losses, metrics, samples."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from perceiver.config import ParallelConfig, UserError
from perceiver.data.shards import read_block
from perceiver.data.text import IGNORE, mask_words
from perceiver.data.tokenizers import CLS, MASK, SEP, SentencePieceTokenizer, load_tokenizer
from perceiver.data.train_tokenizer import train_sentencepiece
from perceiver.generation.masks import encode_masked
from perceiver.models import build_model
from perceiver.tasks import build_task
from perceiver.tasks.masked_lm import gather_labels, usual_positions, with_masks
from perceiver.tasks.text_classification import TextClassificationConfig
from perceiver.training.batches import read_here
from tests.data.test_train_tokenizer import CONFIG as SMALL_TOKENIZER
from tests.data.test_train_tokenizer import documents as random_texts
from tests.support import small
from tests.support.small import classification_experiment, masked_experiment, text_experiment, write_documents, write_stream
from tests.training.test_training import losses, run

BYTES = load_tokenizer("bytes")


def text_ids(num: int, seed: int) -> np.ndarray:
    """Ids of random words."""
    rng = np.random.default_rng(seed)
    letters = rng.integers(97, 123, num)
    letters[rng.random(num) < 0.2] = 32
    return (letters + 6).astype(np.uint16)


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    return folder, write_stream(folder, text_ids(2001, 0), text_ids(600, 1), length=32)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    return folder, write_documents(folder)


def batches(experiment, data, split="train", rank=0, world=1, start=0, stop=None):
    folder, manifest = data
    loader = small.loader_of(experiment, build_task(experiment), str(folder), manifest.splits[split], train=split == "train")
    return [batch for step in loader.steps(read_here, rank, world, start, stop or loader.order.steps_per_epoch) for batch in step]


# --------------------------------------------------------------------------------------------------- masked language model


def labels_by_text(found: list[dict]) -> dict[bytes, list[tuple[int, int]]]:
    """Labelled positions and labels of each window, by its original ids."""
    result = {}
    for batch in found:
        for ids, positions, labels in zip(*(batch[k].numpy().copy() for k in ("ids", "positions", "labels")), strict=True):
            real = labels != IGNORE
            ids[positions[real]] = labels[real]
            result[ids.tobytes()] = list(zip(positions[real].tolist(), labels[real].tolist(), strict=True))
    return result


def test_masks_of_a_window_do_not_depend_on_batches_or_workers(stream):
    whole = labels_by_text(batches(masked_experiment(), stream))
    halves = [b for rank in range(2) for b in batches(masked_experiment(global_batch_size=4), stream, rank=rank, world=2)]
    parts = labels_by_text(halves)
    assert {k: v for k, v in whole.items() if v} == {k: v for k, v in parts.items() if v}
    assert sum(map(len, whole.values())) > 100


def test_dynamic_masks_change_with_the_epoch_and_static_ones_do_not(stream):
    for static in (False, True):
        experiment = masked_experiment()
        experiment = replace(experiment, task=replace(experiment.task, static=static))
        steps = len(batches(experiment, stream))
        first, second = batches(experiment, stream), batches(experiment, stream, start=steps, stop=2 * steps)
        assert (labels_by_text(first) == labels_by_text(second)) is static


def test_validation_masks_are_the_same_for_every_run(stream):
    one, two = (labels_by_text(batches(masked_experiment(seed=seed), stream, "val")) for seed in (0, 1))
    assert one == two and sum(map(len, one.values())) > 30


def test_trainings_with_other_shares_of_masked_words_can_be_validated_on_the_same_masks(stream):
    plain = masked_experiment()
    more = replace(plain, task=replace(plain.task, mask_probability=0.6, val_mask_probability=plain.task.mask_probability))
    assert labels_by_text(batches(more, stream, "val")) == labels_by_text(batches(plain, stream, "val"))
    masked, usual = (sum(map(len, labels_by_text(batches(e, stream, stop=2)).values())) for e in (more, plain))
    assert masked > 2 * usual


@pytest.mark.parametrize("probability", [0.15, 0.9])
def test_the_loss_over_decoded_positions_is_that_over_all_positions(stream, probability):
    """Also where rows have more labels than usual: every label counts."""
    experiment = masked_experiment()
    experiment = replace(experiment, task=replace(experiment.task, mask_probability=probability))
    task, model = build_task(experiment), build_model(experiment.model)
    for batch in batches(experiment, stream):
        labels = torch.full_like(batch["ids"], IGNORE)
        for row, positions, targets in zip(labels, batch["positions"], batch["labels"], strict=True):
            row[positions[targets != IGNORE]] = targets[targets != IGNORE]
        logits = model(batch["ids"], batch.get("pad_mask"))
        expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss, _ = task.loss(model, batch)
        torch.testing.assert_close(loss, expected)
        assert task.num_targets(batch) == (labels != IGNORE).sum()


def test_gathered_labels_are_all_labels():
    rng = np.random.default_rng(0)
    labels = np.where(rng.random((50, 64)) < 0.3, rng.integers(0, 9, (50, 64)), IGNORE)
    least, step = usual_positions(64, 0.15)
    positions, targets = gather_labels(labels, least, step)
    assert positions.shape[1] > least and (positions.shape[1] - least) % step == 0
    again = np.full_like(labels, IGNORE)
    rows = np.nonzero(targets != IGNORE)[0]
    again[rows, positions[targets != IGNORE]] = targets[targets != IGNORE]
    assert np.array_equal(again, labels)
    assert gather_labels(labels[:0], least, step)[0].shape == (0, least)


def test_batches_of_a_long_text_have_one_shape():
    """512 of 2,048 positions are decoded, whatever is masked."""
    ids = text_ids(2048 * 200, 2).reshape(200, 2048)
    _, labels = mask_words(ids, BYTES.words, mask_id=MASK, probability=0.15, seed=0, epoch=0, rows=np.arange(200))
    positions, _ = gather_labels(labels, *usual_positions(2048, 0.15))
    assert positions.shape == (200, 512)


def test_the_end_of_a_text_is_padding_without_labels(stream):
    folder, manifest = stream
    split = manifest.splits["val"]
    real = split.tokens % 32
    found = [b for b in batches(masked_experiment(global_batch_size=1), stream, "val") if "pad_mask" in b]
    assert len(found) == 1
    assert found[0]["pad_mask"][0].tolist() == [False] * real + [True] * (32 - real)
    assert found[0]["positions"].max() < real


def test_an_untrained_model_is_as_good_as_chance_and_a_perfect_one_exact(stream):
    experiment = masked_experiment()
    task, split = build_task(experiment), stream[1].splits["val"]
    sums = {"loss": np.float64(np.log(2) * 40), "targets": np.float64(10), "correct": np.float64(5)}
    metrics = task.metrics(sums, replace(split, tokens=102, bytes=100, documents=1))
    assert metrics == pytest.approx({"loss": np.log(2) * 4, "bits_per_byte": 4.0, "acc": 0.5})


def test_brackets_mask_all_tokens_of_what_they_hold():
    assert with_masks("a [bcd] e [MASK]", BYTES) == "a [MASK][MASK][MASK] e [MASK]"


def test_masked_pieces_stand_where_they_stood_in_the_whole_text():
    """A SentencePiece model puts a blank before what it encodes: parts between masks must not get one each."""
    texts = ["the film was good, the end was not. A film it was!\n" * 40, "it was a good film. the end" * 40] + random_texts(300)
    tokenizer = SentencePieceTokenizer(train_sentencepiece(texts, SMALL_TOKENIZER), "x")
    text = "the[ film] was good,[ the] end[ was not]. A film"
    masked = encode_masked(tokenizer, with_masks(text, tokenizer), 64)[1:-1]
    whole = tokenizer.encode(text.replace("[", "").replace("]", ""))
    assert len(masked) == len(whole)
    kept = masked != tokenizer.mask_id
    assert (masked[kept] == whole[kept]).all()
    assert tokenizer.decode(whole[~kept]) == "film the was not"
    opening = encode_masked(tokenizer, with_masks("[the] film", tokenizer), 64)[1:-1]
    assert opening[-1] == tokenizer.encode("the film")[-1] and len(opening) == len(tokenizer.encode("the film"))


def test_samples_fill_the_masks_and_change_nothing_else(stream):
    experiment = masked_experiment()
    experiment = replace(experiment, task=replace(experiment.task, sample_texts=("ab [cd] e",), sample_predictions=2))
    task, model = build_task(experiment), build_model(experiment.model)
    model.train()
    (sample,) = task.samples(model, {}, stream[1].splits["val"])
    assert model.training
    title, first, second = sample.text.splitlines()
    assert title == "ab [cd] e" and first.startswith("1. ab ") and first.endswith(" e") and first[3:] != second[3:]


def test_a_model_with_little_room_for_a_prefix_continues_a_longer_prompt(stream):
    experiment = text_experiment()
    experiment = replace(
        experiment, model=replace(experiment.model, max_latents=15), task=replace(experiment.task, sample_prompt="abcd", sample_tokens=3)
    )
    (sample,) = build_task(experiment).samples(build_model(experiment.model), {}, stream[1].splits["val"])
    assert sample.name == "continuation" and sample.text


def test_masked_training_is_the_same_for_one_and_two_workers(stream, tmp_path):
    folder, _ = stream
    run(masked_experiment(), folder, tmp_path / "one")
    run(masked_experiment(), folder, tmp_path / "two", world=2)
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-5)


def test_settings_that_cannot_be_are_refused():
    experiment = masked_experiment()
    wrong = replace(experiment, model=classification_experiment().model)
    with pytest.raises(UserError, match="TextOutput"):
        build_task(wrong).check()
    wrong = replace(experiment, task=replace(experiment.task, mask_probability=1.5))
    with pytest.raises(UserError, match="mask-probability is 1.5"):
        build_task(wrong).check()
    wrong = replace(experiment, task=replace(experiment.task, sample_texts=("nothing to fill in",)))
    with pytest.raises(UserError, match="has no mask"):
        build_task(wrong).check()


@pytest.mark.parametrize(("prompt", "length"), [("", 0), ("a prompt that is too long", 25)])
def test_a_sample_prompt_that_cannot_be_continued_is_refused_before_anything_starts(prompt, length):
    experiment = text_experiment()
    task = replace(experiment.task, sample_prompt=prompt, sample_tokens=3)
    with pytest.raises(UserError, match=f"--task.sample-prompt has {length} tokens and must have 1 to 16"):
        build_task(replace(experiment, task=task)).check()
    build_task(replace(experiment, task=replace(task, sample_tokens=0))).check()


# ---------------------------------------------------------------------------------------------------- text classification


def stored(data, split="train") -> list[tuple[tuple[int, ...], int]]:
    folder, manifest = data
    tables = [read_block(folder, manifest.splits[split], b) for b in range(manifest.splits[split].num_blocks)]
    table = pa.concat_tables(tables)
    return [(tuple(t), label) for t, label in zip(table["tokens"].to_pylist(), table["label"].to_pylist(), strict=True)]


def unpadded(found: list[dict]) -> list[tuple[tuple[int, ...], int]]:
    result = []
    for batch in found:
        pad_mask = batch.get("pad_mask", torch.zeros_like(batch["ids"], dtype=torch.bool))
        for ids, mask, label in zip(batch["ids"], pad_mask, batch["labels"].tolist(), strict=True):
            if label != IGNORE:
                real = ids[~mask].tolist()
                assert real[0] == CLS and real[-1] == SEP and not ids[mask].any()
                result.append((tuple(real[1:-1]), label))
    return result


@pytest.mark.parametrize("world, micro", [(1, None), (2, None), (2, 2)])
def test_every_document_comes_once_between_cls_and_sep(documents, world, micro):
    experiment = replace(classification_experiment(), parallel=ParallelConfig(micro_batch_size=micro))
    found = [b for rank in range(world) for b in batches(experiment, documents, rank=rank, world=world)]
    assert sorted(unpadded(found)) == sorted(stored(documents))


def test_batches_are_padded_to_their_longest(documents):
    for batch in batches(classification_experiment(), documents):
        if "pad_mask" in batch:
            assert not batch["pad_mask"].all(0).any()


def test_grouping_by_length_pads_less_and_keeps_the_batches(documents):
    sizes = {}
    for grouped in (True, False):
        experiment = replace(
            classification_experiment(global_batch_size=12),
            task=TextClassificationConfig(group_by_length=grouped),
            parallel=ParallelConfig(micro_batch_size=3),
        )
        found = batches(experiment, documents)
        sizes[grouped] = sum(batch["ids"].numel() for batch in found)
        steps = [sorted(unpadded(found[i : i + 4])) for i in range(0, len(found), 4)]
        sizes[grouped, "steps"] = steps
    assert sizes[True, "steps"] == sizes[False, "steps"]
    assert sizes[True] < 0.85 * sizes[False]


def test_grouping_and_workers_do_not_change_the_training(documents, tmp_path):
    folder, _ = documents
    experiment = classification_experiment(global_batch_size=12)
    plain = replace(experiment, task=TextClassificationConfig(group_by_length=False))
    run(plain, folder, tmp_path / "plain")
    run(replace(experiment, parallel=ParallelConfig(micro_batch_size=2)), folder, tmp_path / "grouped", world=2)
    np.testing.assert_allclose(losses(tmp_path / "plain"), losses(tmp_path / "grouped"), rtol=1e-5)


def test_padding_does_not_change_the_logits(documents):
    experiment = classification_experiment()
    task, model = build_task(experiment), build_model(experiment.model).eval()
    one_by_one = {}
    for batch in batches(replace(experiment, training=replace(experiment.training, global_batch_size=1)), documents):
        one_by_one[unpadded([batch])[0][0]] = task.logits(model, batch)[0]
    for batch in batches(experiment, documents):
        for (ids, _), logits in zip(unpadded([batch]), task.logits(model, batch), strict=False):
            torch.testing.assert_close(logits, one_by_one[ids])


def test_a_classifier_learns_and_shows_its_confusions(documents, tmp_path):
    folder, _ = documents
    experiment = classification_experiment(max_steps=300)
    experiment = replace(experiment, run=replace(experiment.run, val_every=300, checkpoint_every=300))
    run(experiment, folder, tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["val_acc"] > 0.8
    assert list((tmp_path / "run" / "samples").glob("confusion-*.png"))


def test_class_names_must_fit_the_model():
    experiment = replace(classification_experiment(), task=TextClassificationConfig(class_names=("a", "b", "c")))
    with pytest.raises(UserError, match="3 names but model.output.num-classes is 2"):
        build_task(experiment).check()


def test_golden_word_ids_are_the_words_that_are_masked_together(shared):
    """The reference's own windows: its words, but that ours do not reach from one document into the next."""
    cases = json.loads((shared / "golden" / "text_pipeline.json").read_text())
    for record in cases["pipeline"]["mlm_add_special_tokens"]["train"]:
        ids = np.array(record["input_ids"])[None]
        words = np.array([-1 if w is None else w for w in record["word_ids"]])
        for seed in range(30):
            _, labels = mask_words(ids, BYTES.words, mask_id=MASK, probability=0.5, seed=seed, epoch=0, rows=np.zeros(1, int))
            chosen = labels[0] != IGNORE
            assert not chosen[words == -1].any()
            borders = np.flatnonzero(np.diff(words)) + 1
            assert all(len(set(part.tolist())) == 1 for part in np.split(chosen, borders))
