"""Experiments by name: presets, functions of yours, saved ones; and the command-line words that make an experiment again."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from perceiver.catalog import CATALOG
from perceiver.config import Config, Experiment, UserError, check_tree, flatten, nearest, spelled, to_dict
from perceiver.config.checks import check_values
from perceiver.config.core import is_builtin
from perceiver.config.values import words
from perceiver.config_files import PRESET, YAML, ExperimentFile, read_experiment_file
from perceiver.extensions import call, code_of, code_of_file, installed_experiments, is_reference, load_object, load_point
from perceiver.runs import Run
from perceiver.trust import check_trust, trust

FILES = (".json", *YAML)
"""Kinds of files that experiments are saved in."""


def find_experiment(name: str, trust_code: bool = False) -> Experiment:
    """The experiment of a name.

    Tried in this order:

    - a preset, or a name under which an installed package registers a function (entry points "perceiver.experiments"),
    - package.module:function or path/file.py:function, which returns an `Experiment` (or is one),
    - a saved experiment: a run's folder, a .json or a .yaml file.

    Args:
        trust_code: a saved run may bring code that was never run from this account.

    Raises:
        UserError: there is none of that name; names the nearest.
    """
    check_name(name)
    if name in CATALOG:
        # Here and not above: they are made of all models and tasks.
        from perceiver.presets import PRESETS

        return PRESETS[name]()
    installed = installed_experiments()
    if name in installed or is_reference(name):
        found = load_point(installed[name]) if name in installed else load_object(name, "experiment")
        experiment = _made(name, call(name, found, "experiment"))
        trust(code_of(experiment))
        return experiment
    path = Path(name).expanduser()
    run = Run(path)
    if run.exists:
        experiment, _ = run.load(trust_code)
        _check_sources(experiment, path, trust_code)
        return replace(experiment, run=replace(experiment.run, name=path.absolute().name, storage=_storage(experiment, path)))
    return _read_file(path)


def changed_experiment(name: str, fields: Mapping[str, Any]) -> Experiment:
    """The experiment of a name with some fields changed, as a command line names them: {"optim.lr": 1e-3}.

    Raises:
        UserError: there is no such experiment or field (names the nearest), or a value does not fit.
    """
    base, changes = find_experiment(name), dict[str, Any]()
    for field, value in fields.items():
        *place, last = field.replace("-", "_").split(".")
        node = changes
        for step in place:
            node = node.setdefault(step, {})
        node[last] = to_dict(value) if isinstance(value, Config) else list(value) if isinstance(value, tuple) else value
    changed = ExperimentFile(Path(name), changes, {}).experiment(base)
    check_tree(changed)
    return changed


def check_name(name: str) -> None:
    """Refuses what can be no experiment's name, before anything heavy is loaded.

    Raises:
        UserError: names the nearest.
    """
    if not name.strip():
        raise UserError("the experiment is empty: give a preset, FILE.py:FUNCTION or a run (is a variable of the shell not set?)")
    path, installed = Path(name).expanduser(), installed_experiments()
    if name in CATALOG or name in installed or is_reference(name) or Run(path).exists or path.suffix in FILES:
        return
    if path.suffix == ".py":
        raise UserError(f"experiment {name!r}: name a function of that file that returns an Experiment: {name}:FUNCTION")
    known = [*CATALOG, *installed]
    raise UserError(
        f"experiment {name!r} does not exist{nearest(name, known)}; presets are {', '.join(known)}; yours can be FILE.py:FUNCTION, "
        "MODULE:FUNCTION, a run's folder, a .json or a .yaml file"
    )


def _made(name: str, found: Any) -> Experiment:
    if not isinstance(found, Experiment):
        kind = "None" if found is None else f"a {type(found).__name__}"
        raise UserError(f"experiment {name!r} is {kind} and must be an Experiment or a function that returns one")
    check_values(found)
    return replace(found, preset=name)


def _check_sources(experiment: Experiment, path: Path, trusted: bool) -> None:
    """Refuses files of code that somebody else's run names as its data sources.

    Raises:
        UserError: this user never ran them.
    """
    data = experiment.data
    for source in (data.source, data.val_source or "", *(entry.rpartition("=")[0] for entry in data.mixture)):
        file = Path(source.rpartition(":")[0]).expanduser()
        if is_reference(source) and file.suffix == ".py" and file.is_file():
            check_trust(code_of_file(file), f"{path} (data source {source})", file.parent, trusted)


def _storage(experiment: Experiment, folder: Path) -> str:
    """Where a run whose folder was named is kept: where that lies, or the object store that it is a copy of."""
    return experiment.run.storage if "://" in experiment.run.storage else str(folder.absolute().parent)


# ------------------------------------------------------------------------------------------------------ saved experiments


def _read_file(path: Path) -> Experiment:
    """The experiment of a .json or .yaml file: a whole one, or "preset" and what differs from it."""
    file = read_experiment_file(path)
    _check_ends(file)
    base = None if file.base is None else _base(file, file.base)
    experiment = file.experiment(base)
    name = experiment.run.name or ("" if base is not None and file.says_nothing_more else path.stem)
    return replace(experiment, preset=str(path), run=replace(experiment.run, name=name))


def _check_ends(file: ExperimentFile) -> None:
    """Raises UserError where a file starts from itself, maybe by way of others."""
    place = f"{file.path}{'' if (line := file.line((PRESET,))) is None else f', line {line}'}"
    seen, here = {file.path.expanduser().resolve()}, file
    while here.base is not None and not is_reference(here.base) and Path(here.base).suffix in FILES:
        path = Path(_beside(here.path, here.base)).expanduser()
        if path.resolve() in seen:
            raise UserError(f"{place}: preset is {file.base}, which starts from {path} again: name a preset that ends somewhere")
        seen.add(path.resolve())
        try:
            here = read_experiment_file(path)
        except UserError:  # which is said where that file is read
            return


def _base(file: ExperimentFile, name: str) -> Experiment:
    """What a file starts from."""
    try:
        return find_experiment(_beside(file.path, name))
    except UserError as error:
        line = file.line((PRESET,))
        raise UserError(f"{file.path}{'' if line is None else f', line {line}'}: {error}") from None


def _beside(path: Path, base: str) -> str:
    """What a file starts from, as it is found here: a relative path that leads nowhere from here is one from the file's folder."""
    place, colon, name = base.rpartition(":") if is_reference(base) else (base, "", "")
    there = path.expanduser().parent / place
    if Path(place).suffix not in (".py", *FILES) or Path(place).expanduser().exists() or not there.exists():
        return base
    return f"{there}{colon}{name}"


