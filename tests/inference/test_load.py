"""Trained models by name, what they can do, and what they refuse."""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import perceiver
from perceiver.config import UserError
from perceiver.models import build_model
from perceiver.runs import Run
from tests.support.small import text_experiment, write_stream
from tests.support.trained import experiment, same_weights, write_run

TASKS = ("causal", "masked", "sentiment", "images")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each task by name, in a folder that $PERCEIVER_HOME may point to."""
    home = tmp_path_factory.mktemp("home")
    return {task: write_run(home / "runs" / task, task, {1: 3.0, 2: 1.0, 3: 2.0}) for task in TASKS}


@pytest.fixture(scope="module")
def models(runs):
    return {task: perceiver.load(folder, device="cpu") for task, folder in runs.items()}


def test_importing_the_package_takes_no_pytorch():
    code = "import sys, perceiver; assert 'torch' not in sys.modules and callable(perceiver.load)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("which, seed", [("best", 2), ("last", 3), ("1", 1), ("step-00000002", 2)])
def test_the_checkpoint_asked_for_is_loaded(runs, which, seed):
    loaded = perceiver.load(runs["causal"], which, device="cpu")
    assert same_weights(loaded.model, build_model(experiment("causal").model, seed=seed))
    assert loaded.provenance["step"] == seed


def test_a_run_is_found_by_name(runs, monkeypatch):
    monkeypatch.setenv("PERCEIVER_HOME", str(runs["masked"].parent.parent))
    assert perceiver.load("masked", device="cpu").abilities == ("fill_mask", "embed")


def test_a_trained_run_gives_the_weights_of_its_end(tmp_path):
    from perceiver.training.run import save_experiment
    from tests.training.test_training import run

    rng = np.random.default_rng(0)
    manifest = write_stream(tmp_path / "data", *(rng.integers(6, 262, n).astype(np.uint16) for n in (800, 200)))
    save_experiment(Run(tmp_path / "run"), text_experiment(max_steps=3), manifest, "")
    weights = run(text_experiment(max_steps=3), tmp_path / "data", tmp_path / "run")
    loaded = perceiver.load(tmp_path / "run", "last", device="cpu")
    assert loaded.provenance["step"] == 3
    for name, parameter in loaded.model.named_parameters():
        np.testing.assert_array_equal(parameter.numpy(), weights[name])


def test_what_is_not_there_is_one_sentence(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("PERCEIVER_HOME", str(tmp_path))
    with pytest.raises(UserError, match="no model 'nothing'"):
        perceiver.load("nothing")
    with pytest.raises(UserError, match="steps 1, 2, 3"):
        perceiver.load(runs["causal"], "17")
    with pytest.raises(UserError, match="precision is 'fp8'"):
        perceiver.load(runs["causal"], precision="fp8")
    with pytest.raises(UserError, match="device is 'warp'"):
        perceiver.load(runs["causal"], device="warp")
    with pytest.raises(UserError, match="no model 'nobody/nothing' here or on the hub|hub cannot be reached"):
        perceiver.load("nobody/nothing")


@pytest.mark.parametrize(
    "task, wrong, input",
    [
        ("causal", "fill_mask", "a <mask>"),
        ("causal", "classify", "a"),
        ("masked", "generate", "a"),
        ("masked", "score", "a"),
        ("sentiment", "fill_mask", "a"),
        ("images", "generate", "a"),
    ],
)
def test_a_model_says_what_it_can_do_instead(models, task, wrong, input):
    with pytest.raises(UserError, match=f"cannot {wrong}: its task is .* which can .*embed"):
        getattr(models[task], wrong)(input)


# ----------------------------------------------------------------------------------------------- batched equals single


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_classes_and_embeddings_do_not_depend_on_the_batch(models, batch_size):
    texts = ["short", "a good deal longer than that", "x" * 100, "ü"]
    sentiment = models["sentiment"]
    single = [sentiment.classify(text) for text in texts]
    batched = sentiment.classify(texts, batch_size=batch_size)
    assert [c.label for c in batched] == [c.label for c in single]
    for one, other in zip(batched, single, strict=True):
        np.testing.assert_allclose(one.probabilities, other.probabilities, rtol=1e-5)
    for task in ("sentiment", "masked", "causal"):
        for pool in (True, False):
            for one, text in zip(models[task].embed(texts, pool=pool, batch_size=batch_size), texts, strict=True):
                np.testing.assert_allclose(one, models[task].embed(text, pool=pool), rtol=1e-4, atol=1e-5)


def test_texts_are_cut_as_in_training_with_both_marks(models):
    from perceiver.inference.measure import document_rows

    sentiment = models["sentiment"]
    (row,) = document_rows(sentiment.tokenizer, ["y" * 100], 32)
    assert len(row) == 32 and row[0] == sentiment.tokenizer.cls_id and row[-1] == sentiment.tokenizer.sep_id
    assert sentiment.classify("y" * 100) == sentiment.classify("y" * 30)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_are_sums_over_every_token_whatever_the_batch(models, batch_size):
    """Against a loop that asks for one token at a time, with all before it that fits."""
    causal = models["causal"]
    texts = ["a", "some bytes", "a text that is much longer than the sixteen tokens of the window"]
    config = causal.config
    for text, result in zip(texts, causal.score(texts, batch_size=batch_size), strict=True):
        ids = torch.tensor([causal.tokenizer.eos_id, *causal.tokenizer.encode(text).tolist()])
        total = 0.0
        for target in range(1, len(ids)):
            # The window that scores it ends at the next multiple of max_latents (or at the end).
            end = min(-(-target // config.max_latents) * config.max_latents, len(ids) - 1)
            window = ids[max(0, end - config.max_seq_len) : end]
            logits = causal.model(window[None], len(window) - min(config.max_latents, len(window)))
            total -= float(logits[0, target - end - 1].log_softmax(-1)[ids[target]])
        assert result.tokens == len(text.encode())
        assert result.loss == pytest.approx(total / result.tokens, rel=1e-5)
        assert result.bits_per_byte == pytest.approx(total / np.log(2) / len(text.encode()), rel=1e-5)


def test_masks_are_filled_with_the_likeliest_tokens_best_first(models):
    masked = models["masked"]
    texts = ["a <mask>b", "no<mask>[MASK] and <mask>"]
    for top_k in (1, 5):
        results = masked.fill_mask(texts, top_k=top_k)
        for text, fills in zip(texts, results, strict=True):
            alone = masked.fill_mask(text, top_k=top_k)
            np.testing.assert_allclose([f.probability for f in fills], [f.probability for f in alone], rtol=1e-4)
            assert fills[0].text == alone[0].text
            assert len(fills) == top_k
            assert [f.probability for f in fills] == sorted((f.probability for f in fills), reverse=True)
    assert [len(f.filled) for f in masked.fill_mask(texts[1], top_k=3)] == [2, 2, 2]


def test_fills_are_the_best_combinations_of_all(models):
    """Against all pairs of the likeliest tokens of two masks."""
    masked = models["masked"]
    tokenizer = masked.tokenizer
    ids = torch.tensor([[tokenizer.cls_id, tokenizer.mask_id, *tokenizer.encode("xy").tolist(), tokenizer.mask_id, tokenizer.sep_id]])
    log_probs = masked.model(ids).log_softmax(-1)[0, [1, 4]].double()
    log_probs[:, :6] = -torch.inf
    pairs = (log_probs[0][:, None] + log_probs[1]).flatten().topk(40).values.exp()
    fills = masked.fill_mask("<mask>xy<mask>", top_k=40)
    np.testing.assert_allclose([f.probability for f in fills], pairs.numpy(), rtol=1e-4)


def test_the_most_fills_of_many_masks_take_a_moment(models):
    started = time.monotonic()
    fills = models["masked"].fill_mask("<mask>" * 20, top_k=10_000)
    probabilities = [fill.probability for fill in fills]
    assert len(fills) == 10_000 and probabilities == sorted(probabilities, reverse=True)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "text, top_k, message",
    [
        ("no mask", 1, "has no mask"),
        ("<mask>" * 40, 1, "at most 32"),
        ("<mask>", 0, "at least 1"),
        ("<mask>" * 30, 10**9, "at most 10,000"),
        (3, 1, "must be text"),
    ],
)
def test_masks_that_cannot_be_filled_are_refused(models, text, top_k, message):
    with pytest.raises(UserError, match=message):
        models["masked"].fill_mask(text, top_k=top_k)


# --------------------------------------------------------------------------------------------------------------- images


def test_an_image_is_the_same_as_array_file_bytes_and_picture(models, tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (6, 6), np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "x.png")
    images = [
        pixels,
        pixels[..., None],
        torch.from_numpy(pixels),
        picture,
        tmp_path / "x.png",
        str(tmp_path / "x.png"),
        (tmp_path / "x.png").read_bytes(),
    ]
    first, *others = models["images"].classify(images)
    assert all(other == first for other in others)
    assert models["images"].classify(np.stack([pixels[..., None]] * 2)) == [first, first]
    assert first.label in ("0", "1", "2") and sum(first.probabilities) == pytest.approx(1)


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((5, 6), np.uint8), "5 x 6 pixels with 1 channels and must be 6 x 6 with 1"),
        (np.zeros((6, 6)), "must be uint8"),
        ("nowhere.png", "no image file nowhere.png"),
        (b"no image", "no image that can be read"),
        (7, "must be a path, bytes"),
    ],
)
def test_what_is_no_image_of_the_model_is_refused(models, image, message):
    with pytest.raises(UserError, match=message):
        models["images"].classify(image)


def test_colour_is_turned_grey_for_a_grey_model(models):
    grey = np.random.default_rng(0).integers(0, 256, (6, 6, 1), np.uint8)
    assert models["images"].classify(np.repeat(grey, 3, -1)) == models["images"].classify(grey)
