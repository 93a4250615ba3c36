"""The experiment and its sections. Every default of the project stands beside its field, once.

Presets (`perceiver/presets/`) are functions that return an `Experiment` and show only what differs. What belongs to a run's identity
(`Experiment.identity`): task, model, data, optim, training. What only says where and how fast it runs, and who watches it (`parallel`,
`run`, `callbacks`), does not, so that a run can be continued on other machines.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from perceiver.config.core import Config, UserError, check_folder_name, check_positive, flatten, home, is_builtin, spelled, to_dict
from perceiver.config.optimization import OptimConfig

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import nn

    from perceiver.data.rows import ArrayRows
    from perceiver.tasks.base import Task
    from perceiver.training.callbacks import Callback


class ModelConfig(Config):
    """A model: base class of all. Any architecture will do, Perceiver or not."""

    encoder_fields: ClassVar[tuple[str, ...]] = ()
    """Of a model whose encoder can start from another model's (`training.init-encoder-from`): how the names of the fields begin
    that say what its encoder is. The names of the encoder's weights then begin with "encoder."; (): it has none of its own."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The model on the current default device, "meta" when it is to be sharded: then no weight has a value yet.

        The module has `layers()`, the list of layers to shard, recompute and compile one by one; `init_weights(seed)`, which gives every
        parameter its initial value as a function of the seed alone; and `reset_buffers()`, which computes its constants.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method build() that returns the model")

    def text_limits(self) -> tuple[int, int] | None:
        """Of a model that reads text: its longest input in tokens, and the number of token ids. None: it reads something else."""
        return None


class TaskConfig(Config):
    """What is learned: base class of all tasks' settings."""

    kind: ClassVar[str] = "arrays"
    """What prepared rows the task reads: "images", "tokens", "documents" (see perceiver/data/rows.py), or "arrays" (`rows`)."""
    document_marks: ClassVar[str] = "eos"
    """Of a task that reads a stream of text, the ids around each document: "eos" (one after it) or "cls-sep"."""
    abilities: ClassVar[tuple[str, ...]] = ("predict",)
    """Methods of `perceiver.inference.trained.TrainedModel` that its models have; a batch of rows is given to the first by default."""
    several_classes: ClassVar[bool] = False
    """Of a task with classes, whether an example has any number of them and not one."""
    takes_any: ClassVar[bool] = False
    """Whether `of_model` takes every model of a class: such a task is asked after those that take some."""

    measured: ClassVar[tuple[str, ...]] = ()
    """Fields that `measure` fills in. They follow from the data, so they are no part of a run's identity."""

    @classmethod
    def of_model(cls, model: ModelConfig) -> TaskConfig | None:
        """The task, where published weights of such a model were trained for it; None: they were not, as far as this task can tell."""
        return None

    def rows(self, model: ModelConfig, data: DataConfig) -> ArrayRows | None:
        """The columns of the rows that the task reads, where it reads arrays (kind "arrays"); else None."""
        return None

    def check_images(self, model: ModelConfig, shape: tuple[int, int, int]) -> None:
        """Checks that images (height, width, channels) are what the task and its model take, where it reads images.

        Raises:
            UserError: they are not.
        """

    def prepared_settings(self, model: ModelConfig) -> dict[str, Any]:
        """What of the task and its model decides how rows are prepared, besides what their kind says: "row_length", "sample_rate"."""
        return {}

    def completed(self, experiment: Experiment) -> Experiment:
        """The experiment with what its command line left open and the schema of its data tells: sizes, names of classes.

        Raises:
            UserError: the data has not what the experiment names.
        """
        return experiment

    def measure(self, model: ModelConfig, blocks: Iterator[pa.Table]) -> TaskConfig:
        """The settings with their `measured` fields filled in from all rows of the training split."""
        return self

    def counted(self, counts: Sequence[float]) -> Self:
        """The settings with what follows from how often each class occurs in the training split, where rows have one."""
        return self

    @abstractmethod
    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task[Any, Any]:
        """The task for one model and one kind of data, a subclass of `perceiver.tasks.base.Task`; `seed` is that of all random choices.

        Raises:
            UserError: it cannot be trained, or not with such a model.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method build(model, data, seed) that returns the task")


class CallbackConfig(Config):
    """Something that watches a training: base class of all callbacks' settings."""

    @abstractmethod
    def build(self) -> Callback:
        """The callback, a subclass of `perceiver.training.callbacks.Callback`: one on every worker, for every start of a run."""
        raise NotImplementedError(f"{type(self).__name__} needs a method build() that returns the callback")

    def ready(self, where: str) -> CallbackConfig:
        """Itself as workers get it, with what the environment of the command says. Called before workers start.

        Args:
            where: its place with a dot at its end, "callbacks.0.".

        Raises:
            UserError: it cannot work: a package or an account is missing, say.
        """
        return self

    def check_metrics(self, where: str, names: Sequence[str]) -> None:
        """Checks the metrics that it names before a training starts.

        Args:
            where: its place, as its fields are typed ("callbacks.0.").
            names: all that validations of the training give (val_loss, ...).

        Raises:
            UserError: it names another.
        """


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
            raise UserError(
                f"--{where}time-column and --{where}group-column are both given, and validation is held out by one: leave one out"
            )

    def check_encoding(self, where: str = "data.") -> None:
        """Raises UserError where the encoding is none of text."""
        try:
            "a".encode(self.encoding)
        except LookupError:
            raise UserError(
                f"--{where}encoding is {self.encoding!r}, which Python does not know: utf-8, utf-16, latin-1 and cp1252 are common"
            ) from None


