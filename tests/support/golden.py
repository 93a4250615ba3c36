"""Golden vectors: `python -m tests.support.golden DIR` compares the models with every vector file in a folder.

One line a file: the largest absolute errors of outputs, loss and gradients. The exit status is 1 if any is out of
tolerance. All sizes, inputs, expected values and tolerances come from the folder's JSON files.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from perceiver.generation.generate import generate
from perceiver.generation.options import Sampling
from perceiver.interop import reference, transformers
from perceiver.models import PerceiverAR, PerceiverIO, build_model
from tests.support import golden_text

Model = PerceiverIO | PerceiverAR


@dataclass
class Result:
    """Errors of one file; `failures` says what is out of tolerance."""

    name: str
    errors: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    status: str = "ok"

    def compare(self, kind: str, what: str, actual: Tensor, expected: Tensor, atol: float, rtol: float) -> None:
        if actual.shape != expected.shape:
            self.failures.append(f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
            return
        difference = (actual.double() - expected.double()).abs()
        error = float(difference.max())
        self.errors[kind] = max(self.errors.get(kind, 0.0), error)
        if not bool((difference <= atol + rtol * expected.double().abs()).all()):
            self.failures.append(f"{what}: largest error {error:.3g}")

    def require(self, what: str, holds: bool) -> None:
        if not holds:
            self.failures.append(what)

    def __str__(self) -> str:
        errors = ", ".join(f"{kind} {error:.2e}" for kind, error in self.errors.items())
        status = "FAILED" if self.failures else self.status
        return "\n    ".join([f"{self.name:26} {status:15} {errors}".rstrip(), *self.failures])


# ---------------------------------------------------------------------------------------------------------- model cases


def load_model(folder: Path, name: str) -> tuple[Model, dict[str, Any], dict[str, Tensor]]:
    """A case's model with its weights, its description and its tensors."""
    case = json.loads((folder / f"{name}.json").read_text())
    tensors = load_file(folder / f"{name}.safetensors")
    weights = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
    if case["reference"].startswith("transformers"):
        config = transformers.config_from_transformers({"attention_probs_dropout_prob": 0.0} | case["config"], case["model"])
        weights = transformers.from_transformers(weights, config)
    else:
        config = reference.config_from_reference(case["config"])
        weights = reference.from_reference(weights, config)
    model = build_model(config)
    model.load_state_dict(weights)
    return model, case, tensors


def run_model(folder: Path, name: str) -> Result:
    """All calls and the training step of one model case."""
    model, case, tensors = load_model(folder, name)
    result = Result(name)
    count = sum(p.numel() for p in model.parameters())
    result.require(f"{count} parameters, expected {case['num_parameters']}", count == case["num_parameters"])
    for call in case["calls"]:
        run_call(model, call, tensors, result)
    for step in case.get("training", []):
        run_training(model, case, step, tensors, result)
    return result


def run_call(model: Model, call: dict[str, Any], tensors: dict[str, Tensor], result: Result) -> None:
    inputs = {name: tensors[spec["tensor"]] for name, spec in call["inputs"].items()}
    model.train(call["mode"] == "train")
    with torch.no_grad():
        outputs = compute(model, inputs, call["scalars"].get("prefix_len"), set(call["expected"]))
    for name, spec in call["expected"].items():
        actual, expected = outputs[name], tensors[spec["tensor"]]
        if call["name"] == "pad_into_latents":
            # Where padding reaches into the latents, the reference lets it take part; ours masks it.
            result.require(f"{call['name']}: {name} is not finite", bool(actual.isfinite().all()))
            ordinary = ~inputs["pad_mask"][:, call["scalars"]["prefix_len"] :].any(dim=1)
            actual, expected = actual[ordinary], expected[ordinary]
        result.compare("output", f"{call['name']}.{name}", actual, expected, call["atol"], call["rtol"])


def compute(model: Model, inputs: dict[str, Tensor], prefix_len: int | None, names: set[str]) -> dict[str, Tensor]:
    """The model's outputs under the names of the vectors."""
    if isinstance(model, PerceiverAR):
        keep = inputs.get("prefix_keep_mask")
        if keep is not None:
            keep = keep.nonzero()[:, 1].view(keep.shape[0], -1)
        hidden = model.hidden(inputs["x"], prefix_len, pad_mask=inputs.get("pad_mask"), prefix_keep=keep)
        return {"last_hidden_state": hidden, "logits": model.head(hidden)}
    if "image_u8_chw" in inputs:
        inputs = {"x": inputs["image_u8_chw"].permute(0, 2, 3, 1) / 127.5 - 1}
    if "attention_mask" in inputs:
        inputs = {"x": inputs["x"], "pad_mask": inputs["attention_mask"] == 0}
    if names == {"latents"}:
        return {"latents": model.encode(inputs["x"])}
    if names == {"adapted"}:
        return {"adapted": model.encoder.input_adapter(inputs["x"])}
    (name,) = names
    return {name: model(inputs["x"], inputs.get("pad_mask"))}


