"""Runs beside each other."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from perceiver.comparison import ComparedRun, grouped
from perceiver.config import UserError, to_dict
from perceiver.disk import write_json
from perceiver.evaluations import save_examples
from perceiver.presets import PRESETS
from perceiver.runs import Run
from perceiver.significance import Group, bootstrap, welch
from ray_jobs import compare
from tests.ray_jobs.test_main import loaded

BATCH = PRESETS["quickstart"]().training.global_batch_size


def make(folder, lr=1e-3, seed=0, values=(0.9, 0.5, 0.7), losses=None, acc=None, data="abc", targets=None):
    """A run of 30 steps, validated every 10, of which the best was evaluated."""
    experiment = PRESETS["quickstart"]()
    experiment = replace(experiment, optim=replace(experiment.optim, lr=lr), training=replace(experiment.training, seed=seed))
    run = Run(folder)
    write_json(folder / "experiment.json", {"experiment": to_dict(experiment), "data": data, "version": "0.2.0", "flops_per_example": 1e6})
    lines = []
    for number, value in enumerate(values, 1):
        # 10 steps of 36 s, of which a tenth waited; as much time again went to validation.
        lines.append({"step": 10 * number, "loss": 1.0, "step_seconds": 36.0, "data_wait": 0.1, "goodput": 0.45})
        lines.append({"step": 10 * number, "val_loss": value, "val_acc": 1 - value})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    marker = {"step": 20, "metrics": {"val_loss": 0.5, "val_acc": 0.5}, "higher_is_better": ["val_acc"]}
    write_json(folder / "checkpoints" / "step-00000020" / "checkpoint.json", marker)
    if losses is not None:
        path = run.evaluation_file(20, "abc")
        write_json(path, {"checkpoint": "step-00000020", "data": {"digest": "abc"}, "metrics": {"val_loss": float(np.mean(losses))}})
        kept = {"loss": losses, "targets": np.ones(len(losses)) if targets is None else targets}
        save_examples(path, {"": kept | ({} if acc is None else {"acc": acc})})
    return folder


def printed(capsys, *words):
    assert compare.main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def test_only_what_differs_is_shown_with_best_last_and_cost(tmp_path, capsys):
    one, other = make(tmp_path / "one"), make(tmp_path / "other", lr=0.1, values=(0.8, 0.6, 0.4))
    found = json.loads(printed(capsys, one, other, "--json", "--price-per-hour", "2"))
    assert found["fields"] == {"optim.lr": [1e-3, 0.1]} and not found["code"] and not found["data"]
    first, second = found["runs"]
    assert (first["best"], first["at_step"], first["last"]) == (0.5, 20, 0.7) and second["at_step"] == 30
    assert first["examples"] == 20 * BATCH and first["flops"] == 20 * BATCH * 1e6
    assert first["hours"] == pytest.approx(0.4) and first["hours_in_all"] == pytest.approx(0.6), "validation's time is counted"
    assert first["cost"] == pytest.approx(0.6 * PRESETS["quickstart"]().parallel.workers * 2)
    text = printed(capsys, one, other)
    assert "optim.lr  0.001  0.1" in text and "training.seed" not in text and "perceiver evaluate" in text


def test_a_run_without_records_has_what_it_was_evaluated_to(tmp_path, capsys):
    one, mean = make(tmp_path / "one"), make(tmp_path / "mean", losses=np.array([0.25, 0.35]))
    (mean / "metrics.jsonl").unlink()
    write_json(mean / "result.json", {"step": 20, "stopped": "it is the mean of 2 checkpoints"})
    _, found = json.loads(printed(capsys, one, mean, "--json"))["runs"]
    assert (found["best"], found["at_step"], found["last"], found["examples"]) == (pytest.approx(0.3), 20, pytest.approx(0.3), 20 * BATCH)
    assert Run(mean).last_step() == 20 and Run(one).last_step() == 30


def test_the_metric_says_which_values_are_better_and_an_unknown_one_is_a_sentence(tmp_path, capsys):
    runs = make(tmp_path / "one"), make(tmp_path / "other")
    found = json.loads(printed(capsys, *runs, "--json", "--metric", "acc"))
    assert found["metric"] == "val_acc" and found["higher_is_better"] and found["runs"][0]["best"] == 0.5
    with pytest.raises(UserError, match="--metric val_ac: .*did you mean val_acc"):
        compare.main([*map(str, runs), "--metric", "val_ac"])
    with pytest.raises(UserError, match="--by optim.l: .*did you mean optim.lr"):
        compare.main([*map(str, runs), "--by", "optim.l"])
    with pytest.raises(UserError, match="needs two runs"):
        compare.main([str(runs[0])])
    with pytest.raises(UserError, match="no run"):
        compare.main([str(runs[0]), str(tmp_path / "none")])


def test_a_difference_on_the_same_examples_is_told_from_chance(tmp_path, capsys):
    rng = np.random.default_rng(1)
    losses = rng.exponential(1.0, 400)
    make(tmp_path / "a", losses=losses, acc=(losses < 1.0).astype(float))
    make(tmp_path / "better", losses=losses - 0.05 + rng.normal(0, 0.1, 400), acc=(losses < 1.5).astype(float))
    make(tmp_path / "same", losses=losses + rng.normal(0, 0.1, 400) - rng.normal(0, 0.1, 400).mean(), acc=(losses < 1.0).astype(float))
    make(tmp_path / "elsewhere")
    found = json.loads(printed(capsys, tmp_path, "--json"))["paired"]
    better, elsewhere, same = found["runs"]
    assert better["real"] and better["p"] < 0.01 and better["high"] < 0 and better["difference"] == pytest.approx(-0.05, abs=0.02)
    assert not same["real"] and same["p"] > 0.05 and same["low"] < 0 < same["high"]
    assert elsewhere["difference"] is None and "not evaluated on the same data" in elsewhere["note"]
    assert found["metric"] == "val_loss"
    text = printed(capsys, tmp_path / "a", tmp_path / "better", tmp_path / "same", "--metric", "acc")
    assert "better: better than a" in text and "same: not shown to be better or worse than a" in text


def test_the_same_data_in_other_pieces_is_not_paired(tmp_path, capsys):
    make(tmp_path / "a", losses=np.ones(10)), make(tmp_path / "b", losses=np.ones(5), targets=np.full(5, 2.0))
    (found,) = json.loads(printed(capsys, tmp_path, "--json"))["paired"]["runs"]
    assert found["difference"] is None and "other pieces" in found["note"]


def test_the_bootstrap_interval_is_that_of_the_mean_over_targets():
    rng = np.random.default_rng(0)
    targets, differences = np.ones(2000), rng.normal(0.1, 1.0, (1, 2000))
    (found,) = bootstrap(targets, differences)
    error = differences.std() / math.sqrt(2000)
    assert found.value == pytest.approx(differences.mean())
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.1 * error * 1.96)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.1 * error * 1.96)
    (of_two,) = bootstrap(2 * targets, 2 * differences)
    assert of_two == found, "sums by numbers of targets"


def test_runs_that_differ_in_their_seeds_are_a_group_with_a_t_interval(tmp_path, capsys):
    for seed, value in enumerate((0.50, 0.52, 0.54)):
        make(tmp_path / f"base-{seed}", seed=seed, values=(0.9, value, 0.9))
        make(tmp_path / f"change-{seed}", lr=0.1, seed=seed, values=(0.9, value - 0.2, 0.9))
    result = json.loads(printed(capsys, tmp_path, "--json"))
    base, change = result["groups"]
    assert base["seeds"] == [0, 1, 2] and base["mean"] == pytest.approx(0.52) and base["deviation"] == pytest.approx(0.02)
    assert base["margin"] == pytest.approx(4.302653 * 0.02 / math.sqrt(3), rel=1e-5)  # t of 2 degrees of freedom
    assert change["real"] and change["difference"] == pytest.approx(-0.2)
    assert "change-0: better than base-0, over seeds" in printed(capsys, tmp_path)
    by = json.loads(printed(capsys, tmp_path, "--json", "--by", "optim.lr"))["groups"]
    assert [group["group"] for group in by] == ["optim.lr 0.001", "optim.lr 0.1"]


def test_welchs_test_is_that_of_the_books():
    from scipy.stats import ttest_ind

    values = (27.5, 21.0, 19.0, 23.6, 17.0), (27.1, 22.0, 20.8, 23.4)
    found = welch(Group("a", (), values[0]), Group("b", (), values[1]))
    expected = ttest_ind(*values, equal_var=False)
    assert found.p == pytest.approx(expected.pvalue) and found.low == pytest.approx(expected.confidence_interval().low)
    assert welch(Group("a", (), values[0]), Group("b", (), values[1][:1])) is None


def test_a_change_of_data_or_code_makes_no_replicate_and_is_told(tmp_path, capsys):
    make(tmp_path / "a", seed=0), make(tmp_path / "b", seed=1, data="other"), make(tmp_path / "c", seed=2)
    (tmp_path / "c" / "code").mkdir()
    (tmp_path / "c" / "code" / "mine.py").write_text("a = 1")
    assert len(grouped([ComparedRun(Run(tmp_path / name)) for name in "abc"], "val_loss")) == 3
    text = printed(capsys, tmp_path)
    assert "code of c differs from a's: mine.py" in text and "data differs: a abc, b other, c abc" in text


def test_the_curves_are_drawn_over_every_axis(tmp_path, capsys):
    make(tmp_path / "a"), make(tmp_path / "b")
    picture = tmp_path / "curves.png"
    assert "curves: " in printed(capsys, tmp_path / "a", tmp_path / "b", "--plot", picture)
    assert picture.read_bytes()[1:4] == b"PNG"
    with pytest.raises(UserError, match="--plot .* must end in"):
        compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--plot", "curves.txt"])


def test_a_comparison_loads_no_pytorch(tmp_path):
    make(tmp_path / "a", losses=np.ones(10)), make(tmp_path / "b", seed=1, losses=np.ones(10))
    code = f"from ray_jobs.main import main; main(['compare', {str(tmp_path / 'a')!r}, {str(tmp_path / 'b')!r}])"
    assert loaded(code) == {"numpy"}