class TrainingConfig(Config):
    """What is trained: batch, length, seed, precision."""

    global_batch_size: int = 128
    """Examples per optimizer step, over all workers and accumulation steps."""
    max_epochs: int | None = None
    """Length in epochs (passes over the training set)."""
    max_steps: int | None = None
    """Length in optimizer steps; together with max-epochs, whichever ends first."""
    seed: int = 0
    """Seed of initial weights, order, masks, shifts and dropout."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """tf32: on GPUs matrix products take fp32 numbers with a mantissa of 10 bits, which is several times as fast. bf16: parameters are
    cast to bfloat16 for forward and backward, reductions and updates stay fp32."""
    deterministic: bool = False
    """Use deterministic algorithms only, so that a run gives the same bits every time on GPUs as well (on CPUs it always does);
    slower."""
    skip_not_finite: int = 0
    """Number of steps with a loss or gradient that is NaN or infinite that may be skipped before the run ends; 0: the first ends it.
    Any other number costs a wait for the device at every step."""
    on_spike: Literal["ignore", "skip", "rollback"] = "ignore"
    """A step whose loss is far above the usual, or not finite: skip: its update is left out; rollback: the weights become those of the
    last good checkpoint. Both wait for the device at every step."""
    spike_deviations: float = 8.0
    """A spike is a loss above the median of the last 100 steps by this number of standard deviations (by their median deviation)."""
    max_spikes: int = 10
    """Number of spikes that are answered so before the run ends."""
    init_from: str | None = None
    """Start from the whole model of a run (its folder or name) or of other weights (a folder, a file, a name on the hub)."""
    init_encoder_from: str | None = None
    """Start from the encoder alone of a run or of other weights; the decoder is new."""
    init_checkpoint: str = "best"
    """Which checkpoint of that run: best, last, or a step."""
    fork: str | None = None
    """Start from a checkpoint of another run: RUN (its last one), RUN@best or RUN@STEP; --fork for short. Weights, optimizer state,
    step count and place in the data order are taken over; every field may be changed that they do not depend on."""
    fork_weights_only: bool = False
    """With --fork: take over only the weights that fit; optimizer, step count and data order start afresh. --fork-weights-only for
    short."""

    def check(self, where: str) -> None:
        check_positive(self, where, "global_batch_size", "max_steps", "max_epochs")
        if self.fork is not None and (other := next((n for n in ("init_from", "init_encoder_from") if getattr(self, n) is not None), None)):
            raise UserError(f"{where}fork and {spelled(where + other)} are both set: choose one")
        if self.fork_weights_only and self.fork is None:
            raise UserError(f"--{spelled(where)}fork-weights-only is True, but there is no fork: give --fork RUN")
        if self.max_steps is None and self.max_epochs is None:
            raise UserError(f"{where}max-steps and {where}max-epochs are both None: set one of them")
        if self.skip_not_finite < 0:
            raise UserError(f"{spelled(where)}skip-not-finite is {self.skip_not_finite} and must not be negative")
        if self.skip_not_finite and self.on_spike != "ignore":
            raise UserError(
                f"--{spelled(where)}skip-not-finite is {self.skip_not_finite} and --{spelled(where)}on-spike is {self.on_spike}: "
                "a loss that is not finite is a spike, so leave out skip-not-finite"
            )
        if not self.spike_deviations > 0:
            raise UserError(f"--{spelled(where)}spike-deviations is {self.spike_deviations} and must be above 0")
        if self.max_spikes < 0:
            raise UserError(f"--{spelled(where)}max-spikes is {self.max_spikes} and must not be negative")
        if self.seed < 0:
            raise UserError(f"{where}seed is {self.seed} and must not be negative")


class ParallelConfig(Config):
    """How a run is laid out on machines. Not part of its identity."""

    workers: int = 1
    """Workers, one a GPU (or one a process on CPUs); `--workers N` for short."""
    min_workers: int | None = None
    """Elastic: start with as many workers as there is room for, from this number up to `workers`, and grow and shrink with the
    cluster; `--workers 2..8` for short. None: always exactly `workers`."""
    resize_seconds: float = 60.0
    """Elastic: seconds between looks for room for more workers. A larger number of workers continues from the last checkpoint."""
    replicas: int = 1
    """Copies of the model: each is sharded over workers / replicas neighbours (HSDP: one a node, say); 1: over all workers."""
    micro_batch_size: int | None = None
    """Examples that a worker computes at once; its share of the global batch is accumulated from such parts. None: all at once."""
    activation_checkpointing: int | Literal["auto"] = 0
    """Recompute every n-th layer in the backward pass to save memory; 0: none, 1: all; auto: as few as the memory plan says that fit."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in the host's memory and update them there (no effect on CPUs)."""
    compile: bool = False
    """torch.compile each layer."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs where the cluster has them, or its autoscaler may start machines with them."""
    device_memory_gib: float | None = None
    """GiB of memory of a worker's device, for the check whether a step fits; None: as found."""
    cpus_per_worker: float | None = None
    """CPUs reserved in Ray for a worker; None: chosen so that data tasks still fit."""
    threads_per_worker: int | None = None
    """Compute threads of a CPU worker; None: the machine's cores divided by its workers."""
    wait_minutes: float = 0.0
    """How long to wait for a cluster to grow to the size that the run needs (its autoscaler is asked to add machines); 0: start
    with what is there, or fail."""
    address: str | None = None
    """Ray cluster to join; None: the one this process runs in, else $RAY_ADDRESS, else a new local one."""

    @property
    def recompute_every(self) -> int:
        """`activation_checkpointing` as a number; of auto, which a training replaces before it starts, 0."""
        return 0 if self.activation_checkpointing == "auto" else self.activation_checkpointing

    def check(self, where: str) -> None:
        check_positive(self, where, "workers", "min_workers", "replicas", "micro_batch_size", "threads_per_worker")
        for name in ("cpus_per_worker", "device_memory_gib"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"{spelled(where + name)} is {value} and must be above 0, or None for what is found")
        if self.recompute_every < 0:
            raise UserError(f"{spelled(where)}activation-checkpointing is {self.recompute_every} and must be auto or not negative")
        if self.wait_minutes < 0:
            raise UserError(f"{spelled(where)}wait-minutes is {self.wait_minutes} and must not be negative")
        if self.workers % self.replicas:
            raise UserError(f"{where}replicas is {self.replicas} and must divide {where}workers ({self.workers})")
        if self.min_workers is not None:
            if self.min_workers > self.workers:
                raise UserError(f"{where}min-workers is {self.min_workers} and must be at most {where}workers ({self.workers})")
            if self.replicas > 1:
                raise UserError(
                    f"{where}replicas is {self.replicas}: an elastic run ({where}min-workers) has no replicas, as its workers change"
                )
            if not self.resize_seconds > 0:
                raise UserError(f"{where}resize-seconds is {self.resize_seconds} and must be above 0")


