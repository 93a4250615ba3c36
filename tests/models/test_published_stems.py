"""The two published ImageNet models with other inputs: read from transformers, equal to it, and written back."""

import pytest
import torch

import perceiver
from perceiver.costs.flops import num_parameters
from perceiver.interop.transformers import config_from_transformers
from perceiver.models import ConvolutionInput, LearnedPositionInput

transformers = pytest.importorskip("transformers")

SMALL = {
    "num_latents": 4, "d_latents": 32, "num_blocks": 2, "num_self_attends_per_block": 1, "num_self_attention_heads": 2,
    "num_cross_attention_heads": 1, "num_labels": 7, "initializer_range": 0.2,
}  # fmt: skip
PUBLISHED = {
    "num_latents": 512, "d_latents": 1024, "num_blocks": 8, "num_self_attends_per_block": 6, "num_self_attention_heads": 8,
    "num_cross_attention_heads": 1, "num_labels": 1000, "image_size": 224,
}  # fmt: skip
CASES = {
    "PerceiverForImageClassificationLearned": ({"d_model": 512, "image_size": 16}, 16, LearnedPositionInput),
    "PerceiverForImageClassificationConvProcessing": ({"d_model": 322}, 224, ConvolutionInput),
}


def theirs(name: str, settings: dict) -> torch.nn.Module:
    """A random model of transformers, with statistics of its normalisation that are not those of its beginning."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.PerceiverConfig(**(SMALL | settings))).eval()
    for key, tensor in model.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.normal_(std=0.2)
    return model


@pytest.mark.parametrize("name", CASES)
def test_a_model_of_transformers_is_read_equal_and_written_back(name, tmp_path):
    settings, size, kind = CASES[name]
    model = theirs(name, settings)
    model.save_pretrained(tmp_path / "theirs")
    loaded = perceiver.load(tmp_path / "theirs", device="cpu")
    assert isinstance(loaded.config.input, kind) and loaded.photos and len(loaded.class_names) == 7
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected, found = model(inputs=images).logits, loaded.model(images.permute(0, 2, 3, 1))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    loaded.export(tmp_path / "back", format="transformers")
    again = getattr(transformers, name).from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(inputs=images).logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_published_models_have_as_many_parameters_as_in_transformers(name):
    config = transformers.PerceiverConfig(**(PUBLISHED | {"d_model": CASES[name][0]["d_model"]}))
    with torch.device("meta"):
        number = sum(p.numel() for p in getattr(transformers, name)(config).parameters())
    ours = config_from_transformers(config.to_dict(), name)
    # Of scale and shift of the normalisation, 64 each, the convolution's bias is left.
    assert num_parameters(ours) == number - (64 if name.endswith("ConvProcessing") else 0)
