"""The files of a run: their names, which no other module spells, and where they lie in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from perceiver.checkpoints import checkpoint_name

EXPERIMENT = "experiment.json"
"""File that makes a folder a run: its resolved configuration, the hash of its data, its length, the version that started it."""
START = "start.json"
"""What its weights started from, where that was another run or published weights."""
SWEEP = "sweep.json"
"""File that makes a folder a sweep, whose trials are runs."""
METRICS = "metrics.jsonl"
"""Records, one JSON object a line."""
RESULT = "result.json"
"""The last metrics of a run that is finished."""
FAILURE = "failure.json"
"""Why its last start failed for good; workers that are started again find it and end at once."""
CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints."""
CODE = "code"
"""Folder with a copy of the source files of the user's that it needs."""
EVALUATIONS = "evaluations"
"""Folder of what was measured of its checkpoints."""
TENSORBOARD = "tensorboard"
SAMPLES = "samples"
"""Folder of what the task makes at validations: texts, pictures, other files."""
CURVE = "curve.png"
"""Picture of the training's curves."""
PROVENANCE = "provenance.json"
"""The command that began it, the code, the packages and the machine; see `perceiver.provenance`."""
TRACKERS = "trackers.json"
"""Names of the run in trackers (MLflow, Weights & Biases)."""
DIFFS = ("package.diff", "folder.diff")
"""Changes of the code that were not committed when it began: of this package's, and of the folder that the command was given in."""
NOT_FINITE = "not-finite.json"
"""Steps whose loss or gradient was not finite, each with its rows."""
SPIKES = "spikes.json"
"""Spikes of the loss, each with the rows that were left out."""
RECORDS = (EXPERIMENT, START, METRICS, RESULT, FAILURE, PROVENANCE, TRACKERS, NOT_FINITE, SPIKES, *DIFFS)
PROGRESS = (METRICS, RESULT)
"""The records that say how far a run is."""
RECORD_FOLDERS = (TENSORBOARD, SAMPLES)
LOCK = ".lock"
TRIAL_FILES = ("values.json", "failed.txt", "costs.json", "earlier.json")
"""Of a trial of a sweep besides: its values of the fields that are varied; why it failed; what a whole training of it costs; names under
which it was run before, by which events know it."""


@dataclass(frozen=True)
class RunFiles:
    """The folder of a run and the paths in it; nothing need exist yet."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def exists(self) -> bool:
        """Whether a training was started here."""
        return (self.folder / EXPERIMENT).is_file()

    @property
    def checkpoints_folder(self) -> Path:
        return self.folder / CHECKPOINTS

    @property
    def code_folder(self) -> Path:
        return self.folder / CODE

    @property
    def start_file(self) -> Path:
        return self.folder / START

    @property
    def provenance_file(self) -> Path:
        return self.folder / PROVENANCE

    def diff_file(self, code: str) -> Path:
        """Uncommitted changes of the code of the "package" or of the "folder"."""
        return self.folder / next(name for name in DIFFS if name.startswith(code))

    @property
    def trackers_file(self) -> Path:
        return self.folder / TRACKERS

    @property
    def trackers_folder(self) -> Path:
        """Files that trackers keep of it."""
        return self.folder / "trackers"

    @property
    def profile_folder(self) -> Path:
        """What the profiler found of some of its steps: a trace, and a table of operators."""
        return self.folder / "profile"

    @property
    def log_file(self) -> Path:
        """Its lines of progress, each with its time."""
        return self.folder / "log.txt"

    @property
    def not_finite_file(self) -> Path:
        return self.folder / NOT_FINITE

    @property
    def spikes_file(self) -> Path:
        return self.folder / SPIKES

    @property
    def labels_file(self) -> Path:
        """Tags and a note that a person gave it."""
        return self.folder / "labels.json"

    @property
    def own_names(self) -> tuple[str, ...]:
        """Patterns of the names in its folder that this package gives, and nobody else."""
        files = (self.log_file, self.labels_file, *self.tokenizer_files, self.ray_folder)
        others = (self.trackers_file, self.trackers_folder, self.profile_folder)
        folders = (CHECKPOINTS, CODE, f"{CODE}-before-*", EVALUATIONS, *RECORD_FOLDERS)
        trials = TRIAL_FILES if self.is_trial else ()
        return (*RECORDS, *folders, CURVE, LOCK, *trials, *(path.name for path in (*files, *others)))

    @staticmethod
    def is_lock(name: str) -> bool:
        """Whether a path's name is that of a lock, which is of no use elsewhere."""
        return Path(name).name == LOCK

    @property
    def is_trial(self) -> bool:
        """Whether it is a trial of a sweep, which alone says whether it continues."""
        return (self.folder.parent.parent / SWEEP).is_file()

    @property
    def tokenizer_file(self) -> Path:
        """Copy of the file of its data's tokenizer, if that has one."""
        files = self.tokenizer_files
        return next((file for file in files if file.is_file()), files[0])

    @property
    def tokenizer_files(self) -> tuple[Path, ...]:
        """Where that may be: its name is that of its format."""
        # Here and not above: the list of runs takes neither NumPy nor Arrow.
        from perceiver.data.tokenizer_base import TOKENIZER_FILES

        return tuple(self.folder / name for name in TOKENIZER_FILES)

    @property
    def curve_file(self) -> Path:
        return self.folder / CURVE

    @property
    def tensorboard_folder(self) -> Path:
        return self.folder / TENSORBOARD

    @property
    def samples_folder(self) -> Path:
        return self.folder / SAMPLES

    @property
    def ray_folder(self) -> Path:
        """What Ray Train keeps of it, which every start makes anew."""
        return self.folder / "ray"

    @property
    def evaluations_folder(self) -> Path:
        return self.folder / EVALUATIONS

    def evaluation_file(self, step: int, digest: str, averaged: bool = False) -> Path:
        """Metrics of a checkpoint (or its averaged weights) on a data set."""
        return self.evaluations_folder / f"{checkpoint_name(step)}{'-ema' if averaged else ''}-{digest}.json"
