"""The experiment that is disturbed on Ray, with what must be caused from inside of a worker: stalls, losses that are NaN, failing stores.

What is to happen is said by files in a folder, each named after it and the worker's number; an empty folder changes nothing.
"""

import random
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem

from perceiver.config import CallbackConfig, Experiment
from perceiver.models import StemInput
from perceiver.presets.images import quickstart
from perceiver.training.callbacks import Callback

PACE = 0.05
"""Seconds that a step takes besides, so that many faults find room in few steps; none where the file `fast` is there."""
STALL = 900.0


class Troubles(CallbackConfig):
    """Does what the files of a folder say."""

    folder: str = ""
    """Where they are: fast, stand-RANK, nan-RANK, memory-RANK."""

    def build(self) -> Callback:
        return _Troubles(Path(self.folder))


class _Troubles(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_start(self, training):
        training.model.register_forward_hook(self._spoil)

    def after_step(self, step, result):
        if (self.folder / "fast").exists():
            return
        time.sleep(PACE)
        stand = self.folder / f"stand-{self.training.world.rank}"
        if stand.exists():
            stand.unlink()
            time.sleep(STALL)

    def _spoil(self, model, inputs, output):
        if (self.folder / f"memory-{self.training.world.rank}").exists():
            torch.empty(2**50, dtype=torch.uint8)
        if model.training and (self.folder / f"nan-{self.training.world.rank}").exists():
            return output * torch.nan
        return output


class Flaky(LocalFileSystem):
    """A local folder as an object store (flaky://PATH), which is slow and fails now and then while the file `store` is beside it."""

    protocol = "flaky"
    local_file = False
    cachable = False
    SECONDS, SHARE = 0.05, 0.3
    """How slow it is, and how often it fails."""

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(str(path).removeprefix("flaky://"))

    def _trouble(self, path):
        parts = Path(self._strip_protocol(path)).parts
        home = Path(*parts[: parts.index("store")]) if "store" in parts else Path("/nowhere")
        if not (home / "troubles" / "store").exists():
            return
        time.sleep(self.SECONDS)
        if random.random() < self.SHARE:
            raise OSError("the store does not answer (injected)")

    def _open(self, path, *args, **kwargs):
        self._trouble(path)
        return super()._open(path, *args, **kwargs)

    def ls(self, path, *args, **kwargs):
        self._trouble(path)
        return super().ls(path, *args, **kwargs)


fsspec.register_implementation("flaky", Flaky, clobber=True)


def light(folder: str = "") -> Experiment:
    """A light model: what a fault costs is to be seen, not what a step does."""
    base = quickstart()
    model = replace(base.model, num_latents=4, num_latent_channels=32, input=replace(base.model.input, num_frequency_bands=4))
    assert isinstance(model.input, StemInput)
    return replace(base, model=model, callbacks=(Troubles(folder=folder),))
