"""`python -m tests.support.structure [FOLDER]`: counts that say how a tree of this project hangs together (FOLDER: another one's root).

- files that need each other, also by imports inside functions, and imports that run against the arrows of docs/architecture.md
- lines of the largest files
- files that name a class of a task, input or output of another room
- calls that put a section into a copy of an experiment for a function that wants a whole one: those of files in `CHANGED` of
  tests/docs/test_architecture.py make one that is trained, saved or shown, and are left out
- places that build a task, and that look for prepared data
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("perceiver", "ray_jobs", "tuning")
ORDER = ("config", "models", "data", "costs", "generation", "tasks", "training", "inference", "ray_jobs", "tuning")
"""Rooms, each of which needs those before it alone."""
SECTIONS = {"preset", "task", "model", "data", "optim", "training", "parallel", "run", "callbacks"}


def parsed(root: Path) -> dict[str, ast.Module]:
    """Syntax trees of all files, by their modules."""
    files = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text()) for path in files}


def imports(node: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """What a file imports at run time, also inside functions (imports for type checkers alone are left out): modules, and names of them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, []) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            yield child.module, [alias.name for alias in child.names]
        yield from imports(child)


def needed(name: str, tree: ast.Module, modules: set[str]) -> set[str]:
    """Modules of the project that a file imports at run time."""
    found: set[str] = set()
    for module, names in imports(tree):
        found |= {f"{module}.{word}" for word in names} & modules or {module}
    return found & modules - {name}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of files that need each other."""
    reach: dict[str, set[str]] = {}
    for name in graph:
        seen, waiting = set[str](), [name]
        while waiting:
            for other in graph[waiting.pop()] - seen:
                seen.add(other)
                waiting.append(other)
        reach[name] = seen
    groups = {frozenset({name, *(other for other in reach[name] if name in reach[other])}) for name in graph if name in reach[name]}
    return [set(group) for group in groups]


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "perceiver" and len(parts) > 1 else parts[0]


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a room that comes later; `models` and `data` are not to need each other either."""
    place = {name: number for number, name in enumerate(ORDER)}
    found = []
    for name, others in graph.items():
        for other in others:
            here, there = room(name), room(other)
            if here in place and there in place and (place[here] < place[there] or (here, there) == ("data", "models")):
                found.append(f"{name} -> {other}")
    return found


def classes_outside(trees: dict[str, ast.Module]) -> list[str]:
    """Uses of classes of tasks, inputs and outputs outside of the rooms that may know them."""
    bases: dict[str, set[str]] = {}
    for name, tree in trees.items():
        if room(name) in ("tasks", "models", "config"):
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    bases[node.name] = {word.id for base in node.bases for word in ast.walk(base) if isinstance(word, ast.Name)}
    roots = {"TaskConfig", "Task", "InputConfig", "OutputConfig"}
    known = {name for name in bases if name.endswith(("Input", "Output"))}
    known |= {
        "CausalLMConfig",
        "MaskedLMConfig",
        "ImageClassificationConfig",
        "TextClassificationConfig",
        "SymbolicAudioConfig",
    } & bases.keys()
    while more := {name for name, given in bases.items() if given & (roots | known)} - known - roots:
        known |= more
    found = []
    for name, tree in trees.items():
        if room(name) in ("tasks", "models", "presets", "interop", "config"):
            continue
        own = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & known - own
        found += [f"{name}: {word}" for word in sorted(used)]
    return found


def calls(trees: dict[str, ast.Module]) -> Iterator[tuple[str, ast.Call]]:
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield name, node


def main(root: Path) -> None:
    from tests.docs.test_architecture import CHANGED

    trees = parsed(root)
    graph = {name: needed(name, tree, set(trees)) for name, tree in trees.items()}
    found = circles(graph)
    print(f"circles of files: {len(found)}", *(" ".join(sorted(group)) for group in found), sep="\n  ")
    up = upward(graph)
    print(f"imports against the arrows: {len(up)}", *up, sep="\n  ")
    lines = {path: len(path.read_text().splitlines()) for package in PACKAGES for path in (root / package).rglob("*.py")}
    largest = [f"{path.relative_to(root)} {count}" for path, count in sorted(lines.items(), key=lambda item: -item[1]) if count > 350]
    print(f"files above 350 lines: {len(largest)} of {len(lines)}", *largest, sep="\n  ")
    outside = classes_outside(trees)
    print(f"classes of tasks, inputs and outputs named by other rooms: {len(outside)}", *outside, sep="\n  ")
    kept = {path.removesuffix(".py").replace("/", ".") for path in CHANGED}
    made_up = [
        f"{name}:{call.lineno}"
        for name, call in calls(trees)
        if ast.unparse(call.func).rpartition(".")[2] == "replace"
        and {keyword.arg for keyword in call.keywords} & SECTIONS
        and name not in kept
        and room(name) not in ("presets", "config")
    ]
    print(f"experiments changed outside of those files: {len(made_up)}", *made_up, sep="\n  ")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path.cwd())
