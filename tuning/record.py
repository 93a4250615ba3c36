"""What happens in a sweep, written down as it happens; what ends and what is thrown away."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from ray.tune import Callback, Stopper

from perceiver.runs import Run
from tuning.constraints import REFUSED
from tuning.edits import Edit
from tuning.sweeps import Sweep
from tuning.trial import FAILED, VALUES, run_name
from tuning.trials import EVENTS, TRIALS, diverged, prune, read_trials

logger = logging.getLogger(__name__)


class StopDiverged(Stopper):
    """Ends trials whose loss grows; a loss that is not a number ends its training by itself."""

    def __init__(self) -> None:
        self._first: dict[str, float] = {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        loss = result.get("loss")
        return loss is not None and diverged(self._first.setdefault(trial_id, loss), loss)

    def stop_all(self) -> bool:
        return False


class Record(Callback):
    """Writes `events.jsonl`, logs lines of progress, and throws checkpoints of losing trials away as trials end."""

    def __init__(self, folder: Path, sweep: Sweep, steps: int, edit: Edit | None = None) -> None:
        self._folder, self._sweep, self._steps = folder, sweep, steps
        self._kept, self._size = (0, sweep.size) if edit is None else (len(edit.kept), edit.size)

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._write(trial, "start")

    def on_trial_restore(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._write(trial, "start")

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict[str, Any], **info: Any) -> None:
        metric = self._sweep.metric
        if metric not in result:
            return
        self._write(trial, "report", step=result["step"], examples=result["examples"], loss=result.get("loss"), value=result[metric])
        over = f"{self._kept + sum(t.is_finished() for t in trials)} of {self._size} trials over"
        logger.info(f"{run_name(trial.trial_id)}: step {result['step']:,}  {metric} {result[metric]:.4f}  ({over})")

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._end(trial, "")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        # A trial that is stopped may write down a failure too: that of its workers, which are taken from it.
        reason = self._folder / TRIALS / run_name(trial.trial_id) / FAILED
        lines = (trial.get_error() or "it died without a word").strip().splitlines()
        self._end(trial, reason.read_text() if reason.exists() else lines[-1])

    def _end(self, trial: Any, failed: str) -> None:
        run = self._folder / TRIALS / run_name(trial.trial_id)
        if not (run / VALUES).exists():
            run.mkdir(parents=True, exist_ok=True)
            (run / VALUES).write_text(json.dumps(trial.config["values"]))
        self._write(trial, "end", failed=failed)
        if failed:
            logger.info(f"{run.name} {failed}" if failed.startswith(REFUSED) else f"{run.name} failed: {failed}")
        elif Run(run).status() != "finished":
            logger.info(f"{run.name} was stopped")
        if self._sweep.scheduler != "pbt":
            prune(self._folder, [t for t in read_trials(self._folder) if t["status"] != "unfinished"], self._sweep.keep)

    def _write(self, trial: Any, event: str, **values: Any) -> None:
        line = {"time": time.time(), "trial": run_name(trial.trial_id), "event": event, **values}
        with open(self._folder / EVENTS, "a") as file:
            file.write(json.dumps(line) + "\n")
