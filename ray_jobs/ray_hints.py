"""What Ray prints in between that a user of this package can do nothing about."""

from __future__ import annotations

from typing import Any

HINTS = ("worker processes have been started on node",)
"""Parts of messages that are left out. Ray counts processes against cores: of a training most wait, and two cores have more than eight."""


def leave_out_hints() -> None:
    """Keeps `HINTS` out of this process's output; all else that Ray's nodes report is printed as before. Called again it does nothing."""
    from ray._private import worker

    printed = worker.print_to_stdstream
    if getattr(printed, "leaves_out_hints", False):
        return

    def print_others(data: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        lines = [line for line in data["lines"] if not any(hint in line for hint in HINTS)]
        if lines:
            printed({**data, "lines": lines}, *args, **kwargs)

    print_others.leaves_out_hints = True  # type: ignore[attr-defined]
    worker.print_to_stdstream = print_others
