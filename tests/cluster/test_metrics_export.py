"""What the dashboard asks for is what a training exports."""

import re

from perceiver.training.meters import Meter
from ray_jobs.metrics_export import GAUGES
from tests.conftest import ROOT


def test_the_dashboard_asks_for_all_gauges_of_a_training_and_no_others():
    asked = set(re.findall(r"ray_(perceiver_\w+)\{", (ROOT / "cluster" / "grafana.json").read_text()))
    assert asked == {name for name, _ in GAUGES.values()}


def test_goodput_is_the_share_of_time_that_is_neither_waiting_nor_validation(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("perceiver.training.meters.time.perf_counter", lambda: now[0])
    waited = [0.0]
    meter = Meter(total_steps=10, units_per_step=4, flops_per_step=None, peak=None, wait_seconds=lambda: waited[0], _time=100.0)
    now[0], waited[0] = 120.0, 2.0
    meter.exclude(10.0)
    rates = meter.report(2)
    assert rates["goodput"] == 0.4 and rates["data_wait"] == 0.2 and rates["throughput"] == 0.8
    assert rates.keys() - {"throughput", "step_seconds", "seconds_left", "goodput", "data_wait"} == set()
