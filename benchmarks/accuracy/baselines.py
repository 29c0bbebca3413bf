"""References to place a figure, on exactly the same folds: what needs no motion, or nothing at all.

Another one is another entry of `BASELINES`. One that reads features of videos (an appearance or a motion probe, say)
is `probe` with a function of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from sora.core.records import Split
from sora.core.tensors import FLOW, VIDEO
from sora.model.bank import APPEARANCE
from sora.model.probes import over_time
from sora.store.shards import ShardSet

SIDE = 32  # pixels of a mean image


@dataclass(frozen=True, slots=True)
class Task:
    """A fold's question. `learn` and `asked` have `sha256, label`; the clips of all their videos lie in `shards`."""

    shards: Path
    classes: tuple[str, ...]
    learn: pd.DataFrame
    asked: pd.DataFrame


@dataclass(frozen=True, slots=True)
class Guess:
    """The answers, `(asked videos, classes) float64`, rows that sum to 1, and how many numbers were learnt."""

    probabilities: np.ndarray
    parameters: int


@dataclass(frozen=True, slots=True)
class Baseline:
    """`settings` name all that decides its answers beside the clips: with another value they are another baseline's.

    Nothing is stopped early, so it learns from the videos kept aside for that, too.
    """

    about: str
    settings: Mapping[str, str | int | float]
    guess: Callable[[Task], Guess]


# (shards, sha256 of videos) → (videos, features) float32
Features = Callable[[Path, tuple[str, ...]], np.ndarray]


def majority(task: Task) -> Guess:
    """The shares of the classes among the videos to learn from, for every video; of equal ones the first class."""
    shares = task.learn["label"].value_counts(normalize=True).reindex(list(task.classes), fill_value=0.0)
    return Guess(np.tile(shares.to_numpy(np.float64), (len(task.asked), 1)), 0)


def probe(
    about: str, features: Features, *, regularisation: float, kernel: bool = False, **settings: str | int | float
) -> Baseline:
    """Logistic regression on standardised features of videos, or a support vector machine with a Gaussian kernel.

    Args:
        features: gets the folder of the shards and the videos' sha256; called for all videos of a fold at once.
        regularisation: scikit-learn's C.
        settings: what names the features.
    """

    def guess(task: Task) -> Guess:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from sklearn.svm import SVC

        # All of a set's folds ask for the same videos in the same order, so that features may keep what they computed.
        videos = tuple(sorted({*task.learn["sha256"], *task.asked["sha256"]}))
        x = features(task.shards, videos)
        place = {name: row for row, name in enumerate(videos)}
        known = [place[name] for name in task.learn["sha256"]]
        asked = [place[name] for name in task.asked["sha256"]]
        labels = task.learn["label"].to_numpy()
        result = np.zeros((len(asked), len(task.classes)))
        if len(set(labels)) == 1:  # a regression needs two classes
            result[:, task.classes.index(labels[0])] = 1
            return Guess(result, 0)
        chosen = SVC(C=regularisation) if kernel else LogisticRegression(C=regularisation, max_iter=5000)
        fitted = make_pipeline(StandardScaler(), chosen)
        fitted.fit(x[known], labels)
        columns = [task.classes.index(name) for name in fitted.classes_]
        last = fitted[-1]
        if not kernel:
            result[:, columns] = fitted.predict_proba(x[asked])
            return Guess(result, int(last.coef_.size + last.intercept_.size))
        # It has no probabilities, and only its answer is asked for.
        answers = [task.classes.index(name) for name in fitted.predict(x[asked])]
        result[np.arange(len(asked)), answers] = 1
        return Guess(result, int(last.support_vectors_.size + last.dual_coef_.size))

    return Baseline(about, {**settings, "C": regularisation}, guess)


@lru_cache(maxsize=2)
def mean_images(shards: Path, videos: tuple[str, ...]) -> np.ndarray:
    """Grey levels of the mean frame, over all clips of a video: `(videos, 32 * 32) float32`, 0 … 255.

    Raises:
        InputError: no complete shard set there.
        KeyError: a video without clips.
        ServiceError: a damaged clip.
    """
    stored = ShardSet.open(shards)
    rows = stored.index.groupby("sha256").indices
    result = np.empty((len(videos), SIDE * SIDE), np.float32)
    for number, video in enumerate(videos):
        total = [stored.read(VIDEO, [row])[0].mean(axis=0, dtype=np.float32) for row in rows[video]]
        grey = cv2.cvtColor(np.mean(total, axis=0, dtype=np.float32), cv2.COLOR_RGB2GRAY)
        result[number] = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA).ravel()
    result.flags.writeable = False
    return result


@lru_cache(maxsize=2)
def appearance(shards: Path, videos: tuple[str, ...]) -> np.ndarray:
    """What the frozen backbone sees, over time, the mean over a video's clips: `(videos, features) float32`.

    Raises: as `mean_images`; InputError also if there is no bank beside the clips.
    """
    bank = ShardSet.open(bank_of(shards))
    rows = bank.index.groupby("sha256").indices
    result = np.stack([over_time(bank.read(APPEARANCE, rows[video])).mean(axis=0) for video in videos])
    result.flags.writeable = False
    return result


@lru_cache(maxsize=2)
def motion(shards: Path, videos: tuple[str, ...]) -> np.ndarray:
    """Histograms of optical flow, the mean over a video's clips: `(videos, 368) float32`. Raises: as `mean_images`."""
    stored = ShardSet.open(shards)
    rows = stored.index.groupby("sha256").indices
    result = np.stack([stored.read(FLOW, rows[video]).astype(np.float32).mean(axis=0) for video in videos])
    result.flags.writeable = False
    return result


def bank_of(shards: Path) -> Path:
    """Where the bank of some clips lies."""
    return shards.with_name(f"features-{shards.name}")


BASELINES: Mapping[str, Baseline] = {
    "majority": Baseline("the largest class", {"version": 1}, majority),
    "mean-image": probe(
        f"mean image, grey, {SIDE}x{SIDE} + logistic regression", mean_images,
        regularisation=0.01, reads="mean image", side=SIDE, version=1,
    ),
    "appearance-probe": probe(
        "frozen backbone over time + logistic regression", appearance,
        regularisation=0.01, reads="bank", version=1,
    ),
    "motion-probe": probe(
        "histograms of optical flow + support vector machine", motion, kernel=True,
        regularisation=3.0, reads="flow", version=1,
    ),
}  # fmt: skip


def answers(
    baseline: Baseline, shards: Path, classes: tuple[str, ...], table: pd.DataFrame, judged: Split
) -> dict[str, Any]:
    """A fold's entry in the form of `sora.learning.crossval.answers`, without metrics.

    Args:
        table: `sha256, label, split`. All that is not `judged` is learnt from.
    """
    began = time.perf_counter()
    own = table["split"] == judged
    asked, learn = table[own], table[~own]
    guess = baseline.guess(Task(shards, classes, learn, asked))
    predicted = [classes[number] for number in guess.probabilities.argmax(axis=1)]
    rows = zip(asked["sha256"], asked["label"], predicted, guess.probabilities.tolist(), strict=True)
    names = ("sha256", "label", "predicted", "probabilities")
    training = {"best_epoch": None, "clips_per_second": None, "parameters": guess.parameters}
    return {
        "videos": [dict(zip(names, row, strict=True)) for row in rows],
        "training": {**training, "seconds": time.perf_counter() - began},
        "train": len(learn),
        "val": 0,
    }
