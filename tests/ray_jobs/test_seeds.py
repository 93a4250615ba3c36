"""Replicates of a training under several seeds."""

import math
import os
import re
import signal
import threading
import time

import pytest

from perceiver.config import UserError
from perceiver.runs import Run
from ray_jobs import seeds
from ray_jobs.cli import parse_experiment
from ray_jobs.seeds import OPTION, Processes, Spread, parse_seeds, replicate, run_of, table, take_seeds, train_seeds
from tests.support.jobs import QUICK, Job
from tests.support.small import heard


@pytest.mark.parametrize(
    ("words", "value"),
    [(["a", OPTION, "5", "--x"], "5"), (["a", "--seeds=0,1", "--x"], "0,1"), (["a", "--x"], None)],
)
def test_seeds_are_taken_from_the_command_line_and_all_else_is_left(words, value):
    assert take_seeds(words) == (value, ["a", "--x"])


def test_a_number_counts_from_the_first_seed_and_a_list_is_a_list():
    assert parse_seeds("3", 0) == [0, 1, 2] and parse_seeds("2", 7) == [7, 8]
    assert parse_seeds("0,1, 7", 3) == [0, 1, 7] and parse_seeds("7,", 0) == [7]


@pytest.mark.parametrize("value", ["0", "x", "1,,2", "-1", "1,1", "1001", "1" * 30, "²"])
def test_what_names_no_seeds_is_refused_in_one_sentence(value):
    with pytest.raises(UserError, match=f"^{OPTION} is '{re.escape(value)}' and "):
        parse_seeds(value, 0)


@pytest.mark.parametrize("words", [["a", OPTION], ["a", OPTION, "--name", "b"], ["a", "--seeds="]])
def test_seeds_without_a_value_are_refused(words):
    with pytest.raises(UserError, match="--seeds has no value"):
        take_seeds(words)


def test_a_replicate_differs_in_seed_and_name_alone():
    base = parse_experiment(["quickstart", "--name", "base"], "ray_jobs.train")
    made = replicate(base, 3)
    assert (made.training.seed, made.run.name) == (3, "base-seed-3")
    changed = {name for name, value in made.identity.items() if base.identity[name] != value}
    assert changed == {"training.seed"} and replicate(parse_experiment(["quickstart"], "x"), 0).run.name == "quickstart-seed-0"


def test_mean_deviation_and_students_interval_are_those_of_the_textbook():
    spread = Spread((10.0, 12.0, 14.0))
    assert (spread.mean, spread.deviation) == (12.0, 2.0)
    assert spread.margin == pytest.approx(4.302653 * 2 / math.sqrt(3), rel=1e-6)  # t of 0.975 at two degrees of freedom
    assert math.isnan(Spread((1.0,)).margin) and math.isnan(Spread((1.0,)).deviation)


def test_the_table_has_a_row_for_each_seed_their_spread_and_what_no_training_reaches():
    lines = table({0: {"step": 9, "val_loss": 0.5}, 4: {"step": 9, "val_loss": 0.7}, 5: "the loss is not a number"}, {"val_loss": 2.3})
    cells = [re.split(r"  +", line) for line in lines]
    assert cells[:4] == [["seed", "step", "val_loss"], ["0", "9", "0.5"], ["4", "9", "0.7"], ["5", "failed"]]
    assert [row[0] for row in cells[4:]] == ["mean", "std", "95% t-interval", "baseline"]
    assert [row[-1] for row in cells[4:]] == ["0.6", "0.1414", "-0.6706 to 1.871", "2.3"]
    assert len(table({0: {"step": 9, "val_loss": 0.5}}, {})) == 2


def test_a_seed_that_fails_while_it_trains_costs_its_own_line_and_a_mistake_ends_all(tmp_path):
    base = parse_experiment(["quickstart", "--name", "base", "--storage", str(tmp_path)], "ray_jobs.train")
    trained = []

    def train(made):
        trained.append(made.run.name)
        if made.training.seed == 1:
            (tmp_path / made.run.name).mkdir()
            Run(tmp_path / made.run.name).save_failure(True, "the loss is not a number")
            raise UserError("the loss is not a number")
        return {"step": 3, "val_loss": 0.1}

    with heard() as lines:
        assert not train_seeds(base, [0, 1, 2], train, dict)
    assert trained == ["base-seed-0", "base-seed-1", "base-seed-2"]
    assert any(re.match(r"1 +failed", line) for line in lines) and any(line.startswith("mean") for line in lines)

    def refuse(made):
        raise UserError("no such thing")

    with pytest.raises(UserError, match="no such thing"):
        train_seeds(base, [0, 1], refuse, dict)
    assert seeds.MOST == 1000


