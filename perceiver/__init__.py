"""Perceiver, Perceiver IO and Perceiver AR in PyTorch: models, tasks, data, training, inference. Knows nothing of Ray."""
