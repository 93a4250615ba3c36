"""Many of the same trainings under Ray Tune: sweeps, population-based training, scaling laws. The only room that knows Ray Tune."""
