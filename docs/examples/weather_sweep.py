"""A search space for weather.py: two fields of its own classes."""

from ray import tune


def space():
    return {"task.huber": tune.uniform(0.1, 2.0), "optim.optimizer.momentum": tune.uniform(0.5, 0.95)}
