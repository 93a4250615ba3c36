"""Trained models by name: a run's folder or name, an exported folder, published weights. Needs no Ray."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perceiver.config import DataConfig, ModelConfig, TaskConfig, UserError, home, load_tree, subclasses, type_name
from perceiver.config.core import import_builtins, is_builtin
from perceiver.config.optimization import AVERAGED, averaged_of
from perceiver.data.rows import KINDS, ArrayRows
from perceiver.data.tokenizer_base import TOKENIZER_FILES, Tokenizer
from perceiver.data.tokenizers import tokenizer_of
from perceiver.datasets import needs_tokenizer
from perceiver.inference.card import source_of
from perceiver.inference.export import CONFIG, WEIGHTS, download, read_config
from perceiver.inference.trained import TrainedModel
from perceiver.interop.foreign import fitting_model, in_one_sentence, read_model
from perceiver.interop.pretrained import is_hub_name, read_json, read_pretrained
from perceiver.interop.tensors import header_of, read_tensors
from perceiver.models import build_model
from perceiver.runs import Run
from perceiver.training.checkpoint_files import check_files
from perceiver.training.remote_copy import find_run
from perceiver.training.state import load_average, load_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load(
    source: str | Path | Run,
    checkpoint: str = "best",
    *,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    trust_code: bool = False,
) -> TrainedModel:
    """A trained model, in this process and on one device.

    Args:
        source: a run, its folder, its name among those of $PERCEIVER_HOME, a folder that `export` wrote, a folder or
            file with published weights (of transformers or krasserm/perceiver-io), or a name on the Hugging Face hub.
        checkpoint: of a run: "best" (by the run's own metric), "last" or a step; with ":ema" after it, the averaged weights.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        precision: of weights and computation.
        trust_code: run the code that a run brings although that was never run from this account. (Weights from anywhere else bring
            none: the modules of their classes must be imported already.)

    Raises:
        UserError: there is no such model; says where it was looked for.
    """
    source = source.folder if isinstance(source, Run) else source
    _check_source(source)
    target = _device(device)
    if precision not in DTYPES:
        raise UserError(f"precision is {precision!r} and must be one of {', '.join(DTYPES)}")
    run = find_run(source)
    if run is not None:
        trained = load_run(run, checkpoint, target, trust_code)
    else:
        trained = _load_other(source, target)
    trained.model.to(dtype=DTYPES[precision])
    trained.model.requires_grad_(False)
    trained.model.eval()
    return trained


@dataclass(frozen=True)
class Description:
    """What is known of a model without loading its weights."""

    name: str
    location: str
    """The folder or file, the URI of a run, or the name on the hub."""
    checkpoint: str
    """Of a run: the step chosen, which stays the same where "best" or "last" would move on."""
    task: TaskConfig | None
    """None: only loading tells (published weights)."""
    config: ModelConfig | None = None
    """None: only loading tells."""
    data: DataConfig = DataConfig()
    """What the task knows of the data that it was trained on."""

    @property
    def abilities(self) -> tuple[str, ...]:
        """See `TrainedModel.abilities`; empty where only loading tells."""
        return () if self.task is None else self.task.abilities

    @property
    def rows(self) -> ArrayRows | None:
        """The columns that the task reads, where it reads arrays."""
        return None if self.task is None or self.config is None else self.task.rows(self.config, self.data)


def describe(source: str | Path, checkpoint: str = "best", trust_code: bool = False) -> Description:
    """What `load` would load; for its arguments see there.

    Raises:
        UserError: a run without such a checkpoint or with a damaged one, an exported folder whose weights have other names or shapes
            than its model, or a path or name that cannot be a model.
    """
    _check_source(source)
    run = find_run(source)
    if run is not None:
        experiment, _ = run.load(trust_code)
        chosen = run.checkpoint(str(checkpoint), experiment.run.best_metric)
        check_files(chosen.path)
        # Who loads it may be on another machine: a URI means the same there.
        location = str(source) if "://" in str(source) else str(run.folder)
        step = f"{chosen.step}{AVERAGED}" if averaged_of(str(checkpoint))[1] else str(chosen.step)
        return Description(run.name, location, step, experiment.task, experiment.model, experiment.data)
    path = Path(source).expanduser()
    config = read_config(path)
    if config is not None:
        task, model = _task(config["task"], path / CONFIG), read_model(config["model"], path / CONFIG)
        fitting_model(model, header_of(path / WEIGHTS), path / WEIGHTS)
        return Description(config["name"], str(path.absolute()), checkpoint, task, model)
    if not path.exists() and not is_hub_name(str(source)):
        raise _nothing(source)
    return Description(str(source), str(path.absolute()) if path.exists() else str(source), checkpoint, None)


def load_run(run: Run, checkpoint: str, device: torch.device, trust_code: bool = False) -> TrainedModel:
    """The model of a run's checkpoint.

    Raises:
        UserError: there is no such checkpoint or it is damaged, or the run's tokenizer is missing.
    """
    experiment, digest = run.load(trust_code)
    chosen = run.checkpoint(str(checkpoint), experiment.run.best_metric)
    model = empty_model(experiment.model, device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process is what is meant
        load_model(chosen.path, model)
        if averaged_of(str(checkpoint))[1]:
            load_average(chosen.path, model)
    copy, data = run.tokenizer_file, experiment.data
    if copy.is_file():
        data = replace(data, tokenizer=str(copy))
    tokenizer = model_tokenizer(experiment.model, data) if needs_tokenizer(experiment) else None
    provenance = {
        "run": run.name,
        "preset": experiment.preset,
        "step": chosen.step,
        **({"weights": "averaged"} if averaged_of(str(checkpoint))[1] else {}),
        "metrics": chosen.metrics,
        "data": digest,
        "source": source_of(experiment.data),
        **({"started_from": started} if (started := _beginning(run)) else {}),
    }
    return TrainedModel(
        model=model, config=experiment.model, task=experiment.task, data=data, seed=experiment.training.seed, tokenizer=tokenizer,
        photos=KINDS[experiment.task.kind].keeps_photos, name=run.name, provenance=provenance, experiment=experiment,
    )  # fmt: skip


def _beginning(run: Run) -> str | None:
    """What a run's weights began from, without places on this machine; None: from random weights."""
    if (parent := run.parent()) is not None:
        return f"run {parent.name}, step {parent.step}"
    content = read_json(run.start_file) if run.start_file.is_file() else {}
    origin = content.get("origin")
    return f"weights {Path(origin).name}" if isinstance(origin, str) and origin else None


def load_export(folder: Path, device: torch.device) -> TrainedModel:
    """The model of a folder in our format (`perceiver.inference.export`).

    Raises:
        UserError: a file is missing or damaged, or its weights are not those of its config.json.
    """
    config = read_config(folder)
    if config is None:
        raise UserError(f"{folder} holds no exported model")
    model_config, task = read_model(config["model"], folder / CONFIG), _task(config["task"], folder / CONFIG)
    path = folder / WEIGHTS
    model = _filled(fitting_model(model_config, header_of(path), path), read_tensors(path), device)
    tokenizer, data = config["tokenizer"], DataConfig()
    if tokenizer is not None:
        data = replace(data, tokenizer=str(folder / tokenizer) if tokenizer in TOKENIZER_FILES else tokenizer)
        data = replace(data, special_tokens=config.get("special_tokens", data.special_tokens))
        tokenizer = model_tokenizer(model_config, data)
    return TrainedModel(
        model=model, config=model_config, task=task, data=data, tokenizer=tokenizer, photos=config["photos"], name=config["name"],
        provenance=config["provenance"],
    )  # fmt: skip


def _task(data: Any, file: Path) -> TaskConfig:
    with in_one_sentence(file):
        return load_tree(data, TaskConfig, f"{file} describes no model that can be read", foreign=True)


def _filled(model: Any, weights: dict[str, Tensor], device: torch.device) -> nn.Module:
    """A model without values on a device with these, which fit it."""
    model.to_empty(device=device)
    model.reset_buffers()
    model.load_state_dict(weights)
    return model


def empty_model(config: ModelConfig, device: torch.device) -> nn.Module:
    """A model on a device whose parameters wait for values; its constants are computed."""
    with torch.device("meta"):
        model = build_model(config)
    model.to_empty(device=device)
    model.reset_buffers()
    return model


def model_tokenizer(config: ModelConfig, data: DataConfig) -> Tokenizer | None:
    """The tokenizer of a model that reads text; None for the others.

    Raises:
        UserError: it is missing or has more ids than the model.
    """
    limits, vocab_size = config.text_limits(), config.num_text_ids()
    if limits is not None:
        _, vocab_size = limits
    if vocab_size is None:
        return None
    tokenizer = tokenizer_of(data)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"tokenizer {data.tokenizer} has {tokenizer.vocab_size} ids, but the model's vocab_size is {vocab_size}")
    return tokenizer


