"""`python -m ray_jobs.train_tokenizer OUT --data.source SOURCE [--vocab-size N] [--field value ...]`: a tokenizer.

A SentencePiece model, or where OUT ends in .json a tokenizer.json of Hugging Face's library.

Learned from a sample of the documents of anything that `ray_jobs.preprocess` can read; written to the file OUT.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator

import pyarrow as pa
from pyarrow.fs import FileType

from perceiver.config import DataConfig, ParallelConfig, TokenizerTraining, UserError, flatten, to_dict
from perceiver.data.pieces import Piece, cut_pieces
from perceiver.data.sources import resolve
from perceiver.data.storage import open_folder, write_file
from perceiver.data.tables import Columns
from perceiver.data.tokenizers import load_tokenizer
from perceiver.data.train_huggingface import train_huggingface
from perceiver.data.train_tokenizer import Sample, check_training, choose_pieces, sample_piece, train_sentencepiece
from perceiver.disk import local_folder
from ray_jobs.cli import main_entry
from ray_jobs.logs import show_progress
from ray_jobs.overrides import override

logger = logging.getLogger("ray_jobs.train_tokenizer")  # which __name__ is not where it is run as a program

USED = ("source", "val_source", "val_fraction", "text_column", "encoding", "on_error")
"""Fields of the data's configuration that a tokenizer is made from."""
JSON = ".json"
"""Ends the name of a file that is to be a tokenizer.json."""
ROWS_SENT = 1024
"""Documents that a task sends at once."""


def main(argv: list[str]) -> int:
    argv = show_progress(argv)
    default = TokenizerTraining(data=DataConfig())
    prog = "ray_jobs.train_tokenizer OUT"
    if not argv or argv[0] in ("-h", "--help"):
        override(default, ["--help"], prog)
    if argv[0].startswith("-"):
        raise UserError(f"the first argument is {argv[0]}, it must be the file to write")
    train(argv[0], override(default, argv[1:], prog))
    return 0


def train(out: str, config: TokenizerTraining) -> None:
    """Trains a tokenizer and writes it to `out`, a local path or a URI. The same input and configuration give the same bytes.

    Raises:
        UserError: a mistake in the configuration or its source, or a fault in an input file.
    """
    started = time.monotonic()
    check(out, config)
    pieces = cut_pieces(resolve(config.data, "tokens").inputs)
    pieces = [piece for piece in pieces if any(span.file.split != "val" for span in piece.spans)]
    chosen = choose_pieces(pieces, config.read_megabytes * 10**6, config.seed)

    from ray_jobs.ray_env import connect

    sample, done = Sample(config.sample_megabytes * 10**6), 0
    with connect(ParallelConfig(address=config.address)):
        for rows, ends in _samples(chosen, config):
            for key, text in rows:
                sample.add(key, text)
            done += ends
            if ends:
                logger.info(f"  pieces {done:,}/{len(chosen):,} (of {len(pieces):,}), sample {sample.size / 1e6:.1f} MB")
    texts = [text for _, text in sample.items()]
    if not texts:
        raise UserError(f"data.source {config.data.source} has no text to train on: everything in it is empty or was skipped")
    logger.info(f"learning {config.vocab_size:,} pieces from {len(texts):,} documents, {sample.size / 1e6:.1f} MB (one thread)")
    model = train_huggingface(texts, config) if out.endswith(JSON) else train_sentencepiece(texts, config)
    folder, name = place(out)
    write_file(folder, name, model)
    tokenizer = load_tokenizer(out)
    ids = sum(len(tokenizer.encode(text)) for text in texts[:100])
    size = sum(len(text.encode()) for text in texts[:100])
    sha256 = hashlib.sha256(model).hexdigest()
    logger.info(f"wrote {out} after {time.monotonic() - started:.0f} s: sha256 {sha256[:12]}, {size / ids:.2f} bytes an id")
    logger.info(f"use it: --data.tokenizer {out} (and a model whose vocab-size is {config.vocab_size:,} or more)")


def check(out: str, config: TokenizerTraining) -> None:
    """Checks what can be known before anything is read.

    Raises:
        UserError: a field that cannot be right or has no part in this.
    """
    check_training(config)
    if config.model_type == "wordpiece" and not out.endswith(JSON):
        raise UserError(f"model-type is wordpiece, which SentencePiece has not, and OUT is {out}: it must end in {JSON}")
    if not config.data.source:
        raise UserError("data.source is empty: name a data set or your own files (see docs/data.md)")
    if not out.strip():
        raise UserError("OUT is empty: it must be the file to write")
    if "\0" in out:
        raise UserError(f"OUT is {out!r} and holds a NUL character, which no path can")
    if out.endswith("/"):
        raise UserError(f"{out} is a folder, it must be the file to write")
    folder, name = place(out)
    if "://" not in out:
        local_folder("OUT", folder)
    filesystem, path = open_folder(folder)
    if filesystem.get_file_info(f"{path}/{name}").type != FileType.NotFound:
        raise UserError(f"{out} exists already: choose another file, or remove it first")
    given, default = flatten(to_dict(config.data)), flatten(to_dict(DataConfig()))
    useless = [name for name in given if name not in USED and given[name] != default[name]]
    if useless:
        raise UserError(f"data.{useless[0].replace('_', '-')} has no part in training a tokenizer, only {', '.join(USED)} do")


def place(out: str) -> tuple[str, str]:
    """Folder and name of the file to write."""
    folder, _, name = out.rpartition("/")
    return folder or ("/" if out.startswith("/") else "."), name


def _samples(pieces: list[Piece], config: TokenizerTraining) -> Iterator[tuple[list[tuple[int, str]], bool]]:
    """The samples of all pieces, one task a piece, by Ray Data, as they come: some (key, text), and whether a piece ends.

    Raises:
        UserError: the first one that a task raised (and returned as data: Ray would wrap the exception in its own).
    """
    import ray

    columns = Columns(text=config.data.text_column, label=None)
    settings = (columns, config.data.on_error == "skip", config.data.val_fraction, config.sample_megabytes * 10**6, config.seed)

    def run(batch: pa.Table) -> Iterator[pa.Table]:
        try:
            rows, error = sample_piece(pieces[batch["item"][0].as_py()], *settings).items(), ""
        except UserError as fault:
            rows, error = [], str(fault)
        for first in range(0, max(len(rows), 1), ROWS_SENT):
            part = [{"key": key, "text": text} for key, text in rows[first : first + ROWS_SENT]]
            yield pa.table({"rows": [part], "error": [error], "ends": [first + ROWS_SENT >= len(rows)]}, schema=_SENT)

    plan = ray.data.from_items([{"item": i} for i in range(len(pieces))], override_num_blocks=len(pieces))
    for table in plan.map_batches(run, batch_size=1, batch_format="pyarrow").iter_batches(batch_size=1, batch_format="pyarrow"):
        (sent,) = table.to_pylist()
        if sent["error"]:
            raise UserError(sent["error"])
        yield [(row["key"], row["text"]) for row in sent["rows"]], sent["ends"]


_SENT = pa.schema(
    [
        ("rows", pa.list_(pa.struct([("key", pa.uint64()), ("text", pa.large_string())]))),
        ("error", pa.string()),
        ("ends", pa.bool_()),
    ]
)
"""What a task sends at once: documents, or the fault that it met, and whether it ends."""


if __name__ == "__main__":
    main_entry(main)
