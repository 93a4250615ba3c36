"""Bytes of input files, in runs that begin where documents do. Every fault names the file and the byte.

A *span* is a part of a file that one task reads: bytes of a plain file, rows of parquet, or all of a compressed file.
Spans cut only where documents begin, and where documents begin does not depend on spans: so any cutting gives the
same documents.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from perceiver.config import UserError
from perceiver.data.examples import ExamplePart
from perceiver.data.files import InputFile
from perceiver.data.storage import open_folder

SECTION = 1 << 16
"""Plain text files are cut at line ends into sections of about this size in bytes, the units of holding out validation."""
SLAB = 8 << 20
"""Bytes read at once: what bounds a task's memory, whatever the size of a file."""
MOST_RECORD = 256 << 20
"""Most bytes of one row, and of a member of an archive: a packed file of some MiB may unpack to any number of them."""
MOST_WHOLE = 4 << 30
"""Most bytes of a file that is read as a whole."""
_ARTICLE = re.compile(rb"\n ?\n(?= = (?!=)[^\n]*(?<!=) = \n)")
"""The end of the blank line before an article's title, ` = Title = `, in WikiText."""
_LOOKBACK = 4096
"""Bytes before a span that are searched for where its first document begins."""


@dataclass(frozen=True)
class Span:
    """A part of a file: bytes, or rows of parquet; or all of a part of a source that is code."""

    file: InputFile | ExamplePart
    start: int
    stop: int
    unpacked: bool = False
    """Of a compressed file: `start` and `stop` count bytes of its text, which is unpacked from its beginning to get there."""

    @property
    def input_file(self) -> InputFile:
        """The file, of a span that is no part of code."""
        assert isinstance(self.file, InputFile)
        return self.file

    @property
    def whole(self) -> bool:
        """Whether this is all of a compressed file."""
        return self.file.compressed and not self.unpacked


SHOWN = 3
"""Faults of a kind that a message names."""


LEFT_OUT = "class left out"
"""Reason of what is left out by the user's choice, which is counted and never refused."""


class Problems:
    """What to do with faults: count them by reason, or refuse them.

    Args:
        skip: count them.
        most: number of faults that are refused together. Fewer ones are refused by `end`.
    """

    def __init__(self, skip: bool, most: int = 1) -> None:
        self.skip = skip
        self.counts: Counter[str] = Counter()
        self._most = most
        self._refused: list[tuple[str, str]] = []

    def report(self, reason: str, sentence: str) -> None:
        """A fault of a row or a file: the caller leaves it out.

        Raises:
            UserError: faults are not to be skipped, and there are enough of them.
        """
        self.counts[reason] += 1
        if self.skip or reason == LEFT_OUT:
            return
        self._refused.append((reason, sentence))
        if len(self._refused) >= self._most:
            self.end()

    def end(self) -> None:
        """Raises UserError where there were faults that are not to be skipped."""
        found = self._refused
        if not found:
            return
        text = found[0][1]
        if len(found) > 1:
            shown = [sentence for n, (reason, sentence) in enumerate(found) if [r for r, _ in found[:n]].count(reason) < SHOWN]
            more = f"; {len(found) - len(shown)} more of these kinds" if len(shown) < len(found) else ""
            text = f"{'at least ' if len(found) == self._most else ''}{len(found)} faults: {'; '.join(shown)}{more}"
        raise UserError(f"{text} (--data.on-error skip leaves out and counts such rows and files)")


class Unreadable(Exception):
    """A file cannot be read any further: (reason, sentence)."""


def chunks(span: Span, start: int) -> Iterator[bytes]:
    """The bytes of a file from `start` on, unpacked, at most SLAB at once.

    Raises:
        Unreadable: the file is missing, truncated or corrupt.
    """
    file = span.input_file
    filesystem, path = open_folder(file.path)
    read = 0
    try:
        if not file.compressed:
            with filesystem.open_input_file(path) as source:
                while chunk := source.read_at(SLAB, start):
                    _refuse_utf_16(file, chunk, start)
                    yield chunk
                    start += len(chunk)
            return
        skip = start if span.unpacked else 0
        for chunk in _text_chunks(file, filesystem, path):
            _refuse_utf_16(file, chunk, read)
            read += len(chunk)
            if skip < read:
                yield chunk[max(0, skip - (read - len(chunk))) :]
    except EOFError:
        kind = {".gz": "gzip", ".bz2": "bzip2"}[file.packing]
        where = f", after byte {read:,} of its text" if read else ""
        raise Unreadable("truncated file", f"{file.name} is truncated: its {kind} data ends early{where}") from None
    except UnicodeDecodeError as error:
        what = f"byte {error.object[error.start]:#04x} after byte {read:,} of its text ({error.reason})"
        raise Unreadable("other encoding", f"{file.name} is not {file.encoding} (--data.encoding): {what}") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise Unreadable("corrupt file", f"{file.name} is corrupt after byte {read:,} of its text ({error})") from None
    except OSError as error:
        if file.packing in (".bz2", ".zst"):
            raise Unreadable("corrupt file", f"{file.name} is corrupt after byte {read:,} of its text ({error})") from None
        raise Unreadable("unreadable file", f"{file.name} cannot be read ({error})") from None


