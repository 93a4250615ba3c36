"""The README tells the truth: its commands and its Python are run as they stand, its table is that of the presets."""

import re
import shlex
import subprocess
import sys

import pytest

from perceiver.presets import PRESETS
from tests.conftest import ROOT
from tests.support.jobs import Job

TEXT = (ROOT / "README.md").read_text()

SHORT = ["--training.max-epochs", "1", "--run.val-batches", "2"]

# How each command is run here: what is added to make it short or independent of the network; None: where else it is run.
COMMANDS = {
    "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/python -m ray_jobs.train quickstart": [],
    "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest -n auto": None,  # .ci/run
    "perceiver preprocess img-clf-mnist": ["--data.source", "mnist-mini"],
    "perceiver train img-clf-mnist": ["--data.source", "mnist-mini", "--training.max-steps", "2"],
    "perceiver evaluate img-clf-mnist": [],
    "perceiver runs": [],
    "perceiver plan clm-c4 --device h200": [],
    "perceiver train quickstart --name wider --model.num-latents 32 --optim.lr 2e-3 --workers 2": SHORT,
    "perceiver train docs/examples/weather.py:tiny": None,  # tests/docs/test_outside_ray.py
    "perceiver evaluate tiny": None,  # tests/docs/test_outside_ray.py
    "perceiver sweep quickstart --trials 8": ["--trials", "2", "--reports", "3", "--training.max-steps", "30"],
    "ray job submit --address http://127.0.0.1:8265 --working-dir . -- python -m ray_jobs.train clm-wikitext --workers 8": None,
}  # The last one is run by tests/ray_jobs/test_submitted_job.py, on a cluster that it starts.


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.S)


def commands() -> list[str]:
    return [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]


def test_every_command_is_known_to_this_test():
    assert commands() == list(COMMANDS)


def test_the_table_is_that_of_the_presets():
    from perceiver.costs.flops import num_parameters

    rows = dict(re.findall(r"^\| `([\w-]+)` \|.*\| ([\d,]+) \|$", TEXT, flags=re.M))
    assert rows == {name: f"{num_parameters(preset().model):,}" for name, preset in PRESETS.items() if name in rows}
    assert {"quickstart", "img-clf-mnist", "clm-wikitext", "mlm-imdb", "clm-c4"} <= rows.keys() <= PRESETS.keys()


def test_the_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_presets_command_prints_the_table():
    result = subprocess.run([sys.executable, "-m", "perceiver.presets"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(number in result.stdout for number in ("907,212", "30,563,078", "201,108,230", "453,950,720"))


@pytest.mark.slow
def test_the_commands_run(tmp_path):
    for command, more in COMMANDS.items():
        if more is None:
            continue
        program, *words = shlex.split(command.rpartition("&& ")[2])
        module, *words = ["ray_jobs.main", *words] if program == "perceiver" else words[words.index("-m") + 1 :]
        job = Job(module, *words, *more, home=tmp_path)
        output = job.finish(400)
        if command.endswith("train quickstart"):
            accuracy = float(re.search(r"^  val_acc +([\d.]+) +\(always", output, re.MULTILINE).group(1))
            assert accuracy > 0.6, "chance is 0.1"
            for path in re.findall(r"(?:run folder|pictures|--logdir)[:\s]+(\S+?),?\s", output):
                assert (tmp_path / path).exists(), path


@pytest.mark.long
def test_the_python_runs(tmp_path):
    (code,) = blocks("python")
    script = tmp_path / "readme.py"
    # Ray's processes import the main module's file: its statements must not run there again.
    script.write_text("if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in code.splitlines()))
    job = Job(str(script), home=tmp_path, PYTHONPATH=str(ROOT))
    accuracies = re.findall(r"(?:^|mine )(0\.\d+)$", job.finish(400), flags=re.M)
    assert len(accuracies) == 2 and min(map(float, accuracies)) > 0.3, "chance is 0.1"
