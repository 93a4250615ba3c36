"""Generation against the reference's golden sequences."""

import json

import pytest
import torch

from perceiver.config import UserError
from perceiver.generation.generate import generate
from perceiver.generation.options import Sampling


def golden_cases(shared):
    from safetensors.torch import load_file

    from perceiver.interop.reference import config_from_reference, from_reference
    from perceiver.models import build_model

    data = json.loads((shared / "golden" / "generation.json").read_text())
    models = {}
    for case in data["cases"]:
        name = case["weights"]
        if name not in models:
            config = config_from_reference(json.loads((shared / "golden" / f"{name}.json").read_text())["config"])
            weights = {
                k.removeprefix("weights."): v
                for k, v in load_file(shared / "golden" / f"{name}.safetensors").items()
                if k.startswith("weights.")
            }
            model = build_model(config)
            model.load_state_dict(from_reference(weights, config))
            models[name] = model.eval()
        yield models[name], case, data["new_tokens"]


@pytest.mark.parametrize("mode", ["cached", "uncached_documented"])
def test_greedy_generation_gives_the_golden_ids(shared, mode):
    count = 0
    for model, case, new_tokens in golden_cases(shared):
        pad_mask = torch.tensor(case["pad_mask"], dtype=torch.bool)
        ids = generate(
            model, torch.tensor(case["prompt"]), max_new_tokens=new_tokens, num_latents=case["num_latents"],
            pad_mask=pad_mask if pad_mask.any() else None, use_cache=mode == "cached", sampling=Sampling(temperature=0))  # fmt: skip
        assert ids.tolist() == case["expected_new_ids"][mode], (case["weights"], case["label"])
        count += 1
    assert count >= 10


@pytest.fixture(scope="module")
def model():
    from perceiver.models import PerceiverARConfig, build_model

    config = PerceiverARConfig(
        vocab_size=20,
        max_seq_len=12,
        max_latents=5,
        num_channels=16,
        num_heads=2,
        num_self_attention_layers=2,
        init_scale=0.5,
    )
    return build_model(config).eval()


@pytest.mark.parametrize(
    "length, latents, message",
    [(13, 5, "1 to 12"), (0, 1, "1 to 12"), (8, 6, "1 to 5"), (10, 2, "3 to 5"), (8, 0, "1 to 5")],
)
def test_what_does_not_fit_is_refused_with_the_valid_range(model, length, latents, message):
    with pytest.raises(UserError, match=message):
        generate(model, torch.zeros(1, length, dtype=torch.long), max_new_tokens=1, num_latents=latents)


def test_sampling_with_one_candidate_is_greedy(model):
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    greedy = generate(model, prompt, max_new_tokens=8, sampling=Sampling(temperature=0))
    assert torch.equal(generate(model, prompt, max_new_tokens=8, sampling=Sampling(top_k=1)), greedy)
    assert torch.equal(generate(model, prompt, max_new_tokens=8, sampling=Sampling(top_p=1e-6)), greedy)


def test_the_seed_decides_the_sample(model):
    prompt = torch.tensor([[1, 2, 3]])
    first, again, other = (generate(model, prompt, max_new_tokens=20, sampling=Sampling(temperature=2.0, seed=s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
