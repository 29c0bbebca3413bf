"""`sora data audit`: which videos are probably mislabelled, according to models that have not seen them.

Confident learning (Northcutt, Jiang and Chuang 2021): the project's videos are divided into folds by group. A model is
trained for each fold on the others, and its answers for the held-out videos are compared with their labels. A video
is suspect when another class is given at least the probability that videos of that class get on average (their
"self-confidence"), and more than any other class that reaches its own average. Nothing is changed: a person decides.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sora.config import Project, Settings
from sora.core import provenance
from sora.core.errors import InputError
from sora.core.files import atomic, writing
from sora.core.progress import Bar, say
from sora.learning import crossval

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 60  # suspects on the page
_VALIDATION = 0.2  # share of the training videos of a fold, by group, for early stopping


@dataclass(frozen=True)
class Finding:
    """One video. `margin` is the probability of `suggested` (the likeliest other class) less that of its label."""

    path: str
    sha256: str
    label: str
    suggested: str
    probability: float  # of the label
    suggested_probability: float
    margin: float  # -1 to 1; the list falls by it, suspects first
    suspect: bool


def audit(project: Project, *, folds: int = 5, progress: Bar = lambda done, total, note="": None) -> dict[str, Any]:
    """Ranks the project's accepted videos: `{videos, suspects, accuracy, folds, page, findings: [Finding]}`.

    `accuracy` is that of the out-of-fold answers: if it is near chance, the ranking says nothing. Finished folds
    stay in .sora/audit until data, labels, parameters or code change, so an interrupted audit continues.

    Raises:
        InputError: nothing has been prepared yet, there are fewer groups than folds, or videos may have several labels.
        ServiceError, DiskFull: a training failed; the folds before it stay.
    """
    settings, videos = _videos(project)
    labels, units = videos["label"].to_numpy(), videos["unit"].to_numpy()
    from sora.dataset import folds as folding

    outer = folding.stratified(labels, units, folds, settings.train.seed)
    epochs = settings.train.epochs
    answered: list[dict[str, Any]] = []
    keys: set[str] = set()
    for number in range(folds):
        train = outer != number
        aside = folding.with_validation(train, labels, units, _VALIDATION, settings.train.seed)
        table = videos[["sha256", "path", "label", "unit"]].assign(
            split=np.where(aside, "val", np.where(train, "train", "test"))
        )
        key = crossval.digest(
            [
                crossval.configuration(settings),
                provenance.LEARNING,
                table[["sha256", "label", "split"]].to_csv(index=False),
            ]
        )
        keys.add(key)

        def show(event: dict[str, Any], number: int = number) -> None:
            if event["event"] == "epoch":
                progress(number * epochs + event["epoch"], folds * epochs, f"fold {number + 1} of {folds}")
            elif event["event"] == "note":
                say(event["message"])

        fold = crossval.answers(
            folder(project) / key,
            project.shards,
            table,
            settings,
            judged="test",
            features=project.features,
            on_event=show,
        )
        progress((number + 1) * epochs, folds * epochs, f"fold {number + 1} of {folds}")
        answered += fold["videos"]
    findings = rank(answered, settings.classes)
    _forget(folder(project), keys)
    result = {
        "videos": len(findings),
        "suspects": sum(finding.suspect for finding in findings),
        "accuracy": float(np.mean([one["predicted"] == one["label"] for one in answered])),
        "folds": folds,
        "page": str(folder(project) / "index.html"),
        "findings": [asdict(finding) for finding in findings],
    }
    _write(project, result, findings)
    return result


def folder(project: Project) -> Path:
    """The results of audits: finished folds, index.html and audit.json."""
    return project.audit


def rank(answers: Sequence[dict[str, Any]], classes: Sequence[str]) -> list[Finding]:
    """All videos, suspects first, each part by decreasing margin.

    Args:
        answers: `label` and `probabilities` (in the order of `classes`) of videos that the model was not trained on,
            with `path` and `sha256`.
    """
    if not answers:
        return []
    names = list(classes)
    label = np.array([names.index(one["label"]) for one in answers])
    p = np.array([one["probabilities"] for one in answers], float)
    every = np.arange(len(p))
    # Nothing is known about a class without videos: no probability reaches its average.
    threshold = np.array([p[label == c, c].mean() if (label == c).any() else np.inf for c in range(len(names))])
    confident = np.where(p >= threshold, p, -1)
    likeliest = confident.argmax(axis=1)
    suspect = (confident.max(axis=1) >= 0) & (likeliest != label)
    others = p.copy()
    others[every, label] = -1
    other = np.where(suspect, likeliest, others.argmax(axis=1))
    margin = p[every, other] - p[every, label]
    order = sorted(range(len(p)), key=lambda i: (not suspect[i], -margin[i], answers[i]["sha256"]))
    return [
        Finding(
            path=answers[i]["path"],
            sha256=answers[i]["sha256"],
            label=names[label[i]],
            suggested=names[other[i]],
            probability=float(p[i, label[i]]),
            suggested_probability=float(p[i, other[i]]),
            margin=float(margin[i]),
            suspect=bool(suspect[i]),
        )
        for i in order
    ]


def _videos(project: Project) -> tuple[Settings, pd.DataFrame]:
    """The accepted prepared videos, sorted by sha256, with their `unit`."""
    from sora.dataset import manifest, table
    from sora.dataset.quality import quarantine

    settings = project.settings()
    if not settings.task.exclusive:
        raise InputError(
            "the audit looks for videos that fit another class better, but with model.head multilabel one class takes "
            "nothing from another",
            fix="see the worst mistakes on the evaluation page (.sora/last_evaluation/index.html) instead",
        )
    try:
        rejected = quarantine.rejected_paths(project)
        rows = manifest.read(project.manifest)
    except (OSError, InputError) as error:
        raise InputError(f"nothing is prepared yet ({error})", fix="`sora run` prepares the videos first") from error
    return settings, table.usable(rows, rejected, settings.validate_.unit_bits)


def _forget(place: Path, keys: set[str]) -> None:
    """Removes the folds of earlier audits: no later audit would use them."""
    import shutil

    for old in place.iterdir():
        if old.is_dir() and old.name not in keys:
            shutil.rmtree(old, ignore_errors=True)


def _write(project: Project, result: dict[str, Any], findings: Sequence[Finding]) -> None:
    from sora.judging.report import suspects
    from sora.store.shards import ShardSet

    shown = [finding for finding in findings if finding.suspect][:SHOWN]
    page = suspects.render(result, shown, ShardSet.open(project.shards), title=project.settings().name)
    with writing(folder(project)):
        folder(project).mkdir(parents=True, exist_ok=True)
    for name, text in (("index.html", page), ("audit.json", json.dumps(result, allow_nan=False, indent=1))):
        with atomic(folder(project) / name) as file:
            file.write(text.encode())
