"""Fields of one's own classes, of every type: saved, read, typed on a command line, written as YAML."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Optional

import pytest

from perceiver.config import Config, TaskConfig, UserError, from_dict, to_dict
from perceiver.config.checks import check_values
from perceiver.config.schema import experiment_schema
from perceiver.config_files import read_experiment_file, write_experiment_file
from perceiver.experiments import differing, field_words
from perceiver.presets import PRESETS
from ray_jobs.cli import override


class Mode(enum.Enum):
    FAST = 1
    EXACT = 2


class Part(Config):
    """A node of no base class of the package."""

    scale: float = 1.0
    power: Optional[int] = None  # noqa: UP045  # as people write it


class EveryField(TaskConfig):
    """A task with a field of each type."""

    mode: Mode = Mode.FAST
    """A choice of an enum."""
    path: Path = Path("größe/a b")
    maybe_path: Path | None = None
    part: Part = Part()
    parts: tuple[Part, ...] = (Part(), Part(scale=2.0))
    choice: Literal["a", "b"] = "a"
    pair: tuple[int, float] = (1, 2.0)
    ranges: tuple[tuple[int, int], ...] = ((0, 1), (1, 2))
    names: list[str] = field(default_factory=lambda: ["ä", "ö ü"])
    modes: tuple[Mode, ...] = ()
    text_or_number: int | str = "all"


CHANGED = EveryField(
    mode=Mode.EXACT,
    path=Path("/ä"),
    maybe_path=Path("b c"),
    part=Part(power=3),
    parts=(Part(scale=0.5), Part(power=2)),
    choice="b",
    pair=(3, 4.5),
    ranges=((5, 6), (7, 8)),
    names=["ß"],
    modes=(Mode.EXACT, Mode.FAST),
    text_or_number=3,
)


def of(task):
    return replace(PRESETS["quickstart"](), task=task)


@pytest.mark.parametrize("task", [EveryField(), CHANGED])
def test_fields_of_every_type_are_saved_and_read(task):
    experiment = of(task)
    check_values(experiment)
    assert from_dict(json.loads(json.dumps(to_dict(experiment)))) == experiment
    assert all(value == value and json.dumps(value) for value in experiment.identity.values())


def test_fields_of_every_type_are_typed_on_a_command_line():
    base, changed = of(EveryField()), of(CHANGED)
    words = [word for name, value in differing(changed, base).items() for word in field_words(name, value)]
    assert override(base, words, "ray_jobs.train") == changed
    with pytest.raises(UserError, match="--task.mode is '.*' and must be one of FAST, EXACT"):
        override(base, ["--task.mode", "SLOW"], "ray_jobs.train")


def test_fields_of_every_type_are_written_as_yaml(tmp_path):
    base, changed = of(EveryField()), of(CHANGED)
    path = tmp_path / "größe.yaml"
    write_experiment_file(path, changed, base, "quickstart")
    assert read_experiment_file(path).experiment(base) == changed
    path.write_text(path.read_text().replace("mode: EXACT", "mode: SLOW"))
    with pytest.raises(UserError, match="line 4: task.mode is 'SLOW' and must be one of FAST, EXACT"):
        read_experiment_file(path).experiment(base)


def test_the_schema_knows_enums_and_paths():
    tasks = experiment_schema()["$defs"]["TaskConfig"]["anyOf"]
    fields = next(task for task in tasks if "text_or_number" in task["properties"])["properties"]
    assert fields["mode"]["enum"] == ["FAST", "EXACT"] and fields["path"]["type"] == "string"


@dataclass
class NoConfig:
    scale: float = 1.0


class Unsaved(TaskConfig):
    """Fields that cannot be saved."""

    options: Any = None


class Wrong(TaskConfig):
    folder: str = Path("a")  # type: ignore[assignment]


@pytest.mark.parametrize("value", [{"a": 1}, NoConfig(), {1, 2}, len, (1, {"a": 2})])
def test_what_cannot_be_saved_is_named_with_its_field(value):
    with pytest.raises(UserError, match=r"Unsaved: task.options is .* cannot be saved with a run: fields hold numbers, texts"):
        check_values(of(Unsaved(options=value)))


def test_an_annotation_that_does_not_say_what_a_field_holds_is_named():
    with pytest.raises(UserError, match=r"Wrong: task.folder is .*, which its annotation \(str\) does not say"):
        check_values(of(Wrong()))