class RunConfig(Config):
    """Where a run is kept and how it reports. Not part of its identity."""

    name: str = ""
    """Name of the run; "": the preset's name."""
    storage: str = ""
    """Folder of all runs, on a file system that all nodes share (or there is one node); or s3://, gs://, ...: checkpoints and
    records are copied there from local folders, and a run continues from there on any machine. "": $PERCEIVER_HOME/runs."""
    log_every: int = 10
    """Steps between lines of progress and metrics."""
    val_every: int = 500
    """Steps between validations (there is always one at the end)."""
    val_batches: int | None = None
    """Number of global batches to validate on, from the start of the fixed validation order; None: all."""
    checkpoint_every: int = 500
    """Steps between checkpoints (there is always one at the end)."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept; the best are kept besides. (A validation that is among the best so far makes a
    checkpoint of its own.)"""
    keep_best: int = 1
    """How many of the best checkpoints are kept, by run.best-metric."""
    best_metric: str = "val_loss"
    """Metric that names the best checkpoint: a validation metric of the task (val_loss, val_acc, ...)."""
    max_failures: int = 3
    """How often a run restarts by itself from its last checkpoint when a worker dies; -1: without limit."""
    stall_minutes: float = 30.0
    """Minutes without any progress of a worker (one line of code, one step) after which it is ended and the run restarts from its last
    checkpoint. A worker whose process does not answer at all is ended after one minute."""

    profile: str | None = None
    """Steps to profile on the first worker, FIRST..LAST counted from 1 (20..25): a trace for Perfetto and a table of the operators that
    cost most, in the run's folder under profile."""
    layer_grad_norms: bool = False
    """Whether the gradient's norm of each layer is among the metrics, grad_norm/LAYER, at each line of progress."""

    def check(self, where: str) -> None:
        if self.profile is not None:
            profiled_steps(self.profile, f"--{where}profile")
        check_positive(self, where, "log_every", "val_every", "val_batches", "checkpoint_every", "keep_checkpoints", "keep_best")
        if not self.stall_minutes > 0:
            raise UserError(f"{spelled(where)}stall-minutes is {self.stall_minutes} and must be more than 0")
        if self.max_failures < -1:
            raise UserError(f"{where}max-failures is {self.max_failures} and must be at least -1 (without limit)")

    @property
    def storage_path(self) -> str:
        """The local folder of runs."""
        return str(home() / "runs") if self.remote_root or not self.storage else self.storage

    @property
    def remote_root(self) -> str | None:
        """The URI that runs are copied to; None: nowhere."""
        return self.storage if "://" in self.storage else None


