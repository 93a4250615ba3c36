"""The HTML page of `perceiver data SOURCE --html FILE`: what a source holds, as charts, tables and examples."""

from __future__ import annotations

import math
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from perceiver.data.examples_shown import pictures, texts
from perceiver.data.files import InputFile
from perceiver.data.labels import class_order
from perceiver.data.sources import Source
from perceiver.data.survey import LENGTHS, TableSurvey, table_rows
from perceiver.pages import Page, color

_ROWS = 10
"""Rows of a table that are shown."""
_MOST_BARS = 60
"""Classes that a chart has, at most: the commonest."""


@dataclass
class Facts:
    """What a page is made of, as far as the source has it."""

    survey: TableSurvey | None = None
    """Columns, lengths and duplicates of tables."""
    files: list[InputFile] = field(default_factory=list)
    """The tables."""
    text: str | None = None
    """Their column of texts."""
    label: str | None = None
    """The column of classes."""
    classes: dict[str, Mapping[str, int]] = field(default_factory=dict)
    """How often each class occurs, by split."""
    target: str | None = None
    """Of a table of numbers the column to predict."""
    begins: list[tuple[str, str]] = field(default_factory=list)
    """Names and first characters of files of text."""
    pictures: Source | None = None


def page_of(title: str, lines: list[str], commands: list[str], facts: Facts) -> str:
    """The page, one HTML file that loads nothing.

    Args:
        title: the source.
        lines: what is said of it in the terminal.
        commands: those that train on it.
        facts: what is shown.
    """
    page = Page(title)
    page.text("\n".join(lines))
    page.heading("Train on it")
    page.text("\n".join(commands))
    if facts.classes:
        page.heading("Classes")
        page.chart(_bars(facts.classes), height=360, yaxis={"title": {"text": "rows"}}, barmode="group", xaxis={"type": "category"})
        page.table(("class", *facts.classes), _class_rows(facts.classes))
    survey = facts.survey
    if survey is not None and survey.lengths:
        page.heading(f"Lengths of the texts in {facts.text!r}")
        ends = [*LENGTHS, 0]
        names = [f"to {end:,}" if end else f"over {LENGTHS[-1]:,}" for end in ends]
        bars = {"type": "bar", "x": names, "y": [survey.lengths[end] for end in ends], "marker": {"color": color(0)}}
        page.chart([bars], height=320, xaxis={"title": {"text": "bytes"}, "type": "category"}, yaxis={"title": {"text": "texts"}})
    if survey is not None:
        page.heading("Columns")
        heads = ("column", "types", "different values", "an example", "least", "mean", "greatest")
        page.table(heads, list(map(_column_row, survey.columns.items())))
    if facts.target is not None and survey is not None:
        if (column := survey.columns[facts.target]).is_number and not facts.classes:
            page.heading(f"To predict: {facts.target}")
            found = histogram(facts.files, facts.target, column.low, column.high)
            page.chart(
                [{"type": "bar", **found, "marker": {"color": color(0)}}], height=320, bargap=0.02, yaxis={"title": {"text": "rows"}}
            )
        page.heading("The first rows")
        page.table(tuple(survey.columns), [[row.get(name) for name in survey.columns] for row in islice(_all_rows(facts.files), _ROWS)])
    if facts.text is not None:
        page.heading("Examples")
        for caption, text in texts(facts.files, facts.text, facts.label):
            page.heading(caption, 3)
            page.text(text)
    if facts.begins:
        page.heading("Examples")
        for name, text in facts.begins:
            page.heading(name, 3)
            page.text(text)
    if facts.pictures is not None and (shown := pictures(facts.pictures, facts.label or "label")):
        page.heading("Pictures")
        page.sheet(shown)
    return page.render()


def histogram(files: list[InputFile], column: str, low: float, high: float, bins: int = 30) -> dict[str, list[float]]:
    """The middles of equal parts of a column's range and how many numbers lie in each."""
    width = (high - low) / bins or 1.0
    counts = [0] * bins
    for row in _all_rows(files):
        with suppress(TypeError, ValueError):  # what is missing
            number = float(row[column])
            if math.isfinite(number):
                counts[min(bins - 1, int((number - low) / width))] += 1
    return {"x": [low + (place + 0.5) * width for place in range(bins)], "y": list(map(float, counts))}


def _all_rows(files: list[InputFile]) -> Iterator[dict[str, Any]]:
    return (row for file in files for row in table_rows(file))


def _bars(classes: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    together: dict[str, int] = {}
    for counts in classes.values():
        for name, count in counts.items():
            together[name] = together.get(name, 0) + count
    shown = set(sorted(together, key=lambda name: -together[name])[:_MOST_BARS])
    names = [name for name in _ordered(together) if name in shown]
    return [
        {"type": "bar", "name": split, "x": names, "y": [counts.get(name, 0) for name in names], "marker": {"color": color(number)}}
        for number, (split, counts) in enumerate(classes.items())
    ]


def _class_rows(classes: Mapping[str, Mapping[str, int]]) -> list[list[Any]]:
    names = _ordered({name: 1 for counts in classes.values() for name in counts})
    return [[name, *(counts.get(name, 0) for counts in classes.values())] for name in names]


def _ordered(names: Mapping[str, int]) -> tuple[str, ...]:
    return class_order(Counter(names))


def _column_row(item: tuple[str, Any]) -> list[Any]:
    name, column = item
    types = ", ".join(f"{kind} {count:,}" for kind, count in column.types.most_common())
    numbers = [column.low, column.mean, column.high] if column.is_number and column.low <= column.high else ["", "", ""]
    return [name, types, "many" if column.values is None else len(column.values), reprlib.repr(column.example), *numbers]
