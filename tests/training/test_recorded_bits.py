"""Orders, weights and sizes are to the bit those on record (see tests/support/record_bits.py, which also writes the record)."""

import pytest

from tests.support import record_bits


@pytest.fixture(scope="module")
def record() -> dict:
    return record_bits.read_record()


@pytest.fixture
def weights(record) -> dict[str, str]:
    """The digests of weights that are on record for this machine."""
    if (key := record_bits.key()) not in record["weights"]:
        pytest.skip(f"no weights are on record for {key}: on a commit known to be good, `python -m tests.support.record_bits` adds them")
    return record["weights"][key]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", record_bits.DATA_SETS)
def test_the_first_three_epochs_have_the_recorded_rows_and_batches(name, world, record, tmp_path):
    assert record_bits.order_of(name, tmp_path, world) == record["orders"][name]


def test_every_preset_has_the_recorded_number_of_parameters(record):
    assert record_bits.parameters() == record["parameters"]


@pytest.mark.parametrize("name", record_bits.TRAININGS)
def test_a_training_ends_with_the_recorded_weights(name, weights, tmp_path):
    assert record_bits.TRAININGS[name](tmp_path) == weights[name]


@pytest.mark.long
@pytest.mark.parametrize("name", record_bits.SLOW_TRAININGS)
def test_a_long_training_ends_with_the_recorded_weights(name, weights, tmp_path):
    assert record_bits.SLOW_TRAININGS[name](tmp_path) == weights[name]


def test_a_continued_training_is_on_record_with_the_weights_of_an_uninterrupted_one(record):
    for weights in record["weights"].values():
        assert weights["causal language model, 25 + 25 steps"] == weights["causal language model, 50 steps"]
