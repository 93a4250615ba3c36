"""Domains of search spaces: mistakes are named before anything starts, and a sweep knows its space again in another process."""

import sys

import pytest
from ray import tune

from perceiver.config import UserError
from ray_jobs.main import main as perceiver_command
from tuning.space_texts import check_line
from tuning.spaces import check_space, described, parse_space
from tuning.sweep import check_values
from tuning.sweeps import Sweep, find_sweep


def checked(**domain):
    return check_values(Sweep(preset="quickstart", space={name.replace("__", "."): value for name, value in domain.items()}))


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        (tune.uniform(1e-2, 1e-4), r"optim\.lr of the sweep's space is a range from 0\.01 to 0\.0001 and must go from a lower"),
        (tune.loguniform(1e-2, 1e-4), r"range from 0\.01 to 0\.0001"),
        (tune.quniform(1.0, 0.5, 0.1), r"range from 1 to 0\.5"),
        (tune.choice([]), r"optim\.lr of the sweep's space has no value to choose from"),
        (tune.grid_search([]), r"optim\.lr of the sweep's space has no value to choose from"),
        (1e-3, r"optim\.lr of the sweep's space is 0\.001 and must be tune\.uniform"),
        ([1e-3], r"optim\.lr of the sweep's space is \[0\.001\] and must be tune\.uniform"),
        ({"choice": [1e-3]}, r"optim\.lr of the sweep's space is a mapping and must be"),
        (tune.uniform(-1.0, 1.0), r"optim\.lr.* -1"),
        (tune.choice([1e-3, "fast"]), r"optim\.lr"),
    ],
)
def test_domains_that_nothing_can_be_drawn_from_or_that_do_not_fit_are_named(domain, message):
    with pytest.raises(UserError, match=message):
        checked(optim__lr=domain)


def test_fields_may_be_spelled_as_on_the_command_line():
    made = Sweep(preset="quickstart", space={"optim.warmup-steps": tune.choice([0, 50])})
    check_values(made)
    assert made.default() == {"optim.warmup_steps": 50}
    assert Sweep(preset="quickstart", points=({"optim.warmup-steps": 3},)).points == ({"optim.warmup_steps": 3},)


def test_ranges_of_whole_numbers_are_checked_at_both_ends():
    checked(model__num_latents=tune.randint(8, 33))
    with pytest.raises(UserError, match=r"range from 5 to 3"):
        checked(model__num_latents=tune.randint(5, 3))
    with pytest.raises(UserError, match=r"num-latents is 0"):
        checked(model__num_latents=tune.randint(0, 3))
    checked(model__num_latents=tune.qrandint(8, 32, 8))
    with pytest.raises(UserError, match=r"heads is 4, but must divide .*, 130"):
        checked(model__num_latent_channels=tune.qrandint(128, 130, 2))


def test_a_range_of_fractions_for_a_field_of_whole_numbers_is_refused_with_what_draws_these():
    for domain in (tune.uniform(8, 16), tune.quniform(8, 16, 2)):
        with pytest.raises(UserError, match=r"model\.num-latents is .8\.0. and must be int: randint, qrandint and lograndint draw whole"):
            checked(model__num_latents=domain)


def test_what_is_drawn_by_a_function_or_without_bounds_is_left_to_the_trials():
    seen = []
    check_space({"a": tune.sample_from(lambda config: 1), "b": tune.randn(0, 1)}, lambda *given: seen.append(given))
    assert not seen


def test_a_domain_is_described_without_an_address_in_memory():
    def half(config):
        return config["a"] / 2

    def third(config):
        return config["a"] / 3

    made = [lambda: tune.sample_from(half), lambda: tune.quniform(0.0, 1.0, 0.1), lambda: tune.qloguniform(1e-3, 1e-1, 1e-3)]
    for domain in made:
        assert described(domain()) == described(domain()) and "0x" not in described(domain())
    assert described(tune.sample_from(half)) != described(tune.sample_from(third))
    assert described(tune.quniform(0.0, 1.0, 0.1)) != described(tune.quniform(0.0, 1.0, 0.2))
    assert described(tune.uniform(0.0, 1.0)) == f"Float (0.0, 1.0) {tune.uniform(0.0, 1.0).sampler}"  # as sweeps of 0.1 have it


