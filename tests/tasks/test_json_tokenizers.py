"""A tokenizer.json from its file to a trained model that writes, fills masks, classifies, and is exported: in this process."""

from dataclasses import replace

import pytest
import torch

import perceiver
from perceiver.config import UserError
from perceiver.data.storage import list_folder
from perceiver.data.train_huggingface import train_huggingface
from perceiver.datasets import Dataset, with_prepared_tokenizer
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.training.batches import read_here
from perceiver.training.parallel import join_world
from perceiver.training.run import Training, save_experiment
from ray_jobs.preprocess import prepare
from tests.data.test_huggingface_tokenizer import TEXTS, config_of, gpt2_like
from tests.support.preparing import serially, write_jsonl
from tests.support.small import classification_experiment, masked_experiment, text_experiment

SIZE = 420


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Tokenizers of two kinds, and labelled texts."""
    folder = tmp_path_factory.mktemp("in")
    for kind in ("bpe", "wordpiece"):
        (folder / f"{kind}.json").write_bytes(train_huggingface(TEXTS, config_of(kind)))
    (folder / "texts").mkdir()
    rows = [{"text": text[:60], "label": i % 2} for i, text in enumerate(TEXTS)]
    write_jsonl(folder / "texts" / "train.jsonl", rows[:100])
    write_jsonl(folder / "texts" / "val.jsonl", rows[100:])
    return folder


def on(base, files, tmp_path, kind):
    data = replace(base.data, source=str(files / "texts"), root=str(tmp_path / "data"), tokenizer=str(files / f"{kind}.json"))
    model = base.model
    model = replace(model, vocab_size=SIZE) if hasattr(model, "vocab_size") else replace(model, input=replace(model.input, vocab_size=SIZE))
    run = replace(base.run, storage=str(tmp_path / "runs"), name="run", val_every=2, checkpoint_every=2)
    return replace(base, data=data, model=model, run=run, training=replace(base.training, max_steps=2))


def trained(experiment, monkeypatch, tmp_path):
    serially(monkeypatch)
    manifest = prepare(experiment)
    dataset = Dataset.find(experiment)
    assert "tokenizer.json" in list_folder(dataset.folder) and manifest.tokenizer["name"] == "tokenizers"
    experiment = with_prepared_tokenizer(dataset.measured(), dataset.folder, dataset.manifest)
    folder = tmp_path / "runs" / "run"
    training = Training(experiment, build_task(experiment), dataset.folder, manifest, join_world(torch.device("cpu")), folder, read_here)
    training.run()
    save_experiment(Run(folder), experiment, manifest, dataset.folder)
    assert (folder / "tokenizer.json").read_bytes() == open(experiment.data.tokenizer, "rb").read()
    return perceiver.load(str(folder), device="cpu")


def exported(model, tmp_path):
    folder = model.export(tmp_path / "out")
    assert (folder / "tokenizer.json").is_file()
    return perceiver.load(str(folder), device="cpu")


def test_a_language_model_writes_with_it(files, tmp_path, monkeypatch):
    model = trained(on(text_experiment(), files, tmp_path, "bpe"), monkeypatch, tmp_path)
    written = model.generate(TEXTS[0][:20], max_new_tokens=4, seed=1)
    assert model.tokenizer.decode(model.tokenizer.encode(TEXTS[0])) == TEXTS[0]
    assert exported(model, tmp_path).generate(TEXTS[0][:20], max_new_tokens=4, seed=1) == written


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_a_masked_model_fills_masks_with_it(files, tmp_path, monkeypatch, kind):
    base = masked_experiment()
    base = replace(base, task=replace(base.task, sample_texts=("a[ word] of it",)))
    model = trained(on(base, files, tmp_path, kind), monkeypatch, tmp_path)
    filled = model.fill_mask("this <mask> that", top_k=2)
    assert len(filled) == 2 and all("mask" not in fill.text for fill in filled)
    assert exported(model, tmp_path).fill_mask("this <mask> that", top_k=2) == filled


def test_a_classifier_reads_with_it_and_its_data_is_told_apart_by_content(files, tmp_path, monkeypatch):
    chosen = on(classification_experiment(), files, tmp_path, "wordpiece")
    model = trained(chosen, monkeypatch, tmp_path)
    again = exported(model, tmp_path)
    assert again.classify(TEXTS[:3]) == model.classify(TEXTS[:3])
    copy = tmp_path / "renamed.json"
    copy.write_bytes((files / "wordpiece.json").read_bytes())
    renamed = replace(chosen, data=replace(chosen.data, tokenizer=str(copy)))
    assert Dataset.find(renamed).folder == Dataset.find(chosen).folder
    other = replace(chosen, data=replace(chosen.data, tokenizer=str(files / "bpe.json")))
    with pytest.raises(UserError, match="is not prepared"):
        Dataset.find(other)
    copy.unlink()
    assert Dataset.find(renamed).experiment.data.tokenizer.endswith("/tokenizer.json"), "the copy beside the shards is enough"


def test_a_task_names_the_special_token_that_is_missing(files, tmp_path):
    from perceiver.data.huggingface_tokenizer import HuggingFaceTokenizer

    plain = gpt2_like({"bpe": HuggingFaceTokenizer((files / "bpe.json").read_bytes(), "bpe")})
    (tmp_path / "bpe.json").write_bytes(plain.model)
    chosen = on(masked_experiment(), files, tmp_path, "bpe")
    chosen = replace(chosen, data=replace(chosen.data, tokenizer=str(tmp_path / "bpe.json")))
    with pytest.raises(UserError, match=r"has no mask token \(<mask> or \[MASK\]\); its special tokens: <\|endoftext\|>"):
        build_task(chosen).check()
