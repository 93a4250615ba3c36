"""The HTML page of `perceiver predict --html FILE`: what was said of the inputs, the first of them beside the inputs themselves."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from perceiver.data.examples_shown import thumbnail
from perceiver.data.storage import atomic_file, open_folder
from perceiver.inference.part import Part
from perceiver.inference.rows import Row
from perceiver.pages import Page, color

logger = logging.getLogger(__name__)

SHOWN = 200
"""Rows that are shown, at most."""
_MOST_BARS = 60
_LONGEST = 300
"""Characters of a text that are shown."""


def labels_in(table: pa.Table) -> Counter[str]:
    """How often each label was said."""
    if "label" not in table.column_names:
        return Counter()
    return Counter({item["values"]: item["counts"] for item in pc.value_counts(table["label"].drop_null()).to_pylist()})


def write_page(
    file: str, title: str, lines: Sequence[str], output: str, parts: Sequence[tuple[str, Part]], read: Callable[[Part], list[Row]]
) -> None:
    """Writes the page of a finished job.

    Args:
        file: HTML file to write.
        title: what the output is called.
        lines: what was done.
        output: the folder with the output's parts.
        parts: their files, and what each was made from.
        read: gives the rows of a part of the input.
    """
    filesystem, path = open_folder(output)
    rows: list[Row] = []
    said: list[dict[str, Any]] = []
    labels: Counter[str] = Counter()
    for name, part in parts:
        table = pq.read_table(f"{path}/{name}", filesystem=filesystem, partitioning=None)
        labels += labels_in(table)
        if (wanted := SHOWN - len(rows)) > 0:
            rows += read(part)[:wanted]
            said += table.slice(0, wanted).to_pylist()
    root, _, name = file.rpartition("/")
    with atomic_file(root, name) as stream:
        stream.write(predicted_page(title, lines, labels, rows, said).encode())
    logger.info(f"page: {file}")


def predicted_page(
    title: str, lines: Sequence[str], labels: Mapping[str, int], rows: Sequence[Row], said: Sequence[Mapping[str, Any]]
) -> str:
    """The page, one HTML file that loads nothing.

    Args:
        title: of the page.
        lines: what was done.
        labels: how often each label was said of all rows.
        rows: the inputs to show.
        said: the output row of each of them.
    """
    page = Page(title)
    page.text("\n".join(lines))
    if labels:
        shown = sorted(labels, key=lambda name: -labels[name])[:_MOST_BARS]
        page.heading("Labels")
        bars = {"type": "bar", "x": shown, "y": [labels[name] for name in shown], "marker": {"color": color(0)}}
        page.chart([bars], height=320, xaxis={"type": "category"}, yaxis={"title": {"text": "rows"}})
    pictures = [
        (_caption(found), small)
        for row, found in zip(rows, said, strict=True)
        if isinstance(row.value, bytes) and (small := thumbnail(row.value)) is not None
    ]
    if pictures:
        page.heading("Pictures")
        page.sheet(pictures)
    page.heading(f"The first {len(rows):,} rows")
    names = [name for name in (said[0] if said else ()) if any(_is_short(found[name]) for found in said)]
    inputs = any(isinstance(row.value, (str, dict)) for row in rows)
    cells = [
        [found["id"], *([_input(row)] if inputs else []), *(_cell(found[name]) for name in names if name != "id")]
        for row, found in zip(rows, said, strict=True)
    ]
    page.table(("id", *(["input"] if inputs else []), *(name for name in names if name != "id")), cells)
    return page.render()


def _caption(found: Mapping[str, Any]) -> str:
    """What is said of a picture, and its name."""
    sure = found.get("probability")
    what = f"{found['label']}{'' if sure is None else f' {sure:.0%}'}: " if found.get("label") is not None else ""
    return what + str(found["id"]).rpartition("/")[2]


def _input(row: Row) -> str:
    if isinstance(row.value, dict):
        return ", ".join(f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.value.items())
    text = row.value if isinstance(row.value, str) else ""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ... ({len(text):,} characters)"


def _is_short(value: Any) -> bool:
    return value is not None and not (isinstance(value, list) and len(value) > 20)


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return ", ".join(f"{each:.4g}" if isinstance(each, float) else str(each) for each in value) if len(value) <= 20 else ""
    return "" if value is None else value