def profiled_steps(text: str, field: str = "--run.profile") -> tuple[int, int]:
    """The first and the last step that FIRST..LAST, or a single number, names.

    Raises:
        UserError: it is neither, or names none.
    """
    first, dots, last = text.partition("..")
    try:
        steps = int(first), int(last if dots else first)
    except ValueError:
        steps = 0, 0
    if not 1 <= steps[0] <= steps[1]:
        raise UserError(f"{field} is {text!r} and must be FIRST..LAST, two steps counted from 1 (20..25)")
    return steps


class Experiment(Config):
    """All of one training."""

    preset: str = ""
    """What the command line named: a preset, module:function, file.py:function. Set by whoever finds the experiment."""
    task: TaskConfig
    """What is learned."""
    model: ModelConfig
    """By which model."""
    data: DataConfig = DataConfig()
    """From which data."""
    optim: OptimConfig = OptimConfig()
    """How it is optimised."""
    training: TrainingConfig = TrainingConfig()
    """Batch, length, seed, precision."""
    parallel: ParallelConfig = ParallelConfig()
    """Workers and devices."""
    run: RunConfig = RunConfig()
    """Name, storage, reporting."""
    callbacks: tuple[CallbackConfig, ...] = ()
    """What else happens while training: each watches it, and may keep a state of its own in the checkpoints."""

    @property
    def run_name(self) -> str:
        """Name of the run's folder: run.name, else the preset's, else that of the function that returned the experiment."""
        return self.run.name or self.preset.rpartition(":")[2].replace("_", "-")

    def check(self, where: str) -> None:
        check_folder_name("--run.name", self.run_name)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run: everything but place, speed and reporting. Flat, by dotted names."""
        tree = to_dict(self)
        for section in ("preset", "parallel", "run", "callbacks"):
            del tree[section]
        for name in ("root", "on_error"):
            del tree["data"][name]
        for name in self.task.measured:
            del tree["task"][name]
        if self.data.tokenizer != "bytes":  # where its file lies is nobody's identity; the data's hash has its content
            tree["data"]["tokenizer"] = "of a file"
        # A class of this package is itself wherever it stands.
        return {
            name: value.partition(":")[2] if name.rpartition(".")[2] == "type" and is_builtin(value) else value
            for name, value in flatten(tree).items()
        }


# ----------------------------------------------------------------------------------------------- training of a tokenizer


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
