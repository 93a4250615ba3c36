"""The files for people who join the project: that they agree with each other and with the program."""

import json
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import perceiver
from perceiver.config import to_dict
from perceiver.presets import PRESETS
from perceiver.runs import Run
from perceiver.training.run import save_experiment
from ray_jobs.main import COMMANDS
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_changelog_and_citation_are_of_the_version_in_the_making():
    version = PROJECT["project"]["version"].partition(".dev")[0]
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert first and first.group(1) == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version


@pytest.mark.parametrize("package", ["perceiver", "ray_jobs", "tuning"])
def test_types_are_shipped_with_each_package(package):
    assert (ROOT / package / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["*"]


def test_hooks_and_workflow_run_what_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["id"] for hook in hooks] == ["ruff-format", "ruff-check", "mypy"]
    lint, tests = ci.index("ruff format --check"), ci.index("python -m pytest -n 2")
    assert lint < ci.index("\nruff check") < ci.index("\nmypy\n") < ci.index("sphinx-build -W") < tests
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["jobs"]["ci"]["steps"][-1] == {"run": ".ci/run"}
    assert "pytest -m slow" in ci and "pytest -m long" in ci
    nightly = yaml.safe_load((ROOT / ".github" / "workflows" / "nightly.yml").read_text())
    assert nightly["jobs"]["long"]["steps"][-1] == {"run": ".ci/run long"}
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert {"name", "description", "body"} <= yaml.safe_load(form.read_text()).keys()


def test_types_are_checked_in_every_file():
    mypy = PROJECT["tool"]["mypy"]
    assert mypy["files"] == ["perceiver", "ray_jobs", "tuning"] and "exclude" not in mypy
    assert not any("ignore_errors" in part for part in [mypy, *mypy["overrides"]])


def test_every_page_is_in_the_index_and_every_link_of_the_documentation_leads_somewhere():
    docs = ROOT / "docs"
    trees = re.findall(r"```\{toctree\}(.*?)```", (docs / "index.md").read_text(), flags=re.S)
    listed = re.findall(r"^([a-z-]+)$", "\n".join(trees), flags=re.M)
    assert sorted(listed) == sorted(page.stem for page in docs.glob("*.md") if page.stem != "index")
    for page in [*docs.glob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_commands_in_the_documentation_are_commands():
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "README.md"]:
        for name in re.findall(r"^perceiver ([a-z-]+)", page.read_text(), flags=re.M):
            assert name in COMMANDS, f"{page.name}: perceiver {name}"


def test_a_run_records_the_version_and_its_length(tmp_path: Path):
    experiment = PRESETS["quickstart"]()
    manifest = SimpleNamespace(digest="abc", tokenizer=None, splits={"train": SimpleNamespace(rows=100)})
    save_experiment(Run(tmp_path), experiment, manifest, "")
    assert json.loads((tmp_path / "experiment.json").read_text()) == {
        "experiment": json.loads(json.dumps(to_dict(experiment))),
        "data": "abc",
        "steps": 12 * 2,  # epochs of 100 rows in batches of 64
        "flops_per_example": 14_101_568.0,
        "version": perceiver.__version__,
    }
