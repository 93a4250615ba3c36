"""Configurations of the tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from perceiver.config.core import UserError
from perceiver.config.sections import DataConfig, ModelConfig, TaskConfig

if TYPE_CHECKING:
    from perceiver.tasks.base import Task


class CausalLMConfig(TaskConfig):
    """Next-token prediction on packed windows of text."""

    kind: ClassVar[str] = "tokens"

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

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task:
        from perceiver.tasks.causal_lm import CausalLM

        return CausalLM(self, model, data, seed)


class MaskedLMConfig(TaskConfig):
    """Masked language modelling on packed windows of text."""

    kind: ClassVar[str] = "tokens"
    document_marks: ClassVar[str] = "cls-sep"

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

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task:
        from perceiver.tasks.masked_lm import MaskedLM

        return MaskedLM(self, model, data, seed)


class TextClassificationConfig(TaskConfig):
    """A class per document."""

    kind: ClassVar[str] = "documents"

    class_names: tuple[str, ...] = ("negative", "positive")
    """Names of the classes, in the order of their labels."""
    group_by_length: bool = True
    """Sort a worker's share of a global batch by length before it is cut into micro-batches: less padding, the same batches."""

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task:
        from perceiver.tasks.text_classification import TextClassification

        return TextClassification(self, model, data, seed)


class ImageClassificationConfig(TaskConfig):
    """A class per image."""

    kind: ClassVar[str] = "images"

    class_names: tuple[str, ...] | None = None
    """Names of the classes, in the order of their labels; None: their numbers."""
    random_crop: int | None = None
    """Training images are cropped to this side length at a random place; None: not cropped."""

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task:
        from perceiver.tasks.image_classification import ImageClassification

        return ImageClassification(self, model, data, seed)


class SymbolicAudioConfig(TaskConfig):
    """Next-event prediction on windows of MIDI events."""

    min_seq_len: int | None = None
    """Windows are cut to a random length from here to max_seq_len in training; None: all of max_seq_len."""

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task:
        raise UserError("symbolic audio is not trainable yet: its task comes with a later version (its model can be built)")


class OpticalFlowConfig(TaskConfig):
    """A flow vector per pixel of the first of two frames."""

    patch_min_overlap: int = 20
    """Least overlap in pixels of the patches that a large image is cut into."""

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task:
        raise UserError("optical flow is not trainable yet: its task comes with a later version (its model can be built)")
