"""The command `perceiver`: what it offers, what it loads, what it completes."""

import ast
import importlib.util
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from perceiver.config import home
from perceiver.terminal import number_of
from ray_jobs import completion
from ray_jobs.cli import main_entry
from ray_jobs.help import show_help
from ray_jobs.main import COMMANDS, main
from ray_jobs.program import STARTED_AS, program, started_as
from tests.conftest import ROOT
from tests.tuning.test_tuning import make_run

HEAVY = {"torch", "ray", "tyro", "pyarrow", "numpy", "datasets", "tensorboardX", "sentencepiece"}


def loaded(code: str, **environment: str) -> set[str]:
    """Which heavy modules a program has loaded when it ends."""
    program = f"import sys\n{code}\nprint(*sorted({HEAVY!r} & sys.modules.keys()), file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, env=environment or None)
    return set(result.stderr.split())


def test_the_help_lists_every_command_under_what_one_wants_to_do_with_three_examples(capsys):
    assert main([]) == 0
    alone = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == alone
    for name, command in COMMANDS.items():
        assert f"  {name} " in alone and f"\n{command.group}:\n" in alone
    assert alone.count("\n  perceiver ") == 3
    assert len(alone.splitlines()) < 60 and max(map(len, alone.splitlines())) <= 100


def test_the_command_is_installed():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"perceiver": "ray_jobs.main:entry"}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_the_main_of_a_module_that_there_is(name):
    spec = importlib.util.find_spec(COMMANDS[name].module)
    functions = {node.name for node in ast.parse(open(spec.origin).read()).body if isinstance(node, ast.FunctionDef)}
    assert "main" in functions


