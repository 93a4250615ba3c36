"""Validation by time: rows of the latest times are held out. A time is a key of its own, in place of a group's hash."""

from __future__ import annotations

import datetime
import math
import struct
from typing import Any

import numpy as np

from perceiver.config import DataConfig

_MOST = (1 << 64) - 1


class TimeColumn(str):
    """Name of a column of times, where otherwise that of a column of groups stands."""


class Time(bytes):
    """A time as 8 bytes, which are a key by themselves: the later the time, the smaller."""

    @classmethod
    def of(cls, value: Any) -> Time:
        """That of a number, a date, or a text of either, such as 2026-01-31 or 2026-01-31T12:00:00+01:00; without an offset it is UTC.

        Raises:
            ValueError: it is none of these.
        """
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, str):
            text = value.strip()
            try:
                value = float(text)
            except ValueError:
                value = datetime.datetime.fromisoformat(text)
        if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
            value = datetime.datetime.combine(value, datetime.time())
        if isinstance(value, datetime.datetime):
            value = (value if value.tzinfo else value.replace(tzinfo=datetime.UTC)).timestamp()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{value!r} is no time")
        (bits,) = struct.unpack(">Q", struct.pack(">d", value + 0.0))
        ascending = bits ^ (_MOST if bits >> 63 else 1 << 63)  # so that the order of the numbers is that of the bits
        return cls((_MOST - ascending).to_bytes(8, "big"))


def together_by(data: DataConfig) -> str | None:
    """The column that says which rows are held out together: of groups, or of times."""
    return data.group_column if data.time_column is None else TimeColumn(data.time_column)