def load_published(source: str | Path, folder: Path | None, device: torch.device) -> TrainedModel:
    """A model of transformers or krasserm/perceiver-io, from a folder, a file, or the hub by name; see
    `perceiver.interop.pretrained`.

    Its task follows from its input and output, its tokenizer is that of UTF-8 bytes.

    Args:
        folder: where its config.json lies, if it has one.

    Raises:
        UserError: there is no such model, or none that can be used here.
    """
    pretrained = read_pretrained(source)
    published = read_json(folder / CONFIG) if folder is not None and (folder / CONFIG).is_file() else {}
    task = task_of(pretrained.config)
    photos = (published.get("architectures") or [""])[0].startswith("PerceiverForImageClassification")
    if getattr(task, "class_names", ()) is None and (labels := published.get("id2label")):
        with in_one_sentence((folder or Path()) / CONFIG):
            names: dict[str, Any] = {"class_names": tuple(str(labels[key]) for key in sorted(labels, key=int))}
            task = replace(task, **names)
    shapes = {name: tuple(tensor.shape) for name, tensor in pretrained.weights.items()}
    model = _filled(fitting_model(pretrained.config, shapes, source), pretrained.weights, device)
    tokenizer = model_tokenizer(pretrained.config, DataConfig())
    name = Path(pretrained.origin).name
    return TrainedModel(
        model=model, config=pretrained.config, task=task, tokenizer=tokenizer, photos=photos, name=name, provenance={"origin": name}
    )


