"""docs/python.md and the notebooks tell the truth: their code is run as it stands."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import perceiver
from perceiver.datasets import Dataset
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.training.batches import read_here
from perceiver.training.parallel import join_world
from perceiver.training.run import Training, save_experiment
from ray_jobs.preprocess import prepare
from tests.conftest import ROOT
from tests.support.jobs import Job
from tests.support.preparing import serially

TEXT = (ROOT / "docs/python.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


def train_here(experiment) -> Run:
    """What `perceiver.train` does, on one worker that is this process."""
    prepare(experiment)
    dataset = Dataset.find(experiment)
    run = Run(Path(experiment.run.storage_path) / experiment.run_name)
    save_experiment(run, dataset.experiment, dataset.manifest, dataset.folder)
    task, world = build_task(dataset.experiment), join_world(torch.device("cpu"))
    Training(dataset.experiment, task, dataset.folder, dataset.manifest, world, run.folder, read_here).run()
    return run


def test_the_page_runs_word_for_word(tmp_path, monkeypatch, capsys):
    """Its training in this process; on Ray it is run by the slow test below."""
    monkeypatch.setenv("PERCEIVER_HOME", str(tmp_path))
    serially(monkeypatch)
    monkeypatch.setattr(perceiver, "train", train_here)
    names: dict = {"__name__": "page"}
    for block in BLOCKS:
        exec(compile(block, "docs/python.md", "exec"), names)
    said = capsys.readouterr().out
    assert "optim.lr is -1.0 and must be above 0" in said
    assert re.search(r"^<first step 20: ImageClassification by PerceiverIO, [\d,]+ parameters, float32 on cpu>$", said, flags=re.M)
    assert "takes a tensor of shape (B, 28, 28, 1), not (2, 1, 28, 28)" in said
    assert names["run"].result()["val_acc"] == names["model"].evaluate()["val_acc"]
    config = names["model"].config
    assert names["maps"].shape == (2, config.encoder.num_cross_attention_heads, config.num_latents, config.input.num_positions())
    assert names["latents"].shape == (8, 16, 64) and all(p.grad is not None for p in names["encoder"].parameters())
    assert sum(names["losses"][-10:]) < sum(names["losses"][:10])


def test_the_package_imports_neither_pytorch_nor_ray(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, perceiver\nperceiver.train, perceiver.load\nassert not {'torch', 'ray', 'ray_jobs'} & sys.modules.keys()\n"
    )
    Job(str(script), home=tmp_path, PYTHONPATH=str(ROOT)).finish(60)


def test_notebooks_are_small_and_without_outputs():
    assert len(NOTEBOOKS) == 2
    for path in NOTEBOOKS:
        assert path.name in TEXT and path.stat().st_size < 10_000
        for cell in json.loads(path.read_text())["cells"]:
            assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.slow
def test_the_page_runs_on_ray(tmp_path):
    script = tmp_path / "page.py"
    code = "".join(BLOCKS[:4])
    script.write_text("if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in code.splitlines()))
    assert "<first step 20" in Job(str(script), home=tmp_path, PYTHONPATH=str(ROOT)).finish(200)


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="notebooks are run by nbclient (extra test)")
    nbformat, _ = pytest.importorskip("nbformat"), pytest.importorskip("ipykernel")
    monkeypatch.setenv("PERCEIVER_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{':'.join(p for p in sys.path if p)}")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # as all jobs of the tests
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    pictures = [out for cell in notebook.cells for out in cell.get("outputs", ()) if "image/png" in out.get("data", {})]
    assert pictures
