"""Values of a command line that do not fit their field."""

import pytest

from perceiver.config import UserError, nearest
from ray_jobs.cli import parse_experiment


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--optim.lr", "a"], "--optim.lr is 'a' and must be float"),
        (["--optim.lr=a"], "--optim.lr is 'a' and must be float"),
        (["--training.max-steps", "1.5"], "--training.max-steps is '1.5' and must be int or None"),
        (["--optim.ema-decay", "x"], "--optim.ema-decay is 'x' and must be float or None"),
        (["--model.num-latents"], "--model.num-latents needs a value: int"),
        (["--training.deterministic", "maybe"], "--training.deterministic is 'maybe' and must be True or False"),
        (["--optim.optimizer.betas", "0.9"], "--optim.optimizer.betas is '0.9' and must be 2 values (float, float)"),
        (["--workers", "two"], "--parallel.workers is 'two' and must be int"),
        (["--task.random-crop", "6", "30"], "'30' is one value too many for --task.random-crop"),
        (["--optim.lr=1", "3", "--run.name", "3"], "'3' is one value too many for --optim.lr"),
        (["--optim.optimizer.betas", "0.9", "0.9", "0.8"], "'0.8' is one value too many for --optim.optimizer.betas"),
        (["--run.name", "a", "b c"], "'b c' is one value too many for --run.name"),
        (["lr", "3"], "'lr' is not a field: fields are written as --optim.lr 0.001"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_field_value_and_what_is_right(words, sentence):
    with pytest.raises(UserError) as error:
        parse_experiment(["quickstart", *words], "ray_jobs.train")
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--optim.learning_rate", "--optim.lr"),
        ("--learning-rate", "--optim.lr"),
        ("--training.batch-size", "--training.global-batch-size"),
        ("--training.epochs", "--training.max-epochs"),
        ("--optim.max-gradnorm", "--optim.max-grad-norm"),
    ],
)
def test_a_field_is_offered_by_the_initials_that_it_is_named_by_and_by_what_is_alike(typed, meant):
    with pytest.raises(UserError, match=f"field {typed} does not exist, did you mean {meant}[?]"):
        parse_experiment(["quickstart", typed, "1"], "ray_jobs.train")


def test_of_names_that_are_alike_the_one_that_a_word_begins_is_offered():
    assert nearest("val_acuracy", ["val_loss", "val_acc", "val_auroc"]) == ", did you mean val_acc?"
