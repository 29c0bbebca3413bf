"""Finished folds as small files that git keeps: FOLDER/<set>/<configuration>/<seed>-<fold>.json.

A file says what was answered for each video that was left out, by which configuration, on which division of the set and
at which commit. So a figure that takes many hours can be measured in pieces, on several machines, and checked later.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sora.core.errors import InputError
from sora.core.files import atomic, writing
from sora.core.progress import say

PREFIX = 16  # hex digits of a video's sha256: enough to tell the videos of a set apart
DIGITS = 4  # of a probability
_FIX = "take it from git again, or remove it: the fold is then computed anew"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered for one video. `sha256` is its first 16 digits; `probabilities` go by the fold's classes."""

    sha256: str
    label: str
    predicted: str
    probabilities: tuple[float, ...]

    @property
    def right(self) -> bool:
        return self.predicted == self.label


@dataclass(frozen=True, slots=True)
class FoldRecord:
    """One fold of one seed. `seconds` are those of the training; what a kind of classifier lacks is None."""

    set: str
    seed: int
    fold: int
    configuration: str  # digest: see `sora.learning.crossval.configuration`, or a baseline's
    table: str  # digest of (sha256, label, split) of all its videos
    commit: str  # that it was computed at
    seconds: float
    train: int  # videos to learn from
    val: int  # videos kept aside
    parameters: int | None
    best_epoch: int | None
    clips_per_second: float | None
    classes: tuple[str, ...]
    answers: tuple[Answer, ...]

    def is_of(self, configuration: str, table: str) -> bool:
        """Whether it answers this question; the commit may be another one."""
        return (self.configuration, self.table) == (configuration, table)


def answers_of(videos: list[dict[str, Any]]) -> tuple[Answer, ...]:
    """From the entries of an `EvalReport` (`sora.core.records`), in their order.

    Raises:
        InputError: two videos begin with the same digits.
    """
    made = tuple(
        Answer(
            one["sha256"][:PREFIX],
            one["label"],
            one["predicted"],
            tuple(round(float(value), DIGITS) for value in one["probabilities"]),
        )
        for one in videos
    )
    if len({one.sha256 for one in made}) < len(made):
        raise InputError(
            f"two videos have the same first {PREFIX} digits of their sha256", fix="remove the copy from the set"
        )
    return made


def from_answered(answered: Mapping[str, Any], **of: Any) -> FoldRecord:
    """The record of what `sora.learning.crossval.answers` returned; `of` are the fields that it does not know."""
    training = answered["training"]
    return FoldRecord(
        seconds=round(float(training["seconds"]), 3),
        train=answered.get("train", 0),
        val=answered.get("val", 0),
        parameters=training["parameters"],
        best_epoch=training["best_epoch"],
        clips_per_second=training["clips_per_second"],
        answers=answers_of(answered["videos"]),
        **of,
    )


def plain(name: str) -> str:
    """A name with hyphens for what a file's name should not hold; "" if nothing is left."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.")


def folder_of(folds: Path, set_name: str, configuration: str) -> Path:
    """The folder of a configuration's folds.

    Raises:
        InputError: a name that can't be a folder's in every checkout.
    """
    for name in (set_name, configuration):
        if not _NAME.fullmatch(name):
            raise InputError(
                f"{name!r} can't name a folder of folds",
                fix="use letters, digits and the marks . _ + - and begin with a letter or digit",
            )
    return folds / set_name / configuration


def file_of(folder: Path, seed: int, fold: int) -> Path:
    return folder / f"{seed}-{fold}.json"


def write(folder: Path, record: FoldRecord) -> Path:
    """Puts the record into its file, whole or not at all, in place of an earlier one; an answer a line.

    Raises:
        DiskFull, ReadOnly, ServiceError: see `sora.core.files.writing`.
    """
    file = file_of(folder, record.seed, record.fold)
    values = asdict(record)
    answers = [json.dumps(one, ensure_ascii=False) for one in values.pop("answers")]
    head = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False).removesuffix("\n}")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with atomic(file) as out:
        out.write((head + ',\n "answers": [\n  ' + ",\n  ".join(answers) + "\n ]\n}\n").encode())
    return file


def read(file: Path) -> FoldRecord:
    """The record in a file.

    Raises:
        InputError: the file is no such record, or of another fold than its name says.
    """
    try:
        values = json.loads(file.read_text("utf-8"))
        missing = {field.name for field in fields(FoldRecord)} ^ set(values)
        if missing:
            raise ValueError(f"it lacks, or has too many: {', '.join(sorted(missing))}")
        answers = tuple(
            Answer(one["sha256"], one["label"], one["predicted"], tuple(float(value) for value in one["probabilities"]))
            for one in values.pop("answers")
        )
        record = FoldRecord(**{**values, "classes": tuple(values["classes"])}, answers=answers)
        if not answers or any(len(one.probabilities) != len(record.classes) for one in answers):
            raise ValueError("it has no answers, or not a probability a class")
        if file.name != file_of(file.parent, record.seed, record.fold).name:
            raise ValueError(f"it holds fold {record.fold} of seed {record.seed}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is no finished fold: {error}", fix=_FIX) from error
    return record


def stored(folder: Path, wanted: Mapping[tuple[int, int], tuple[str, str]], commit: str | None) -> list[FoldRecord]:
    """The wanted folds that have a file; those of another configuration or division are counted aloud and left out.

    Args:
        wanted: (seed, fold) → digests of (configuration, table).
        commit: only files of this commit count; None: those of any.

    Raises:
        InputError: a file is damaged.
    """
    found, others = [], 0
    for (seed, fold), (configuration, table) in wanted.items():
        file = file_of(folder, seed, fold)
        if file.exists():
            record = read(file)
            if not record.is_of(configuration, table):
                others += 1
            elif commit in (None, record.commit):
                found.append(record)
    if others:
        say(f"{folder}: {others} folds are of another configuration or other videos; they are computed anew")
    return found
