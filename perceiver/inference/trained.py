"""A trained model and what can be done with it: `perceiver.load` gives one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from perceiver.config import DataConfig, Experiment, ModelConfig, TaskConfig, UserError
from perceiver.data.midi import FROM_NOTHING, midi_file
from perceiver.data.row_kind import KINDS
from perceiver.data.tokenizers import Tokenizer
from perceiver.generation.continuations import generate_text, stream_text
from perceiver.generation.generate import generate, new_seed
from perceiver.generation.masks import fill_masks
from perceiver.generation.options import GenerationOptions, Sampling
from perceiver.generation.texts import check_text, pad_right
from perceiver.inference import measure
from perceiver.inference.images import ImageLike, images_of
from perceiver.inference.predictor import Predictor
from perceiver.inference.sounds import SoundLike, sounds_of
from perceiver.models.attention_maps import recorded_maps

Result = TypeVar("Result")


@dataclass(kw_only=True, repr=False)
class TrainedModel:
    """A model with its weights, its task and its tokenizer, ready for use in one process.

    Inputs are single texts (or images) or lists of them; a list gives a list of results. Inputs of a list are computed
    `batch_size` at once. All methods raise UserError for wrong input, and where the model's task is another one.
    """

    model: nn.Module
    config: ModelConfig
    task: TaskConfig
    data: DataConfig = DataConfig()
    """What the task knows of the data that it was trained on."""
    seed: int = 0
    """Of the task's random choices."""
    tokenizer: Tokenizer | None = None
    photos: bool = False
    """Images of any size are cut and scaled, as the published ImageNet models want it
    (`perceiver.inference.images.photo`)."""
    name: str = "model"
    """What messages call it."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the weights come from: goes into exports."""
    experiment: Experiment | None = None
    """What it was trained by, of a run's model (its tokenizer may lie elsewhere now: see `data`); None of all others."""

    def __repr__(self) -> str:
        """One line: what it is, its size, and where."""
        parameters = list(self.model.parameters())
        step = f" step {self.provenance['step']}" if "step" in self.provenance else ""
        task, dtype = type(self.task).__name__.removesuffix("Config"), str(parameters[0].dtype).removeprefix("torch.")
        size = sum(parameter.numel() for parameter in parameters)
        return f"<{self.name}{step}: {task} by {type(self.model).__name__}, {size:,} parameters, {dtype} on {self.device}>"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def abilities(self) -> tuple[str, ...]:
        """Names of the methods that this model's task allows."""
        return self.task.abilities

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes of a classifier; their numbers where they have none."""
        if names := getattr(self.task, "class_names", None):
            return names
        return tuple(str(i) for i in range(self.config.number_of_classes() or 0))

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        max_new_tokens: int = 200,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        num_latents: int | None = None,
        num_beams: int = 1,
        seed: int | None = None,
        row_ids: Sequence[int | str] | None = None,
        stop: Sequence[str] = (),
        use_cache: bool = True,
        compile: bool = False,
        batch_size: int = 8,
    ) -> Any:
        """Continues a prompt, or several; returns the new text without the prompt.

        Args:
            temperature: 0 takes the most likely token; otherwise logits are divided by it and a token is drawn.
            top_k, top_p: sample only from the k most likely tokens, or the fewest that have probability p together.
            num_latents: prompt tokens that start as latents, 1 .. max_latents; None: as many as there are.
            num_beams: above 1: beam search instead of drawing.
            seed: of the sampling; None: another one at each call.
            row_ids: what is drawn for a prompt depends on the seed and its id here alone; None: the prompts' numbers in the
                list. So equal prompts get different samples, and a sample does not depend on batch_size.
            stop: strings that end the continuation and do not belong to it.
            compile: compile the step of a token: worth its minute where much is generated.
        """
        tokenizer = self._require("generate")
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=new_seed() if seed is None else seed)
        prompts = prompt if isinstance(prompt, (list, tuple)) else [prompt]
        ids = range(len(prompts)) if row_ids is None else row_ids
        if len(ids) != len(prompts):
            raise UserError(f"row_ids has {len(ids)} ids for {len(prompts)} prompts and must have one for each")
        texts = _map(
            lambda rows: generate_text(
                self.model,
                tokenizer,
                [text for _, text in rows],
                max_new_tokens=max_new_tokens,
                num_latents=num_latents,
                sampling=sampling,
                row_ids=[identity for identity, _ in rows],
                num_beams=num_beams,
                stop=stop,
                use_cache=use_cache,
                compile=compile,
            ),
            list(zip(ids, prompts, strict=True)),
            batch_size,
        )
        return texts if isinstance(prompt, (list, tuple)) else texts[0]

    def stream(
        self,
        prompt: str,
        *,
        row_id: int | str = 0,
        **options: Any,
    ) -> Iterator[str]:
        """Like `generate` for one prompt (of this id), but gives the text piece by piece as it comes.

        Args:
            prompt: the text to continue.
            row_id: what is drawn depends on the seed and this id alone.
            options: fields of `GenerationOptions`: max_new_tokens, temperature, top_k, top_p, num_latents, seed, stop.
        """
        how = GenerationOptions(**options)
        tokenizer = self._require("stream")
        pieces = stream_text(
            self.model,
            tokenizer,
            [prompt],
            max_new_tokens=how.max_new_tokens,
            num_latents=how.num_latents,
            stop=how.stop,
            row_ids=[row_id],
            sampling=how.sampling,
        )
        return (piece for (piece,) in pieces if piece)

    def play(
        self,
        prompt: str | Path | bytes | np.ndarray | None = None,
        *,
        max_new_tokens: int = 1024,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        row_id: int | str = 0,
    ) -> np.ndarray:
        """Continues a performance; returns all its events, the prompt's first: uint16 (n,), for `perceiver.data.midi.write_midi`.

        Args:
            prompt: a MIDI file, its bytes, or events; None: begin from nothing. Of a long one the last max_seq_len events are used.
            max_new_tokens: events to add.
            temperature: 0 takes the most likely event; otherwise logits are divided by it and an event is drawn.
            top_k: sample only from the k most likely events.
            top_p: sample only from the fewest events that have this probability together.
            seed: of the sampling; None: another one at each call.
            row_id: what is drawn depends on the seed and this id alone.

        Raises:
            UserError: the model's task is another one, the prompt is no MIDI file with notes, or an argument is out of range.
        """
        self._require("play")
        longest, latents = self._causal_limits()
        events = FROM_NOTHING if prompt is None else prompt if isinstance(prompt, np.ndarray) else midi_file(prompt, "the prompt")
        used = torch.from_numpy(events[-longest:].astype(np.int64))[None].to(self.device)
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=new_seed() if seed is None else seed)
        num_latents = min(latents, used.shape[1])
        new = generate(self.model, used, max_new_tokens=max_new_tokens, num_latents=num_latents, sampling=sampling, row_ids=[row_id])
        return np.concatenate([events, new[0].cpu().numpy().astype(np.uint16)])

    def fill_mask(self, text: str | Sequence[str], *, top_k: int = 1, batch_size: int = 8) -> Any:
        """The top_k most likely ways to fill the masks of a text, best first: lists of `Fill`.

        Write "<mask>" (or "[MASK]") for each token to be filled in; with a byte tokenizer a token is a byte.
        """
        tokenizer = self._require("fill_mask")
        return _map(lambda texts: fill_masks(self.model, tokenizer, texts, top_k), text, batch_size)

    def classify(self, inputs: str | ImageLike | SoundLike | Sequence[Any], *, batch_size: int = 16) -> Any:
        """The class of a text, image or sound, or of several: `Classification`."""
        self._require("classify")
        names, several = self.class_names, self.task.several_classes
        return _map(lambda batch: measure.classify(self.model, *self._inputs(batch), names, several), inputs, batch_size)

    def flow(self, frames: Any, *, batch_size: int = 4) -> Any:
        """How the pixels of a frame move until the next one: float32 (height, width, 2), pixels to the right and down.

        Args:
            frames: two images of one size (`ImageLike`), or a list of such pairs, which gives a list.
            batch_size: frames, or parts of large ones, computed at once.
        """
        self._require("flow")
        pairs = frames if isinstance(frames, list) else [frames]
        found = measure.flows(self.model, self.task.build(self.config, self.data, self.seed), pairs, self.device, batch_size)
        return found if isinstance(frames, list) else found[0]

    def predict(self, rows: Any, *, batch_size: int = 16, **options: Any) -> Any:
        """What the model was trained for, on new inputs.

        Of a task on rows of arrays what it says of them (`Task.predict`): an array for each of its names, (rows, ...). Of any other task
        what its first ability gives: `classify` of a classifier, `fill_mask` of a masked language model, `generate` of a causal one.

        Args:
            rows: a pyarrow table, a list of mappings, or one mapping of arrays whose first dimension is the rows. Of the columns that
                the task reads, those are needed that its `predict` uses: targets may be missing. Of other tasks one input or a list.
            batch_size: inputs computed at once.
            options: of the method of another task.
        """
        if "predict" not in self.abilities and self.abilities and self.abilities[0] != "play":
            return getattr(self, self.abilities[0])(rows, batch_size=batch_size, **options)
        self._require("predict")
        if options:
            raise UserError(f"predict has no {next(iter(options))} for {self.name}: it takes rows and batch_size")
        return self.predictor.predict(rows, batch_size)

    def evaluate(self, *, batches: int | None = None) -> dict[str, float]:
        """Metrics over the validation data of the model's run, computed in this process: those of `perceiver evaluate`.

        Args:
            batches: number of global batches, from the start of the validation order; None: all.

        Returns:
            The metrics by name, such as val_loss and val_acc.

        Raises:
            UserError: the model is of no run, or the run's data is not prepared here.
        """
        from perceiver.inference.evaluate import evaluate

        return evaluate(self, batches)

    def attention(self, inputs: Any, *, layer: int = 0) -> np.ndarray:
        """Which inputs each latent reads: the weights of the cross-attention to the input, float32 (B, heads, latents, inputs).

        Over the inputs they add up to 1; padding has 0. For text an input is a token (of a causal model at most max_seq_len of them: the
        last), for images a pixel or patch, row by row.

        Args:
            inputs: a text or an image, a list of them, rows of arrays as for `predict`, or a tensor (B, ...) as the model takes it.
            layer: number of the cross-attention layer, from 0, of models with repeated cross-attention.
        """
        with recorded_maps(self.model, layer) as maps:
            self._pass(inputs)
        return maps[0].cpu().numpy()

    @cached_property
    def predictor(self) -> Predictor:
        """The task at work on new rows.

        Raises:
            UserError: it reads no arrays.
        """
        return Predictor(self.model, self.task.build(self.config, self.data, self.seed), self.device, self.name)

    def embed(self, inputs: Any, *, pool: bool = True, batch_size: int = 16) -> Any:
        """Latents of a text, image or sound as a float32 vector (channels,): their mean; with `pool=False` all (latents,
        channels). A list gives a list.

        Of a causal language model: the final latents of the last max_latents tokens. Of rows of arrays, as for `predict`: an array
        (rows, channels), or (rows, latents, channels).
        """
        if "predict" in self.abilities:
            return self.predictor.embed(inputs, pool, batch_size)
        self._require("embed")
        return _map(lambda batch: list(self._embed(batch, pool)), inputs, batch_size)

    def score(self, text: str | Sequence[str], *, batch_size: int = 8) -> Any:
        """The loss of a document under a causal language model: `Score`."""
        tokenizer = self._require("score")
        return _map(lambda texts: measure.score(self.model, tokenizer, texts, batch_size), text, batch_size)

    def export(self, folder: str | Path, *, format: str = "perceiver", license: str | None = None) -> Path:
        """Writes the model to a folder; see `perceiver.inference.export.export`."""
        from perceiver.inference.export import export

        return export(self, folder, format, license)

    def _embed(self, batch: Sequence[Any], pool: bool) -> Sequence[np.ndarray]:
        if self.config.causal_limits() is None:
            return measure.embed(self.model, *self._inputs(batch), pool)
        assert self.tokenizer is not None
        rows = [self.tokenizer.encode(check_text(text)) for text in batch]
        if not all(map(len, rows)):
            raise UserError("the text is empty: there is nothing to embed")
        return measure.embed_causal(self.model, rows, pool)

    @torch.no_grad()
    def _pass(self, inputs: Any) -> None:
        """One forward pass of the encoder, or of a causal model, over all inputs."""
        if isinstance(inputs, torch.Tensor):
            self.model(inputs.to(self.device))
        elif "predict" in self.abilities:
            table = self.predictor.table(inputs)
            self.predictor.predict(table, max(1, table.num_rows))
        else:
            batch = list(inputs) if isinstance(inputs, (list, tuple)) or getattr(inputs, "ndim", 0) == 4 else [inputs]
            if self.config.causal_limits() is not None:
                self._embed(batch, pool=True)
            else:
                self.model.encode(*self._inputs(batch))  # type: ignore[operator]

    def _inputs(self, batch: Sequence[Any]) -> tuple[Any, torch.Tensor | None]:
        """Inputs of a model that is not causal, and where they are padding."""
        if KINDS[self.task.kind].new_rows == "audio":
            stored = self.task.prepared_settings(self.config)
            return torch.from_numpy(sounds_of(batch, stored["sample_rate"], stored["row_length"])).to(self.device), None
        if (shape := self.config.picture_shape()) is not None:
            crop = getattr(self.task, "random_crop", None)
            pixels = images_of(batch, shape, crop, self.photos, self.data.image_size)
            return torch.from_numpy(pixels).to(self.device), None
        limits = self.config.text_limits()
        if limits is None or self.tokenizer is None:
            raise UserError(f"{self.name} reads neither pictures nor text (its model's picture_shape() and text_limits() are None)")
        return pad_right(measure.document_rows(self.tokenizer, batch, limits[0]), self.device)

    def _causal_limits(self) -> tuple[int, int]:
        """Longest input and latents of a causal model.

        Raises:
            UserError: it is none.
        """
        limits = self.config.causal_limits()
        if limits is None:
            raise UserError(
                f"{self.name} continues nothing: its model is not causal ({type(self.config).__name__}.causal_limits() is None)"
            )
        return limits

    def _require(self, ability: str) -> Tokenizer:
        """The tokenizer, of a model that can do this; a model of images has none.

        Raises:
            UserError: the model's task is another one.
        """
        if ability not in self.abilities:
            task = type(self.task).__name__.removesuffix("Config")
            can = ", ".join(self.abilities) or "none of these"
            raise UserError(f"{self.name} cannot {ability}: its task is {task}, which can {can}")
        return self.tokenizer  # type: ignore[return-value]


def _map(function: Callable[[Sequence[Any]], Sequence[Result]], inputs: Any, batch_size: int) -> Any:
    """Applies a function of batches to one input or a list of inputs."""
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size} and must be at least 1")
    if getattr(inputs, "ndim", 0) == 4:  # an array or tensor of images
        inputs = list(inputs)
    if not isinstance(inputs, (list, tuple)):
        return function([inputs])[0]
    return [result for i in range(0, len(inputs), batch_size) for result in function(inputs[i : i + batch_size])]
