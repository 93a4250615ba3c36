"""Ray Train's trainer without the actors that are of no use to this package: each is a process that loads Ray Train while the workers
start, and that wakes a hundred times a second as long as they train.
"""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from ray_jobs.ray_env import own_processes


class Trainer(TorchTrainer):  # type: ignore[misc]  # Ray's types are not followed
    """A TorchTrainer whose workers read their data themselves (`ray_jobs.ingest`), so that nobody hands data sets to them.

    Where the cluster ends with this process, nobody watches over the workers' place in it either: there is nothing to free after the end.
    """

    def _create_default_callbacks(self) -> list[Any]:
        spared = (DatasetsCallback, PlacementGroupCleanerCallback) if own_processes() else (DatasetsCallback,)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, spared)]
