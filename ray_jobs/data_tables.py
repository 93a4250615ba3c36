"""What `perceiver data` says of tables: of texts, with classes or without, and of numbers."""

from __future__ import annotations

import reprlib

from perceiver.config import DataConfig, UserError
from perceiver.config.data import TEXT_LENGTH
from perceiver.data.files import InputFile
from perceiver.data.labels import class_order
from perceiver.data.sources import resolve
from perceiver.data.survey import (
    LENGTHS,
    ColumnSurvey,
    TableSurvey,
    label_column,
    labels_column,
    survey_columns,
    survey_texts,
    target_column,
    text_column,
)
from perceiver.terminal import number_of
from ray_jobs.data_found import SHOWN, Found, class_counts, class_lines, shown_counts
from ray_jobs.data_media import pictures_found
from ray_jobs.data_page import Facts

TABLES = ("csv", "jsonl", "parquet", "arrow")
"""Formats of tables."""
_CONTEXT = 254
"""Bytes of a text that txt-clf takes."""


def table_found(lines: list[str], source: str, text: str | None, label: str | None, encoding: str) -> Found:
    """What a table, or several, has, and what can be trained on it: a classifier of texts, a language model, or a task on numbers.

    Args:
        lines: what is said of the files.
        source: as it was given.
        text, label: the columns of texts and classes, where they are not to be guessed.
        encoding: of text.

    Raises:
        UserError: it has no rows, or none that anything can be learned from.
    """
    resolved = resolve(DataConfig(source=source, encoding=encoding, val_fraction=0.1), "tokens")
    files = [file for file in resolved.files if file.format in TABLES]
    found = survey_columns(files)
    files = [file for file in files if file.path not in found.unreadable]
    if not found.rows:
        raise UserError("; ".join(found.faults.first) or f"{source} has no rows")
    if strange := [name for name in found.columns if any("\ud800" <= letter <= "\udfff" or letter == "\0" for letter in name)]:
        shown = repr(strange[0].encode(errors="surrogateescape")[:20])
        raise UserError(
            f"{files[0].name} has a column whose name is no text in UTF-8, {shown}: --encoding names another encoding, such as "
            "latin-1, if it is a table at all"
        )
    if (image := found.columns.get("image")) is not None and image.types.keys() & {"dict", "bytes"}:
        return pictures_found([*lines, number_of(found.rows, "row")], source, label or "label")
    for given, name in (("--text-column", text), ("--label-column", label)):
        if name is not None and name not in found.columns:
            raise UserError(f"{given} is {name!r}, which {source} does not have (it has: {', '.join(found.columns)})")
    lines = [*lines, f"{number_of(found.rows, 'row')}, columns:"]
    width = max(map(len, list(found.columns)[:SHOWN]))
    for name, column in list(found.columns.items())[:SHOWN]:
        types = ", ".join(f"{kind} {count:,}" for kind, count in column.types.most_common())
        numbers = column.is_number and column.low <= column.high
        shown = f"{column.low:.6g} to {column.high:.6g}, mean {column.mean:.6g}" if numbers else f"such as {reprlib.repr(column.example)}"
        lines.append(f"  {name:{width}}  {types}; {shown}; {_read_as(column, found.rows)}")
    if len(found.columns) > SHOWN:
        lines.append(f"  ... {len(found.columns):,} in all")
    words = ["--data.source", source, *(["--data.encoding", encoding] if encoding != "utf-8" else [])]
    if damaged := list(found.unreadable.values()):
        more = ", ..." if len(damaged) > SHOWN else ""
        lines.append(f"{number_of(len(damaged), 'file')} left out, as {'they' if len(damaged) > 1 else 'it'} cannot be read: "
                     f"{'; '.join(damaged[:SHOWN])}{more}")  # fmt: skip
    if damaged or found.faults.counts.total():
        words += ["--data.on-error", "skip"]
    if faults := found.faults.counts.total():
        more = ", ..." if faults > len(found.faults.first) else ""
        lines.append(f"{number_of(faults, 'row')} cannot be read: {'; '.join(found.faults.first)}{more}")
    if found.not_utf_8:
        lines.append(f"{number_of(found.not_utf_8, 'row')} not in UTF-8: --data.encoding names another encoding, such as latin-1 or cp1252")
    text = text or text_column(found)
    if text is None:
        return _numbers(lines, source, words, found, files)
    survey_texts(found, files, text, _CONTEXT)
    lines += _texts(found, text)
    own = list(words)
    words += ["--data.text-column", text] if text != "text" else []
    if (tags := labels_column(found) if label is None else label) is not None and (counts := found.columns[tags].labels):
        lines.append(f"labels in {tags!r}, any number a row: {shown_counts({name: counts[name] for name in class_order(counts)})}")
        words += ["--data.label-column", tags] if tags != "label" else []
        return Found(lines, "txt-tags", words, facts=Facts(survey=found, files=files, text=text, classes={"rows": counts}))
    label = label or label_column(found, text)
    facts = Facts(survey=found, files=files, text=text, label=label)
    if label is None:
        real = [name for name, column in found.columns.items() if column.is_quantity]
        no_classes = f", and {real[0]!r} holds real numbers, which are none" if real else ""
        lines = [*lines, f"no column has few different values: no classes{no_classes}"]
        quantity = ["--task.targets", real[0]] if real and found.columns[text].reading(found.rows) == "text" else []
        return Found(lines, "clm-wikitext-small", words, facts=facts, table_words=[*own, *quantity] if quantity else [])
    values = found.columns[label].values
    if found.columns[label].is_quantity:
        example = found.columns[label].example
        raise UserError(
            f"{source} has {example} in {label!r}, a real number: classes are whole numbers or names (--label-column names another)"
        )
    if values is not None and any(file.split == "val" for file in files):
        facts.classes.update(class_counts(resolved, label))
        lines += class_lines(facts.classes, label)
    elif values is not None:
        lines.append(f"classes in {label!r}: {shown_counts({name: values[name] for name in class_order(values)})}")
        facts.classes["rows"] = values
    beside = [name for name in _usable(found) if name not in (text, label)]
    table_words = [*own, "--task.targets", label] if beside and found.columns[text].reading(found.rows) == "text" else []
    words += ["--data.label-column", label] if label != "label" else []
    return Found(lines, "txt-clf", words, facts=facts, table_words=table_words)


