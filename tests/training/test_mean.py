"""The mean of a run's checkpoints."""

from dataclasses import replace

import pytest
import torch

from perceiver.config import ParallelConfig, UserError, to_dict
from perceiver.runs import Run
from perceiver.training.checkpoint_files import all_tensors
from perceiver.training.init_from import forked_run
from ray_jobs import average
from tests.training import test_parallel
from tests.training.test_parallel import make_data


def test_the_mean_of_sharded_checkpoints_is_a_finished_run_with_the_last_optimizer(tmp_path, capsys):
    made = test_parallel.experiment()
    made = replace(
        made, training=replace(made.training, max_steps=12), parallel=ParallelConfig(workers=2), optim=replace(made.optim, ema_decay=0.9),
        run=replace(made.run, checkpoint_every=4, val_every=12, keep_checkpoints=3),
    )  # fmt: skip
    test_parallel.train(made, make_data(tmp_path / "data"), tmp_path / "runs" / "whole")
    run = Run(tmp_path / "runs" / "whole")
    run.save({"experiment": to_dict(made), "data": "abc"})
    for words, message in (
        (["--last", "4"], "--last is 4 and must be from 2 to 3: run whole has checkpoints of steps 4, 8, 12"),
        (["--steps", "5", "8"], "--steps names 5"),
        (["--steps", "8"], "needs two checkpoints"),
        (["--name", "../x"], "--name"),
    ):
        with pytest.raises(UserError, match=message):
            average.main([str(run.folder), *words])
    assert average.main([str(run.folder), "--last", "2"]) == 0
    assert "mean of steps 8, 12" in capsys.readouterr().out
    mean = Run(tmp_path / "runs" / "whole-mean")
    (checkpoint,) = mean.checkpoints()
    found, (_, *both) = all_tensors(checkpoint.path), [all_tensors(c.path) for c in run.checkpoints()]
    names = [name for name in found if name.startswith("model.")]
    assert len(names) > 10 and found.keys() == {name for name in both[1] if not name.startswith("average.")}
    for name in found:
        expected = ((both[0][name].double() + both[1][name].double()) / 2).float() if name in names else both[1][name]
        assert torch.equal(found[name], expected), name
    assert not all(torch.equal(found[name], both[1][name]) for name in names)
    assert mean.status() == "finished" and str(mean.parent()) == "whole@12" and mean.load()[0].optim.ema_decay is None
    assert forked_run("whole-mean", str(tmp_path / "runs"))[0].folder == mean.folder
    with pytest.raises(UserError, match="exists: choose another"):
        average.main([str(run.folder)])
