"""The section `data` of an experiment, and the settings of a tokenizer's training."""

from __future__ import annotations

from typing import Literal

from perceiver.config.checks import check_positive
from perceiver.config.core import Config, UserError, home

TEXT_LENGTH = 256
"""Tokens of a text in a column of a table that go into a model, unless its configuration has another number."""


class DataConfig(Config):
    """Where the data comes from, how it is prepared, and how it is shuffled."""

    source: str = ""
    """A named data set (docs/data.md lists them), a data set on the hub ("hub:NAME[:CONFIG]"), a file, folder or glob of your own, or code
    of your own that yields examples (FILE.py:NAME or MODULE:NAME, see perceiver/data/examples.py)."""
    mixture: tuple[str, ...] = ()
    """Several sources in place of `source`, each as SOURCE=WEIGHT (c4=0.7 wikitext-103-raw=0.3). Each batch has rows of all in these
    shares. Each source keeps its own order and starts again at its end; validation measures each."""
    val_source: str | None = None
    """Source of the validation data. None: the validation split of a named data set, otherwise val-fraction of the training data."""
    val_fraction: float = 0.05
    """Share of documents (or images) to hold out for validation if the source has no validation split."""
    stratify: bool = True
    """Hold out the same share of every class (labelled data). False: hold out rows whatever their class."""
    group_column: str | None = None
    """Column, such as a patient or an author. Rows with the same value stay together: all are for training or all for validation."""
    time_column: str | None = None
    """Column of dates (2026-01-31, with or without a time) or numbers; the latest rows are held out for validation."""
    val_fold: int | None = None
    """Fold to hold out for validation, for sounds whose table has a column fold; None: the greatest."""
    text_column: str = "text"
    """Column of tables (.jsonl, .json, .csv, .tsv, .arrow, .parquet) that holds the text."""
    label_column: str = "label"
    """Column with the label, for classification. Where a row may have several classes: a list, or names separated by | or ;."""
    image_size: int | None = None
    """Scale pictures until their shorter side has this many pixels, and cut out the square in the middle. None: leave them as they are;
    all must then have the same size."""
    long_texts: Literal["cut", "split", "stride", "refuse"] = "cut"
    """What to do with labelled texts that are longer than the model's input. cut: keep their beginning; split: make each part a row of
    its own with the same label; stride: the same, overlapping; refuse: stop and name the first such text."""
    text_stride: int | None = None
    """With long-texts stride: tokens between the beginnings of two parts of a text. None: half of what the model takes."""
    encoding: str = "utf-8"
    """Encoding of text files, .csv and .jsonl: utf-8, utf-16, latin-1, or another that Python knows."""
    tokenizer: str = "bytes"
    """"bytes" (UTF-8, 262 ids), the path of a SentencePiece model or of a tokenizer.json (Hugging Face), or a tokenizer on the hub
    (hub:NAME or hub:NAME@REVISION)."""
    special_tokens: Literal["text", "tokens"] = "text"
    """How to read the name of a special token in a text, such as [MASK] or `<|im_end|>`. text: as ordinary text; tokens: as that token,
    for texts that were written with them."""
    prepare: Literal["shards", "stream"] = "shards"
    """shards: tokenize all text before the training. stream: tokenize the training text while training, and look only at the sizes of its
    files before (language models only; validation data is prepared as shards in any case)."""
    duplicates: Literal["keep", "skip", "refuse"] = "keep"
    """What to do with rows that have the content of another one (their number is said in any case). keep: take them; skip: leave them
    out, those for training where one for validation has the content, too; refuse: stop and say how many there are."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do about an unreadable input file or row. raise: stop and name it; skip: leave it out and count it."""
    rows_per_block: int = 256
    """Rows of a block (a Parquet row group), which is read and shuffled as a whole."""
    blocks_per_shard: int = 64
    """Blocks of a shard file."""
    shuffle_window_blocks: int | None = None
    """Number of blocks whose rows are shuffled together. (The blocks themselves are permuted over the whole epoch.) None: 128 divided by
    the lanes, or all blocks if the data set has at most 16."""
    lanes: int | None = None
    """Largest number of lanes, parallel streams of the epoch's order, from which a global batch takes equal parts. None: as many as the
    global batch has rows, up to 512 (see docs/data.md)."""
    balance: int | None = None
    """Draw training rows of all classes equally often, and a single row at most this many times in an epoch (10, say). Rows of rare
    classes are repeated, and frequent classes show only some of their rows in each epoch. None: every row once."""
    root: str = ""
    """Folder for prepared data sets; "": $PERCEIVER_HOME/data."""

    @property
    def root_path(self) -> str:
        return self.root or str(home() / "data")

    def check(self, where: str) -> None:
        check_positive(self, where, "rows_per_block", "blocks_per_shard", "shuffle_window_blocks", "lanes")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"{where}val-fraction is {self.val_fraction} and must be at least 0 and below 1")
        check_positive(self, where, "image_size", "text_stride")
        if self.balance is not None and self.balance < 2:
            raise UserError(f"--{where}balance is {self.balance} and must be at least 2, or left out: rows of rare classes come again")
        self.check_encoding(where)
        if self.text_stride is not None and self.long_texts != "stride":
            raise UserError(
                f"--{where}text-stride is {self.text_stride}, and --{where}long-texts is {self.long_texts}: give stride, or leave it out"
            )
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
    """Trains a tokenizer. If OUT ends in .json, it is a tokenizer.json of Hugging Face's library, otherwise a SentencePiece
    model.
    """

    data: DataConfig
    """The text to learn from: source, text_column, on_error. Documents that val_source or val_fraction hold out for validation are left
    out."""
    vocab_size: int = 32_000
    """Number of ids, including single bytes (or letters) and special pieces."""
    model_type: Literal["unigram", "bpe", "wordpiece"] = "unigram"
    """unigram: a unigram language model (arXiv 1804.10959). bpe: byte pair encoding; in a .json on bytes, as GPT-2's. wordpiece: as
    BERT's, for a .json only."""
    character_coverage: float = 0.9995
    """Share of the sample's characters that may get pieces of their own. The others are written as bytes (WordPiece: are unknown)."""
    sample_megabytes: int = 100
    """Largest amount of text to learn from, in MB. The trainer takes about 25 times as much memory."""
    read_megabytes: int = 2_000
    """Largest amount of input to draw that text from, in MB as stored: files or parts of files, spread over the whole source."""
    seed: int = 0
    """Seed for both draws."""
    address: str | None = None
    """Ray cluster to join; None: the one this process runs in, else $RAY_ADDRESS, else a new local one."""
