"""Models that cannot exist are refused in one sentence that names the field, its value, and what would be right."""

from dataclasses import replace

import pytest

from perceiver.config import ModelConfig, UserError
from perceiver.models import ClassOutput, FlowOutput, ImageInput, TextOutput, build_model, check_model
from perceiver.presets import PRESETS
from tests.models.test_perceiver_ar import CONFIG as AR
from tests.models.test_perceiver_io import ENCODER, FLOW, IMAGE, TEXT

WRONG = {
    "heads": (
        replace(AR, num_heads=5),
        "model.num-heads is 5, but must divide model.num-channels, 32: one of 1, 2, 4, 8",
    ),
    "tiny heads": (replace(AR, num_heads=32), "at most 16 heads"),
    "latents": (replace(AR, max_latents=25), "model.max-latents is 25, but must be at most model.max-seq-len, 24"),
    "rotary layers": (replace(AR, num_self_attention_rotary_layers=4), "must be -1 (all) or 0 to"),
    "dropout": (replace(AR, cross_attention_dropout=1.0), "model.cross-attention-dropout is 1.0"),
    "vocabulary": (replace(AR, vocab_size=0), "model.vocab-size is 0, but must be at least 1"),
    "scale": (replace(AR, init_scale=0.0), "model.init-scale is 0.0"),
    "encoder heads": (
        replace(TEXT, encoder=replace(TEXT.encoder, num_cross_attention_heads=3)),
        "model.encoder.num-cross-attention-heads is 3, but must divide model.encoder.num-cross-attention-qk-channels, 4",
    ),
    "value heads": (
        replace(IMAGE, encoder=replace(IMAGE.encoder, num_self_attention_heads=4, num_self_attention_v_channels=6)),
        "model.encoder.num-self-attention-v-channels, 6: one of 1, 2, 3, 6",
    ),
    "decoder heads": (
        replace(IMAGE, decoder=replace(IMAGE.decoder, num_cross_attention_heads=3)),
        "model.decoder.num-cross-attention-heads is 3",
    ),
    "cross-attention layers": (
        replace(IMAGE, encoder=replace(ENCODER, num_cross_attention_heads=1, num_cross_attention_layers=4)),
        "at most model.encoder.num-self-attention-blocks, 3",
    ),
    "text of images": (
        replace(IMAGE, output=TextOutput()),
        "model.output is TextOutput, which needs model.input to be TextInput",
    ),
    "flow of text": (replace(TEXT, output=FlowOutput()), "needs model.input to be FlowInput, not TextInput"),
    "image": (replace(IMAGE, input=ImageInput(image_shape=(0, 4, 1))), "model.input.image-shape is (0, 4, 1)"),
    "classes": (replace(TEXT, output=ClassOutput(num_classes=-1)), "model.output.num-classes is -1"),
    "decoder dropout": (replace(FLOW, decoder=replace(FLOW.decoder, dropout=-0.1)), "model.decoder.dropout is -0.1"),
}


@pytest.mark.parametrize(("config", "message"), WRONG.values(), ids=WRONG.keys())
def test_impossible_models_are_refused(config: ModelConfig, message: str) -> None:
    for function in (check_model, build_model):
        with pytest.raises(UserError) as error:
            function(config)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_sizes_that_the_data_says_are_no_mistake_until_weights_are_made() -> None:
    config = replace(TEXT, output=ClassOutput(num_classes=0))
    check_model(config)
    with pytest.raises(UserError, match=r"no numbers: model\.output\.num-classes of 0 means what the data has"):
        build_model(config)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_pass(name: str) -> None:
    check_model(PRESETS[name]().model)
