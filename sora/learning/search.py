"""The choice by evidence: candidates are compared by cross-validation inside train and validation; the best is solved.

Test videos are not here: the table's rows of that split are left out before anything is read. Folds are grouped like
the splits. Every candidate answers for the same videos on the same folds, and candidates are compared by the log-loss
of these answers after one temperature, which is steadier than the share of right answers.
"""

from __future__ import annotations

import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sora.config import Model, Train
from sora.core import statistics
from sora.core.errors import InputError
from sora.core.files import atomic
from sora.core.processes import Emit
from sora.core.records import Tried
from sora.core.tensors import FLOW
from sora.dataset import folds
from sora.learning import probing
from sora.learning.probing import Setting
from sora.media.video import flow
from sora.model.bank import APPEARANCE
from sora.model.probes import Branch, over_time

if TYPE_CHECKING:
    import pandas as pd

    from sora.store.shards import ShardSet
    from sora.tasks import Task

FOLDS = 5
READS = {"appearance": ("appearance",), "motion": ("motion",), "both": ("appearance", "motion")}  # `model.probe`
# `auto` tries them in this order, the cheapest to serve first: of equals the earlier is kept.
CANDIDATES = ("motion", "appearance", "both")
_SURE = 1e-3  # chance that a note about mirroring is wrong
_PRICE = 1.0  # nats a fitted weight must save over all videos (Akaike 1974)


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that the search may look at: the clips of the videos of train and validation.

    `owner` is each clip's video, `targets` are the clips', `truth` the videos'. `unit` is each video's: a unit is not
    divided. `features` has `(clips, channels) float32` for what can be read.
    """

    sha256: np.ndarray  # of each clip's video
    clip: np.ndarray
    owner: np.ndarray
    targets: np.ndarray
    truth: np.ndarray
    unit: np.ndarray
    is_train: np.ndarray  # (videos,) bool
    features: dict[str, np.ndarray]
    classes: int


@dataclass(frozen=True, slots=True)
class Choice:
    """The solved probes, what was tried, and the answers that were given for each clip by a fold that had not seen it.

    `held_out` is `(clips, classes) float32` in the order of the evidence; None if nothing could be held out. `notes` is
    for people.
    """

    branches: tuple[Branch, ...]
    tried: tuple[Tried, ...]
    held_out: np.ndarray | None
    notes: tuple[str, ...] = ()


def gather(shards: ShardSet, bank: ShardSet | None, table: pd.DataFrame, classes: int, task: Task) -> Evidence:
    """Reads the features of the table's videos of the splits `train` and `val`.

    Args:
        table: `sha256, label_index, split` and, if known, `unit`.

    Raises:
        InputError: the shards or the bank lack a video.
        ServiceError: stored bytes are damaged.
    """
    rows = table[table["split"].isin(["train", "val"])].sort_values("sha256", ignore_index=True)
    number = {sha256: place for place, sha256 in enumerate(rows["sha256"])}
    owners = shards.index["sha256"].map(number)
    places = np.flatnonzero(owners.notna().to_numpy())
    owner = owners.iloc[places].to_numpy(np.int64)
    lacking = len(rows) - len(np.unique(owner))
    if lacking:
        raise InputError(f"the shards lack {lacking} of {len(rows)} videos", fix="`sora run` prepares what is missing")
    features: dict[str, np.ndarray] = {}
    if FLOW in shards.tensors:
        features["motion"] = shards.read(FLOW, places).astype(np.float32)
    if bank is not None:
        features["appearance"] = over_time_of(bank, _same(shards, bank, places))
    truth = task.targets(rows["label_index"], classes)
    unit = rows["unit"].to_numpy(np.int64) if "unit" in rows else np.arange(len(rows))
    return Evidence(
        sha256=shards.index["sha256"].to_numpy("U64")[places],
        clip=shards.index["clip"].to_numpy(np.int64)[places],
        owner=owner,
        targets=truth[owner],
        truth=truth,
        unit=unit,
        is_train=(rows["split"] == "train").to_numpy(),
        features=features,
        classes=classes,
    )


def over_time_of(bank: ShardSet, places: np.ndarray, chunk: int = 256) -> np.ndarray:
    """`over_time` of clips of the bank, a few at a time: the frames of all of them would fill the memory."""
    parts = [over_time(bank.read(APPEARANCE, places[start : start + chunk])) for start in range(0, len(places), chunk)]
    return np.concatenate(parts)


def _same(shards: ShardSet, bank: ShardSet, places: np.ndarray) -> np.ndarray:
    """The positions in the bank of clips that are at `places` of the shards."""
    there = {key: place for place, key in enumerate(zip(bank.index["sha256"], bank.index["clip"], strict=True))}
    wanted = zip(shards.index["sha256"].to_numpy()[places], shards.index["clip"].to_numpy()[places], strict=True)
    found = [there.get(key, -1) for key in wanted]
    if -1 in found:
        raise InputError(
            f"the bank in {bank.folder} lacks clips that the shards have", fix="`sora run` computes what is missing"
        )
    return np.array(found, np.int64)


def candidates(model: Model, evidence: Evidence) -> tuple[str, ...]:
    """What is tried: for `auto` all that the evidence has features for, else what `model.probe` names.

    Raises:
        InputError: the features that it reads are not there.
    """
    wanted = CANDIDATES if model.preset == "auto" else (model.probe,)
    can = tuple(name for name in wanted if all(feature in evidence.features for feature in READS[name]))
    if not can:
        raise InputError(
            f"model.preset {model.preset} reads optical flow or a frozen backbone, but the prepared clips have neither",
            fix="set clip.flow to 16, or model.backbone to efficientnet-lite0",
        )
    return can


def choose(
    evidence: Evidence, model: Model, train: Train, out: Path, emit: Emit, classes: Sequence[str] = ()
) -> Choice:
    """Compares the candidates, and solves the best one on all the evidence.

    Args:
        out: a folder for what is finished; the same search there goes on with it.
        classes: their names, for the notes.

    Raises:
        InputError: nothing can be tried.
    """
    from threadpoolctl import threadpool_limits

    # One thread: the matrices are small, and on a busy machine threads that wait for each other took 70 times as long.
    with threadpool_limits(1, user_api="blas"):
        return _chosen(evidence, model, train, out, emit, classes)


def _chosen(evidence: Evidence, model: Model, train: Train, out: Path, emit: Emit, classes: Sequence[str]) -> Choice:
    names = candidates(model, evidence)
    parts = _parts(evidence, train.seed)
    if parts is None:
        emit({"event": "note", "message": "too few groups to compare candidates: the last one is taken unexamined"})
        return _without_evidence(evidence, names, model, train)
    answers: dict[str, _Answers] = {}
    end = time.monotonic() + 60 * train.minutes
    for feature in dict.fromkeys(feature for name in names for feature in READS[name]):
        if answers and time.monotonic() > end:
            emit({"event": "note", "message": f"no time is left for {feature}: train.minutes is {train.minutes:g}"})
            continue
        answers[feature] = _answers(evidence, feature, parts, model, train, out, emit)
    names = tuple(name for name in names if all(feature in answers for feature in READS[name]))
    compared = [_compared(name, [answers[feature] for feature in READS[name]], evidence, model) for name in names]
    best = min(range(len(names)), key=lambda place: (compared[place].cost, place))
    tried = tuple(replace(one.tried, chosen=place == best) for place, one in enumerate(compared))
    winner = compared[best]
    solved = [answers[feature] for feature in READS[names[best]]]
    branches = tuple(
        _solved(evidence, one.feature, np.ones(len(evidence.owner), bool), one.setting, model, train, weight)
        for one, weight in zip(solved, winner.weights, strict=True)
    )
    notes = tuple(filter(None, [_mirroring(evidence, answers, model, classes)]))
    return Choice(branches, tried, winner.logits.astype(np.float32), notes)


def _parts(evidence: Evidence, seed: int) -> np.ndarray | None:
    """The fold of each video; None if there are not two units."""
    units = len(np.unique(evidence.unit))
    if units < 2:
        return None
    labels = evidence.truth if evidence.truth.ndim == 1 else [str(row) for row in evidence.truth.astype(int).tolist()]
    return folds.stratified(labels, evidence.unit, min(FOLDS, units), seed)


@dataclass(frozen=True, slots=True)
class _Answers:
    """What one feature's probe answers for each clip in the fold that leaves its video out, at the best setting.

    `mirrored` are the answers for the clips' mirror images, where they are known without their pictures.
    """

    feature: str
    setting: Setting
    logits: np.ndarray
    temperature: float  # that calibrates them
    mirrored: np.ndarray | None
    seconds: float


def _answers(
    evidence: Evidence, feature: str, parts: np.ndarray, model: Model, train: Train, out: Path, emit: Emit
) -> _Answers:
    began = time.monotonic()
    settings = probing.SETTINGS[feature]
    views = 2 if feature == "motion" else 1  # as it is, and mirrored
    logits = {one: np.zeros((views, len(evidence.owner), evidence.classes), np.float32) for one in settings}
    count = int(parts.max()) + 1
    for number in range(count):
        left_out = (parts == number)[evidence.owner]
        kept = out / f"{feature}-{number}.npz"
        stored = _stored(kept, settings, (views, int(left_out.sum()), evidence.classes))
        if stored is None:
            stored = {}
            asked = evidence.features[feature][left_out]
            bases = {
                columns: probing.basis(feature, evidence.features[feature][~left_out], columns)
                for columns in dict.fromkeys(one.columns for one in settings)
            }
            for one in settings:
                branch = _branch(bases[one.columns], evidence.targets[~left_out], evidence.classes, one, model, train)
                seen = (asked, flow.mirrored(asked)) if feature == "motion" else (asked,)
                stored[one] = np.stack([branch(view) for view in seen])
            with atomic(kept) as file:
                np.savez(file, allow_pickle=False, **{str(one): values for one, values in stored.items()})
        for one in settings:
            logits[one][:, left_out] = stored[one]
        emit({"event": "search", "candidate": feature, "done": number + 1, "total": count})
    costs = {one: _cost(values[0], evidence, model) for one, values in logits.items()}
    best = min(settings, key=lambda one: costs[one][0])
    mirrored = logits[best][1] if views > 1 else None
    return _Answers(feature, best, logits[best][0], costs[best][1], mirrored, time.monotonic() - began)


def _stored(file: Path, settings: Sequence[Setting], shape: tuple[int, int, int]) -> dict[Setting, np.ndarray] | None:
    """What an interrupted search kept of a fold, or None."""
    try:
        with np.load(file, allow_pickle=False) as kept:
            stored = {one: kept[str(one)] for one in settings}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return stored if all(values.shape == shape for values in stored.values()) else None


def _branch(
    base: probing.Basis, targets: np.ndarray, classes: int, setting: Setting, model: Model, train: Train
) -> Branch:
    return probing.solve(base, targets, classes, model.task, setting.strength, class_weights=train.class_weights)


def _solved(
    evidence: Evidence, feature: str, rows: np.ndarray, setting: Setting, model: Model, train: Train, weight: float
) -> Branch:
    base = probing.basis(feature, evidence.features[feature][rows], setting.columns)
    branch = _branch(base, evidence.targets[rows], evidence.classes, setting, model, train)
    return replace(branch, logits=branch.logits.scaled(weight))


def _cost(logits: np.ndarray, evidence: Evidence, model: Model) -> tuple[float, float]:
    """Log-loss over videos after the best temperature, and that temperature."""
    task, videos = model.task, len(evidence.truth)
    temperature = task.fit_temperature(logits, evidence.owner, evidence.truth)
    shares = task.video_probabilities(logits, evidence.owner, videos, temperature)
    return task.log_loss(shares, evidence.truth), temperature


@dataclass(frozen=True, slots=True)
class _Compared:
    tried: Tried
    cost: float
    weights: tuple[float, ...]  # of the branches' logits: calibrated
    logits: np.ndarray  # weighed


def _compared(name: str, answers: list[_Answers], evidence: Evidence, model: Model) -> _Compared:
    logits = [one.logits for one in answers]
    alone = [1 / one.temperature for one in answers]
    weights = _weights(logits, alone, evidence, model) if len(logits) > 1 else tuple(alone)
    weighed = _sum(logits, weights)
    task, videos = model.task, len(evidence.truth)
    shares = task.video_probabilities(weighed, evidence.owner, videos)
    loss = task.log_loss(shares, evidence.truth)
    right = (task.answered(shares) == (task.dense(evidence.truth, evidence.classes) > 0.5)).all(axis=1)
    low, high = statistics.wilson(float(right.sum()), videos)
    tried = Tried(
        name=name,
        accuracy=float(right.mean()),
        low=low,
        high=high,
        log_loss=loss,
        videos=videos,
        seconds=sum(one.seconds for one in answers),
        settings={one.feature: str(one.setting) for one in answers},
    )
    return _Compared(tried, loss + _PRICE * (len(answers) - 1) / videos, weights, weighed)


def _mirroring(evidence: Evidence, answers: Mapping[str, _Answers], model: Model, classes: Sequence[str]) -> str | None:
    """In words, that a mirrored clip shows another class; None without a clear sign of it.

    The sign: by its motion, a video is answered rightly and its mirror image wrongly far more often than the reverse.
    """
    from scipy.stats import binom

    known = answers.get("motion")
    if known is None or known.mirrored is None or evidence.truth.ndim != 1:
        return None
    task, videos = model.task, len(evidence.truth)
    plain, turned = (
        task.video_probabilities(one, evidence.owner, videos).argmax(axis=1) for one in (known.logits, known.mirrored)
    )
    right, still = plain == evidence.truth, turned == evidence.truth
    lost, won = int((right & ~still).sum()), int((~right & still).sum())
    if not lost or binom.sf(lost - 1, lost + won, 0.5) > _SURE:
        return None
    pairs = []
    for number, name in enumerate(classes):
        own = turned[(evidence.truth == number) & right]
        if len(own) and (other := int(np.bincount(own).argmax())) != number:
            pairs.append(f"{name!r} looks like {classes[other]!r}")
    return (
        f"mirrored left to right, {lost} of {int(right.sum())} videos change their class by their motion"
        + (f" ({', '.join(pairs)})" if pairs else "")
        + ": train.flip must not mirror them"
    )


def _weights(logits: list[np.ndarray], alone: list[float], evidence: Evidence, model: Model) -> tuple[float, ...]:
    """The weights, 0 to 10, with which the sum of logits has the least log-loss (stacking: Wolpert 1992).

    Args:
        alone: the weight that calibrates each by itself.
    """
    from scipy.optimize import minimize

    task, videos = model.task, len(evidence.truth)

    def cost(turned: np.ndarray) -> float:
        shares = task.video_probabilities(_sum(logits, turned), evidence.owner, videos)
        return task.log_loss(shares, evidence.truth)

    # From each alone and from the middle between them: the best end counts.
    starts = [[weight / len(logits) for weight in alone]]
    starts += [[weight if place == one else 0.0 for place, weight in enumerate(alone)] for one in range(len(alone))]
    bounds = [(0, 10)] * len(logits)
    ends = [minimize(cost, start, method="L-BFGS-B", bounds=bounds) for start in starts]
    return tuple(float(weight) for weight in min(ends, key=lambda end: end.fun).x)


def _sum(logits: Sequence[np.ndarray], weights: Sequence[float] | np.ndarray) -> np.ndarray:
    # In double precision: single hides the small steps by which a minimum is looked for.
    return sum((one * float(w) for one, w in zip(logits, weights, strict=True)), np.zeros(logits[0].shape))


def _without_evidence(evidence: Evidence, names: Sequence[str], model: Model, train: Train) -> Choice:
    """Nothing can be held out: the default strengths, on the training videos alone, so that validation stays unseen."""
    name = names[-1]
    rows = evidence.is_train[evidence.owner]
    weight = 1 / len(READS[name])
    branches = tuple(
        _solved(evidence, feature, rows, probing.DEFAULTS[feature], model, train, weight) for feature in READS[name]
    )
    return Choice(branches, (), None)
