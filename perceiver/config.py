"""The one configuration tree: an `Experiment` names a task, its model, its data, its optimisation and its run.

Every default of the project stands here, once. Presets (`perceiver/presets.py`) are functions that return an
`Experiment` and show only what differs. The docstring under each field is its `--help` text.

What belongs to a run's identity (`Experiment.identity`): task, model, data, optim, training. What only says where and how
fast it runs (`parallel`, `run`) does not, so that a run can be continued on other machines.
"""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args


class UserError(Exception):
    """A mistake of the user's, told in one sentence: the field, the value, and what would be right. Exit status 2."""


def home() -> Path:
    """The folder for prepared data and runs unless told otherwise: $PERCEIVER_HOME, or ~/perceiver."""
    return Path(os.environ.get("PERCEIVER_HOME", "~/perceiver")).expanduser()


# ---------------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True, kw_only=True)
class TextInput:
    """Token ids: learned token embedding + learned position embedding."""

    vocab_size: int = 262
    """Number of token ids (262: UTF-8 bytes and 6 special tokens)."""
    max_seq_len: int = 2048
    """Longest input in tokens."""
    num_channels: int = 768
    """Channels of the embeddings."""


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """Every pixel attended, channels last, with Fourier position features."""

    image_shape: tuple[int, int, int] = (28, 28, 1)
    """Height, width, channels."""
    num_frequency_bands: int = 32
    """Fourier bands per axis."""


@dataclass(frozen=True, kw_only=True)
class FlowInput:
    """Two frames as 3 x 3 patch features per pixel, projected, with Fourier position features."""

    image_shape: tuple[int, int] = (368, 496)
    """Height and width of one patch."""
    num_patch_input_channels: int = 27
    """Channels of one frame's patch features (3 x 3 x 3)."""
    num_patch_hidden_channels: int = 64
    """Channels after the input projection of both frames."""
    num_frequency_bands: int = 64
    """Fourier bands per axis."""


@dataclass(frozen=True, kw_only=True)
class TextOutput:
    """One learned query per position; logits over the vocabulary."""

    num_query_channels: int | None = None
    """Channels of the queries; None: as the token embedding, whose matrix is then also the output matrix (tied)."""


@dataclass(frozen=True, kw_only=True)
class ClassOutput:
    """Learned queries and a linear head to classes."""

    num_classes: int = 10
    """Number of classes."""
    num_queries: int = 1
    """Number of learned output queries."""
    num_query_channels: int = 128
    """Channels of the output queries."""


@dataclass(frozen=True, kw_only=True)
class FlowOutput:
    """The adapted input itself as queries; two flow channels per pixel."""

    rescale_factor: float = 100.0
    """The output is divided by this number."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Perceiver IO encoder: cross-attention of latents to the input, then self-attention blocks (arXiv 2107.14795)."""

    num_cross_attention_heads: int = 8
    """Heads of the cross-attention."""
    num_cross_attention_qk_channels: int | None = None
    """Query and key channels; None: the latents' for text, the input's for images and flow."""
    num_cross_attention_v_channels: int | None = None
    """Value channels; None: as query and key."""
    num_cross_attention_layers: int = 1
    """The first so many blocks are each preceded by a cross-attention (more than 1: the first Perceiver)."""
    first_cross_attention_layer_shared: bool = False
    """Whether later cross-attention layers use the first one's weights (otherwise layers 2, 3, ... share a second set)."""
    cross_attention_widening_factor: int = 1
    """Hidden channels of the cross-attention's MLP as a multiple of its channels."""
    num_self_attention_heads: int = 8
    """Heads of the self-attention."""
    num_self_attention_qk_channels: int | None = None
    """Query and key channels; None: the latents'."""
    num_self_attention_v_channels: int | None = None
    """Value channels; None: as query and key."""
    num_self_attention_layers_per_block: int = 8
    """Layers of one self-attention block."""
    num_self_attention_blocks: int = 1
    """Number of blocks; blocks 2, 3, ... share one set of weights."""
    first_self_attention_block_shared: bool = True
    """Whether that set is also the first block's."""
    self_attention_widening_factor: int = 1
    """Hidden channels of the self-attention's MLPs as a multiple of their channels."""
    dropout: float = 0.0
    """Dropout on attention weights."""
    freeze: bool = False
    """Whether the encoder's parameters stay as they are during training."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Perceiver IO decoder: one cross-attention of output queries to the latents."""

    num_cross_attention_heads: int = 8
    """Heads."""
    num_cross_attention_qk_channels: int | None = None
    """Query and key channels; None: the queries'."""
    num_cross_attention_v_channels: int | None = None
    """Value channels; None: as query and key."""
    cross_attention_widening_factor: int = 1
    """Hidden channels of the MLP as a multiple of its channels."""
    cross_attention_residual: bool = True
    """Whether the queries are added to the attention's output."""
    dropout: float = 0.0
    """Dropout on attention weights."""


