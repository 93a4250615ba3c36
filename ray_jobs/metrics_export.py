"""Training metrics as Ray metrics, which a cluster's nodes export to Prometheus (there with the prefix ray_)."""

from __future__ import annotations

from ray.util.metrics import Gauge

from perceiver.training.callbacks import Callback

GAUGES = {
    "step": ("perceiver_step", "Optimizer steps taken"),
    "loss": ("perceiver_loss", "Training loss since the last log line"),
    "throughput": ("perceiver_throughput", "Examples or tokens per second, over all workers"),
    "mfu": ("perceiver_mfu", "Model FLOP utilisation, 0 to 1"),
    "data_wait": ("perceiver_data_wait_share", "Share of time waiting for data, 0 to 1"),
    "goodput": ("perceiver_goodput", "Share of all time in which steps were computed, 0 to 1"),
    "checkpoint_seconds": ("perceiver_checkpoint_seconds", "Seconds that training has waited for checkpoints"),
}
"""Name in metrics.jsonl -> name and description of the gauge."""


class MetricsExport(Callback):
    """Sets the gauges of a run from its training metrics, tagged with the run's name."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}

    def after_log(self, step: int, metrics: dict[str, float]) -> None:
        if self.training.world.rank > 0:
            return
        values = {"step": step, **metrics}
        for name, (gauge, description) in GAUGES.items():
            if name in values:
                if name not in self._gauges:
                    self._gauges[name] = Gauge(gauge, description=description, tag_keys=("run",))
                    self._gauges[name].set_default_tags({"run": self._run})
                self._gauges[name].set(values[name])
