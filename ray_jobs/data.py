"""`perceiver data SOURCE [--text-column NAME] [--label-column NAME] [--html FILE]`: shows what data
holds, before anything is prepared, and the command that trains on it. With a run, it shows what that run was trained on.
"""

from __future__ import annotations

import reprlib
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from perceiver.config import DataConfig, UserError
from perceiver.data.examples import is_code
from perceiver.data.files import format_of, list_files
from perceiver.data.labels import class_order, label_counts, picture_sizes
from perceiver.data.picture_folders import picture_folder
from perceiver.data.sound_lengths import MOST_LOOKED_AT, sound_infos
from perceiver.data.sources import NAMED, Source, is_path, resolve
from perceiver.data.survey import LENGTHS, TableSurvey, label_column, labels_column, survey_columns, survey_texts, table_rows, text_column
from perceiver.datasets import Dataset
from perceiver.runs import Run
from perceiver.terminal import CommandParser, number_of, summary
from ray_jobs.cli import main_entry, refuse_empty
from ray_jobs.data_code import of_code
from ray_jobs.data_page import Facts, page_of
from ray_jobs.program import program

_TABLES = ("csv", "jsonl", "parquet", "arrow")
_CONTEXT = 254
"""Bytes of a text that txt-clf takes."""
_STATS = {
    "shared_documents": "validation rows that occur in training",
    "repeated": "rows with the content of another one",
    "groups": "groups",
}
"""Counts of a manifest that are shown, and what they count."""
_SHOWN = 20
"""Classes and columns that are listed, at most."""


@dataclass(frozen=True)
class Found:
    """What a source holds, and what can be trained on it."""

    lines: list[str]
    """For a person."""
    preset: str
    words: list[str]
    """Fields that the preset is given, as on a command line."""
    prepared_first: bool = False
    """Whether the data has to be prepared by a command of its own."""
    open: str = ""
    """What the user has to add, if anything."""
    facts: Facts = field(default_factory=Facts)
    """What a page shows besides."""

    @property
    def commands(self) -> list[str]:
        """The commands that prepare it and train on it."""
        train = f"train: {_command(self.preset, self.words)}{self.open}"
        return (
            [f"prepare: {_command(self.preset, self.words, 'preprocess')}", train.replace(": ", ":   ", 1)]
            if self.prepared_first
            else [train]
        )


def main(argv: list[str]) -> int:
    parser = CommandParser(prog=program("ray_jobs.data"), description=summary(__doc__))
    parser.add_argument("source", help="a file, a folder or a glob; code that yields examples, FILE.py:NAME; or a run")
    parser.add_argument("--text-column", help="column with the text (default: text, or the one with the most text)")
    parser.add_argument("--label-column", help="column with the class (default: label, or one that has few different values)")
    parser.add_argument("--html", help="file to write a page to: the same, with charts, examples and pictures")
    args = parser.parse_args(argv)
    refuse_empty(args, ("source",))
    run = Run.find(args.source) if is_path(args.source) or "/" not in args.source else None
    if args.html is not None:
        write_page(args.source, args.html, args.text_column, args.label_column, run is not None)
        return 0
    print("\n".join(of_run(run) if run is not None else look(args.source, args.text_column, args.label_column)))
    return 0


