"""What Ray Tune says in between: what a sweep says by itself is left out, that it stops is said in other words."""

from __future__ import annotations

import logging
import warnings

logger = logging.getLogger("tuning.sweep")
STOPPED = "Stop signal received"
"""How Ray Tune's message on the first Ctrl-C begins."""
LEVELS = {
    # The preset's values need not be in the space.
    "ray.tune.search.variant_generator": logging.ERROR,
    # A failed trial is one line of `Record`, its traceback in error.txt below `tune`.
    "ray.tune.execution.tune_controller": logging.CRITICAL,
    # Trials that were stopped before their first report have no results.
    "ray.tune.analysis.experiment_analysis": logging.ERROR,
}
"""Logger of Ray Tune's -> the least that is printed."""


def leave_out_messages() -> None:
    """Sets Ray Tune's loggers for this process. Called again it does nothing."""
    for name, level in LEVELS.items():
        logging.getLogger(name).setLevel(level)
    run = logging.getLogger("ray.tune.tune")  # lists trials that failed or were stopped, and how one of its own objects continues
    if not any(isinstance(known, _Stopping) for known in run.filters):
        run.addFilter(_Stopping())
    warnings.filterwarnings("ignore", message="Consider boosting PBT")


class _Stopping(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if record.getMessage().startswith(STOPPED):
            logger.info("stopping the trials (Ctrl-C again ends at once)")
        return False
