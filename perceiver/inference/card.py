"""Model cards: the README.md that goes with exported weights, with the fields that the Hugging Face hub reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceiver.config import DataConfig, UserError
from perceiver.data.sources import source_label

if TYPE_CHECKING:
    from perceiver.inference.trained import TrainedModel

CARD = "README.md"
UNNAMED = "OWNER/NAME"
"""In a card's example, until the name on the hub is known."""
LICENSES = "https://huggingface.co/docs/hub/repositories-licenses"
"""Where the hub lists the names of licenses."""
_PIPELINES = {"generate": "text-generation", "fill_mask": "fill-mask"}
_CALLS = {
    "classify": "model.classify({example})",
    "fill_mask": 'model.fill_mask("some <mask> text")',
    "generate": 'model.generate("The meaning of", max_new_tokens=100)',
    "play": "model.play({example})",
    "flow": "model.flow({example})",
    "predict": "model.predict(rows)  # a table with the columns that the task reads",
}
_EXAMPLES = {
    "text": '"some text"',
    "image": '"picture.png"',
    "audio": '"sound.wav"',
    "midi": '"prompt.mid"',
    "arrays": "rows",
    "frames": '("first.png", "second.png")',
}


def check_license(license: str | None) -> None:
    """Raises UserError where a license is no name as the hub has them."""
    if license is not None and (
        not license or not all(c.isascii() and (c.isalnum() or c in "-.") for c in license) or license.lower() != license
    ):
        raise UserError(f"--license is {license!r} and must be one of the hub's names, such as apache-2.0, mit or other ({LICENSES})")


def name_card(folder: Path, name: str) -> None:
    """Writes the model's name on the hub into the example of an exported folder's card."""
    path = folder / CARD
    path.write_text(path.read_text(encoding="utf-8").replace(f'load("{UNNAMED}")', f'load("{name}")'), encoding="utf-8")


def card(trained: TrainedModel, license: str | None = None) -> str:
    """The card of a model: what it is, what it was trained on, what was measured, where its weights began.

    Args:
        trained: the model.
        license: name of the weights' license, as the hub has it; None: the card says that none is stated.

    Raises:
        UserError: see `check_license`.
    """
    from huggingface_hub import EvalResult, ModelCardData

    check_license(license)
    known, task = trained.provenance, type(trained.task).__name__.removesuffix("Config")
    ability = trained.abilities[0] if trained.abilities else None
    kind = _kind(trained)
    pipeline = _PIPELINES.get(ability or "") or (f"{kind}-classification" if ability == "classify" else None)
    data = known.get("source")
    metrics: dict[str, float] = known.get("metrics") or {}
    results = [
        EvalResult(
            task_type=pipeline or "other",
            dataset_type=data or "unknown",
            dataset_name=data or "unknown",
            dataset_split="validation",
            metric_type=name.removeprefix("val_"),
            metric_name=name,
            metric_value=value,
        )
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and value == value
    ]
    fields = ModelCardData(
        library_name="perceiver-ray",
        license=license,
        pipeline_tag=pipeline,
        tags=["perceiver", type(trained.model).__name__],
        eval_results=results or None,
        model_name=trained.name if results else None,
    )
    parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    lines = ["---", fields.to_yaml(), "---", "", f"# {trained.name}", ""]
    lines += [f"A {type(trained.model).__name__} of {parameters:,} parameters for {task}, trained with perceiver-ray.", ""]
    if ability is not None:
        call = _CALLS[ability].format(example=_EXAMPLES[kind])
        lines += ["```python", "import perceiver", "", f'model = perceiver.load("{UNNAMED}")  # or this folder', call, "```", ""]
    lines += ["## Data", "", data or "Not known: the weights are of no run.", ""]
    if digest := known.get("data"):
        lines += [f"Prepared data with the digest `{digest}`.", ""]
    if metrics:
        rows = [f"| {name} | {value:.6g} |" for name, value in metrics.items()]
        lines += [
            "## Metrics",
            "",
            "On the validation data, at the step of these weights.",
            "",
            "| metric | value |",
            "|---|---|",
            *rows,
            "",
        ]
    lines += ["## Lineage", "", *_lineage(known), ""]
    lines += ["## License", "", f"`{license}`" if license else "None is stated.", ""]
    return "\n".join(lines)


def _kind(trained: TrainedModel) -> str:
    from perceiver.data.rows import KINDS

    return KINDS[trained.task.kind].new_rows


def source_of(data: DataConfig) -> str | None:
    """What a model was trained on, without places on this machine."""
    if data.mixture:
        parts = [entry.rpartition("=") for entry in data.mixture]
        return ", ".join(f"{source_label(source)} ({weight})" for source, _, weight in parts)
    return source_label(data.source)


def _lineage(known: dict[str, Any]) -> list[str]:
    lines = []
    if "run" in known:
        began = f", of the preset {known['preset']}" if known.get("preset") else ""
        lines.append(f"- run {known['run']}{began}, step {known.get('step')}" + (", averaged weights" if known.get("weights") else ""))
    if started := known.get("started_from"):
        lines.append(f"- its weights began from {started}")
    if "origin" in known:
        lines.append(f"- published weights: {known['origin']}")
    return lines or ["Not known."]
