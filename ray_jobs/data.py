"""`perceiver data SOURCE [--text-column NAME] [--label-column NAME] [--html FILE]`: shows what data
contains, before anything is prepared, and the command that trains on it. For a run, it shows the data that it was trained on.
"""

from __future__ import annotations

import reprlib
import shlex
from collections import Counter
from pathlib import Path

from perceiver.config import DataConfig, UserError
from perceiver.data.examples import is_code
from perceiver.data.examples_shown import text_begin
from perceiver.data.files import format_of, list_files
from perceiver.data.picture_folders import names_pictures, picture_folder
from perceiver.data.sources import NAMED, is_path, resolve
from perceiver.datasets import Dataset
from perceiver.disk import local_file
from perceiver.inference.frames import is_flow
from perceiver.runs import Run
from perceiver.terminal import CommandParser, number_of, summary
from ray_jobs.cli import main_entry, refuse_empty
from ray_jobs.data_code import of_code
from ray_jobs.data_found import Found, shown_counts
from ray_jobs.data_media import flows_found, pictures_found, sounds_found
from ray_jobs.data_page import Facts, page_of
from ray_jobs.data_tables import TABLES, table_found
from ray_jobs.data_time import time_lines
from ray_jobs.program import program

_STATS = {
    "shared_documents": "validation rows that occur in training",
    "repeated": "rows with the content of another one",
    "groups": "groups",
}
"""Counts of a manifest that are shown, and what they count."""


NO_TEXT = "\ufffd"
"""What stands for bytes that are no text."""
_BEGINS = 8
"""Files of text whose begins a page shows."""


def add_encoding(parser: CommandParser) -> None:
    """Adds the option that the readers' messages name."""
    help_text = "encoding of text, such as utf-16 or latin-1 (default: utf-8)"
    parser.add_argument("--data.encoding", dest="encoding", default="utf-8", metavar="NAME", help=help_text)


def main(argv: list[str]) -> int:
    parser = CommandParser(prog=program("ray_jobs.data"), description=summary(__doc__))
    parser.add_argument("source", help="a file, a folder or a glob; code that yields examples, FILE.py:NAME; or a run")
    parser.add_argument("--text-column", help="column with the text (default: text, or the one with the most text)")
    parser.add_argument("--label-column", help="column with the class (default: label, or one with few distinct values)")
    add_encoding(parser)
    parser.add_argument("--html", help="also write this as an HTML page, with charts and examples, to this file")
    args = parser.parse_args(argv)
    refuse_empty(args, ("source",))
    DataConfig(encoding=args.encoding).check_encoding()
    run = Run.find(args.source) if is_path(args.source) or "/" not in args.source else None
    here = Path(args.source).expanduser()
    if run is not None and here.exists() and here.absolute() != run.folder:
        run = None  # data of this name in the working folder, beside a run elsewhere that has it, too
    if args.html is not None:
        args.html = str(local_file("html", args.html))
        write_page(args.source, args.html, args.text_column, args.label_column, run is not None, args.encoding)
        return 0
    print("\n".join(of_run(run) if run is not None else look(args.source, args.text_column, args.label_column, args.encoding)))
    return 0