def test_several_at_once_train_at_once_and_the_table_keeps_their_order(tmp_path):
    base = parse_experiment(["quickstart", "--name", "base", "--storage", str(tmp_path)], "ray_jobs.train")
    together = threading.Barrier(2, timeout=30)

    def train(made):
        together.wait()  # broken, if the other one does not train meanwhile
        if made.training.seed == 0:
            time.sleep(0.1)
        return {"step": made.training.seed, "val_loss": 0.1}

    with heard() as lines:
        assert train_seeds(base, [0, 1, 2, 3], train, dict, at_once=2)
    assert [line.split()[0] for line in lines if re.match(r"\d ", line)] == ["0", "1", "2", "3"]


def test_a_mistake_ends_those_that_wait(tmp_path):
    base = parse_experiment(["quickstart", "--name", "base", "--storage", str(tmp_path)], "ray_jobs.train")
    asked = []

    def refuse(made):
        asked.append(made.training.seed)
        raise UserError("no such thing")

    with pytest.raises(UserError, match="no such thing"):
        train_seeds(base, range(200), refuse, dict, at_once=2)
    assert len(asked) < 200


@pytest.fixture
def in_place_of_training(tmp_path, monkeypatch):
    """A module `ray_jobs.train` for other processes, which leaves a result, fails, or waits for a signal, by its seed."""
    (tmp_path / "ray_jobs").mkdir()
    (tmp_path / "ray_jobs" / "__init__.py").touch()
    (tmp_path / "ray_jobs" / "train.py").write_text(
        "import json, pathlib, signal, sys, time\n"
        "words = dict(word.split('=', 1) for word in sys.argv[1:])\n"
        "run = pathlib.Path(words['--storage'], words['--run.name'])\n"
        "run.mkdir(exist_ok=True)\n"
        "print('trains', flush=True)\n"
        "match words['--training.seed']:\n"
        "    case '0':\n"
        "        (run / 'result.json').write_text(json.dumps({'step': 3, 'val_loss': 0.5}))\n"
        "    case '1':\n"
        "        print('error: it does not fit', file=sys.stderr)\n"
        "        sys.exit(2)\n"
        "    case '2':\n"
        "        signal.signal(signal.SIGTERM, lambda *_: (run / 'saved').touch() or sys.exit(130))\n"
        "        (run / 'waits').touch()\n"
        "        time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    base = parse_experiment(["quickstart", "--name", "base", "--storage", str(tmp_path)], "ray_jobs.train")
    monkeypatch.chdir(tmp_path)
    return base, Processes([f"--storage={tmp_path}"], environment)


def test_a_process_gives_its_result_or_the_sentence_that_it_ended_with(in_place_of_training):
    base, processes = in_place_of_training
    with processes, heard() as lines:
        assert processes.train(replicate(base, 0)) == {"step": 3, "val_loss": 0.5}
        with pytest.raises(UserError, match="^it does not fit$"):
            processes.train(replicate(base, 1))
    assert "seed 0: trains" in lines


def test_a_signal_is_handed_on_and_waited_for_and_no_further_training_begins(in_place_of_training, tmp_path):
    base, processes = in_place_of_training
    run = run_of(replicate(base, 2)).folder

    def interrupt():
        while not (run / "waits").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with processes:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            train_seeds(base, [2, 0], processes.train, dict, at_once=2)
        with pytest.raises(KeyboardInterrupt):
            processes.train(replicate(base, 1))
    assert (run / "saved").exists() and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_seeds_on_the_command_line_are_runs_of_their_own_that_continue_by_the_same_command(tmp_path):
    words = ["quickstart", *QUICK, "--training.max-steps", "4", "--name", "base", "--seeds", "0,3"]
    output = Job("ray_jobs.train", *words, home=tmp_path).finish()
    found = [Run(tmp_path / "runs" / f"base-seed-{seed}") for seed in (0, 3)]
    assert [run.result()["step"] for run in found] == [4, 4]
    assert [run.load()[0].training.seed for run in found] == [0, 3]
    (table_of,) = re.findall(r"^seed +step.*", output, re.MULTILINE | re.DOTALL)
    assert "95% t-interval" in table_of and "baseline" in table_of
    found[1].forget_result()
    again = Job("ray_jobs.train", *words, home=tmp_path).finish()
    assert "run base-seed-0 is finished" in again and again.endswith(table_of)


@pytest.mark.slow
def test_seeds_share_a_cluster_that_has_room_for_several(tmp_path):
    words = ["quickstart", *QUICK, "--workers", "1", "--training.max-steps", "4", "--name", "base", "--seeds", "0,3"]
    output = Job("ray_jobs.train", *words, home=tmp_path).finish()
    assert "2 seeds, 2 at once" in output and "seed 0: " in output and "seed 3: " in output
    assert [Run(tmp_path / "runs" / f"base-seed-{seed}").result()["step"] for seed in (0, 3)] == [4, 4]
    assert re.search(r"^mean ", output, re.MULTILINE)