@dataclass(frozen=True, kw_only=True)
class PerceiverIOConfig:
    """Perceiver and Perceiver IO models."""

    num_latents: int = 256
    """Number of latents."""
    num_latent_channels: int = 1280
    """Channels of the latents."""
    input: TextInput | ImageInput | FlowInput = TextInput()
    """What goes in."""
    encoder: EncoderConfig = EncoderConfig()
    """Input to latents."""
    decoder: DecoderConfig = DecoderConfig()
    """Latents to output."""
    output: TextOutput | ClassOutput | FlowOutput = TextOutput()
    """What comes out."""
    init_scale: float = 0.02
    """Standard deviation of initial weights."""
    init: Literal["normal", "local"] = "normal"
    """normal: all matrices random, as published. local: a text model's attention starts at neighbouring positions, without which
    a small one does not learn from random weights (docs/text-chain.md); init_scale is then that of the embeddings."""


@dataclass(frozen=True, kw_only=True)
class PerceiverARConfig:
    """Perceiver AR (arXiv 2202.07765): causal; the last positions are latents, all before them is prefix."""

    vocab_size: int = 262
    """Number of token ids."""
    max_seq_len: int = 4096
    """Longest input in tokens, prefix and latents together."""
    max_latents: int = 512
    """Positions at the end of the input that are latents and predict; the prefix holds at most the rest."""
    num_channels: int = 512
    """Channels of all layers."""
    num_heads: int = 8
    """Heads of all attention layers."""
    num_self_attention_layers: int = 8
    """Causal self-attention layers on the latents."""
    num_self_attention_rotary_layers: int = 1
    """Rotary embedding in so many of the first self-attention layers; -1: in all."""
    self_attention_widening_factor: int = 4
    """Hidden channels of the self-attention's MLPs as a multiple of num_channels."""
    cross_attention_widening_factor: int = 4
    """Hidden channels of the cross-attention's MLP as a multiple of num_channels."""
    cross_attention_dropout: float = 0.5
    """Share of prefix positions left out in training (prefix dropout)."""
    post_attention_dropout: float = 0.0
    """Dropout on attention weights."""
    residual_dropout: float = 0.0
    """Dropout on layer outputs before they are added."""
    abs_pos_emb: bool = True
    """Learned position embedding; rotary embedding then covers half of each head's channels, otherwise all."""
    output_norm: bool = False
    """LayerNorm before the output matrix."""
    output_bias: bool = True
    """Bias per token at the output (the output matrix is the token embedding)."""
    init_scale: float = 0.02
    """Standard deviation of initial weights."""


ModelConfig = PerceiverIOConfig | PerceiverARConfig

# ----------------------------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True, kw_only=True)
class CausalLMConfig:
    """Next-token prediction on packed windows of text."""

    random_shift: bool = False
    """Shift all window boundaries by a random offset each epoch (training only)."""
    min_seq_len: int | None = None
    """Windows are cut to a random length from here to max_seq_len in training, all of a step to the same; None: not cut."""
    val_stride: int | None = None
    """Validation scores the last max_latents targets of windows that start so many tokens apart; None: max_seq_len (windows
    do not overlap); max_latents: every target of the text is scored once, those of its beginning with the text there is before them."""
    sample_prompt: str = "The "
    """Prompt of the sample continuation that validation writes."""
    sample_tokens: int = 128
    """Length of that continuation in tokens; 0: none."""


