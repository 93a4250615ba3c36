"""Real runs under random faults, and a long one: what the harness checks holds, and what it checks with finds what does not."""

import os

import pytest

from tests.faults.causes import FAULTS
from tests.faults.disturb import disturb
from tests.faults.outcome import Outcome
from tests.faults.soak import Look, growing, look, soak, soak_alone

SOAK_MINUTES = float(os.environ.get("PERCEIVER_SOAK_MINUTES", "30"))


@pytest.mark.long
def test_runs_survive_two_minutes_of_random_faults(tmp_path):
    outcomes: list[Outcome] = []
    disturb(tmp_path, 2, int.from_bytes(os.urandom(2)), [], outcomes)
    assert outcomes and not [outcome for outcome in outcomes if outcome.wrong or outcome.seconds is None], outcomes


@pytest.mark.long
@pytest.mark.parametrize("run", [soak, soak_alone])
def test_no_process_of_a_long_training_grows(run, tmp_path):
    assert not growing(run(SOAK_MINUTES, tmp_path), SOAK_MINUTES)


def test_a_process_that_grows_is_found_and_one_that_does_not_is_not():
    grows = [Look(5.0 * n, 100 + n, 10, 4) for n in range(100)]
    stays = [Look(5.0 * n, 100 + n % 3, 10, 4) for n in range(100)]
    late = [Look(5.0 * n, 100 + min(n, 40), 10, 4) for n in range(100)]  # what is made once is made in the first half
    (found,) = growing({"grows": grows, "stays": stays, "late": late}, 500 / 60)
    assert found.startswith("grows: memory grew by")


def test_a_process_is_looked_at_and_one_that_has_ended_is_nothing():
    own = look(os.getpid(), 0.0)
    with open(__file__):
        assert look(os.getpid(), 0.0).files == own.files + 1
    assert own.memory > 10 and own.threads >= 1 and look(2**22, 0.0) is None


def test_faults_have_names_of_their_own():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