def write_page(
    source: str, file: str, text: str | None = None, label: str | None = None, is_run: bool = False, encoding: str = "utf-8"
) -> None:
    """Writes what a source holds to an HTML file, and says where.

    Raises:
        UserError: see `find`; or the file cannot be written, or the source is a run.
    """
    if is_run:
        raise UserError(f"--html is {file}, and {source} is a run: `perceiver show {source} --html {file}` makes its page")
    found = find(source, text, label, encoding)
    lines = [*found.lines, *time_lines(found.preset, found.words)]
    try:
        Path(file).write_text(page_of(source, lines, found.commands, found.facts), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html is {file}, which cannot be written ({error.strerror or error})") from None
    print("\n".join([*lines, "", *found.commands, "", f"page: {file}"]))


def look(source: str, text: str | None = None, label: str | None = None, encoding: str = "utf-8") -> list[str]:
    """What a source holds, line by line, and the commands that train on it. Raises UserError: see `find` and `of_code`."""
    if is_code(source):
        return of_code(source)
    found = find(source, text, label, encoding)
    return [*found.lines, *time_lines(found.preset, found.words), "", *found.commands]


def of_run(run: Run) -> list[str]:
    """What a run was trained on, line by line.

    Raises:
        UserError: its data is not there any more.
    """
    experiment, digest = run.load()
    dataset = Dataset.find(experiment, digest)
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
                lines.append(f"  classes: {shown_counts(dict(zip(classes, labels, strict=False)))}")
        stats = manifest.stats
        lines += [f"{what}: {stats[name]:,}" for name, what in _STATS.items() if stats.get(name)]
        lines += [
            f"longer than the model takes: {found['texts']:,} {name} texts, {found['lost']:,} of {found['tokens']:,} tokens lost"
            for name, found in stats.get("long_texts", {}).items()
        ]
        lines += [f"left out as duplicates: {count:,} {name} rows" for name, count in stats.get("duplicates", {}).items() if count]
        lines += [f"held out {how}"] if (how := stats.get("held_out")) else []
        lines += [f"skipped: {count:,} x {reason}" for reason, count in stats.get("skipped", {}).items()]
    return [*lines, "", f"look at the source: {shlex.join(['perceiver', 'data', data.source])}"] if is_path(data.source) else lines


def _begins_as_midi(path: str) -> bool:
    """Whether a file of that name may be MIDI, as far as its first bytes tell; of files elsewhere, and packed ones, that is not asked."""
    if "://" in path or not path.lower().endswith((".mid", ".midi")):
        return True
    with open(path, "rb") as file:
        return file.read(4) == b"MThd"


def find(source: str, text: str | None = None, label: str | None = None, encoding: str = "utf-8") -> Found:
    """What a source holds.

    Args:
        source: a file, folder or glob.
        text, label: the columns of texts and classes, where they are not to be guessed.
        encoding: of text.

    Raises:
        UserError: it is not there, cannot be read, or holds nothing that is known.
    """
    if is_code(source):
        raise UserError(f"{source} is code, of which there is no page: leave --html out")
    listed = list_files(source, "SOURCE", NAMED)
    if not sum(size for _, _, size in listed):
        raise UserError(f"{source} is empty: {number_of(len(listed), 'file')} of 0 bytes")
    formats = Counter(form for path, _, _ in listed if (form := format_of(path)) is not None)
    lines = [f"{source}: {number_of(len(listed), 'file')}, {sum(size for _, _, size in listed):,} bytes"]
    single = len(listed) == 1 and not listed[0][1]
    if not single and any(is_flow(inner) for _, inner, _ in listed):
        return flows_found(lines, source)
    pictures = bool(formats.keys() & {"picture", "idx", "tar"}) and not single or formats.keys() <= {"tar"} and bool(formats)
    if (
        pictures
        or single
        and names_pictures(listed[0][0], source)
        or (not single and picture_folder(listed, "data", source, label or "label"))
    ):
        return pictures_found(lines, source, label or "label")
    given = ["--data.source", source]
    if "sound" in formats:
        return sounds_found(lines, source, label)
    if "midi" in formats:
        foreign = [path for path, _, _ in listed if format_of(path) == "midi" and not _begins_as_midi(path)]
        if len(foreign) == formats["midi"]:
            raise UserError(f"{foreign[0]} is no MIDI file, whatever its name: it does not begin with MThd")
        given += ["--data.on-error", "skip"] if foreign else []
        lines += [f"{number_of(len(foreign), 'file')} left out, as no MIDI file begins so: {foreign[0]}"] if foreign else []
        return Found([*lines, number_of(formats["midi"] - len(foreign), "MIDI file")], "sam-small", given)
    if formats.keys() & set(TABLES):
        return table_found(lines, source, text, label, encoding)
    if formats.keys() & {"text", "wikitext"}:
        texts = resolve(DataConfig(source=source, val_fraction=0.05, encoding=encoding), "tokens").files
        given += ["--data.encoding", encoding] if encoding != "utf-8" else []
        begins = {file.name: text_begin(file) for file in texts[:_BEGINS]}
        strange = [name for name, begin in begins.items() if NO_TEXT in begin]
        if len(strange) == len(begins) and all(10 * begin.count(NO_TEXT) > len(begin) for begin in begins.values()):
            raise UserError(f"{strange[0]} is no text in UTF-8: --encoding names another encoding, such as latin-1, if it is text at all")
        size = sum(file.size for file in texts)
        sizes = sorted(file.size for file in texts)
        each = f", {sizes[0]:,} to {sizes[-1]:,} bytes each" if len(texts) > 1 else ""
        lines.append(f"{number_of(len(texts), 'file')} of text without classes, {size:,} bytes{each}")
        lines += [f"such as {texts[0].name}: {reprlib.repr(begin)}"] if (begin := begins[texts[0].name]) else []
        if strange:
            lines.append(f"not in UTF-8: {strange[0]}; --data.encoding names another encoding, such as latin-1 or cp1252")
        return Found(lines, "clm-wikitext-small", given, facts=Facts(begins=list(begins.items())))
    raise UserError(f"{source} has no pictures, sounds, texts, tables, MIDI files or frames with their optical flow")


if __name__ == "__main__":
    main_entry(main)
