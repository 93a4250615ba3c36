"""The command line demo."""

import io

import numpy as np
import pytest

import perceiver
from perceiver.inference.__main__ import main, parse
from tests.support.trained import write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    home = tmp_path_factory.mktemp("runs")
    return {task: str(write_run(home / task, task)) for task in ("causal", "masked", "sentiment", "images")}


def test_a_prompt_is_continued_as_the_library_does(runs, capsys):
    assert main([runs["causal"], "The ", "--max-new-tokens", "9", "--seed", "1", "--temperature", "0.8"]) == 0
    text = perceiver.load(runs["causal"]).generate("The ", max_new_tokens=9, seed=1, temperature=0.8)
    assert capsys.readouterr().out == f"The {text}\n"


@pytest.mark.parametrize("task, prompt, lines", [("masked", "a <mask>", 5), ("sentiment", "good", 1)])
def test_what_the_model_was_trained_for_is_the_default(runs, capsys, task, prompt, lines):
    assert main([runs[task], prompt]) == 0
    assert capsys.readouterr().out.count("\n") == lines


def test_an_image_is_classified_by_its_path(runs, capsys, tmp_path):
    from PIL import Image

    Image.fromarray(np.zeros((6, 6), np.uint8)).save(tmp_path / "x.png")
    assert main([runs["images"], str(tmp_path / "x.png")]) == 0
    assert capsys.readouterr().out.count("%") == 3


def test_in_a_dialogue_a_mistake_is_one_line_and_the_next_question(runs, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("no mask here\na <mask>\n\nnever asked\n"))
    assert main([runs["masked"], "--top-k", "2"]) == 0
    streams = capsys.readouterr()
    assert streams.out.count("%") == 2 and "error: the text has no mask" in streams.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing"], "no model 'nothing'"),
        (["masked", "x", "--action", "generate"], "cannot generate: its task is MaskedLM"),
        (["causal", "x" * 99], "99 tokens and must have 1 to 16"),
        (["images", "nowhere.png"], "no image file nowhere.png"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(runs, capsys, arguments, message):
    assert main([runs.get(arguments[0], arguments[0]), *arguments[1:]]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]


def test_the_help_of_a_command_shows_its_own_options_alone(capsys):
    shown = {}
    for action in ("generate", "fill_mask"):
        with pytest.raises(SystemExit) as stop:
            parse(["--action", action, "--help"])
        assert stop.value.code == 0
        shown[action] = capsys.readouterr().out
    assert "--temperature" in shown["generate"] and "--temperature" not in shown["fill_mask"]
    assert "--top-k" in shown["fill_mask"]
    assert not any("--action" in text for text in shown.values())
