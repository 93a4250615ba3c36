"""What all clusters share: pinned packages, image, uploaded code, node set-up, metrics, guide, and no secrets."""

import ast
import itertools
import json
import re
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from tests.support.cluster_files import CLUSTER, LAUNCHERS, RAY, REQUIREMENTS, ROOT, normal, pins

# ----------------------------------------------------------------------------------------- versions, image, environment


def version_problems(requirements: str, project: dict, containerfile: str) -> list[str]:
    versions, problems = pins(requirements), []
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["tune"], *extras["serve"]]
    for requirement in map(Requirement, wanted):
        version = versions.get(normal(requirement.name))
        if version is None or not requirement.specifier.contains(version):
            problems.append(f"pyproject wants {requirement}, pinned is {version}")
    base = re.search(r"^FROM docker\.io/rayproject/ray:([\d.]+)-py311", containerfile, re.M)
    if not base or base[1] != versions["ray"]:
        problems.append("the image's base is of another Ray")
    if f"-ray{versions['ray']} " not in containerfile:
        problems.append("the image's tag names another Ray")
    users = re.findall(r"^USER (\S+)", containerfile, re.M)
    if not users or not re.fullmatch(r"[1-9]\d*(:\d+)?", users[-1]):
        problems.append("the image runs as root")
    return problems


def version_inputs() -> tuple[str, dict, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return REQUIREMENTS, project, (CLUSTER / "Containerfile").read_text()


def test_versions_agree_with_the_project():
    assert version_problems(*version_inputs()) == []


def test_version_check_finds_what_disagrees():
    requirements, project, containerfile = version_inputs()
    other = requirements.replace(f"ray[data,default,serve,train,tune]=={RAY}", "ray[data,default,serve,train,tune]==2.9.0")
    assert any("pyproject wants ray" in problem for problem in version_problems(other, project, containerfile))
    assert "the image's base is of another Ray" in version_problems(other, project, containerfile)
    assert "the image runs as root" in version_problems(requirements, project, containerfile + "\nUSER root\n")
    with pytest.raises(ValueError, match="is not pinned"):
        pins("torch>=2.11")


def test_image_context_holds_all_that_the_image_copies():
    copied = re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", (CLUSTER / "Containerfile").read_text(), re.M)
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {source for sources in copied for source in sources.split()} == allowed


def test_runtime_environment_is_valid_and_pins_the_nodes_packages():
    from ray.runtime_env import RuntimeEnv

    environment = RuntimeEnv(**yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text()))
    assert environment["pip"]["packages"] == ["-r ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/cluster/node/requirements.txt"]


def test_submitted_working_directory_is_small_and_complete(tmp_path):
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    names = zipfile.ZipFile(package).namelist()
    for wanted in ("perceiver/presets/images.py", "ray_jobs/train.py", "cluster/node/requirements.txt"):
        assert wanted in names
    assert not [name for name in names if name.startswith(("tests/", "docs/", ".git/", "cluster/kuberay/"))]
    assert package.stat().st_size < 4 << 20


def test_node_setup_installs_once_and_protects_the_token(tmp_path):
    uv, log = tmp_path / ".local/bin/uv", tmp_path / "uv.log"
    uv.parent.mkdir(parents=True)
    uv.write_text(f'#!/bin/sh\necho "$@" >> {log}\nmkdir -p "$HOME/perceiver-env"\n')
    uv.chmod(0o755)
    token = tmp_path / ".ray/auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    for _ in range(2):
        (tmp_path / ".bashrc").touch()
        environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
        subprocess.run(["bash", CLUSTER / "node/setup.sh"], check=True, env=environment)
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["venv", "pip"]
    assert (tmp_path / ".bashrc").read_text().count("RAY_AUTH_MODE=token") == 1
    assert token.stat().st_mode & 0o077 == 0


# ---------------------------------------------------------------------------------------------- secrets, metrics, guide

SECRET = re.compile(r"AKIA[0-9A-Z]{16}|-----BEGIN|gh[pousr]_\w{20}|hf_\w{20}|(?i:token|password|secret)\w*\s*[=:]\s*['\"]?[0-9a-f]{24,}")


def test_no_file_holds_a_secret():
    for path in filter(Path.is_file, CLUSTER.rglob("*")):
        assert not SECRET.search(path.read_text()), path
    for manifest_file in (CLUSTER / "kuberay").glob("*.yaml"):
        assert all(document["kind"] != "Secret" for document in yaml.safe_load_all(manifest_file.read_text()))


@pytest.mark.parametrize("text", ["AKIA" + "A" * 16, "auth_token: " + "0f" * 16, "RAY_AUTH_TOKEN=" + "ab" * 32])
def test_secret_check_finds_secrets(text):
    assert SECRET.search(text)


PERCEIVER_METRICS = {
    f"ray_perceiver_{name}" for name in ("loss", "throughput", "mfu", "data_wait_share", "checkpoint_seconds", "goodput", "step")
}


def ray_metrics() -> set[str]:
    """Names of the gauges of Ray's node agent, read from its source."""
    import ray.dashboard.modules.reporter as reporter

    source = (Path(reporter.__file__).parent / "reporter_agent.py").read_text()
    assignments = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign)]
    (table,) = [node.value for node in assignments if ast.unparse(node.targets[0]) == "METRICS_GAUGES"]
    return {f"ray_{key.value}" for key in table.keys}


def test_grafana_queries_name_metrics_that_exist_and_show_all_of_ours():
    board = json.loads((CLUSTER / "grafana.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries.append(board["templating"]["list"][1]["query"]["query"])
    names = {name for query in queries for name in re.findall(r"\bray_\w+", query)}
    assert names - PERCEIVER_METRICS <= ray_metrics()
    assert names >= PERCEIVER_METRICS
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_grafana_panels_do_not_overlap():
    taken = set()
    for panel in json.loads((CLUSTER / "grafana.json").read_text())["panels"]:
        x, y, width, height = (panel["gridPos"][key] for key in "xywh")
        cells = set(itertools.product(range(x, x + width), range(y, y + height)))
        assert x + width <= 24 and not cells & taken
        taken |= cells


def test_prometheus_reads_rays_list_of_nodes():
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    (job,) = yaml.safe_load((CLUSTER / "prometheus.yml").read_text())["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]


def test_guide_names_all_files_and_blanks_and_opens_nothing(tmp_path):
    guide = (CLUSTER / "README.md").read_text()
    for path in CLUSTER.iterdir():
        if path.name != "README.md" and not path.name.startswith("my-"):
            assert path.name in guide, path.name
    for name in (*LAUNCHERS[:2], "aws-efa.yaml", "aws-head-policy.json"):
        for blank in set(re.findall(r"[\w-]*REPLACE_\w+", (CLUSTER / name).read_text())):
            assert blank in guide, blank
    for link in re.findall(r"\]\(([^)#]+)\)", guide):
        assert (CLUSTER / link).exists() or link.startswith("https://"), link
    blocks = re.findall(r"^```sh\n(.*?)^```", guide, re.M | re.S)
    for block in blocks:
        assert not re.search(r"0\.0\.0\.0|::/0", block)
        checked = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr
    assert len(blocks) > 8