def _numbers(lines: list[str], source: str, words: list[str], found: TableSurvey, files: list[InputFile]) -> Found:
    """What is learned from a table of numbers and categories: the target is guessed, and said to be."""
    target = target_column(found)
    facts = Facts(survey=found, files=files, target=target)
    inputs = [name for name in _usable(found) if name != target]
    if target is None or not inputs:
        raise UserError(f"{source} has no texts, and no two columns of which one could be learned (it has: {', '.join(found.columns)})")
    lines = [*lines, f"to predict: {target!r} (a guess: --task.targets names others), from {number_of(len(inputs), 'other column')}"]
    if left := [name for name in found.columns if name not in (*inputs, target)]:
        lines.append(f"not used: {', '.join(f'{name!r} ({_why_left(found.columns[name])})' for name in left[:SHOWN])}")
    column = found.columns[target]
    if column.values is not None and not column.types.keys() & {"float", "list"}:
        lines.append(f"classes in {target!r}: {shown_counts({name: column.values[name] for name in class_order(column.values)})}")
        facts.classes["rows"] = column.values
    return Found(lines, "tables", [*words, "--task.targets", target], is_table=True, facts=facts)


def _usable(found: TableSurvey) -> list[str]:
    """The columns that the preset `tables` takes by itself."""
    return [name for name, column in found.columns.items() if column.is_number or column.reading(found.rows) is not None]


def _read_as(column: ColumnSurvey, rows: int) -> str:
    """How the preset `tables` reads a column."""
    if column.is_number:
        return "numbers"
    if column.types.keys() - {"str", "missing"}:
        return "not read by tables"
    reading = column.reading(rows)
    if reading == "text":
        return f"text (tables takes its first {TEXT_LENGTH} tokens)"
    values = len(column.values or ())
    return f"{number_of(values, 'category', 'categories')}" if reading == "category" else f"{_why_left(column)}: left out"


def _why_left(column: ColumnSurvey) -> str:
    return "different in nearly every row" if column.values is None or len(column.values) > 1 else "the same in every row"


def _texts(found: TableSurvey, column: str) -> list[str]:
    """Lengths as a histogram, what would be cut, duplicates."""
    total, most = sum(found.lengths.values()), max(found.lengths.values(), default=1)
    lines = [f"texts in {column!r}, by their bytes:"]
    for end in (*LENGTHS, 0):
        if count := found.lengths[end]:
            name = f"to {end:,}" if end else f"over {LENGTHS[-1]:,}"
            lines.append(f"  {name:>10}  {count:>9,}  {'#' * max(1, round(40 * count / most))}")
    lines.append(f"longer than {_CONTEXT} bytes (txt-clf's context): {found.longer:,} of {total:,}; {found.cut_bytes:,} bytes would be cut")
    lines.append(f"duplicates: {found.duplicates:,}{' (--data.duplicates skip leaves them out)' if found.duplicates else ''}")
    if found.shared:
        lines.append(f"texts of validation that occur in training: {found.shared:,}")
    return lines