def task_of(config: ModelConfig) -> TaskConfig:
    """The task that a model without one was made for, as the tasks themselves say; this package's are asked first.

    Raises:
        UserError: none of those that are known.
    """
    import_builtins()
    for task in sorted(subclasses(TaskConfig).values(), key=lambda cls: (not is_builtin(type_name(cls)), cls.takes_any)):
        if (found := task.of_model(config)) is not None:
            return found
    ends = [type(end).__name__ for name in ("input", "output") if (end := getattr(config, name, None)) is not None]
    what = f"from {' to '.join(ends)}" if ends else f"of type {type(config).__name__}"
    raise UserError(f"a model {what} cannot be used here yet")


def _load_other(source: str | Path, device: torch.device) -> TrainedModel:
    path = Path(source).expanduser()
    if path.exists():
        if read_config(path) is not None:
            return load_export(path, device)
        return load_published(path, path if path.is_dir() else path.parent, device)
    if not is_hub_name(str(source)):
        raise _nothing(source)
    folder = download(str(source), [CONFIG])
    if read_config(folder) is not None:
        return load_export(download(str(source), [CONFIG, WEIGHTS, *TOKENIZER_FILES]), device)
    return load_published(str(source), folder, device)


def _check_source(source: str | Path) -> None:
    """Raises UserError for an empty text, which as a path is the current folder."""
    if not str(source).strip():
        raise UserError("the name of the model is empty: give a run, a folder of weights or a name on the hub")


def _nothing(source: str | Path) -> UserError:
    return UserError(
        f"no model {str(source)!r}: it is no run's folder, no name of a run in {home() / 'runs'}, no exported folder, "
        "and no name on the Hugging Face hub"
    )


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device is {device!r} and must be auto, cpu, cuda or cuda:NUMBER") from None
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"device is {device!r} and must be auto, cpu, cuda or cuda:NUMBER")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device is {device!r}, but this machine has {torch.cuda.device_count()} GPUs that PyTorch can use")
    return chosen
