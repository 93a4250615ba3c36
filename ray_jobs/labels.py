"""`perceiver tag RUN TAG ...` and `perceiver note RUN TEXT`: tags and a note, to find a run by and to remember it."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace

from perceiver.config import UserError
from perceiver.housekeeping import read_labels, save_labels
from perceiver.runs import Run
from perceiver.terminal import CommandParser
from ray_jobs.cli import main_entry, refuse_empty


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in ("tag", "note"):
        raise UserError("say what to do: tag or note")
    action, *rest = argv
    return _tag(rest) if action == "tag" else _note(rest)


def _tag(argv: list[str]) -> int:
    parser = CommandParser(
        prog="perceiver tag",
        description="Adds tags to a run, removes them (--remove), or prints them. perceiver runs --tag TAG finds it.",
    )
    parser.add_argument("run", help="folder of a run, or its name among those of $PERCEIVER_HOME")
    parser.add_argument("tags", nargs="*", metavar="TAG", help="tags; none: print those that it has")
    parser.add_argument("--remove", action="store_true", help="take these tags from the run")
    args = parser.parse_args(argv)
    refuse_empty(args, ("run", "tags"))
    run = Run.open(args.run)
    labels = read_labels(run)
    for tag in args.tags:
        if not re.fullmatch(r"[\w.:/+-]{1,100}", tag):
            raise UserError(f"tag {tag!r} must be a word of at most 100 letters, digits and ._:/+-")
        if args.remove and tag not in labels.tags:
            raise UserError(f"run {run.name} has no tag {tag!r}; it has {', '.join(labels.tags) or 'none'}")
    if args.remove and not args.tags:
        raise UserError("--remove needs the tags to remove")
    if args.tags:
        tags = set(labels.tags) - set(args.tags) if args.remove else {*labels.tags, *args.tags}
        labels = replace(labels, tags=tuple(sorted(tags)))
        save_labels(run, labels)
    print(f"{run.name}: {', '.join(labels.tags) or 'no tags'}")
    return 0


def _note(argv: list[str]) -> int:
    parser = CommandParser(prog="perceiver note", description="Writes a note on a run in place of the one before, or prints it.")
    parser.add_argument("run", help="folder of a run, or its name among those of $PERCEIVER_HOME")
    parser.add_argument("text", nargs="*", metavar="TEXT", help='the note; "": remove it; none: print it')
    args = parser.parse_args(argv)
    refuse_empty(argparse.Namespace(run=args.run), ("run",))
    run = Run.open(args.run)
    labels = read_labels(run)
    if args.text:
        labels = replace(labels, note=" ".join(args.text).strip())
        save_labels(run, labels)
    print(f"{run.name}: {labels.note or 'no note'}")
    return 0


if __name__ == "__main__":
    main_entry(main)