def training_loss(model: Model, inputs: dict[str, Tensor], prefix_len: int | None) -> Tensor:
    """The loss that the vectors describe for each kind of model."""
    x, pad_mask = inputs["x"], inputs.get("pad_mask")
    if isinstance(model, PerceiverAR):
        labels = inputs["labels"].masked_fill(pad_mask, -100)[:, prefix_len:]
        logits = model(x, prefix_len, pad_mask=pad_mask)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    if "target" in inputs:
        return F.mse_loss(model(x), inputs["target"])
    logits = model(x, pad_mask)
    return F.cross_entropy(logits.flatten(0, -2), inputs["labels"].flatten())


def run_training(model: Model, case: dict[str, Any], step: dict[str, Any], tensors: dict[str, Tensor], result: Result) -> None:
    inputs = {name: tensors[spec["tensor"]] for name, spec in step["inputs"].items()}
    prefix_len = step["scalars"].get("prefix_len")
    model.train()
    loss = training_loss(model, inputs, prefix_len)
    loss.backward()
    result.compare("loss", "loss", loss.detach(), torch.tensor(step["loss"]), step["loss_atol"], 0.0)
    parameters = dict(model.named_parameters())
    for reference_name, expected in step["grad_norm"].items():
        name = rename(reference_name, model)
        norm, rtol = parameters[name].grad.norm(), step["grad_norm_rtol"]
        result.compare("gradient norm", f"grad_norm of {reference_name}", norm, torch.tensor(expected), 1e-6, rtol)
    for reference_name, key in step["full_grads"].items():
        gradient = parameters[rename(reference_name, model)].grad
        call = case["calls"][0]
        result.compare("gradient", f"gradient of {reference_name}", gradient, tensors[key], call["atol"], step["grad_norm_rtol"])
    total = torch.stack([p.grad.norm() for p in parameters.values()]).norm()
    expected_total = torch.tensor(step["grad_norm_total"])
    result.compare("gradient norm", "grad_norm_total", total, expected_total, 0.0, step["grad_norm_rtol"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    optimizer.step()
    with torch.no_grad():
        after = training_loss(model, inputs, prefix_len)
    expected_after = torch.tensor(step["loss_after_one_adamw_step_lr_1e-3_wd_0.01"])
    result.compare("loss", "loss after one step", after, expected_after, 0.0, 1e-3)


def rename(reference_name: str, model: Model) -> str:
    (name,) = reference.from_reference({reference_name: torch.empty(0)}, model.config)
    return name


# ---------------------------------------------------------------------------------------------------------- other cases


def check_generation(folder: Path) -> list[str]:
    """Greedy decoding without and with cache gives the documented ids."""
    vectors = json.loads((folder / "generation.json").read_text())
    wrong = []
    for case in vectors["cases"]:
        model, _, _ = load_model(folder, case["weights"])
        pad_mask = torch.tensor(case["pad_mask"], dtype=torch.bool)
        for mode, use_cache in (("uncached_documented", False), ("cached", True)):
            new = generate(
                model,
                torch.tensor(case["prompt"]),
                max_new_tokens=vectors["new_tokens"],
                num_latents=case["num_latents"],
                pad_mask=pad_mask if pad_mask.any() else None,
                use_cache=use_cache,
                sampling=Sampling(temperature=0),
            )
            if new.tolist() != case["expected_new_ids"][mode]:
                wrong.append(f"{case['weights']}, {case['label']}, {mode}")
    return wrong


CASES: dict[str, Callable[[Path], list[str]]] = {
    "generation": check_generation,
    "text_pipeline": golden_text.check_pipeline,
    "text_tokenizer": golden_text.check_tokenizer,
}
"""Checks of the vector files that are no model cases, by file name without suffix. Each returns what is wrong."""


def run_folder(folder: Path) -> list[Result]:
    """The results of all vector files in a folder; files that no check knows are named as not covered."""
    models = json.loads((folder / "index.json").read_text())
    results = [run_model(folder, name) for name in models]
    for path in sorted(folder.glob("*.json")):
        if path.stem in models or path.stem == "index":
            continue
        check = CASES.get(path.stem)
        results.append(Result(path.stem, failures=check(folder)) if check else Result(path.stem, status="not covered yet"))
    return results


def main() -> int:
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "index.json").exists():
        print("usage: python -m tests.support.golden DIR   (a folder of golden vectors, with index.json)", file=sys.stderr)
        return 2
    results = run_folder(Path(sys.argv[1]))
    print("\n".join(map(str, results)))
    return int(any(result.failures for result in results))


if __name__ == "__main__":
    sys.exit(main())