def seen_from(name: str, folder: Path) -> str:
    """An experiment's name as a file in a folder gives it: of a relative path, that from the folder."""
    place, colon, function = name.rpartition(":") if is_reference(name) else (name, "", "")
    path, folder = Path(place), folder.absolute()
    if folder == Path.cwd() or name in CATALOG or path.is_absolute() or not path.exists():
        return name
    return f"{Path(os.path.relpath(path, folder)).as_posix()}{colon}{function}"


# -------------------------------------------------------------------------------------------------- words of a command line


def command_words(preset: str, tree: dict[str, Any], keep: Callable[[str], bool] = lambda name: True) -> list[str]:
    """The words after a job's name that make an experiment again: what it started from, and the fields that differ from that.

    Args:
        preset: what it started from.
        tree: the experiment, or some of its sections by their names, as plain data.
        keep: which fields are named, by their dotted names; all by default.
    """
    try:
        base = to_dict(find_experiment(preset))
    except UserError:  # a file that has gone, say: then all fields are given
        base = {}
    return [preset, *(word for name, value in _changed(tree, base).items() if keep(name) for word in field_words(name, value))]


def differing(config: Config, base: Config | None) -> dict[str, Any]:
    """Fields of a tree that differ from another's, by dotted names, as plain data; a node of another class as NAME: "module:Class"."""
    return _changed(to_dict(config), to_dict(base) if base is not None else {})


def _changed(tree: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    new, old = flatten(tree), flatten(base)
    changed = {name: value for name, value in new.items() if name not in ("preset", "type") and old.get(name, ...) != value}
    return {
        name.removesuffix(".type"): value.partition(":")[2].lower() if name.endswith(".type") and is_builtin(value) else value
        for name, value in changed.items()
    }


def field_words(name: str, value: Any) -> list[str]:
    """A field's value as words of a command line; a sequence is as many words as it has members."""
    return [f"--{spelled(name)}", *words(value)]