def _text_chunks(file: InputFile, filesystem: Any, path: str) -> Iterator[bytes]:
    """The text of a file that is packed or not UTF-8, as UTF-8."""
    with _unpacked(file, filesystem, path) as source:
        if file.encoding == "utf-8":
            while chunk := source.read(SLAB):
                yield chunk
            return
        decoder = codecs.getincrementaldecoder(file.encoding)()
        while chunk := source.read(SLAB):
            if text := decoder.decode(chunk):
                yield text.encode()
        if text := decoder.decode(b"", final=True):
            yield text.encode()


@contextmanager
def _unpacked(file: InputFile, filesystem: Any, path: str) -> Iterator[Any]:
    packed = filesystem.open_input_stream(path, compression="zstd" if file.packing == ".zst" else None)
    with packed as source:
        if file.packing == ".gz":
            with gzip.GzipFile(fileobj=source) as unpacked:
                yield unpacked
        elif file.packing == ".bz2":
            with bz2.BZ2File(source) as unpacked:
                yield unpacked
        else:
            yield source


def _refuse_utf_16(file: InputFile, chunk: bytes, start: int) -> None:
    """Raises Unreadable where text begins with the byte order mark of UTF-16."""
    if start == 0 and file.format != "idx" and chunk[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise Unreadable("other encoding", f"{file.name} is UTF-16 (it begins with its byte order mark): give --data.encoding utf-16")


def _checked_chunks(span: Span, problems: Problems) -> Iterator[bytes]:
    """All bytes of a compressed file; where faults are skipped, only after a first pass has found it whole."""
    if problems.skip:
        for _ in chunks(span, 0):
            pass
    yield from chunks(span, 0)


def byte_runs(span: Span, problems: Problems, borders: Callable[[bytes, int], list[int]]) -> Iterator[tuple[int, bytes, bool]]:
    """The byte runs of a span between borders: (first byte in the file, run, whether the file ends with it).

    Args:
        borders: of (buffer, its first byte in the file), the places in the buffer where a run begins, but the
            buffer's start.
    """
    first = 0 if span.whole else max(0, span.start - _LOOKBACK)
    pieces = _checked_chunks(span, problems) if span.whole else chunks(span, first)
    base, carry = first, b""
    begun = span.start == 0
    for chunk in pieces:
        buffer = carry + chunk
        previous = 0
        for cut in borders(buffer, base):
            if base + cut >= span.start:
                if begun:
                    yield base + previous, buffer[previous:cut], False
                if not span.whole and base + cut >= span.stop:
                    return
                begun = True
            previous = cut
        carry = buffer[previous:]
        check_record(span.file.name, len(carry))
        base += previous
    if begun and carry:
        yield base, carry, True


def check_record(name: str, size: int) -> None:
    """Raises Unreadable where a row of a file has no end within `MOST_RECORD`."""
    if size > MOST_RECORD:
        most = f"{MOST_RECORD >> 20:,} MiB"
        raise Unreadable("endless row", f"{name} has a row of more than {most}: it is no file of rows, or made to fill the memory")


def whole(span: Span) -> bytes:
    """All bytes of a file, unpacked.

    Raises:
        Unreadable: the file is missing, truncated or corrupt, or has more than `MOST_WHOLE`.
    """
    parts, size = [], 0
    for part in chunks(span, 0):
        parts.append(part)
        size += len(part)
        if size > MOST_WHOLE:
            most = f"{MOST_WHOLE / 2**30:.3g} GiB"
            raise Unreadable("too large", f"{span.file.name} unpacks to more than {most}, which is not read at once")
    return b"".join(parts)


def line_borders(span: Span) -> Callable[[bytes, int], list[int]]:
    """Not all line starts: the last of a buffer, and those where the span begins and where it ends."""

    def borders(buffer: bytes, base: int) -> list[int]:
        found = {buffer.rfind(b"\n") + 1}
        for edge in () if span.whole else (span.start, span.stop):
            if base < edge <= base + len(buffer):
                found.add(buffer.find(b"\n", edge - base - 1) + 1)
        return sorted(found - {0})

    return borders


def section_borders(buffer: bytes, base: int) -> list[int]:
    """Line starts at or first after a multiple of SECTION in the file."""
    found = []
    target = (base // SECTION + 1) * SECTION
    while (cut := buffer.find(b"\n", max(target - base - 1, 0)) + 1) and cut < len(buffer):
        found.append(cut)
        target = ((base + cut) // SECTION + 1) * SECTION
    return found


def article_borders(buffer: bytes, base: int) -> list[int]:
    """Where articles begin in a buffer."""
    return [match.end() for match in _ARTICLE.finditer(buffer)]


def line_number(span: Span, byte: int) -> int:
    """The number of the line (from 1) that a byte of the file lies in."""
    number, position = 1, 0
    for chunk in chunks(span, 0):
        number += chunk.count(b"\n", 0, max(0, byte - position))
        position += len(chunk)
        if position >= byte:
            break
    return number
