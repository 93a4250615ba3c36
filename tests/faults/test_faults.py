"""Real runs under random faults, and a long one: what the harness checks holds, and what it checks with finds what does not."""

import os
from dataclasses import replace

import pytest

from tests.faults.causes import FAULTS
from tests.faults.disturb import disturb
from tests.faults.outcome import Outcome
from tests.faults.soak import Look, growing, look, soak, soak_alone
from tests.faults.troubles import Troubles
from tests.support.small import image_experiment, write_images
from tests.training.test_not_finite import training_of

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
    opens = [Look(5.0 * n, 100, 40 + n, 4) for n in range(100)]
    assert not growing({"log_monitor 1": opens}, 500 / 60) and growing({"raylet 1": opens}, 500 / 60)
    assert growing({"log_monitor 1": [Look(5.0 * n, 100, 200 + n, 4) for n in range(100)]}, 500 / 60)


def test_a_process_is_looked_at_and_one_that_has_ended_is_nothing():
    own = look(os.getpid(), 0.0)
    with open(__file__):
        assert look(os.getpid(), 0.0).files == own.files + 1
    assert own.memory > 10 and own.threads >= 1 and look(2**22, 0.0) is None


@pytest.mark.parametrize("name, error", [("nan-0", "NotFinite: the loss became nan at step 1"), ("memory-0", "DefaultCPUAllocator")])
def test_troubles_are_those_that_files_ask_for(name, error, tmp_path):
    """A worker of the runs on Ray, in this process."""
    write_images(tmp_path / "data")
    experiment = replace(image_experiment(max_steps=3), callbacks=(Troubles(folder=str(tmp_path)),))
    (tmp_path / "fast").touch()
    training_of(experiment, tmp_path / "data", tmp_path / "well").run()
    (tmp_path / name).touch()
    with pytest.raises(Exception) as found:
        training_of(experiment, tmp_path / "data", tmp_path / "badly").run()
    assert error in f"{type(found.value).__name__}: {found.value}"


def test_faults_have_names_of_their_own():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
