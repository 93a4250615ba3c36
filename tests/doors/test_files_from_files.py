"""Experiment files that start from each other."""

import pytest

from perceiver.config import UserError
from perceiver.experiments import find_experiment


def test_a_file_that_starts_from_itself_is_refused(tmp_path):
    (tmp_path / "own.yaml").write_text("preset: own.yaml\n")
    (tmp_path / "a.yaml").write_text("optim:\n  lr: 1e-3\npreset: b.yaml\n")
    (tmp_path / "b.yaml").write_text("preset: a.yaml\n")
    for name, line in (("own", 1), ("a", 3), ("b", 1)):
        with pytest.raises(UserError) as error:
            find_experiment(str(tmp_path / f"{name}.yaml"))
        assert str(error.value).startswith(f"{tmp_path / name}.yaml, line {line}: preset is ")
        assert str(error.value).endswith("again: name a preset that ends somewhere") and len(str(error.value)) < 600
    (tmp_path / "c.yaml").write_text("preset: quickstart\n")
    (tmp_path / "d.yaml").write_text("preset: c.yaml\noptim:\n  lr: 1e-3\n")
    assert find_experiment(str(tmp_path / "d.yaml")).optim.lr == 1e-3
