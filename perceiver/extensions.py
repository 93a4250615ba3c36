"""Code from outside this package: found by name, sent along with a run, kept with it, and imported only where it is trusted.

An experiment may use classes of a user's own file or package. `code_of` collects the source files that these need; a run keeps a
copy of them, and every process that takes part in it gets them (`Code.install`). Nothing here knows how they travel.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from perceiver.config import Config, UserError, nearest, nodes, type_name
from perceiver.config.core import look_here

GROUP = "perceiver.experiments"
"""Entry points of this group are experiments that installed packages bring."""
OWN = ("perceiver", "ray_jobs", "tuning")
"""Packages of this project, which every process has."""
INSTALLED = frozenset(("site-packages", "dist-packages"))
"""Names of folders in which packages are installed."""


# ----------------------------------------------------------------------------------------------------------- named objects


def is_reference(name: str) -> bool:
    """Whether a name is of the form path/file.py:name or package.module:name (and not s3://..., hub:..., C:\\...)."""
    place, colon, attribute = name.rpartition(":")
    if not colon or "://" in name or not attribute.isidentifier():
        return False
    return place.endswith(".py") or all(part.isidentifier() for part in place.split("."))


def load_object(reference: str, what: str) -> Any:
    """The object of a reference path/file.py:name or package.module:name, whose module is imported.

    The folder of a file is added to the import path, so that the file may import its neighbours.

    Args:
        what: how messages call it: "experiment", "search space", ...

    Raises:
        UserError: there is no such file, module or name in it, or importing it fails: with file and line.
    """
    place, _, attribute = reference.rpartition(":")
    module = _import_file(Path(place).expanduser(), what) if place.endswith(".py") else _import_module(place, what)
    if not hasattr(module, attribute):
        names = [name for name, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == module.__name__]
        # Most often a function is meant.
        shown = [name for name in names if not isinstance(getattr(module, name), type)] or names
        there = f"; it has {', '.join(shown[:8])}" if shown else ""
        raise UserError(f"{what} {reference!r}: {place} has no {attribute}{nearest(attribute, names)}{there}")
    return getattr(module, attribute)


def call(reference: str, function: Any, what: str) -> Any:
    """The result of a function of the user's, or the object itself where it is no function.

    Raises:
        UserError: the function fails: with file and line.
    """
    if not callable(function):
        return function
    try:
        return function()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{what} {reference!r} fails: {place_of(error)}") from error


def _import_file(path: Path, what: str) -> ModuleType:
    if not path.is_file():
        raise UserError(f"{what} {str(path)!r}: there is no such file")
    path, name = path.resolve(), path.stem
    if not name.isidentifier():
        raise UserError(f"{what} {str(path)!r}: a file that is imported needs a name of letters, digits and underscores")
    loaded = sys.modules.get(name)
    if loaded is None:
        check_not_installed(name, path, what)
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        loaded = _import_module(name, what)
    if _file_of(loaded) != path and not _same_text(_file_of(loaded), path):
        raise UserError(f"{what} {str(path)!r}: another module {name} is imported already ({_file_of(loaded)}): give the file another name")
    return loaded


def check_not_installed(name: str, path: Path, what: str) -> None:
    """Raises UserError where the file would take the place of a module of Python or of an installed package, for all that imports it."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return
    origin = Path(spec.origin) if spec is not None and spec.origin else None
    if spec is not None and (origin is None or not origin.is_file() or _is_library(origin)) and spec.origin != str(path):
        raise UserError(f"{what} {str(path)!r}: {name} is the name of an installed module: give the file another name")


def _import_module(name: str, what: str) -> ModuleType:
    look_here()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise UserError(f"{what} {name!r}: there is no module {error.name} on the import path") from None
        raise UserError(f"{what}: {place_of(error)}") from error
    except (Exception, SystemExit) as error:  # a script without `if __name__ == "__main__"` may end the process
        raise UserError(f"{what}: {place_of(error)}") from error


def place_of(error: BaseException) -> str:
    """An error of the user's code with the place that it comes from: "weather.py, line 12: NameError: ..."."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}, line {error.lineno}: SyntaxError: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_library(Path(frame.filename))]
    place = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}: " if frames else ""
    return f"{place}{error}" if isinstance(error, UserError) else f"{place}{type(error).__name__}: {error}"


def installed_experiments() -> dict[str, importlib.metadata.EntryPoint]:
    """Experiments that installed packages bring, by name."""
    return {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}


def load_point(point: importlib.metadata.EntryPoint) -> Any:
    """What an installed package brings under a name.

    Raises:
        UserError: it cannot be imported: with file and line.
    """
    try:
        return point.load()
    except Exception as error:
        raise UserError(f"experiment {point.name!r} of an installed package ({point.value}) fails: {place_of(error)}") from error


# ------------------------------------------------------------------------------------------------------------ source files


