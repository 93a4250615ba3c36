"""Weights & Biases as a callback: `--callbacks wandb`. Needs the extra package wandb."""

from __future__ import annotations

import html
import os
import shlex
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from perceiver.config import CallbackConfig, UserError
from perceiver.training.callbacks import Callback
from perceiver.training.tracking import TrackedRun, Tracker, Tracking, check_installed
from perceiver.training.wandb_files import steps_of

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

MODES = ("online", "offline", "disabled")
LONGEST_TAG = 64
"""Characters of a tag that W&B takes."""


class Wandb(CallbackConfig):
    """Sends parameters, metrics, samples and lineage to Weights & Biases (extra: perceiver-ray[wandb])."""

    project: str = ""
    """Project; "": $WANDB_PROJECT, else perceiver."""
    entity: str = ""
    """User or team that the project is of; "": $WANDB_ENTITY, else the account's own."""
    mode: Literal["", "online", "offline", "disabled"] = ""
    """offline: keep all in the run's folder, for `wandb sync` later; "": $WANDB_MODE, else online, which needs `wandb login` before."""

    def ready(self, where: str) -> CallbackConfig:
        check_installed("wandb", where)
        mode: Any = self.mode or os.environ.get("WANDB_MODE") or "online"
        if mode not in MODES:
            raise UserError(f"WANDB_MODE is {mode!r} and must be one of {', '.join(MODES)}")
        if mode == "online" and not _has_key():
            raise UserError(
                f"--{where}mode is online, but no key of Weights & Biases is known here: run `wandb login`, set WANDB_API_KEY, or give "
                f"--{where}mode offline"
            )
        project, entity = self.project or os.environ.get("WANDB_PROJECT") or "perceiver", self.entity or os.environ.get("WANDB_ENTITY", "")
        return replace(self, project=project, entity=entity, mode=mode)

    def build(self) -> Callback:
        return Tracking(_Wandb(self))


def _has_key() -> bool:
    import wandb

    return bool(wandb.api.api_key)


class _Wandb(Tracker):
    name = "wandb"

    def __init__(self, config: Wandb) -> None:
        self.config = config
        self._sent: set[int] = set()
        """Steps that earlier starts have sent."""
        self._below = 0
        """Earlier starts have sent all steps below."""
        self._row: tuple[int, dict[str, Any]] | None = None
        """Values of the last step. They are sent as one when those of the next come, so that of a step W&B has all or nothing."""

    def open(self, run: TrackedRun) -> str:
        import wandb

        config = self.config
        project = config.project or "perceiver"
        self._key = f"wandb {config.entity}/{project}"
        note = run.note(self._key)
        self._run, self._id = run, note.get("id") or uuid.uuid4().hex[:12]
        folder = run.run.trackers_folder
        written = steps_of(folder, self._id)
        # Where offline files are gone (sent, and removed by `wandb sync --clean`), what was noted counts.
        self._sent, self._below = (written, 0) if written is not None else (set(), note.get("step", -1) + 1)
        run.save_note(self._key, {**note, "id": self._id})
        folder.mkdir(parents=True, exist_ok=True)
        tags = [*run.labels, *([f"fork of {run.parent}"] if run.parent is not None and run.parent.whole else [])]
        self._wandb: Any = wandb.init(
            project=project,
            entity=config.entity or None,
            name=run.name,
            id=self._id,
            resume="allow",
            dir=str(folder),
            group=run.tags.get("sweep") or run.preset or None,
            tags=[tag[:LONGEST_TAG] for tag in tags],
            config={**run.parameters, **{f"perceiver/{name}": value for name, value in run.tags.items()}},
            allow_val_change=True,
            mode=config.mode or None,
            reinit="create_new",
            save_code=False,
            settings=wandb.Settings(console="off", disable_git=True, silent=True),
        )
        if config.mode != "offline":
            self._sent, self._below = set(), self._wandb.starting_step  # what its server has
            return self._wandb.url or config.mode
        return f"offline run {self._id} (wandb sync {shlex.quote(str(folder / 'wandb'))}/offline-run-*-{self._id})"

    def has(self, name: str, step: int) -> bool:
        return step < self._below or step in self._sent

    def metrics(self, step: int, values: dict[str, float], seconds: float) -> None:
        self._log(step, values)

    def text(self, step: int, name: str, text: str) -> None:
        import wandb

        self._log(step, {f"samples/{name}": wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)})

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        import wandb

        self._log(step, {f"samples/{name}": wandb.Image(image)})

    def checkpoint(self, step: int, path: Path) -> None:
        self._wandb.summary["checkpoint"] = str(path)

    def close(self, status: str) -> None:
        self._send_row()
        self._wandb.summary["status"] = status
        self._wandb.finish(exit_code=1 if status == "failed" else 0)

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if self._row is not None and self._row[0] != step:
            self._send_row()
        self._row = (step, {**(self._row[1] if self._row is not None else {}), **values})

    def _send_row(self) -> None:
        if self._row is None:
            return
        step, values = self._row
        self._wandb.log(values, step=step, commit=True)
        self._row = None
        self._run.save_note(self._key, {"id": self._id, "step": step})
