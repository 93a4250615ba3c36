"""The packages and which may import which (docs/architecture.md), held by reading the imports."""

import ast
import re
from pathlib import Path

import pytest

from tests.support import structure

ROOT = Path(__file__).resolve().parent.parent.parent

# What a room may import of the project, besides itself.
ARROWS = {
    "perceiver.config": set(),
    "perceiver.catalog": {"perceiver.terminal"},
    "perceiver.terminal": {"perceiver.config"},
    "perceiver.version": set(),
    "perceiver.plots": set(),
    "perceiver.pages": set(),
    "perceiver.config_files": {"perceiver.config", "perceiver.disk"},
    "perceiver.disk": {"perceiver.config"},
    "perceiver.extensions": {"perceiver.config"},
    "perceiver.trust": {"perceiver.config", "perceiver.disk", "perceiver.extensions"},
    "perceiver.checkpoints": {"perceiver.config", "perceiver.disk"},
    "perceiver.run_files": {"perceiver.checkpoints", "perceiver.data"},
    "perceiver.runs": {
        "perceiver.checkpoints", "perceiver.config", "perceiver.disk", "perceiver.extensions", "perceiver.run_files", "perceiver.trust",
    },
    "perceiver.provenance": {"perceiver.disk", "perceiver.run_files", "perceiver.runs"},
    "perceiver.evaluations": {"perceiver.checkpoints", "perceiver.config", "perceiver.disk", "perceiver.runs"},
    "perceiver.comparison": {
        "perceiver.checkpoints", "perceiver.config", "perceiver.evaluations", "perceiver.runs", "perceiver.significance",
    },
    "perceiver.significance": set(),
    "perceiver.housekeeping": {"perceiver.checkpoints", "perceiver.config", "perceiver.disk", "perceiver.runs"},
    "perceiver.models": {"perceiver.config"},
    "perceiver.data": {"perceiver.config", "perceiver.disk", "perceiver.extensions", "perceiver.trust"},
    "perceiver.costs": {"perceiver.config", "perceiver.models"},
    "perceiver.generation": {"perceiver.config", "perceiver.models", "perceiver.data"},
    "perceiver.tasks": {
        "perceiver.config", "perceiver.costs", "perceiver.data", "perceiver.extensions", "perceiver.generation", "perceiver.models",
        "perceiver.plots",
    },
    "perceiver.presets": {
        "perceiver.catalog", "perceiver.config", "perceiver.costs", "perceiver.data", "perceiver.models", "perceiver.tasks",
    },
    "perceiver.experiments": {
        "perceiver.catalog", "perceiver.config", "perceiver.config_files", "perceiver.extensions", "perceiver.presets", "perceiver.runs",
        "perceiver.trust",
    },
    "perceiver.data_settings": {"perceiver.config", "perceiver.data"},
    "perceiver.prepared_folders": {"perceiver.config", "perceiver.data", "perceiver.data_settings"},
    "perceiver.datasets": {
        "perceiver.config", "perceiver.data", "perceiver.data_settings", "perceiver.experiments", "perceiver.prepared_folders",
    },
    "perceiver.interop": {"perceiver.config", "perceiver.models"},
    "perceiver.training": {
        "perceiver.checkpoints", "perceiver.config", "perceiver.costs", "perceiver.data", "perceiver.disk", "perceiver.extensions",
        "perceiver.models", "perceiver.interop", "perceiver.run_files", "perceiver.runs", "perceiver.tasks", "perceiver.terminal",
        "perceiver.trust", "perceiver.version",
    },
    "perceiver.inference": {
        "perceiver.config", "perceiver.models", "perceiver.data", "perceiver.data_settings", "perceiver.datasets", "perceiver.disk",
        "perceiver.generation",
        "perceiver.interop",
        "perceiver.runs", "perceiver.tasks", "perceiver.terminal", "perceiver.training",
    },
}  # fmt: skip


def room(module: str) -> str:
    return ".".join(module.split(".")[:2]) if module.startswith("perceiver.") else module.split(".")[0]


def imports(path: Path) -> set[str]:
    """Modules that a file imports at run time."""
    return {module for module, _ in structure.imports(ast.parse(path.read_text()))}


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", files("perceiver"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_library_knows_neither_ray_nor_the_jobs(path):
    assert not {m.split(".")[0] for m in imports(path)} & {"ray", "ray_jobs", "tuning", "transformers", "lightning"}


