"""The section `data` of an experiment, and the settings of a tokenizer's training."""

from __future__ import annotations

from typing import Literal

from perceiver.config.core import Config, UserError, check_positive, home


class DataConfig(Config):
    """Where the data comes from, how it is prepared, and how it is shuffled."""

    source: str = ""
    """A named data set (see docs/data.md), a hub name ("hub:NAME[:CONFIG]"), your own files (a file, folder or glob), or your own code
    that yields examples (FILE.py:NAME or MODULE:NAME, see perceiver/data/examples.py)."""
    mixture: tuple[str, ...] = ()
    """Several sources in place of `source`, each as SOURCE=WEIGHT (c4=0.7 wikitext-103-raw=0.3): rows of a batch in these
    shares, each source in its own order, over and over; validation metrics of each."""
    val_source: str | None = None
    """Like source, for validation. None: the validation split of a named data set, otherwise val-fraction of the training data."""
    val_fraction: float = 0.05
    """Share of documents (or images) held out for validation where the source has no validation split."""
    stratify: bool = True
    """Hold out the same share of every class for validation (labelled data); False: hold out rows at random, whatever their
    class."""
    group_column: str | None = None
    """Column, such as a patient or an author, whose rows with one value stay together: all for validation or all for training."""
    time_column: str | None = None
    """Column of dates (2026-01-31, with or without a time) or numbers, the latest of which are held out for validation."""
    val_fold: int | None = None
    """Fold that is held out for validation, of sounds whose table has a column fold; None: the greatest."""
    text_column: str = "text"
    """Column of tables (.jsonl, .json, .csv, .tsv, .arrow, .parquet) that holds the text."""
    label_column: str = "label"
    """Column that holds the label, for classification; of rows with any number of classes a list, or names separated by | or ;."""
    image_size: int | None = None
    """Pictures are scaled until their shorter side has this many pixels, and the square in their middle is cut out; None: they are taken
    as they are, and all must have one size."""
    long_texts: Literal["cut", "split", "refuse"] = "cut"
    """What to do with labelled texts that are longer than the model's input. cut: keep their beginning; split: make each part a row
    of its own with the same label; refuse: stop with an error that names the first."""
    encoding: str = "utf-8"
    """Encoding of text files, .csv and .jsonl: utf-8, utf-16, latin-1, or another that Python knows."""
    tokenizer: str = "bytes"
    """"bytes" (UTF-8, 262 ids), the path of a SentencePiece model or of a tokenizer.json (Hugging Face), or that of a model on the hub
    (hub:NAME or hub:NAME@REVISION)."""
    special_tokens: Literal["text", "tokens"] = "text"
    """What the name of a special token in a text, such as [MASK] or `<|im_end|>`, is: text like any other; or that token, for texts that
    were written with them."""
    prepare: Literal["shards", "stream"] = "shards"
    """shards: all text becomes ids before the training; stream: training text does while training, and only the files' sizes are
    looked at before (language models; validation data are shards all the same)."""
    on_error: Literal["raise", "skip"] = "raise"
    """What a bad input file or row does: stop with its place, or be skipped and counted."""
    rows_per_block: int = 256
    """Rows of one parquet row group, the unit that is read and shuffled as one."""
    blocks_per_shard: int = 64
    """Row groups of one shard file."""
    shuffle_window_blocks: int | None = None
    """Number of blocks whose rows are shuffled together; blocks themselves are permuted over the whole epoch. None: 128 divided by the
    lanes, or all of a data set of at most 16 blocks."""
    lanes: int | None = None
    """Largest number of positions in the epoch's order that a global batch takes its rows from; None: as many as the global batch has
    rows, up to 512 (see docs/data.md)."""
    balance: int | None = None
    """Draw training rows of all classes equally often, rows of rare ones again and of frequent ones not all in an epoch; the number is how
    often a row may come in an epoch at most (10, say). None: each row once."""
    root: str = ""
    """Folder that prepared data sets are written to and found in; "": $PERCEIVER_HOME/data."""

    @property
    def root_path(self) -> str:
        return self.root or str(home() / "data")

    def check(self, where: str) -> None:
        check_positive(self, where, "rows_per_block", "blocks_per_shard", "shuffle_window_blocks", "lanes")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"{where}val-fraction is {self.val_fraction} and must be at least 0 and below 1")
        check_positive(self, where, "image_size")
        if self.balance is not None and self.balance < 2:
            raise UserError(f"--{where}balance is {self.balance} and must be at least 2, or left out: rows of rare classes come again")
        self.check_encoding(where)
        if self.time_column is not None and self.group_column is not None:
            raise UserError(f"--{where}time-column and --{where}group-column are both given: leave one out")

    def check_encoding(self, where: str = "data.") -> None:
        """Raises UserError where the encoding is none of text."""
        try:
            "a".encode(self.encoding)
        except (LookupError, ValueError):  # a name with a null character is the latter
            raise UserError(
                f"--{where}encoding is {self.encoding!r}, which Python does not know: utf-8, utf-16, latin-1 and cp1252 are common"
            ) from None


class TokenizerTraining(Config):
    """Training of a tokenizer (`ray_jobs.train_tokenizer`): OUT that ends in .json is a tokenizer.json of Hugging Face's library, any
    other a SentencePiece model.
    """

    data: DataConfig
    """The text: source, text_column, on_error; what val_source and val_fraction hold out for validation is left out."""
    vocab_size: int = 32_000
    """Number of ids, those of single bytes (or letters) and of special pieces among them."""
    model_type: Literal["unigram", "bpe", "wordpiece"] = "unigram"
    """Unigram language model (arXiv 1804.10959); byte pair encoding, in a .json of bytes as GPT-2's; or, in a .json alone, WordPiece as
    BERT's."""
    character_coverage: float = 0.9995
    """Share of the sample's characters that may get pieces of their own; the others are written as bytes (of WordPiece: are unknown)."""
    sample_megabytes: int = 100
    """Text that the pieces are learned from, at most; the trainer takes about 25 times as much memory."""
    read_megabytes: int = 2_000
    """Input that the sample is drawn from, at most: files or parts of files, drawn over the whole source (as stored, packed)."""
    seed: int = 0
    """Seed of both draws."""
    address: str | None = None
    """Ray cluster to join; None: the one this process runs in, else $RAY_ADDRESS, else a new local one."""
