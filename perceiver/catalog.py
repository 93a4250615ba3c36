"""The presets as a table, which takes neither PyTorch nor the presets themselves to print. A test compares it with them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from perceiver.terminal import CommandParser

CATALOG: dict[str, tuple[str, str, int]] = {
    "quickstart": ("ImageClassification", "mnist-mini", 119_726),
    "img-clf-mnist": ("ImageClassification", "mnist", 907_212),
    "clm-wikitext": ("CausalLM", "wikitext-103-raw", 30_563_078),
    "clm-wikitext-small": ("CausalLM", "wikitext-2-raw", 4_267_526),
    "mlm-imdb": ("MaskedLM", "imdb-unsupervised", 201_108_230),
    "mlm-imdb-small": ("MaskedLM", "imdb-unsupervised", 419_974),
    "txt-clf-imdb-decoder": ("TextClassification", "imdb", 200_587_010),
    "txt-clf-imdb-decoder-small": ("TextClassification", "imdb", 403_522),
    "txt-clf-imdb-all": ("TextClassification", "imdb", 200_587_010),
    "txt-clf-imdb-all-small": ("TextClassification", "imdb", 403_522),
    "clm-c4": ("CausalLM", "c4", 453_950_720),
    "clm-c4-small": ("CausalLM", "c4", 4_885_120),
    "sam-maestro": ("SymbolicAudio", "maestro", 28_531_712),
    "sam-giantmidi": ("SymbolicAudio", "giantmidi", 134_840_832),
    "sam-small": ("SymbolicAudio", "maestro", 1_036_032),
    "copy-small": ("Copying", "perceiver.tasks.copying:ShortSequences", 628_769),
    "copy-131072": ("Copying", "perceiver.tasks.copying:LongSequences", 89_276_673),
    "img-ar-mnist": ("ImageGeneration", "mnist", 1_119_489),
    "img-ar-imagenet64": ("ImageGeneration", "", 780_660_995),
    "img-clf-imagenet": ("PhotoClassification", "imagenet", 48_440_627),
    "optical-flow": ("OpticalFlow", "", 41_057_134),
    "optical-flow-small": ("OpticalFlow", "perceiver.data.made_flow:MovingShapes", 331_358),
    "multimodal-kinetics": ("MultimodalAutoencoding", "", 19_858_855),
    "multimodal-small": ("MultimodalAutoencoding", "perceiver.data.made_video:SoundingShapes", 335_775),
    "tables": ("Tables", "", 102_922),
    "table-heads": ("TableHeads", "", 102_922),
    "forecast-seasons": ("Forecasting", "perceiver.data.made:Seasons", 108_676),
    "points-shapes": ("PointClouds", "perceiver.data.made:Shapes", 129_494),
    "audio-clf-small": ("AudioClassification", "perceiver.data.made_sounds:Sounds", 193_796),
    "audio-clf-esc50": ("AudioClassification", "", 2_629_284),
    "img-clf": ("ImageClassification", "", 197_348),
    "txt-clf": ("TextClassification", "", 403_392),
    "img-tags": ("ImageTags", "", 197_348),
    "txt-tags": ("TextTags", "", 403_392),
}
"""Task, source of the data, and number of the model's parameters, by the preset's name."""


def main(argv: Sequence[str] = ()) -> int:
    """Prints the table."""
    parser = CommandParser(prog="perceiver presets", description="Lists the experiments that come with the package.")
    parser.parse_args(list(argv))
    rows = [("preset", "task", "data", "parameters")]
    rows += [(name, task, data, f"{parameters:,}") for name, (task, data, parameters) in CATALOG.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, task, data, number in rows:
        print(f"{name:{widths[0]}}  {task:{widths[1]}}  {data:{widths[2]}}  {number:>{widths[3]}}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