@dataclass(frozen=True, kw_only=True)
class MaskedLMConfig:
    """Masked language modelling on packed windows of text."""

    mask_probability: float = 0.15
    """Share of words (or tokens) chosen; of those 80% are masked, 10% replaced at random, 10% kept."""
    val_mask_probability: float | None = None
    """The same in validation, so that trainings with other shares can be compared; None: as mask_probability."""
    whole_words: bool = True
    """Choose whole words instead of single tokens."""
    static: bool = False
    """The same masks in every epoch instead of new ones."""
    sample_texts: tuple[str, ...] = ("I have watched this[ movie] and it was[ great].",)
    """Sentences that validation fills in: what stands in brackets is masked, all its tokens, the space before a word as in
    training; [MASK] is one masked token."""
    sample_predictions: int = 3
    """How many of the best predictions it writes for each."""


@dataclass(frozen=True, kw_only=True)
class TextClassificationConfig:
    """A class per document."""

    class_names: tuple[str, ...] = ("negative", "positive")
    """Names of the classes, in the order of their labels."""
    group_by_length: bool = True
    """Sort a worker's share of a global batch by length before it is cut into micro-batches: less padding, the same batches."""


@dataclass(frozen=True, kw_only=True)
class ImageClassificationConfig:
    """A class per image."""

    class_names: tuple[str, ...] | None = None
    """Names of the classes, in the order of their labels; None: their numbers."""
    random_crop: int | None = None
    """Training images are cropped to this side length at a random place; None: not cropped."""


@dataclass(frozen=True, kw_only=True)
class SymbolicAudioConfig:
    """Next-event prediction on windows of MIDI events."""

    min_seq_len: int | None = None
    """Windows are cut to a random length from here to max_seq_len in training; None: all of max_seq_len."""


@dataclass(frozen=True, kw_only=True)
class OpticalFlowConfig:
    """A flow vector per pixel of the first of two frames."""

    patch_min_overlap: int = 20
    """Least overlap in pixels of the patches that a large image is cut into."""


TaskConfig = (
    CausalLMConfig | MaskedLMConfig | TextClassificationConfig | ImageClassificationConfig | SymbolicAudioConfig | OpticalFlowConfig
)

# ------------------------------------------------------------------------------------------------------------------ data


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the data comes from, how it is prepared, and how it is shuffled."""

    source: str = ""
    """A named data set (see docs/data.md), a hub name ("hub:NAME[:CONFIG]"), or your own files: a file, folder or glob."""
    mixture: tuple[str, ...] = ()
    """Several sources in place of `source`, each as SOURCE=WEIGHT (c4=0.7 wikitext-103-raw=0.3): rows of a batch in these
    shares, each source in its own order, over and over; validation metrics of each."""
    val_source: str | None = None
    """The same for validation; None: the named data set's own validation split, else val_fraction of the documents."""
    val_fraction: float = 0.05
    """Share of documents (or images) held out for validation where a source has no validation split."""
    text_column: str = "text"
    """Column of .jsonl and .parquet files that holds the text."""
    label_column: str = "label"
    """Column that holds the label, for classification."""
    tokenizer: str = "bytes"
    """"bytes" (UTF-8, 262 ids), or the path of a SentencePiece model."""
    prepare: Literal["shards", "stream"] = "shards"
    """shards: all text becomes ids before the training; stream: training text does while training, and only the files' sizes are
    looked at before (language models; validation data are shards all the same)."""
    on_error: Literal["raise", "skip"] = "raise"
    """What a bad input file or row does: stop with its place, or be skipped and counted."""
    rows_per_block: int = 256
    """Rows of one parquet row group, the unit that is read and shuffled as one."""
    blocks_per_shard: int = 64
    """Row groups of one shard file."""
    shuffle_window_blocks: int = 16
    """Blocks are permuted over the whole epoch, rows inside windows of so many permuted blocks."""
    lanes: int = 8
    """A global batch takes its rows from so many places of the epoch's order at once (at most; see docs/data.md)."""
    root: str = ""
    """Folder that prepared data sets are written to and found in; "": $PERCEIVER_HOME/data."""

    @property
    def root_path(self) -> str:
        return self.root or str(home() / "data")


