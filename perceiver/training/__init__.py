"""The training of a model on one of several workers: loop, checkpoints, records."""
