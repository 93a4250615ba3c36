"""Reading and spoiling the files under cluster/, for the tests that check them."""

import json
import re
from pathlib import Path

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent.parent
CLUSTER = ROOT / "cluster"
LAUNCHERS = ("aws.yaml", "gcp.yaml", "onprem.yaml")
MANIFESTS = sorted(path.name for path in (CLUSTER / "kuberay").glob("ray*.yaml"))
JOBS = [name for name in MANIFESTS if name.startswith("rayjob-")]


def launcher(name: str) -> dict:
    return yaml.safe_load((CLUSTER / name).read_text())


def manifest(name: str) -> dict:
    # By way of JSON: no object is then shared through a YAML anchor, and one can be spoilt alone.
    return json.loads(json.dumps(yaml.safe_load((CLUSTER / "kuberay" / name).read_text())))


def pins(text: str) -> dict[str, str]:
    """Package (normalised name) -> version of a requirements file.

    Raises:
        ValueError: a line that is not an exact pin.
    """
    versions = {}
    for line in (line for line in text.splitlines() if line and not line.startswith("#")):
        requirement = Requirement(line)
        exact = [s.version for s in requirement.specifier if s.operator == "==" and "*" not in s.version]
        if len(exact) != 1 or len(requirement.specifier) != 1:
            raise ValueError(f"{line} is not pinned")
        versions[normal(requirement.name)] = exact[0]
    return versions


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


REQUIREMENTS = (CLUSTER / "node" / "requirements.txt").read_text()
RAY = pins(REQUIREMENTS)["ray"]


def replaced(config: dict, old: str, new: str) -> dict:
    text = json.dumps(config)
    assert old in text, old
    return json.loads(text.replace(old, new))


def without(config: dict, *path: str) -> dict:
    config = json.loads(json.dumps(config))
    target = config
    for key in path[:-1]:
        target = target[key]
    del target[path[-1]]
    return config
