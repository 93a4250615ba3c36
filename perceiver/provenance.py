"""Where a run came from: the command, the code with its uncommitted changes, versions of packages, the machine. Needs no PyTorch."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from perceiver.disk import whole_file, write_json
from perceiver.runs import Run

PACKAGE_FOLDER = Path(__file__).resolve().parent.parent
MAIN = ("torch", "ray", "numpy", "pyarrow", "safetensors", "timm", "tokenizers", "sentencepiece")
"""Packages whose versions are shown; all are on record."""
LONGEST_DIFF = 2**24
"""Bytes of uncommitted changes that are kept."""
PATIENCE = 20.0
"""Seconds that git may take."""


def record(run: Run, argv: Sequence[str], data: str, workers: int, device: str) -> None:
    """Writes it into a run's folder, once: what it was begun with counts.

    Args:
        argv: words of the command that began it.
        data: digest of its data.
        workers, device: how many there are, and what each computes on.
    """
    if run.provenance_file.exists():
        return
    code: dict[str, Any] = {}
    for name, folder in (("package", PACKAGE_FOLDER), ("folder", Path.cwd())):
        found = _git(folder)
        if found is None or any(found["root"] == other["root"] for other in code.values()):
            continue
        if diff := found.pop("diff"):
            with whole_file(run.diff_file(name)) as file:
                file.write(diff[:LONGEST_DIFF])
        code[name] = {**found, "changed": bool(diff)}
    content = {
        "command": list(argv),
        "folder": str(Path.cwd()),
        "code": code,
        "data": data,
        "workers": workers,
        "device": device,
        "machine": machine(),
        "packages": packages(),
    }
    write_json(run.provenance_file, content)


def machine() -> dict[str, Any]:
    """This machine, as far as results may depend on it."""
    return {"system": f"{platform.system()} {platform.machine()}", "processor": _processor(), "cores": os.cpu_count()}


def packages() -> dict[str, str]:
    """Versions of Python and of all installed packages."""
    found = {str(package.metadata["Name"]): package.version for package in metadata.distributions() if package.metadata["Name"]}
    return {"python": platform.python_version(), **dict(sorted(found.items(), key=lambda item: item[0].lower()))}


def commit_of(folder: Path) -> str | None:
    """The git commit that a folder is at; None: it is in no repository."""
    output = _run_git(folder, "rev-parse", "HEAD")
    return None if output is None else output.decode().strip()


def differences_here(content: Mapping[str, Any]) -> list[str]:
    """What is another here than a record says, of what results may depend on."""
    there, here = content.get("packages", {}), packages()
    found = [
        f"{name} {here.get(name, 'absent')} here, {there[name]} there" for name in ("python", *MAIN) if there.get(name) != here.get(name)
    ]
    machines = content.get("machine", {})
    found += [
        f"{name}: {value} here, {machines[name]} there" for name, value in machine().items() if name in machines and machines[name] != value
    ]
    for name, code in content.get("code", {}).items():
        folder = PACKAGE_FOLDER if name == "package" else Path(code["root"])
        commit = commit_of(folder)
        if commit is not None and commit != code["commit"]:
            found.append(f"code of the {name}: commit {commit[:12]} here, {code['commit'][:12]} there")
    return found


def between(runs: Sequence[Run]) -> dict[str, list[str]]:
    """In what the first run's record and those of the others differ, of code and main packages: by the name of each run that differs.

    Runs without a record (of versions before 0.2) are left out, and all are where the first one has none.
    """
    contents = [_content(run) for run in runs]
    if not runs or not contents[0]:
        return {}
    found = {}
    for run, content in zip(runs[1:], contents[1:], strict=True):
        if content and (lines := _differences(runs[0], contents[0], run, content)):
            found[run.name] = lines
    return found


def _content(run: Run) -> dict[str, Any]:
    try:
        content = json.loads(run.provenance_file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _differences(first: Run, one: Mapping[str, Any], run: Run, other: Mapping[str, Any]) -> list[str]:
    lines = []
    for name in ("package", "folder"):
        here, there = other.get("code", {}).get(name, {}), one.get("code", {}).get(name, {})
        if here.get("commit") != there.get("commit"):
            commits = [str(code.get("commit", "in no repository"))[:12] for code in (here, there)]
            lines.append(f"code of the {name} at commit {commits[0]}, not {commits[1]}")
        elif _bytes(run.diff_file(name)) != _bytes(first.diff_file(name)):
            lines.append(f"code of the {name} with other uncommitted changes ({run.diff_file(name)})")
    packages = [content.get("packages", {}) for content in (other, one)]
    lines += [
        f"{name} {packages[0].get(name, 'absent')}, not {packages[1].get(name, 'absent')}"
        for name in ("python", *MAIN)
        if packages[0].get(name) != packages[1].get(name)
    ]
    return lines


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _git(folder: Path) -> dict[str, Any] | None:
    root, commit = _run_git(folder, "rev-parse", "--show-toplevel"), commit_of(folder)
    if root is None or commit is None:
        return None
    new = _run_git(folder, "ls-files", "--others", "--exclude-standard") or b""
    diff = _run_git(folder, "diff", "HEAD", "--binary") or b""
    return {"root": root.decode().strip(), "commit": commit, "untracked": new.decode(errors="replace").splitlines()[:1000], "diff": diff}


def _run_git(folder: Path, *words: str) -> bytes | None:
    git = shutil.which("git")
    if git is None:
        return None
    try:
        done = subprocess.run([git, "-C", str(folder), *words], capture_output=True, timeout=PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or sys.platform
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
