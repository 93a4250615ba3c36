"""`perceiver init NAME --data SOURCE`: writes NAME.py, an experiment on that data with all its settings, for you to change and train.

The data decides the task: classes of pictures or texts, a language model, a table. `perceiver data SOURCE` shows which.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import keyword
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

from perceiver.config import Config, DataConfig, Experiment, UserError, check_folder_name
from perceiver.extensions import check_not_installed
from perceiver.terminal import CommandParser, summary
from ray_jobs.cli import main_entry, parse_experiment, refuse_empty
from ray_jobs.data import add_encoding, find
from ray_jobs.data_found import Found
from ray_jobs.program import program

_PUBLIC = ("perceiver.config", "perceiver.models", "perceiver.tasks")
"""Packages that offer the classes of their modules."""
_ALWAYS = ("lr",)
"""Fields that are named even where they have their defaults: the first that anybody changes."""
_WIDTH = 100


def main(argv: list[str]) -> int:
    parser = CommandParser(prog=program("ray_jobs.init"), description=summary(__doc__))
    parser.add_argument("name", help="name of the experiment: of its file, function and run")
    parser.add_argument("--data", required=True, metavar="SOURCE", help="a file, a folder or a glob")
    parser.add_argument("--text-column", help="column with the text (default: text, or the one with the most text)")
    add_encoding(parser)
    parser.add_argument("--label-column", help="column with the class (default: label, or one with few distinct values)")
    parser.add_argument(
        "--targets",
        nargs="+",
        metavar="COLUMN",
        help="columns of a table to predict from all others (default: label, or the last one)",
    )
    args = parser.parse_args(argv)
    refuse_empty(args, ("name", "data"))
    check_folder_name("NAME", args.name)
    function = re.sub(r"[^0-9a-z]+", "_", args.name.lower()).strip("_")
    if not function.isidentifier() or keyword.iskeyword(function):
        raise UserError(f"NAME is {args.name!r} and must begin with a letter and be no word of Python, such as my-experiment")
    file = Path(f"{function}.py")
    if not Path(function).is_dir():  # such as the data itself, which a file of that name does not hide
        check_not_installed(function, file.absolute(), "NAME")
    if file.exists():
        raise UserError(f"{file} exists: choose another name, or remove it")
    source = str(Path(args.data).expanduser().absolute()) if "://" not in args.data else args.data
    DataConfig(encoding=args.encoding).check_encoding()
    found = find(source, args.text_column, args.label_column, args.encoding)
    if args.targets and found.table_words:  # of all columns, and not of the text alone
        found = found.as_table()
    words = [*found.words, "--name", args.name]
    if found.is_table and args.targets:
        words += ["--task.targets", *args.targets]
    elif args.targets:
        raise UserError(f"--targets is {' '.join(args.targets)}, and {args.data} is no table: leave it out")
    experiment = parse_experiment([found.preset, *words], "ray_jobs.init")
    file.write_text(text_of(experiment, found, function))
    print("\n".join(found.lines))
    print(f"\nwrote {file}: change what you like, then")
    print("\n".join(f"  {command}" for command in _commands(experiment, function)))
    return 0


def _commands(experiment: Experiment, function: str) -> list[str]:
    return [shlex.join(["perceiver", "train", f"{function}.py:{function}"]), shlex.join(["perceiver", "evaluate", experiment.run_name])]


# -------------------------------------------------------------------------------------------------------------- the file


def text_of(experiment: Experiment, found: Found, function: str) -> str:
    """The file: the experiment as an expression, in which each field that is not its default is explained by its own help."""
    classes: set[type[Config]] = set()
    body = _expression(experiment, 1, classes, skip=("preset",))
    imports: dict[str, set[str]] = {}
    for cls in classes:
        imports.setdefault(_module(cls), set()).add(cls.__name__)
    lines = [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(imports.items())]
    comment = [*found.lines, "", *_commands(experiment, function)]
    head = "\n".join(f"    {line}".rstrip() for line in comment).replace("\\", "\\\\").replace('"""', "'''")
    return (
        f'"""{experiment.run_name}: made by `perceiver init` from the preset {found.preset}. Its data, and how to use it:\n\n{head}\n\n'
        "Fields that are not named here have their defaults: `perceiver train FILE:FUNCTION --help` lists all of them, and any can be\n"
        'changed on the command line, too.\n"""\n\n' + "\n".join(lines) + f"\n\n\ndef {function}() -> Experiment:\n    return {body}\n"
    )


def _module(cls: type[Config]) -> str:
    """Where a class is imported from: a public package where that has it."""
    for name in _PUBLIC:
        if cls.__module__.startswith(f"{name}.") and getattr(importlib.import_module(name), cls.__name__, None) is cls:
            return name
    return cls.__module__


def _expression(node: Config, depth: int, classes: set[type[Config]], skip: tuple[str, ...] = ()) -> str:
    """A node as an expression: the fields that are not their defaults, each after a comment."""
    classes.add(type(node))
    helps, indent = _helps(type(node)), "    " * (depth + 1)
    lines = []
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if field.name in skip or (value == field.default and field.name not in _ALWAYS):
            continue
        if not isinstance(value, Config) and (help := helps.get(field.name)):
            lines += textwrap.wrap(help, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        lines.append(f"{indent}{field.name}={_value(value, depth + 1, classes)},")
    name = type(node).__name__
    return f"{name}(\n" + "\n".join(lines) + f"\n{'    ' * depth})" if lines else f"{name}()"


def _value(value: Any, depth: int, classes: set[type[Config]]) -> str:
    if isinstance(value, Config):
        return _expression(value, depth, classes)
    if isinstance(value, tuple):
        return f"({', '.join(_value(each, depth, classes) for each in value)}{',' * (len(value) == 1)})"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _helps(cls: type) -> dict[str, str]:
    """What the docstrings of a class's fields say, also of those that it inherits."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not (issubclass(base, Config) and base is not Config):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for field, after in zip(body, body[1:], strict=False):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, str):
                found[field.target.id] = " ".join(text.split())
    return found


if __name__ == "__main__":
    main_entry(main)