def write_page(source: str, file: str, text: str | None = None, label: str | None = None, is_run: bool = False) -> None:
    """Writes what a source holds to an HTML file, and says where.

    Raises:
        UserError: see `find`; or the file cannot be written, or the source is a run.
    """
    if is_run:
        raise UserError(f"--html is {file}, and {source} is a run: `perceiver show {source} --html {file}` makes its page")
    found = find(source, text, label)
    try:
        Path(file).write_text(page_of(source, found.lines, found.commands, found.facts), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html is {file}, which cannot be written ({error.strerror or error})") from None
    print("\n".join([*found.lines, "", *found.commands, "", f"page: {file}"]))


def look(source: str, text: str | None = None, label: str | None = None) -> list[str]:
    """What a source holds, line by line, and the commands that train on it. Raises UserError: see `find` and `of_code`."""
    if is_code(source):
        return of_code(source)
    found = find(source, text, label)
    return [*found.lines, "", *found.commands]


def of_run(run: Run) -> list[str]:
    """What a run was trained on, line by line.

    Raises:
        UserError: its data is not there any more.
    """
    experiment, _ = run.load()
    dataset = Dataset.find(experiment)
    data, names = experiment.data, getattr(experiment.task, "class_names", None) or ()
    lines = [f"{run.name}: {' and '.join(data.mixture) or data.source}, prepared in {dataset.folder}"]
    for part in dataset.parts:
        manifest = part.manifest
        if part.name:
            lines.append(f"{part.name}: {part.share:.1%} of each batch")
        for name, split in manifest.splits.items():
            counts = {"tokens": split.tokens, "bytes": split.bytes, "words": split.words, "documents": split.documents}
            more = "".join(f", {count:,} {what}" for what, count in counts.items() if count)
            lines.append(f"{name}: {number_of(split.rows, 'row')}{more}")
            if labels := manifest.stats.get("labels", {}).get(name):
                classes = names if len(names) >= len(labels) else tuple(map(str, range(len(labels))))
                lines.append(f"  classes: {_counts(dict(zip(classes, labels, strict=False)))}")
        stats = manifest.stats
        lines += [f"{what}: {stats[name]:,}" for name, what in _STATS.items() if stats.get(name)]
        lines += [
            f"longer than the model takes: {found['texts']:,} {name} texts, {found['lost']:,} of {found['tokens']:,} tokens lost"
            for name, found in stats.get("long_texts", {}).items()
        ]
        lines += [f"held out {stats['held_out']}"] * ("held_out" in stats)
        lines += [f"skipped: {count:,} x {reason}" for reason, count in stats.get("skipped", {}).items()]
    return [*lines, "", f"look at the source: {shlex.join(['perceiver', 'data', data.source])}"] if is_path(data.source) else lines


def find(source: str, text: str | None = None, label: str | None = None) -> Found:
    """What a source holds.

    Raises:
        UserError: it is not there, cannot be read, or holds nothing that is known.
    """
    if is_code(source):
        raise UserError(f"{source} is code, of which there is no page: leave --html out")
    listed = list_files(source, "SOURCE", NAMED)
    formats = Counter(form for path, _, _ in listed if (form := format_of(path)) is not None)
    lines = [f"{source}: {number_of(len(listed), 'file')}, {sum(size for _, _, size in listed):,} bytes"]
    single = len(listed) == 1 and not listed[0][1]
    pictures = bool(formats.keys() & {"picture", "idx", "tar"}) and not single or formats.keys() <= {"tar"} and bool(formats)
    if pictures or (not single and picture_folder(listed, "data", source, label or "label")):
        return _pictures(lines, source, label or "label")
    given = ["--data.source", source]
    if "sound" in formats:
        return _sounds(lines, source, label)
    if "midi" in formats:
        return Found([*lines, number_of(formats["midi"], "MIDI file")], "sam-small", given, prepared_first=True)
    if formats.keys() & set(_TABLES):
        return _table(lines, source, text, label)
    if formats.keys() & {"text", "wikitext"}:
        texts = resolve(DataConfig(source=source, val_fraction=0.05), "tokens").files
        size = sum(file.size for file in texts)
        what = f"{number_of(len(texts), 'file')} of text without classes, {size:,} bytes"
        return Found([*lines, what], "clm-wikitext-small", given, prepared_first=True)
    raise UserError(f"{source} has no pictures, sounds, texts, tables or MIDI files")


def _pictures(lines: list[str], source: str, label: str) -> Found:
    found = resolve(DataConfig(source=source, label_column=label, val_fraction=0.1), "images")
    sizes = picture_sizes(found, skip=True)
    sides = sorted({shape[:2] for shape in sizes}, key=lambda side: side[0] * side[1])
    size = f"{sides[0][0]} x {sides[0][1]}" + (f" to {sides[-1][0]} x {sides[-1][1]}, {len(sides):,} sizes" if len(sides) > 1 else "")
    grey = sum(count for shape, count in sizes.items() if shape[2] == 1)
    lines = [*lines, f"pictures: {size}; {grey:,} grey, {sum(sizes.values()) - grey:,} in colour"]
    classes = class_counts(found, label)
    lines = [*lines, *_classes(classes)]
    words = ["--data.source", source, *(["--data.label-column", label] if label != "label" else [])]
    return Found(lines, "img-clf", words, facts=Facts(classes=dict(classes), pictures=found, label=label))


def _sounds(lines: list[str], source: str, label: str | None) -> Found:
    """Rates, lengths, channels and classes of sounds. In a table whose classes stand under another name, that of ESC-50 is tried, too."""
    given = [label] if label else ["label", "category", "class"]
    for column in given:
        try:
            found = resolve(DataConfig(source=source, label_column=column, val_fraction=0.1), "sounds")
            break
        except UserError:
            if column == given[-1]:
                raise
    infos = list(sound_infos(found, skip=True))
    if not infos:
        raise UserError(f"{source} has no sound that can be read, such as {found.files[0].name}")
    seconds = sorted(info.seconds for info in infos)
    rates = ", ".join(f"{rate:,} Hz ({count:,})" for rate, count in Counter(info.rate for info in infos).most_common(_SHOWN))
    channels = ", ".join(f"{number} ({count:,})" for number, count in Counter(info.channels for info in infos).most_common())
    classes = class_counts(found, column)
    lines += [
        f"sounds: {len(found.files):,}, {seconds[0]:.2f} to {seconds[-1]:.2f} s, half of them at most {seconds[len(seconds) // 2]:.2f} s",
        f"rates: {rates}; channels: {channels}",
        *_classes(classes),
    ]
    if unread := len(found.files[:: max(1, -(-len(found.files) // MOST_LOOKED_AT))]) - len(infos):
        lines.append(f"{unread:,} of them cannot be read: --data.on-error skip leaves them out")
    words = ["--data.source", source, *(["--data.label-column", column] if column != "label" else [])]
    return Found(lines, "audio-clf-small", words, facts=Facts(classes=dict(classes)))


def class_counts(found: Source, label: str) -> dict[str, Counter[str]]:
    """How often each label occurs, by split: "train", "val", or "all" where validation is held out of them."""
    train = label_counts(found, label, "train")
    splits = dict.fromkeys(file.split for file in found.inputs)
    return {
        "all" if split == "hash" else split: train if split in ("train", "hash") else label_counts(found, label, split) for split in splits
    }


def _classes(classes: Mapping[str, Counter[str]]) -> list[str]:
    """The labels of each split."""
    lines = []
    train = classes.get("train", classes.get("all", Counter()))
    for split, counts in classes.items():
        name = "all (a part is held out for validation)" if split == "all" else split
        lines.append(f"classes in {name}: {_counts({key: counts[key] for key in class_order(counts)})}")
        if new := sorted(counts.keys() - train.keys()):
            lines.append(f"  not in train: {', '.join(new)}")
    return lines


def _counts(counts: Mapping[str, int]) -> str:
    shown = ", ".join(f"{name} ({count:,})" for name, count in list(counts.items())[:_SHOWN])
    return shown + (f", ... {len(counts):,} in all" if len(counts) > _SHOWN else "")


def _table(lines: list[str], source: str, text: str | None, label: str | None) -> Found:
    files = [file for file in resolve(DataConfig(source=source), "tokens").files if file.format in _TABLES]
    found = survey_columns(files)
    if not found.rows:
        raise UserError(f"{source} has no rows")
    if (image := found.columns.get("image")) is not None and image.types.keys() & {"dict", "bytes"}:
        return _pictures([*lines, number_of(found.rows, "row")], source, label or "label")
    for given, name in (("--text-column", text), ("--label-column", label)):
        if name is not None and name not in found.columns:
            raise UserError(f"{given} is {name!r}, which {source} does not have (it has: {', '.join(found.columns)})")
    lines = [*lines, f"{number_of(found.rows, 'row')}, columns:"]
    width = max(map(len, list(found.columns)[:_SHOWN]))
    for name, column in list(found.columns.items())[:_SHOWN]:
        types = ", ".join(f"{kind} {count:,}" for kind, count in column.types.most_common())
        lines.append(f"  {name:{width}}  {types}; such as {reprlib.repr(column.example)}")
    if len(found.columns) > _SHOWN:
        lines.append(f"  ... {len(found.columns):,} in all")
    text = text or text_column(found)
    if text is None:
        return Found(lines, "tables", ["--data.source", source], open=" --task.targets COLUMN", facts=Facts(survey=found, files=files))
    survey_texts(found, (row[text] for file in files for row in table_rows(file) if isinstance(row.get(text), str)), _CONTEXT)
    lines += _texts(found, text)
    words = ["--data.source", source, *(["--data.text-column", text] if text != "text" else [])]
    if (tags := labels_column(found) if label is None else label) is not None and (counts := found.columns[tags].labels):
        lines.append(f"labels in {tags!r}, any number a row: {_counts({name: counts[name] for name in class_order(counts)})}")
        words += ["--data.label-column", tags] if tags != "label" else []
        return Found(lines, "txt-tags", words, facts=Facts(survey=found, files=files, text=text, classes={"rows": counts}))
    label = label or label_column(found, text)
    facts = Facts(survey=found, files=files, text=text, label=label)
    if label is None:
        lines = [*lines, "no column has few different values: no classes"]
        return Found(lines, "clm-wikitext-small", words, prepared_first=True, facts=facts)
    values = found.columns[label].values
    if values is not None:
        lines.append(f"classes in {label!r}: {_counts({name: values[name] for name in class_order(values)})}")
        facts.classes["rows"] = values
    return Found(lines, "txt-clf", [*words, *(["--data.label-column", label] if label != "label" else [])], facts=facts)


def _texts(found: TableSurvey, column: str) -> list[str]:
    """Lengths as a histogram, what would be cut, duplicates."""
    total, most = sum(found.lengths.values()), max(found.lengths.values(), default=1)
    lines = [f"texts in {column!r}, by their bytes:"]
    for end in (*LENGTHS, 0):
        if count := found.lengths[end]:
            name = f"to {end:,}" if end else f"over {LENGTHS[-1]:,}"
            lines.append(f"  {name:>10}  {count:>9,}  {'#' * max(1, round(40 * count / most))}")
    lines.append(f"longer than {_CONTEXT} bytes (txt-clf's context): {found.longer:,} of {total:,}; {found.cut_bytes:,} bytes would be cut")
    lines.append(f"duplicates: {found.duplicates:,}")
    return lines


def _command(preset: str, words: list[str], job: str = "train") -> str:
    return shlex.join(["perceiver", job, preset, *words])


if __name__ == "__main__":
    main_entry(main)
