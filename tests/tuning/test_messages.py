"""What Ray Tune says in between."""

import logging

from tuning.messages import leave_out_messages


def test_a_first_interrupt_is_said_once_in_our_words_and_what_ray_says_of_it_is_not(caplog):
    ray_tune = logging.getLogger("ray.tune.tune")
    kept = list(ray_tune.filters)
    try:
        leave_out_messages()
        leave_out_messages()
        with caplog.at_level(logging.INFO):
            ray_tune.warning("Stop signal received (e.g. via SIGINT/Ctrl+C), ending Ray Tune run. This will try to checkpoint")
            ray_tune.error("Trials did not complete: [%s]", "run_trial_1")
            ray_tune.warning("Experiment has been interrupted, but the most recent state was saved.\nResume experiment with: Tuner.restore")
            logging.getLogger("ray.tune.analysis.experiment_analysis").warning("Failed to fetch metrics for 4 trial(s)")
    finally:
        ray_tune.filters[:] = kept
    assert [record.getMessage() for record in caplog.records] == ["stopping the trials (Ctrl-C again ends at once)"]