def test_a_space_on_the_command_line_is_the_one_of_a_file():
    texts = ["optim.lr=loguniform(1e-4, 1e-2)", "--optim.warmup-steps=choice(0,50)", "optim.schedule=choice(constant, 'cosine')",
             "optim.optimizer.betas=choice((0.9, 0.95), (0.9, 0.99))", "training.seed=grid(0,1,2)"]  # fmt: skip
    expected = {
        "optim.lr": tune.loguniform(1e-4, 1e-2), "optim.warmup_steps": tune.choice([0, 50]),
        "optim.schedule": tune.choice(["constant", "cosine"]),
        "optim.optimizer.betas": tune.choice([(0.9, 0.95), (0.9, 0.99)]), "training.seed": tune.grid_search([0, 1, 2]),
    }  # fmt: skip
    found = parse_space(texts)
    assert {name: described(domain) for name, domain in found.items()} == {name: described(domain) for name, domain in expected.items()}
    check_values(find_sweep("quickstart", [texts[0], texts[1]]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lr", "must be FILE.py:FUNCTION, or FIELD=DOMAIN"),
        ("optim.lr=0.1", "cannot be read"),
        ("optim.lr=__import__('os').system('true')", "cannot be read"),
        ("optim.lr=choice(open('x'))", "cannot be read"),
        ("optim.lr=loguniforn(1,2)", r"there is no domain loguniforn; there are .*grid, did you mean loguniform\?"),
        ("optim.lr=loguniform(1)", "does not take these values"),
    ],
)
def test_a_space_that_is_none_is_one_sentence(text, message):
    with pytest.raises(UserError, match=message):
        parse_space([text])
    with pytest.raises(UserError, match="twice"):
        parse_space(["optim.lr=uniform(1,2)", "optim.lr=uniform(1,3)"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--space", "optim.lr=loguniforn(1,2)"], "did you mean loguniform"),
        (["--space=optim.lr=loguniform(1)"], "loguniform needs 2 numbers: the first and the last value"),
        (["--space", "optim.lr=quniform(1,2)"], "quniform needs 3 numbers: the first and the last value, and the step between them"),
        (["--space", "optim.lr=uniform(1e-3,'a')"], "uniform needs 2 numbers"),
        (["--space", "optim.lr=uniform(1e-2,1e-3)"], r"optim.lr of the sweep's space is a range from 0.01 to 0.001"),
        (["--space", "optim.lr=loguniform(0,1e-3)"], "a logarithmic range from 0 and must begin above 0"),
        (["--space", "optim.lr=choice()"], "has no value to choose from"),
        (["--space", "optim.lrr=uniform(1e-3,1e-2)"], r"optim.lrr of the sweep's space does not exist, did you mean optim.lr\?"),
        (["--space", "run.name=choice(a,b)"], "run.name cannot be varied"),
        (
            ["--trials", "2", "--space", "optim.lr=uniform(1,2)", "--space", "optim.warmup-steps=choice(1,x)"],
            "warmup-steps is 'x' and must be",
        ),
        (["--space", "optim.optimizer.momentum=uniform(0.8,0.9)"], "optim.optimizer.momentum of the sweep's space does not exist"),
        (["--space", "optim.lr=uniform(1,2)", "--optim.beta", "3"], "field --optim.beta does not exist"),
    ],
)
def test_a_mistake_in_a_space_is_found_without_ray(words, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "tuning.sweep", None)  # which imports Ray Tune
    with pytest.raises(UserError, match=message):
        perceiver_command(["sweep", "quickstart", *words])


def test_what_cannot_be_known_without_ray_is_left_to_the_sweep():
    right = ["--space", "optim.lr=uniform(1,2)", "--space", "optim.optimizer.momentum=uniform(0.8,0.9)", "--optim.optimizer", "muon"]
    for words in (["quickstart", *right], ["quickstart", "--space", "own.py:space"], ["own.py:experiment", *right], ["--help"], ["lr"]):
        check_line(words)


def test_fields_that_do_not_exist_and_values_that_do_not_fit_are_named_before_anything_starts():
    with pytest.raises(UserError, match="learning.rate"):
        check_values(find_sweep("quickstart", ["optim.learning_rate=uniform(1,2)"]))
    with pytest.raises(UserError, match="lower value to a higher"):
        check_values(find_sweep("quickstart", ["optim.lr=uniform(2,1)"]))


def test_a_space_of_grids_alone_has_each_combination_once():
    assert find_sweep("quickstart", ["optim.lr=grid(0.1,0.2)", "optim.warmup-steps=grid(0,5,9)"]).size == 6
    assert (
        find_sweep("quickstart", ["optim.lr=grid(0.1,0.2)", "optim.weight-decay=uniform(0,1)"]).size
        == 2 * Sweep(preset="quickstart").trials
    )


def test_a_metric_that_the_task_has_not_and_points_that_cannot_be_are_named_before_anything_starts():
    space = {"optim.lr": tune.uniform(0.1, 1)}
    check_values(Sweep(preset="quickstart", space=space, metric="val_acc"))
    with pytest.raises(UserError, match="metric of the sweep is 'val_acuracy' and must be one of .*, did you mean val_acc"):
        check_values(Sweep(preset="quickstart", space=space, metric="val_acuracy"))
    with pytest.raises(UserError, match="optim.lr is -1"):
        check_values(Sweep(preset="quickstart", points=({"optim.lr": -1},)))
