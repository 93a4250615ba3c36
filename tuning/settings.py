"""What makes a sweep in a folder the same sweep: its settings, as its folder keeps them, and what of them may change."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import perceiver
from perceiver.config import Experiment, UserError, differences, digest, flatten, from_dict, to_dict
from perceiver.disk import write_json
from ray_jobs.train_checks import check_free
from tuning.edits import EDIT, Edit, arrange, check_edit, plan_edit, read_edit
from tuning.spaces import described
from tuning.sweeps import Sweep
from tuning.trial import VALUES
from tuning.trials import SETTINGS, TRIALS, read_settings

logger = logging.getLogger("tuning.sweep")

TUNE = "tune"
"""In a sweep's folder: Ray Tune's state."""
LATER = ("constraints", "against", "seeds", "warm_start")
"""Fields of a sweep that it describes only where they are set."""
EXPERIMENT = "trained"
"""In a sweep's settings: the experiment that trials vary, whole. Its digest alone does not tell a new field from another value."""
FIRST_VERSION = "0.1.0"
"""Of this package: its sweeps do not say which version began them."""


def check_folder(sweep: Sweep, folder: Path, resume: bool = False) -> list[str]:
    """Refuses another sweep in the same folder, and one whose experiment another version of this package took for another one.

    Args:
        sweep: what is to be run there.
        folder: of the sweep.
        resume: the settings may have changed, as far as the trials that are there can be compared with new ones.

    Returns:
        What has changed, field by field; empty: nothing, or there are no trials yet.

    Raises:
        UserError: names the differences.
    """
    path = folder / SETTINGS
    if not path.exists():
        check_free(folder, SETTINGS, "--name")
        return []
    there, wanted = json.loads(path.read_text()), json.loads(json.dumps(describe(sweep)))
    version, edit = there.pop("version", FIRST_VERSION), there.pop(EDIT, None)
    trained = _changes(there.pop(EXPERIMENT, None), sweep.experiment())
    if trained == []:
        there["experiment"] = wanted["experiment"]  # but for fields that are new since, whose defaults it had
    if version != perceiver.__version__ and there | {"experiment": None} == wanted | {"experiment": None} and there != wanted:
        raise UserError(
            f"{folder} holds a sweep that version {version} began, and in version {perceiver.__version__} its trials would be of "
            "another experiment: choose another --name, or continue it with the version that began it"
        )
    if there == wanted:
        return []
    changes = differences(flatten(there), flatten(wanted))
    # What follows from other changes is left out where there are any.
    changes = [line for line in changes if not line.startswith(("default.", "experiment:", "mode:"))] or trained or changes
    if edit is None and not any((folder / TRIALS).glob(f"*/{VALUES}")):
        # It ended before its first trial: by a mistake in its space, say, which is mended now.
        logger.info(f"no trial of the sweep in {folder} had begun: it is replaced ({'; '.join(changes)})")
        shutil.rmtree(folder / TUNE, ignore_errors=True)
        return []
    if not resume:
        raise UserError(
            f"{folder} holds another sweep ({'; '.join(changes)}): choose another --name (with --search optuna --warm-start {folder.name} "
            "it knows what was found here), or continue it with these settings by --resume, where trials that fit them count"
        )
    check_edit(there, wanted, _before(there), sweep.experiment(), folder.name, trained)
    return changes


def _changes(saved: dict[str, Any] | None, now: Experiment) -> list[str] | None:
    """How what is trained differs from a saved experiment, field by field; None: that was not saved, or cannot be read any more."""
    try:
        return None if saved is None else differences(flatten(from_dict(saved, foreign=True).identity), flatten(now.identity))
    except UserError:
        return None


def _before(settings: dict[str, Any]) -> Experiment | None:
    """The experiment of a sweep with the given settings; None: it cannot be made any more."""
    try:
        return Sweep(preset=settings["preset"], overrides=tuple(shlex.split(settings["overrides"]))).experiment()
    except UserError:
        return None


def describe(sweep: Sweep) -> dict[str, Any]:
    """A sweep as JSON-ready data: what makes it the same sweep."""
    plain = {f.name: getattr(sweep, f.name) for f in fields(sweep) if f.name not in ("space", "points", "overrides")}
    space = {name: described(domain) for name, domain in sweep.space.items()}
    # Sweeps of before these were there are the same without them.
    plain = {name: value for name, value in plain.items() if value or name not in LATER}
    identity = sweep.experiment().identity
    return {**plain, "mode": sweep.mode, "space": space, "points": list(map(dict, sweep.points)), "default": sweep.default(),
            "experiment": digest(identity), "overrides": shlex.join(sweep.overrides)}  # fmt: skip


def settle(sweep: Sweep, folder: Path, changes: Sequence[str]) -> Edit | None:
    """Writes a sweep's settings down, and puts its trials in order where they have changed, now or before.

    Args:
        sweep: with the settings as they are now.
        folder: of the sweep.
        changes: what `check_folder` found.

    Returns:
        What the last change made of its trials; None: there was none.
    """
    edit = read_edit(read_settings(folder)) if (folder / SETTINGS).exists() else None
    if changes:
        logger.info(f"the settings of the sweep in {folder} have changed:")
        edit = plan_edit(folder, sweep, edit.number + 1 if edit is not None else 1)
        for line in [*(f"  {line}" for line in changes), *edit.lines()]:
            logger.info(line)
    edited = {} if edit is None else {EDIT: asdict(edit)}
    write_json(folder / SETTINGS, {**describe(sweep), EXPERIMENT: to_dict(sweep.experiment()), "version": perceiver.__version__, **edited})
    if edit is not None:
        edit = read_edit(read_settings(folder))  # as every later start has it
        assert edit is not None
        arrange(folder, edit)
    return edit


def forget_unbegun(folder: Path) -> None:
    """Removes what a sweep has written that failed before its first trial, so that it may be mended and begun again."""
    if not any(folder.glob(f"*/*/{VALUES}")):
        (folder / SETTINGS).unlink(missing_ok=True)
        shutil.rmtree(folder / TUNE, ignore_errors=True)
