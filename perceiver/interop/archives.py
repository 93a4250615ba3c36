"""Files of PyTorch weights are zip archives, of which a small one may unpack to any size. Those that PyTorch writes are not packed."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile, ZipFile, is_zipfile

from perceiver.config import UserError

SPARE = 1 << 20
"""Bytes by which what an archive holds may be more than the file."""


def check_unpacked(path: Path) -> None:
    """Refuses an archive that unpacks to more than it is; what is none, or a damaged one, is left to its reader.

    Raises:
        UserError: it does.
    """
    try:
        if not is_zipfile(path):
            return
        with ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except (OSError, BadZipFile, ValueError, NotImplementedError):
        return
    if size > (there := path.stat().st_size) + SPARE:
        raise UserError(f"{path} is not loaded: it unpacks from {there:,} to {size:,} bytes, as no file of weights does")
