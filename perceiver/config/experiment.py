"""The experiment: its sections and what makes two the same. Every default of the project stands beside its field, once.

Presets (`perceiver/presets/`) are functions that return an `Experiment` and show only what differs. What belongs to a run's identity
(`Experiment.identity`): task, model, data, optim, training. What only says where and how fast it runs, and who watches it (`parallel`,
`run`, `callbacks`), does not, so that a run can be continued on other machines.
"""

from __future__ import annotations

from typing import Any

from perceiver.config.checks import check_folder_name
from perceiver.config.core import Config, flatten, is_builtin, to_dict
from perceiver.config.data import DataConfig
from perceiver.config.optimization import OptimConfig
from perceiver.config.parts import CallbackConfig, ModelConfig, TaskConfig
from perceiver.config.running import ParallelConfig, RunConfig
from perceiver.config.training import TrainingConfig


class Experiment(Config):
    """A training run with all its settings."""

    preset: str = ""
    """What the command line named: a preset, module:function, file.py:function. Set by whoever finds the experiment."""
    task: TaskConfig
    """The task: what the model learns."""
    model: ModelConfig
    """The model and its sizes."""
    data: DataConfig = DataConfig()
    """The data: where it comes from, how it is prepared and shuffled."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and learning-rate schedule."""
    training: TrainingConfig = TrainingConfig()
    """Batch size, length, seed, precision, and what the training starts from."""
    parallel: ParallelConfig = ParallelConfig()
    """Workers and devices."""
    run: RunConfig = RunConfig()
    """Name and folder of the run; how often it logs, validates and saves."""
    callbacks: tuple[CallbackConfig, ...] = ()
    """Callbacks, which watch the training. Each may keep a state of its own in the checkpoints."""

    @property
    def run_name(self) -> str:
        """Name of the run's folder: run.name, else the preset's, else that of the function that returned the experiment."""
        return self.run.name or self.preset.rpartition(":")[2].replace("_", "-")

    def check(self, where: str) -> None:
        check_folder_name("--run.name", self.run_name)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run: everything but place, speed and reporting. Flat, by dotted names."""
        tree = to_dict(self)
        for section in ("preset", "parallel", "run", "callbacks"):
            del tree[section]
        for name in ("root", "on_error"):
            del tree["data"][name]
        for name in self.task.measured:
            del tree["task"][name]
        if self.data.tokenizer != "bytes":  # where its file lies is nobody's identity; the data's hash has its content
            tree["data"]["tokenizer"] = "of a file"
        # A class of this package is itself wherever it stands.
        return {
            name: value.partition(":")[2] if name.rpartition(".")[2] == "type" and is_builtin(value) else value
            for name, value in flatten(tree).items()
        }
