"""Values of a command line that do not fit their field."""

import pytest

from perceiver.config import UserError
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
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_field_value_and_what_is_right(words, sentence):
    with pytest.raises(UserError) as error:
        parse_experiment(["quickstart", *words], "ray_jobs.train")
    assert str(error.value) == sentence
