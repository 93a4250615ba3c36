"""Rows of Excel files (.xlsx): the first sheet, whose first row that is not empty names the columns."""

from __future__ import annotations

import datetime
import io
import zipfile
from collections.abc import Iterator
from typing import Any

from perceiver.config import UserError
from perceiver.data.files import InputFile
from perceiver.data.spans import MOST_RECORD, Span, Unreadable, whole

EXCEL = (".xlsx", ".xlsm")
"""Endings of files that are read here."""


def is_excel(path: str) -> bool:
    """Whether a path's ending is that of an Excel file."""
    return path.lower().endswith(EXCEL)


def excel_rows(file: InputFile) -> Iterator[tuple[int, list[str]]]:
    """The rows of the first sheet with their numbers, from 1, each field as a .csv file would have it: empty where there is nothing,
    true and false, dates as 2026-01-31, of formulas the value that was saved with them. Empty rows are left out.

    Raises:
        Unreadable: it is damaged, or no Excel file.
        UserError: `openpyxl` is not installed.
    """
    try:
        import openpyxl
    except ImportError:
        raise UserError(f"{file.name} is an Excel file, which needs openpyxl: pip install 'perceiver-ray[excel]'") from None
    data = whole(Span(file, 0, file.size))
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if (size := sum(member.file_size for member in archive.infolist())) > 4 * MOST_RECORD:
                raise Unreadable("too large", f"{file.name} unpacks to {size:,} bytes, which is not read at once: save it as .csv")
        book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)
        try:
            sheet = book.worksheets[0]
            sheet.reset_dimensions()  # some programs write a wrong one
            width = 0
            for number, cells in enumerate(sheet.iter_rows(values_only=True), 1):
                fields = [_field(value) for value in cells]
                while fields and not fields[-1]:
                    fields.pop()
                if fields:
                    width = width or len(fields)
                    yield number, fields + [""] * (width - len(fields))
        finally:
            book.close()
    except Unreadable:
        raise
    except Exception as error:  # openpyxl meets damage with errors of every kind
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Unreadable("corrupt file", f"{file.name} is no readable Excel file ({reason})") from None


def _field(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    return str(value)