@pytest.mark.parametrize("wrong, right", [("trian", "train"), ("fillmask", "fill-mask"), ("scaling_laws", "scaling-laws"), ("run", "runs")])
def test_an_unknown_command_is_a_sentence_with_the_nearest_name(capsys, wrong, right):
    with pytest.raises(SystemExit) as stop:
        main_entry(main, [wrong])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"did you mean {right}?" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "code",
    [
        "import perceiver",
        "import perceiver.config, perceiver.catalog, perceiver.runs",
        "from ray_jobs.main import main; main(['--help'])",
        "from ray_jobs.main import main; main(['--version'])",
        "from ray_jobs.main import main; main(['presets'])",
        "from ray_jobs.main import main; main(['completion', '--words', 'train'])",
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_needed(code):
    assert loaded(code) == set()


def test_the_list_of_runs_loads_nothing_heavy(tmp_path):
    make_run(tmp_path / "runs" / "mine", [10], [0.5])
    code = "from ray_jobs.main import main; main(['runs'])"
    assert loaded(code, PERCEIVER_HOME=str(tmp_path)) == set()


def test_the_help_of_a_preset_shows_its_fields_and_none_that_are_internal(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PERCEIVER_HOME", str(tmp_path))
    assert main(["train", "quickstart", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--optim.lr FLOAT" in shown and "Peak learning rate" in shown
    assert "--preset" not in shown


def test_the_help_of_a_preset_is_made_once_and_again_when_anything_it_depends_on_has_changed(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PERCEIVER_HOME", str(tmp_path))
    made = []

    def make():
        made.append(len(made))
        print(f"help number {len(made)}, é")
        raise SystemExit(0)

    def shown(preset="quickstart"):
        show_help("train", preset, make)
        return capsys.readouterr().out

    assert shown() == shown() == "help number 1, é\n"
    assert shown("clm-c4") == "help number 2, é\n" and shown() == "help number 1, é\n"
    monkeypatch.setenv("COLUMNS", "55")
    assert shown() == "help number 3, é\n"
    sources = tmp_path / "sources"
    (sources / "perceiver").mkdir(parents=True)
    monkeypatch.setattr("ray_jobs.help.ROOT", sources)
    assert shown() == "help number 4, é\n"
    (sources / "perceiver" / "new.py").write_text("a = 1\n")
    assert shown() == shown() == "help number 5, é\n"
    assert len(list((tmp_path / "cache" / "help").iterdir())) == 2  # one for each command and preset


def test_help_that_failed_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PERCEIVER_HOME", str(tmp_path))

    def fail():
        raise SystemExit(2)

    with pytest.raises(SystemExit):
        show_help("train", "quickstart", fail)
    assert not (tmp_path / "cache").exists()


def test_help_that_is_kept_and_names_with_a_mistake_load_nothing_heavy(tmp_path):
    program = "from ray_jobs.main import main; main(['train', 'quickstart', '--help'])"
    assert "torch" in loaded(program, PERCEIVER_HOME=str(tmp_path))
    assert loaded(program, PERCEIVER_HOME=str(tmp_path)) == set()
    for command in ("train", "preprocess", "plan"):
        wrong = f"from ray_jobs.main import main\ntry: main([{command!r}, 'quickstrat'])\nexcept Exception: pass\nelse: raise SystemExit(1)"
        assert loaded(wrong) == set()


def test_a_mistake_in_a_field_and_help_of_ones_own_experiment_need_neither_ray_nor_training(tmp_path):
    (tmp_path / "own.py").write_text("from perceiver.presets import PRESETS\nexperiment = PRESETS['quickstart']\n")
    name = f"{tmp_path / 'own.py'}:experiment"
    for words in ([name, "--help"], [name, "--optim.lr", "fast", "--seeds", "2", "--quiet"], ["quickstart", "--optim.lrr", "1"]):
        code = f"from ray_jobs.main import main\ntry: main({['train', *words]!r})\nexcept (Exception, SystemExit): pass"
        heavy = loaded(code, PERCEIVER_HOME=str(tmp_path))
        assert "torch" in heavy and "ray" not in heavy


def test_the_version_is_that_of_the_package_and_shown(capsys):
    import perceiver

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"perceiver {perceiver.__version__}\n"
    assert perceiver.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        perceiver.nothing  # noqa: B018


def test_the_usage_names_the_command_that_was_typed(tmp_path):
    script = tmp_path / "perceiver"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom ray_jobs.main import entry\nentry()\n")
    for words, usage in {
        ("train",): "usage: perceiver train EXPERIMENT",
        ("runs", "--help"): "usage: perceiver runs [-h]",
        ("fill-mask", "--help"): "usage: perceiver fill-mask [-h]",
        ("preprocess", "quickstart", "--help"): "usage: perceiver preprocess quickstart [-h]",
    }.items():
        shown = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=True).stdout
        assert shown.startswith(usage)
    shown = subprocess.run([sys.executable, "-m", "ray_jobs.runs", "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.startswith("usage: python -m ray_jobs.runs [-h]")


def test_completion_knows_commands_presets_fields_and_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PERCEIVER_HOME", str(tmp_path))
    make_run(tmp_path / "runs" / "mine", [10])
    assert completion.words([]) == list(COMMANDS)
    assert "clm-wikitext" in completion.words(["train"]) == completion.words(["submit", "train"])
    assert {"--optim.lr", "--workers"} <= set(completion.words(["train", "quickstart"]))
    assert "--preset" not in completion.words(["train", "quickstart"])
    assert "--model.max-latents" not in completion.words(["train", "quickstart", "--optim.lr"])
    assert completion.words(["evaluate"]) == ["mine"]
    assert completion.words(["submit"])[:2] == ["preprocess", "tokenizer"] and "plan" not in completion.words(["submit"])
    assert completion.words(["completion"]) == ["bash", "zsh", "fish"]
    assert completion.words(["unknown", "x"]) == completion.words(["train", "unknown"]) == []


@pytest.mark.parametrize(
    "typed, found", [("perceiver tra", ["train"]), ("perceiver train clm-c", ["clm-c4", "clm-c4-small"]), ("perceiver export ", ["mine"])]
)
def test_bash_completes_what_is_typed(tmp_path, typed, found):
    make_run(tmp_path / "runs" / "mine", [10])
    command = tmp_path / "perceiver"
    command.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m ray_jobs.main "$@"\n')
    command.chmod(0o755)
    words = typed.split(" ")
    script = f"""{completion.SCRIPTS["bash"]}
COMP_WORDS=({" ".join(f'"{word}"' for word in words)})
COMP_CWORD={len(words) - 1}
_perceiver
printf '%s\\n' "${{COMPREPLY[@]}}" """
    result = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "PERCEIVER_HOME": str(tmp_path)},
    )
    assert result.stdout.split() == found


@pytest.mark.parametrize("shell", completion.SCRIPTS)
def test_the_completion_script_is_one_that_its_shell_reads(shell, capsys):
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    assert main(["completion", shell]) == 0
    subprocess.run([program, "-n"], input=capsys.readouterr().out, text=True, check=True)


COMPILER = "{'torch._dynamo', 'torch._inductor', 'triton'} & sys.modules.keys() or 'none'"
META = """
import sys, torch
from perceiver.presets import PRESETS
from perceiver.tasks import build_task
with torch.device("meta"):
    for preset in ("quickstart", "mlm-imdb", "clm-c4", "forecast-seasons", "optical-flow"):
        build_task(PRESETS[preset]()).build_model()
"""


@pytest.mark.parametrize("code", ["import sys, perceiver.tasks, perceiver.presets", META], ids=["loaded", "built on the meta device"])
def test_tasks_and_models_load_no_compiler(code):
    """It takes seconds in every process of a training: it is loaded where something is compiled."""
    code = f"{code}\nprint({COMPILER})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "none"


WRONG_ARGUMENTS = {
    "option that does not exist": ("runs --jsn", "option --jsn does not exist, did you mean --json?"),
    "misspelled beside one that is missing": (
        "push mine name/model --licence mit --yess",
        "option --licence does not exist, did you mean --license?",
    ),
    "misspelled and so missing": ("predict mine --inptu a --output b", "option --inptu does not exist, did you mean --input?"),
    "of a command that takes fields too": ("sweep quickstart --trails 3", "option --trails does not exist, did you mean --trials?"),
    "the same, with its value": ("evaluate mine --chekpoint=last", "option --chekpoint does not exist, did you mean --checkpoint?"),
    "argument too many": ("presets all", "argument 'all' is one too many;"),
    "missing": ("export", "run and --out are missing;"),
    "missing, with one that may be missing": ("tag", "run is missing;"),
    "no number": ("generate mine hello --max-new-tokens many", "--max-new-tokens is 'many' and must be a whole number;"),
    "no choice": ("completion bsh", "shell is 'bsh' and must be one of bash, zsh, fish;"),
    "no value": ("compare a b --price-per-hour", "--price-per-hour needs a value;"),
    "value of a switch": ("rm mine --yes=1", "--yes takes no value, and is given '1';"),
}


@pytest.mark.parametrize("typed, said", WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
def test_a_wrong_argument_of_any_command_is_one_sentence_and_status_2(typed, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(typed.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"error: {said} ") and error.endswith(" --help lists what can be given\n") and error.count("\n") == 1


def test_all_commands_report_wrong_arguments_alike():
    sources = [path for package in ("perceiver", "ray_jobs", "tuning") for path in (ROOT / package).rglob("*.py")]
    parsers = {path.name: path.read_text().count("argparse.ArgumentParser(") for path in sources}
    # The one of submit reads the words of another command, and reports nothing.
    assert {name: number for name, number in parsers.items() if number} == {"submit.py": 1}


@pytest.mark.parametrize(
    "count, words", [(1, "1 batch"), (0, "0 batches"), (1200, "1,200 batches"), (1.0, "1 batch"), (0.5, "0.5 batches")]
)
def test_one_thing_is_counted_in_the_singular(count, words):
    assert number_of(count, "batch", "batches") == words


def test_trainings_that_a_command_starts_print_commands_as_they_were_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/perceiver", "train"])
    started = {STARTED_AS: started_as()}
    monkeypatch.setattr(sys, "argv", ["/somewhere/ray_jobs/train.py"])
    assert program("ray_jobs.evaluate") == "python -m ray_jobs.evaluate"
    monkeypatch.setenv(STARTED_AS, started[STARTED_AS])
    assert program("ray_jobs.evaluate") == "perceiver evaluate"


def test_the_process_that_workers_report_to_needs_no_pytorch_and_the_one_that_starts_them_not_what_they_run():
    assert loaded("import ray_jobs.mailbox") <= {"ray", "numpy"}
    code = "import sys, ray_jobs.on_workers; sys.stderr.write(' '.join(name for name in sys.modules if name.startswith('perceiver')))"
    assert loaded(code) == set()


def test_a_command_is_spelled_with_the_experiment_as_it_was_typed(monkeypatch):
    monkeypatch.setenv("PERCEIVER_STARTED_AS", "perceiver")
    assert program("ray_jobs.train ./files/weather.py:tiny") == "perceiver train ./files/weather.py:tiny"
    assert program("ray_jobs.train_tokenizer out.json") == "perceiver tokenizer out.json"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_shows_its_help(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    try:
        status = main([name, "--help"])
    except SystemExit as stop:
        status = stop.code
    shown = capsys.readouterr().out
    assert status in (0, None) and "usage: " in shown and len(shown.splitlines()) > 4
    described = [line for line in shown.splitlines() if not line.startswith(("usage:", " "))]
    # Where fields are listed, tyro makes one line of each paragraph.
    assert "[OPTIONS]" in shown or not [line for line in described if len(line) > 80], "text is filled to the width of the terminal"


LONG, NOBODY = "a" * 300, "~nosuchuser/x"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["data", NOBODY], "~nosuchuser/x names the home of a user that does not exist here"),
        (["data", LONG], "File name too long"),
        (["data", "own.jsonl", "--html", NOBODY], "--html is '~nosuchuser/x'"),
        (["data", "own.jsonl", "--html=file/x.html"], "--html is file/x.html"),
        (["evaluate", LONG], "File name too long"),
        (["data", "a\0b"], "holds a NUL character"),
        (["preprocess", "quickstart", "--source", "\0"], "data.source is '\\x00' and must hold no NUL character"),
        (["preprocess", "quickstart", "--data.root", NOBODY], "~nosuchuser/x names the home of a user that does not exist here"),
        (["tokenizer", "a\0b", "--data.source", "own.jsonl"], "holds a NUL character"),
        (["compare", NOBODY, "other"], "~nosuchuser/x names the home"),
        (["runs", NOBODY], "~nosuchuser/x names the home"),
        (["report", "own", "--out", "/proc/x.html"], "--out is /proc/x.html, which cannot be written"),
        (["lr-find", "quickstart", "--out", "/proc/x.png"], "--out is /proc/x.png, which cannot be written"),
        (["tokenizer", "file/x.model", "--data.source", "own.jsonl"], "OUT is 'file'"),
        (["tokenizer", "/proc/x.model", "--data.source", "own.jsonl"], "OUT is '/proc'"),
        (["preprocess", "quickstart", "--data.root", "file/x"], "--data.root file/x cannot be used"),
        (["preprocess", "quickstart", "--data.root=link"], "--data.root link cannot be used"),
        (["train", "quickstart", "--run.storage", "link"], "--run.storage is 'link' and cannot be a folder"),
        (["train", "quickstart", "--init-from", LONG], "--init-from aaa"),
        (["sweep", "quickstart", "--space", "optim.lr=uniform(1e-4,1e-3)", "--storage", "file/x"], "--storage is 'file/x'"),
    ],
)
def test_a_path_that_cannot_be_is_one_sentence_at_every_door(typed, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERCEIVER_HOME", str(tmp_path / "home"))
    (tmp_path / "file").write_text("")
    (tmp_path / "own.jsonl").write_text('{"text": "a"}\n' * 20)
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(SystemExit) as stop:
        main_entry(main, typed)
    printed = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(printed) == 1 and printed[0].startswith("error: ") and said in printed[0]


def test_what_the_system_says_of_another_path_is_one_sentence_and_other_errors_show_where_they_come_from(tmp_path, capsys):
    def fails(error):
        def job(words):
            raise error

        with pytest.raises(SystemExit) as stop:
            main_entry(job, ["run", "--out", "x"])
        return stop.value.code, capsys.readouterr().err

    assert fails(PermissionError(13, "Permission denied", "/elsewhere/y")) == (1, "failed: /elsewhere/y: Permission denied\n")
    assert fails(OSError(28, "No space left on device")) == (1, "failed: [Errno 28] No space left on device\n")
    for error in (ConnectionRefusedError(111, "Connection refused"), RuntimeError("of our own"), OSError("without a number")):
        with pytest.raises(type(error)):
            fails(error)


def test_an_empty_home_is_none(monkeypatch):
    monkeypatch.setenv("PERCEIVER_HOME", "")
    assert home() == Path.home() / "perceiver"
