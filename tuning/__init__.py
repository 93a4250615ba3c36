"""Many of the same trainings under Ray Tune: sweeps, population-based training, scaling laws. No other package imports Ray Tune."""
