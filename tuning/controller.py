"""Ray Tune's controller, which hands the process of a trial that is over on to the next one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from ray.tune.execution.tune_controller import TuneController
from ray.tune.result import RESULT_DUPLICATE


class Controller(TuneController):  # type: ignore[misc]  # Ray's types are not followed
    """Takes a process over (`reuse_actors`) only from a trial whose function has returned.

    Ray Tune takes it from any trial, and fails the next one where the training of a trial that was stopped has not ended within seconds,
    as Ray Train's does not. Such a process ends with its trial, as without `reuse_actors`.
    """

    _returned: frozenset[str] = frozenset()

    def _process_trial_result(self, trial: Any, result: dict[str, Any]) -> Any:
        if RESULT_DUPLICATE in result:  # how Ray Tune says that there was none
            self._returned |= {trial.trial_id}
        return super()._process_trial_result(trial, result)

    def _maybe_cache_trial_actor(self, trial: Any) -> bool:
        return trial.trial_id in self._returned and super()._maybe_cache_trial_actor(trial)


@contextmanager
def handing_processes_on() -> Iterator[None]:
    """Makes Ray Tune, which lets nobody choose its controller, use this one."""
    module = import_module("ray.tune.tune")
    before, module.TuneController = module.TuneController, Controller  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.TuneController = before  # type: ignore[attr-defined]
