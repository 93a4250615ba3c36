"""Which code of users may be imported: what this user has run, by naming it or by saying so."""

from __future__ import annotations

import json
from pathlib import Path

from perceiver.config import UserError, home
from perceiver.disk import whole_file
from perceiver.extensions import Code

TRUSTED = "trusted-code.json"
"""File in $PERCEIVER_HOME with the digests of code that its user has run by naming it."""


def trust(code: Code) -> None:
    """Remembers that this user has run the code, so that runs which bring a copy of it may import that."""
    known = _trusted()
    if code and code.digest not in known:
        path = home() / TRUSTED
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write((json.dumps(sorted({*known, code.digest}), indent=1) + "\n").encode())


def check_trust(code: Code, what: str, folder: Path, trusted: bool = False) -> None:
    """Refuses code that came with somebody else's run.

    Args:
        what: how messages call the run.
        folder: where its code can be read.
        trusted: the user has said that it may run.

    Raises:
        UserError: this user never ran it.
    """
    if trusted:
        trust(code)
    elif code and code.digest not in _trusted():
        raise UserError(
            f"{what} brings code of its own ({', '.join(code.files)}) that was never run from this account: look at it in {folder}, "
            "and give --trust-code (trust_code=True) to run it"
        )


def _trusted() -> set[str]:
    try:
        found = json.loads((home() / TRUSTED).read_text())
    except (OSError, ValueError):
        return set()
    return set(map(str, found)) if isinstance(found, list) else set()
