"""What trainings share: the job and its result, and how both kinds read the clips and store the model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora import __version__
from sora.core import files
from sora.core.errors import InputError
from sora.core.records import ClipSpec, Tried

if TYPE_CHECKING:
    import keras
    import pandas as pd

    from sora.store.shards import ShardSet
    from sora.tasks import Task

MODEL_FILE = "model.keras"
HELD_OUT_FILE = "held_out.npz"  # sha256, clip, logits


@dataclass(frozen=True)
class TrainJob:
    """What the child needs; `to_dict` makes it JSON-able."""

    shards: str  # folder
    table: str  # parquet or CSV file: sha256, label, split and, for a search, unit (`sora.dataset.splits.units`)
    classes: Sequence[str]  # in the order of the logits
    model: dict[str, Any]  # settings.Model
    train: dict[str, Any]  # settings.Train
    clip: dict[str, Any]  # records.ClipSpec; must be the shards' own
    out: str  # folder for this job only: for the checkpoint and, at the end, the model
    features: str = ""  # folder of the bank of features; "": there is none

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "classes": list(self.classes)}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> TrainJob:
        return cls(**value)


@dataclass(frozen=True)
class TrainResult:
    """The result. Epochs count from 1."""

    model: str  # file, without optimiser, float32; the weights of the best epoch
    best_epoch: int
    epochs: int  # trained epochs, including those before a resumption
    history: list[dict[str, float]]  # one entry per epoch: epoch, loss, accuracy, val_…, seconds, clips_per_second
    seconds: float  # of all epochs
    clips_per_second: float  # of training only: the median epoch, without the first, which traces
    parameters: int
    resumed_from: int  # epochs that an interrupted run had finished; 0: none
    tried: list[Tried] = field(default_factory=list)  # what a search compared
    notes: list[str] = field(default_factory=list)  # what it found out, in words
    held_out: str = ""  # file: answers for clips of train and validation by folds that had not seen them; "": none

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> TrainResult:
        return cls(**{**value, "tried": [Tried.from_dict(one) for one in value.get("tried", ())]})


def fingerprint(job: TrainJob, table: pd.DataFrame, *more: object) -> str:
    """A digest of everything that decides what a training computes.

    Args:
        table: the part of the job's table that is read.
        more: what else decides it.
    """
    what = {**job.to_dict(), "table": table.to_csv(index=False), "version": [__version__, *more]}
    for place in ("out", "shards", "features"):  # where, not what
        what.pop(place)
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def open_shards(job: TrainJob) -> ShardSet:
    from sora.store.shards import ShardSet

    shards, clip = ShardSet.open(Path(job.shards)), ClipSpec.from_dict(job.clip)
    if shards.spec != clip:
        raise InputError(
            f"the shards in {job.shards} hold {shards.spec}, but the settings want {clip}",
            fix="`sora run` prepares them again",
        )
    return shards


def labelled(job: TrainJob, task: Task) -> pd.DataFrame:
    """The job's table with `label_index`, as the task's `index` returns it, sorted by sha256."""
    import pandas as pd

    table = pd.read_parquet(job.table) if job.table.endswith(".parquet") else pd.read_csv(job.table, dtype=str)
    single = task.single(table["label"])
    unknown = sorted(set(single) - set(job.classes))
    if unknown:
        raise InputError(
            f"the table has a label that is not a class: {unknown[0]!r}", fix="add it to `classes` in params.yaml"
        )
    trained = set(task.single(table.loc[table["split"] == "train", "label"]))
    if not trained:
        raise InputError("no clip to train on: the split `train` is empty", fix="add videos or groups")
    empty = [name for name in job.classes if name not in trained]
    if empty:
        raise InputError(
            f"no clip to train on of class {', '.join(map(repr, empty))}",
            fix="add videos of it (from more than one group), or remove it from `classes` in params.yaml",
        )
    numbers = {name: number for number, name in enumerate(job.classes)}
    index = [task.index(label, numbers) for label in table["label"]]
    return table.assign(label_index=index).sort_values("sha256", ignore_index=True)


def save(model: keras.Model, path: Path) -> None:
    """Saves the whole model or nothing. Keras requires the suffix."""
    draft = path.with_name("draft.keras")
    with files.writing(path):
        try:
            model.save(draft)
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(draft, path)
            files.sync_folder(path.parent)
        finally:
            draft.unlink(missing_ok=True)
