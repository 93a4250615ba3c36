"""The page on one's own data tells the truth: its commands are what `perceiver data` offers, and are run on data of each form."""

import re
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from perceiver.inference.parts import list_inputs
from ray_jobs.cli import parse_experiment
from ray_jobs.data import look
from tests.conftest import ROOT
from tests.support.jobs import Job
from tests.support.own_data import FORMS

TEXT = (ROOT / "docs" / "own-data.md").read_text()
BLOCKS = [[shlex.split(line) for line in block.splitlines()] for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.S)]
SHORT = {"tables": ["--training.max-epochs", "4"], "txt-clf": ["--training.max-epochs", "2"]}
"""What is added to a preset's training here; to the others STEPS."""
STEPS = ["--training.max-steps", "20"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("own")
    for make in FORMS.values():
        make(made)
    return made


def test_every_form_has_a_block_of_three_commands() -> None:
    assert len(BLOCKS) == len(FORMS)
    for block in BLOCKS:
        assert [words[:2] for words in block] == [["perceiver", command] for command in ("data", "train", "predict")]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block[0][2])
def test_data_offers_the_training_of_the_page_and_the_new_data_are_there(block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (_, _, source), (_, _, *train), (_, _, run, _, new, *_) = block
    offered = [shlex.split(line.partition(": ")[2])[2:] for line in look(source) if ": perceiver train " in line]
    assert (train[: train.index("--run.name")] if "--run.name" in train else train) in offered
    experiment = parse_experiment(train, "x")
    assert run == experiment.run.name or run == experiment.preset
    assert list_inputs([new])


@pytest.mark.long
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block[0][2])
def test_the_commands_run_from_nothing_to_predictions(block, folder: Path, tmp_path: Path) -> None:
    _, train, predict = (words[2:] for words in block)
    Job("ray_jobs.main", "train", *train, *SHORT.get(train[0], STEPS), home=tmp_path, folder=folder, PYTHONPATH=str(ROOT)).finish(600)
    Job("ray_jobs.main", "predict", *predict, *(["--max-new-tokens", "8"] if train[0] in ("clm-wikitext-small", "sam-small") else []),
        home=tmp_path, folder=folder, PYTHONPATH=str(ROOT)).finish(400)  # fmt: skip
    output = folder / predict[predict.index("--output") + 1]
    if output.suffix == ".parquet" or output.is_dir():
        assert pq.read_table(output)["error"].null_count == pq.read_table(output).num_rows > 0
    else:
        assert len(output.read_text().splitlines()) > 1
