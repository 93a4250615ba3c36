"""`perceiver completion bash|zsh|fish`: prints a script that completes command lines of `perceiver` in that shell.

The script asks `perceiver completion --words WORD ...` for what may follow, so that it knows the presets, runs and fields there are
when the key is pressed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from perceiver.catalog import CATALOG
from perceiver.config import flatten, home, to_dict
from perceiver.runs import runs
from perceiver.terminal import CommandParser
from ray_jobs.main import COMMANDS
from ray_jobs.overrides import SHORTCUTS
from ray_jobs.program import program

SCRIPTS = {
    "bash": """\
_perceiver() {
    local IFS=$'\\n'
    COMPREPLY=($(compgen -W "$(perceiver completion --words "${COMP_WORDS[@]:1:COMP_CWORD-1}" 2>/dev/null)" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _perceiver perceiver""",
    "zsh": """\
#compdef perceiver
_perceiver() {
    local -a found
    found=("${(@f)$(perceiver completion --words "${(@)words[2,CURRENT-1]}" 2>/dev/null)}")
    found=(${found:#})
    if (( $#found )); then compadd -a found; else _files; fi
}
compdef _perceiver perceiver""",
    "fish": """\
function __perceiver_words
    perceiver completion --words (commandline --tokenize --cut-at-cursor --current-process)[2..] 2>/dev/null
end
complete --command perceiver --arguments '(__perceiver_words)'""",
}
INSTALL = """\
bash: eval "$(perceiver completion bash)" in ~/.bashrc
zsh:  eval "$(perceiver completion zsh)" in ~/.zshrc, after compinit
fish: perceiver completion fish > ~/.config/fish/completions/perceiver.fish"""


def main(argv: list[str]) -> int:
    if argv[:1] == ["--words"]:
        print("\n".join(words(argv[1:])))
        return 0
    parser = CommandParser(
        prog=program("ray_jobs.completion"),
        description="Prints a script that completes command lines of perceiver.",
        epilog=INSTALL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SCRIPTS)
    print(SCRIPTS[parser.parse_args(argv).shell])
    return 0


def words(before: Sequence[str]) -> list[str]:
    """What may follow the words of a command line (without `perceiver`); none where only a file's name can."""
    if not before:
        return list(COMMANDS)
    command = COMMANDS.get(before[0])
    if command is None:
        return []
    if before[0] == "submit" and len(before) > 1:
        return words(before[1:])
    if len(before) == 1:
        return _first(command.takes)
    return _fields(before[1]) if command.takes == "preset" else []


def _first(takes: str) -> list[str]:
    if takes == "preset":
        return list(CATALOG)
    if takes == "run":
        return [run.name for run in runs(home() / "runs")]
    if takes == "job":
        return [name for name, command in COMMANDS.items() if command.job]
    return list(SCRIPTS) if takes == "shell" else []


def _fields(preset: str) -> list[str]:
    if preset not in CATALOG:
        return []
    # Here and not above: other words take none of the models and tasks.
    from perceiver.experiments import find_experiment

    names = [name for name in flatten(to_dict(find_experiment(preset))) if name != "preset" and name.rpartition(".")[2] != "type"]
    return [*SHORTCUTS, *(f"--{name.replace('_', '-')}" for name in names), "--help"]
