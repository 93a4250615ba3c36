"""`python -m tests.doors` counts what comes of a try, and shows what has failed."""

import random
import time

import pytest

from perceiver.config import UserError, from_dict, to_dict
from tests.doors.__main__ import Hangs, go_through, outcome, table
from tests.doors.tries import DOORS, SMALL, use


def raising(error):
    def attempt(rng):
        raise error

    return attempt


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("a sentence"), "refused"),
        (UserError(""), "failed"),
        (UserError("Traceback (most recent call last)"), "failed"),
        (SystemExit(2), "refused"),
        (SystemExit(0), "worked"),
        (SystemExit(1), "failed"),
        (ValueError("a sentence"), "failed"),
        (Hangs(), "failed"),
    ],
)
def test_only_a_mistake_that_is_named_counts_as_refused(error, expected, capsys):
    assert outcome(raising(error), random.Random(0), "a door") == expected
    assert ("FAILED a door" in capsys.readouterr().out) == (expected == "failed")


def test_a_door_that_refuses_what_is_whole_is_no_door(tmp_path):
    """Else it would refuse all that is damaged, too, and nothing would have been tried."""
    with pytest.raises(UserError):
        go_through(lambda folder: raising(UserError("no")), tmp_path, 0, 0, "a door")


def test_the_table_adds_up(tmp_path):
    found = {"one": go_through(lambda folder: lambda rng: "", tmp_path, time.monotonic(), 0, "one")}
    assert table(found).splitlines()[2:] == ["| one | 1 | 0 | 1 | 0 |", "| all | 1 | 0 | 1 | 0 |"]


@pytest.mark.parametrize("name", list(SMALL))
def test_each_experiment_that_is_damaged_trains_a_step_while_it_is_whole(name):
    use(from_dict(to_dict(SMALL[name]())))


def test_what_is_whole_goes_through_the_doors_of_experiments(tmp_path):
    for name in ("configurations", "experiment files (YAML)"):
        DOORS[name](tmp_path)(None)