@dataclass(frozen=True)
class Code:
    """The source files that an experiment needs besides this package and what is installed."""

    files: Mapping[str, str]
    """Text by path, relative to the folder that is added to the import path."""

    def __bool__(self) -> bool:
        return bool(self.files)

    @property
    def digest(self) -> str:
        """Hash of all files; "" where there are none."""
        text = json.dumps(dict(self.files), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16] if self.files else ""

    def save(self, folder: Path) -> None:
        """Writes the files into a folder; others there are left as they are."""
        for name, text in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    @classmethod
    def load(cls, folder: Path) -> Code:
        """The source files in a folder; none where there is no such folder."""
        return cls({str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*.py"))})

    def differences(self, other: Code) -> list[str]:
        """Names of the files that differ from another's."""
        return sorted(name for name in self.files.keys() | other.files.keys() if self.files.get(name) != other.files.get(name))

    @property
    def is_imported(self) -> bool:
        """Whether this process has imported all of its modules, in whatever version."""
        return bool(self.files) and all(_module_of(name) in sys.modules for name in self.files)

    def install(self) -> None:
        """Makes the files importable in this process.

        Raises:
            UserError: a module of the same name and other content is imported already.
        """
        missing = False
        for name, text in self.files.items():
            module = _module_of(name)
            loaded = sys.modules.get(module)
            if loaded is None:
                missing = True
            elif (file := _file_of(loaded)) is None or not file.is_file() or file.read_text() != text:
                raise UserError(
                    f"module {module} is imported already in another version than the saved one ({name}): use a process of its own for each"
                )
        if missing and self.digest not in _installed:
            folder = Path(tempfile.mkdtemp(prefix="perceiver-code-"))
            self.save(folder)
            sys.path.insert(0, str(folder))
            _installed[self.digest] = folder
            importlib.invalidate_caches()


def _module_of(name: str) -> str:
    """The module of a source file."""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


_installed: dict[str, Path] = {}
"""Folders that this process has put on the import path, by the digest of the code in them."""


def code_of(config: Config, references: Iterable[str] = ()) -> Code:
    """The source files of all classes in a configuration tree, and of references, with what they import from beside them.

    Modules of this project and of installed packages are not among them: every machine has its own.

    Raises:
        UserError: a class has no source file that could be sent to another process.
    """
    modules = {type_name(type(node)).partition(":")[0] for _, node in nodes(config)}
    for reference in references:
        place = reference.rpartition(":")[0]
        modules.add(Path(place).stem if place.endswith(".py") else place)
    return code_of_modules(modules)


def code_of_modules(modules: Iterable[str]) -> Code:
    """The source files of modules by name; see `code_of`."""
    files: dict[str, str] = {}
    for name in sorted(set(modules)):
        module = sys.modules.get(name) or sys.modules.get("__main__")
        if name.partition(".")[0] in OWN or module is None:
            continue
        file = _file_of(module)
        if file is None or not file.is_file():
            raise UserError(f"classes of module {name} have no source file: write them into a file of their own and import it")
        if _is_library(file):
            continue
        root = file.parents[len(name.split(".")) - (0 if file.name == "__init__.py" else 1)]
        _collect(root, file, files)
    return Code(dict(sorted(files.items())))


def code_of_file(path: Path) -> Code:
    """The source file at a path and what it imports from beside it, as `code_of_modules` would have them once it is imported."""
    files: dict[str, str] = {}
    path = path.expanduser().resolve()
    _collect(path.parent, path, files)
    return Code(dict(sorted(files.items())))


def _collect(root: Path, file: Path, files: dict[str, str]) -> None:
    """Adds a file and, recursively, what it imports from the same folder."""
    name = str(file.relative_to(root))
    if name in files:
        return
    files[name] = file.read_text()
    for parent in file.parents:
        if parent == root or root not in parent.parents:
            break
        if (package := parent / "__init__.py").is_file():
            _collect(root, package, files)
    for module in _imports(files[name], name):
        path = root.joinpath(*module.split("."))
        if module.partition(".")[0] in OWN:
            continue
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                _collect(root, candidate, files)


def _imports(text: str, name: str) -> Iterator[str]:
    """Full names of the modules that a source file may import.

    Raises:
        UserError: it is no Python.
    """
    package = name.removesuffix(".py").removesuffix("/__init__").split("/")
    if not name.endswith("__init__.py"):
        package = package[:-1]
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise UserError(f"{name}, line {error.lineno}: SyntaxError: {error.msg}; it is imported by the experiment's file") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module:
                yield module
            yield from (f"{module}.{alias.name}".removeprefix(".") for alias in node.names)


def _file_of(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if file else None


def is_outside(module: ModuleType) -> bool:
    """Whether a module is a source file of the user's: neither of this project nor of Python or an installed package."""
    file = _file_of(module)
    return file is not None and file.suffix == ".py" and not _is_library(file)


def _is_library(file: Path) -> bool:
    """Whether a file belongs to Python, to an installed package or to this project.

    Packages of the user's or of the system's Python, which an environment may look into, are known by the name of their folder.
    """
    if INSTALLED.intersection(file.resolve().parts):
        return True
    paths = sysconfig.get_paths()
    own = Path(__file__).resolve().parent
    folders = [Path(paths[name]).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")] + [own.parent / name for name in OWN]
    return any(folder in file.resolve().parents for folder in folders)


def _same_text(first: Path | None, second: Path) -> bool:
    return first is not None and first.is_file() and first.read_text() == second.read_text()