# ----------------------------------------------------------------------------------------------------- optimisation, run


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    optimizer: Literal["adamw", "adam"] = "adamw"
    """AdamW (decoupled weight decay) or Adam."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Weight decay on matrices; biases, norms and embeddings of positions get none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the moment estimates."""
    eps: float = 1e-8
    """Added to the denominator."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or cosine decay to min_lr_fraction at the last step (and there it stays)."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    min_lr_fraction: float = 0.0
    """The cosine's last learning rate as a fraction of the peak."""
    max_grad_norm: float | None = None
    """Clip the global gradient norm to this; None: no clipping."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What is trained: batch, length, seed, precision."""

    global_batch_size: int = 128
    """Examples per optimizer step, over all workers and accumulation steps."""
    max_epochs: int | None = None
    """Length in passes over the training set."""
    max_steps: int | None = None
    """Length in optimizer steps; with max_epochs the shorter of the two counts."""
    seed: int = 0
    """Seed of initial weights, order, masks, shifts and dropout."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: parameters are cast to bfloat16 for forward and backward, reductions and updates stay fp32."""
    init_from: str | None = None
    """Start from the whole model of a run (its folder or name) or of other weights (a folder, a file, a name on the hub)."""
    init_encoder_from: str | None = None
    """Start from the encoder alone of a run or of other weights; the decoder is new."""
    init_checkpoint: str = "best"
    """Which checkpoint of that run: best, last, or a step."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a run is laid out on machines. Not part of its identity."""

    workers: int = 1
    """Workers, one a GPU (or one a process on CPUs); `--workers N` for short."""
    min_workers: int | None = None
    """Elastic: start with as many workers as there is room for, from so many up to `workers`, and grow and shrink with the
    cluster; `--workers 2..8` for short. None: always exactly `workers`."""
    resize_seconds: float = 60.0
    """Elastic: seconds between looks for room for more workers. A larger number of workers goes on from the last checkpoint."""
    replicas: int = 1
    """Copies of the model: each is sharded over workers / replicas neighbours (HSDP: one a node, say); 1: over all workers."""
    micro_batch_size: int | None = None
    """Examples a worker takes at once; the rest of its share of the global batch is accumulated. None: all at once."""
    activation_checkpointing: int = 0
    """Recompute every n-th layer in the backward pass to save memory; 0: none, 1: all."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer in the host's memory, where the optimizer then computes (on CPUs they are there)."""
    compile: bool = False
    """torch.compile each layer."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs where the cluster has them."""
    device_memory_gib: float | None = None
    """GiB of memory of a worker's device, for the check whether a step fits; None: as found."""
    cpus_per_worker: float | None = None
    """CPUs reserved in Ray for a worker; None: what leaves room for the data tasks."""
    threads_per_worker: int | None = None
    """Compute threads of a CPU worker; None: the machine's cores divided by its workers."""
    wait_minutes: float = 0.0
    """How long to wait for a cluster to grow to what the run needs (its autoscaler is asked); 0: what is there must do."""
    address: str | None = None
    """Ray cluster to join; None: the one this process runs in, else $RAY_ADDRESS, else a new local one."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run is kept and how it reports. Not part of its identity."""

    name: str = ""
    """Name of the run; "": the preset's name."""
    storage: str = ""
    """Folder of all runs, on a file system that all nodes share (or there is one node); or s3://, gs://, ...: checkpoints and
    records are copied there from local folders, and a run goes on from there on any machine. "": $PERCEIVER_HOME/runs."""
    log_every: int = 10
    """Steps between lines of progress and metrics."""
    val_every: int = 500
    """Steps between validations (there is always one at the end)."""
    val_batches: int | None = None
    """Validate on the first so many global batches of the fixed validation order; None: on all."""
    checkpoint_every: int = 500
    """Steps between checkpoints (there is always one at the end)."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept; the best one is kept besides."""
    best_metric: str = "val_loss"
    """Metric that names the best checkpoint (val_acc: higher is better, otherwise lower)."""
    max_failures: int = 3
    """How often a run restarts by itself from its last checkpoint when a worker dies; -1: without limit."""

    @property
    def storage_path(self) -> str:
        """The local folder of runs."""
        return str(home() / "runs") if self.mirror_root or not self.storage else self.storage

    @property
    def mirror_root(self) -> str | None:
        """The URI that runs are copied to; None: nowhere."""
        return self.storage if "://" in self.storage else None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """All of one training."""

    preset: str
    """The preset that this started from."""
    task: TaskConfig
    """What is learned."""
    model: ModelConfig
    """By which model."""
    data: DataConfig
    """From which data."""
    optim: OptimConfig = OptimConfig()
    """How it is optimised."""
    training: TrainingConfig = TrainingConfig()
    """Batch, length, seed, precision."""
    parallel: ParallelConfig = ParallelConfig()
    """Workers and devices."""
    run: RunConfig = RunConfig()
    """Name, storage, reporting."""

    @property
    def run_name(self) -> str:
        return self.run.name or self.preset

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run: everything but place, speed and reporting. Flat, by dotted names."""
        tree = to_dict(self)
        for section in ("parallel", "run"):
            del tree[section]
        for name in ("root", "on_error"):
            del tree["data"][name]
        if self.data.tokenizer != "bytes":  # where its file lies is nobody's identity; the data's hash has its content
            tree["data"]["tokenizer"] = "sentencepiece"
        return flatten(tree)


# ----------------------------------------------------------------------------------------------- training of a tokenizer


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining:
    """Training of a SentencePiece model (`ray_jobs.train_tokenizer`)."""

    data: DataConfig
    """The text: source, text_column, on_error; what val_source and val_fraction hold out for validation is left out."""
    vocab_size: int = 32_000
    """Number of ids, 256 single bytes and 7 special pieces among them."""
    model_type: Literal["unigram", "bpe"] = "unigram"
    """Unigram language model (arXiv 1804.10959), or byte pair encoding."""
    character_coverage: float = 0.9995
    """Share of the sample's characters that may get pieces of their own; the others are written as bytes."""
    sample_megabytes: int = 100
    """Text that the pieces are learned from, at most; the trainer takes about 25 times as much memory."""
    read_megabytes: int = 2_000
    """Input that the sample is drawn from, at most: files or parts of files, drawn over the whole source (as stored, packed)."""
    seed: int = 0
    """Seed of both draws."""
    address: str | None = None
    """Ray cluster to join; None: the one this process runs in, else $RAY_ADDRESS, else a new local one."""


