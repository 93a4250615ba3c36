"""The one configuration tree: an `Experiment` names a task, its model, its data, its optimisation and its run."""

from perceiver.config.checks import check_folder_name, check_tree
from perceiver.config.core import (
    Config,
    UserError,
    differences,
    digest,
    flatten,
    from_dict,
    home,
    load_tree,
    nearest,
    nodes,
    spelled,
    subclasses,
    to_dict,
    type_name,
)
from perceiver.config.data import DataConfig, TokenizerTraining
from perceiver.config.experiment import Experiment
from perceiver.config.optimization import Adam, AdamW, Constant, Cosine, OptimConfig, OptimizerConfig, ScheduleConfig
from perceiver.config.optimizers import Adafactor, AdamW8bit, Lamb, Lion, Muon, Sgd
from perceiver.config.parts import CallbackConfig, ModelConfig, TaskConfig
from perceiver.config.running import ParallelConfig, RunConfig
from perceiver.config.schedules import FlatCosine, InverseSquareRoot, Linear, OneCycle, WarmRestarts, Wsd
from perceiver.config.training import TrainingConfig

__all__ = [
    "Adafactor",
    "Adam",
    "AdamW",
    "AdamW8bit",
    "CallbackConfig",
    "Config",
    "Constant",
    "Cosine",
    "DataConfig",
    "Experiment",
    "FlatCosine",
    "InverseSquareRoot",
    "Lamb",
    "Linear",
    "Lion",
    "ModelConfig",
    "Muon",
    "OneCycle",
    "OptimConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "ScheduleConfig",
    "Sgd",
    "TaskConfig",
    "TokenizerTraining",
    "TrainingConfig",
    "UserError",
    "WarmRestarts",
    "Wsd",
    "check_folder_name",
    "check_tree",
    "differences",
    "digest",
    "flatten",
    "from_dict",
    "home",
    "load_tree",
    "nearest",
    "nodes",
    "spelled",
    "subclasses",
    "to_dict",
    "type_name",
]
