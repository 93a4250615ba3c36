"""Presets: exact sizes of the published models, and the table that `python -m perceiver.presets` prints."""

import pytest

from perceiver.catalog import CATALOG, main
from perceiver.config import from_dict, to_dict
from perceiver.costs.flops import num_parameters
from perceiver.presets import PRESETS

PUBLISHED = {
    "mlm-imdb": 201_108_230,
    "txt-clf-imdb-decoder": 200_587_010,
    "txt-clf-imdb-all": 200_587_010,
    "img-clf-mnist": 907_212,
    "clm-wikitext": 30_563_078,
    "clm-c4": 453_950_720,
    "sam-maestro": 28_531_712,
    "sam-giantmidi": 134_840_832,
    "img-clf-imagenet": 48_440_627,
    "optical-flow": 41_057_134,
    "multimodal-kinetics": 19_858_855,
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_published_models_have_exactly_their_parameters(name: str, parameters: int) -> None:
    assert num_parameters(PRESETS[name]().model) == parameters


@pytest.mark.parametrize("name", PRESETS)
def test_the_catalog_says_of_each_preset_what_it_is(name: str) -> None:
    experiment = PRESETS[name]()
    task = type(experiment.task).__name__.removesuffix("Config")
    assert CATALOG[name] == (task, experiment.data.source, num_parameters(experiment.model))
    assert list(CATALOG) == list(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_bear_their_names_and_survive_serialisation(name: str) -> None:
    experiment = PRESETS[name]()
    assert experiment.preset == experiment.run_name == name
    assert from_dict(to_dict(experiment)) == experiment


def test_the_small_language_model_is_as_large_as_its_description_says() -> None:
    assert "4.3 million" in PRESETS["clm-wikitext-small"].__doc__
    assert round(num_parameters(PRESETS["clm-wikitext-small"]().model) / 1e6, 1) == 4.3


def test_the_table_shows_every_preset_with_its_size(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["preset", *PRESETS]
    sizes = {line.split()[0]: line.split()[-1] for line in lines[1:]}
    assert sizes["clm-c4"] == "453,950,720"
    assert all(sizes[name] == f"{parameters:,}" for name, parameters in PUBLISHED.items())