# ------------------------------------------------------------------------------------------------- to and from plain data


def to_dict(config: Any) -> Any:
    """A dataclass tree as JSON-ready data; members of unions carry their class name under "type"."""
    if dataclasses.is_dataclass(config):
        return {"type": type(config).__name__} | {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, (tuple, list)):
        return [to_dict(value) for value in config]
    return config


def from_dict(data: Any) -> Any:
    """The inverse of `to_dict`. Unknown fields are refused, missing ones take their defaults.

    Raises:
        UserError: a type or field that this version does not know.
    """
    if isinstance(data, dict):
        values = dict(data)
        cls = _CLASSES.get(values.pop("type", None))
        if cls is None:
            raise UserError(f"configuration of type {data.get('type')!r} is not known to this version")
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"{cls.__name__} has no field {', '.join(unknown)} in this version")
        return cls(**{name: from_dict(value) for name, value in values.items()})
    if isinstance(data, list):
        return tuple(from_dict(value) for value in data)
    return data


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def digest(data: Any, length: int = 12) -> str:
    """A short stable hash of JSON-ready data."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), default=to_dict)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines `field: old -> new` for two flat dicts."""
    return [
        f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, "absent") != new.get(name, "absent")
    ]


_CLASSES = {
    cls.__name__: cls
    for cls in (
        TextInput, ImageInput, FlowInput, TextOutput, ClassOutput, FlowOutput, EncoderConfig, DecoderConfig,
        *get_args(ModelConfig), *get_args(TaskConfig),
        DataConfig, OptimConfig, TrainingConfig, ParallelConfig, RunConfig, Experiment,
    )
}  # fmt: skip
