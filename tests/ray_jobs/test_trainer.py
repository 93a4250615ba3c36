"""Ray Train's trainer without the actors that are of no use here."""

import pytest
from ray.train import ScalingConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from ray_jobs import trainer
from ray_jobs.trainer import Trainer


@pytest.mark.parametrize("own", [[], [1234]], ids=["a cluster that outlives the command", "one that ends with it"])
def test_workers_are_handed_no_data_sets_and_their_place_is_watched_over_where_it_would_outlive_the_command(own, monkeypatch):
    monkeypatch.setattr(trainer, "own_processes", lambda: own)
    callbacks = Trainer(lambda: None, scaling_config=ScalingConfig(num_workers=1))._create_default_callbacks()
    kinds = {type(callback) for callback in callbacks}
    assert DatasetsCallback not in kinds and len(callbacks) > 2
    assert (PlacementGroupCleanerCallback in kinds) is not bool(own)
