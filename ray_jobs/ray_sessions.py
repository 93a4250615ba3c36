"""Ray's temporary files of earlier jobs: every local cluster leaves a folder of logs (/tmp/ray/session_...), and Ray never removes one.

Removed are those that jobs of this package began and that have ended; others' are never touched.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path

logger = logging.getLogger(__name__)

MARK = "perceiver.pid"
"""File in a session's folder with the id of the process that began it."""
KEEP = 10
"""How many of the newest that have ended are kept, for who looks for a reason in them."""
DAYS = 7.0
"""After which these go too."""


def mark(session: Path) -> None:
    """Notes that this process began a session."""
    try:
        (session / MARK).write_text(str(os.getpid()))
    except OSError:
        pass  # it is then kept


def remove_old(root: Path) -> int:
    """Removes folders of sessions of this user's that have ended, but the newest; how many went.

    Args:
        root: the folder that they lie in.
    """
    ended = []
    for path in root.glob(f"session_*/{MARK}"):
        try:
            stat, pid = path.stat(), path.read_text()
        except OSError:
            continue  # another job removes it
        if stat.st_uid == os.getuid() and not path.parent.is_symlink() and not _runs(pid):
            ended.append((stat.st_mtime, path.parent))
    ended.sort(reverse=True)
    old = [path for number, (began, path) in enumerate(ended) if number >= KEEP or time.time() - began > 86_400 * DAYS]
    for path in old:
        shutil.rmtree(path, ignore_errors=True)
    if old:
        logger.debug("%d folders of Ray's earlier sessions in %s are removed", len(old), root)
    return len(old)


def _runs(pid: str) -> bool:
    """Whether the process is there; so it seems, too, where its number is another's by now."""
    return not pid.isdecimal() or Path(f"/proc/{pid}").exists()
