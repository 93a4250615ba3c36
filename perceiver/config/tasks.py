"""Configurations of the tasks."""

from perceiver.config.sections import TaskConfig


class CausalLMConfig(TaskConfig):
    """Next-token prediction on packed windows of text."""

    random_shift: bool = False
    """Shift all window boundaries by a random offset each epoch (training only)."""
    min_seq_len: int | None = None
    """Windows are cut to a random length from here to max_seq_len in training, all of a step to the same; None: not cut."""
    val_stride: int | None = None
    """Validation scores the last max_latents targets of windows that start so many tokens apart; None: max_seq_len (windows
    do not overlap); max_latents: every target of the text is scored once."""
    sample_prompt: str = "The "
    """Prompt of the sample continuation that validation writes."""
    sample_tokens: int = 128
    """Length of that continuation in tokens; 0: none."""


class MaskedLMConfig(TaskConfig):
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


class TextClassificationConfig(TaskConfig):
    """A class per document."""

    class_names: tuple[str, ...] = ("negative", "positive")
    """Names of the classes, in the order of their labels."""
    group_by_length: bool = True
    """Sort a worker's share of a global batch by length before it is cut into micro-batches: less padding, the same batches."""


class ImageClassificationConfig(TaskConfig):
    """A class per image."""

    class_names: tuple[str, ...] | None = None
    """Names of the classes, in the order of their labels; None: their numbers."""
    random_crop: int | None = None
    """Training images are cropped to this side length at a random place; None: not cropped."""


class SymbolicAudioConfig(TaskConfig):
    """Next-event prediction on windows of MIDI events."""

    min_seq_len: int | None = None
    """Windows are cut to a random length from here to max_seq_len in training; None: all of max_seq_len."""


class OpticalFlowConfig(TaskConfig):
    """A flow vector per pixel of the first of two frames."""

    patch_min_overlap: int = 20
    """Least overlap in pixels of the patches that a large image is cut into."""
