"""`perceiver schema [--out FILE]`: prints the JSON Schema of experiment files, for editors to complete and check them.

With the first line `# yaml-language-server: $schema=FILE` in an experiment's .yaml file, editors with a YAML language server (VS Code,
Neovim, Emacs) suggest its fields with their descriptions and underline unknown ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from perceiver.catalog import CATALOG
from perceiver.config import UserError
from perceiver.terminal import CommandParser, summary
from ray_jobs.cli import main_entry, refuse_empty
from ray_jobs.program import program


def main(argv: list[str]) -> int:
    parser = CommandParser(
        prog=program("ray_jobs.schema"), description=summary(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", metavar="FILE", help="write it to this file instead of printing it")
    args = parser.parse_args(argv)
    refuse_empty(args)
    # Here and not above: it takes all models and tasks.
    from perceiver.config.schema import experiment_schema

    text = json.dumps(experiment_schema(tuple(CATALOG)), indent=1) + "\n"
    if args.out is None:
        print(text, end="")
        return 0
    path = Path(args.out).expanduser()
    try:
        path.write_text(text)
    except OSError as error:
        raise UserError(f"--out is {path}, which cannot be written ({error.strerror})") from None
    print(f"written to {path}; in an experiment's file: # yaml-language-server: $schema={path}")
    return 0


if __name__ == "__main__":
    main_entry(main)