@pytest.mark.parametrize("path", files("perceiver"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    here = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    allowed = ARROWS.get(here)
    if allowed is None:
        pytest.skip("the package's own entrance")
    used = {room(m) for m in imports(path) if m.startswith("perceiver.")} - {here}
    assert used <= allowed


@pytest.mark.parametrize("path", files("ray_jobs"), ids=lambda p: str(p.relative_to(ROOT)))
def test_ray_tune_stays_in_its_room(path):
    assert not {m for m in imports(path) if m.startswith(("ray.tune", "tuning"))}


def test_a_task_is_known_in_its_own_file_alone():
    """Presets put experiments together; nobody else treats one task differently from another."""
    names = {}
    for path in files("perceiver/tasks"):
        for node in ast.walk(ast.parse(path.read_text())):
            shared = path.name in ("base.py", "next_token.py", "whole_sequences.py")
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config") and not shared:
                names[node.name] = path
    assert {"CausalLMConfig", "SymbolicAudioConfig", "MaskedLMConfig", "ImageClassificationConfig"} <= names.keys()
    for path in (p for package in ("perceiver", "ray_jobs", "tuning") for p in files(package) if p.parent != ROOT / "perceiver/presets"):
        words = set(re.findall(r"\w+", path.read_text()))
        assert not [name for name, own in names.items() if name in words and path != own], path


def test_no_other_module_spells_the_names_of_a_runs_files():
    """Who needs one asks the `Run`; so a name can change, and a run's folder means the same to everybody."""
    own = [ROOT / "perceiver/run_files.py", ROOT / "perceiver/checkpoints.py"]
    names = set()
    for path in own:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                names.add(node.value.value)
            elif (name := joined(node)) is not None:
                names.add(name)
    names -= {"runs", ".lock"}  # where runs are kept by default; a lock of other folders too
    assert {"experiment.json", "metrics.jsonl", "checkpoint.json", "log.txt", "checkpoints", "code", "step-*", "evaluations"} <= names
    for path in (p for package in ("perceiver", "ray_jobs", "tuning") for p in files(package) if p not in own):
        tree = ast.parse(path.read_text())
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        spelled = {name for name in names if "." in name and name in texts} | {joined(node) for node in ast.walk(tree)} & names
        assert not spelled and not [text for text in texts if text.startswith("step-")], path


def joined(node: ast.AST) -> str | None:
    """The name that is joined to a folder: folder / "name"."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant):
        return node.right.value if isinstance(node.right.value, str) else None
    return None


def test_there_is_one_optimizer_step():
    places = [p for package in ("perceiver", "ray_jobs", "tuning") for p in files(package) if "optimizer.step()" in p.read_text()]
    assert [p.relative_to(ROOT).as_posix() for p in places] == ["perceiver/training/loop.py"]


def test_no_two_files_need_each_other():
    """Also not inside functions: whoever reads a file needs only those that it stands on."""
    paths = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
        for package in ("perceiver", "ray_jobs", "tuning")
        for p in files(package)
    }
    graph = {name: {needed for needed in modules(path) if needed in paths and needed != name} for name, path in paths.items()}
    while leaves := [name for name, needed in graph.items() if not needed & graph.keys()]:
        for name in leaves:
            del graph[name]
    while roots := graph.keys() - {needed for name in graph for needed in graph[name]}:  # they only stand on such files
        for name in roots:
            del graph[name]
    assert not graph, f"these need each other: {sorted(graph)}"


def modules(path: Path) -> set[str]:
    """Modules that a file imports, also as names of their package."""
    found = set(imports(path))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = {name for name in names if (ROOT / f"{name.replace('.', '/')}.py").is_file()}
            found |= submodules
            if submodules == names:
                found.discard(node.module)
    return found


def test_the_table_of_rooms_names_every_file_and_no_other():
    rows = {}
    for line in (ROOT / "docs/architecture.md").read_text().splitlines():
        if line.startswith("| `"):
            rooms, what = line.strip("|").split(" | ", 1)
            rows |= dict.fromkeys(re.findall(r"`([^`]+)`", rooms), what)
    assert all((ROOT / place).exists() for place in rows), "a file that is not there"
    for package in ("perceiver", "ray_jobs", "tuning"):
        folders = {path.parent for path in files(package)}
        for folder in folders:
            room = f"{folder.relative_to(ROOT)}/"
            there = {path.name for path in folder.glob("*.py")} - {"__init__.py", "__main__.py"}
            if room == "perceiver/":
                assert {f"{room}{name}" for name in there} <= rows.keys()
            else:
                named = set(re.findall(r"`([a-z_0-9]+\.py)`", rows[room]))
                assert named == there, f"{room}: the table lacks {there - named} and has {named - there}"


def test_classes_of_tasks_inputs_and_outputs_are_known_in_their_own_rooms_alone():
    """What others want to know of one, a method of its base class says: so one of a user's own is asked as those of the package are."""
    classes = {}
    for room in ("tasks", "models"):
        for path in files(f"perceiver/{room}"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    classes[node.name] = {word.id for base in node.bases for word in ast.walk(base) if isinstance(word, ast.Name)}
    bases = {"TaskConfig", "Task", "InputConfig", "OutputConfig"}
    found: set[str] = set()
    while more := {name for name, given in classes.items() if given & (bases | found)} - found - bases:
        found |= more
    assert {"ImageClassification", "CausalLM", "TextInput", "ClassOutput", "MultimodalInput", "TableHeads"} <= found
    knowing = {"perceiver.tasks", "perceiver.models", "perceiver.presets", "perceiver.interop"}  # the last: as others' formats name them
    for path in (p for package in ("perceiver", "ray_jobs", "tuning") for p in files(package)):
        if room_of(path) in knowing:
            continue
        tree = ast.parse(path.read_text())
        own = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | {
            node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
        }
        assert not used & found - own, path


def test_only_rooms_that_know_a_models_formulas_or_its_cache_name_its_class():
    """All others ask `ModelConfig`: `text_limits`, `causal_limits`, `picture_shape`, `number_of_classes`."""
    knowing = {"perceiver.models", "perceiver.tasks", "perceiver.presets", "perceiver.interop", "perceiver.costs", "perceiver.generation"}
    for path in (p for package in ("perceiver", "ray_jobs", "tuning") for p in files(package)):
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert room_of(path) in knowing or not names & {"PerceiverIOConfig", "PerceiverARConfig", "PerceiverIO", "PerceiverAR"}, path


CHANGED = {
    "perceiver/datasets.py": "what a task measures of the data, and the copy of the tokenizer that is there, are its own",
    "perceiver/experiments.py": "the name and place that it was found by",
    "perceiver/tasks/audio_classification.py": "sizes and classes that its command line left open, from the data",
    "perceiver/tasks/classification.py": "the same",
    "perceiver/tasks/image_classification.py": "the same",
    "perceiver/tasks/photo_classification.py": "the same",
    "perceiver/tasks/table_heads.py": "the same",
    "perceiver/tasks/tables.py": "the same",
    "perceiver/training/fork.py": "the step that a fork begins from, the same for all workers",
    "perceiver/training/mean.py": "the new run whose weights are a mean",
    "ray_jobs/cli.py": "a fork's own beginning and name",
    "ray_jobs/recomputation.py": "the number that stands for auto",
    "ray_jobs/reproduce.py": "the new run's name",
    "ray_jobs/scale.py": "the training on other devices that is asked about",
    "ray_jobs/seeds.py": "the runs of other seeds",
    "ray_jobs/train.py": "callbacks as workers get them",
    "ray_jobs/train_checks.py": "the order that a run of an older version began with",
    "tuning/sweep.py": "the share of the cluster that a trial has",
    "tuning/trial.py": "the trial's own run",
}
"""Files that change an experiment, and into which other one: it is trained, saved or shown as such."""
SECTIONS = {"preset", "task", "model", "data", "optim", "training", "parallel", "run", "callbacks"}


def test_no_experiment_is_made_up_for_a_function_that_wants_one():
    """A function takes what it needs (its data, its workers), so that nobody has to put a value into a copy of an experiment for it."""
    changing = set()
    for path in (p for package in ("perceiver", "ray_jobs", "tuning") for p in files(package)):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func).rpartition(".")[2] in ("replace", "Experiment")
                and room_of(path) != ("perceiver.presets")
            ):
                if {keyword.arg for keyword in node.keywords} & SECTIONS:
                    changing.add(path.relative_to(ROOT).as_posix())
    assert changing == CHANGED.keys()


def room_of(path: Path) -> str:
    return room(".".join(path.relative_to(ROOT).with_suffix("").parts))


def test_messages_name_fields_as_they_are_typed():
    """No text of an error has data.val_source, whose option is --data.val-source."""
    field = re.compile(r"\b(data|task|run|training|optim|parallel|model|input|output|encoder|decoder)\.[a-z]+_[a-z_]+")
    wrong = []
    for path in [p for package in ("perceiver", "ray_jobs", "tuning") for p in files(package)]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("Error"):
                texts = [n for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
                wrong += [f"{path.name}:{n.lineno} {n.value}" for n in texts if field.search(n.value)]
    assert not wrong
