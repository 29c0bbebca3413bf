"""What a cross-validation's folds say together: accuracy, spread and interval; a file and a plot of several runs."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks import common
from benchmarks.accuracy.foldfiles import PREFIX, FoldRecord
from sora.core import statistics
from sora.core.files import atomic
from sora.core.progress import say

DRAWS = 10_000
MIN_UNITS = 10  # with fewer the interval is over videos


def summarise(folds: Sequence[FoldRecord], videos: pd.DataFrame) -> dict[str, Any]:
    """Of all answers of all folds.

    `accuracy` is the mean over seeds of the share of videos answered rightly, `spread` its standard deviation over
    seeds. The 95 % interval is a bootstrap over units (groups and near-duplicates), since videos of one group are right
    or wrong together; over videos where there are fewer than 10 units. It tells how the figure would vary with other
    footage of this kind, not with other seeds alone.

    Args:
        folds: at least one.
        videos: `sha256, unit`; of the former the first digits count.
    """
    rows = pd.DataFrame(
        {"seed": fold.seed, "fold": fold.fold, "sha256": one.sha256, "right": one.right, "sure": max(one.probabilities)}
        for fold in folds
        for one in fold.answers
    )
    units = videos[["unit"]].assign(sha256=videos["sha256"].str[:PREFIX])
    rows = rows.merge(units, on="sha256", validate="many_to_one")
    by_seed = rows.groupby("seed")["right"].mean()
    by_video = rows.groupby("sha256").agg(right=("right", "mean"), unit=("unit", "first"))
    over = "groups" if by_video["unit"].nunique() >= MIN_UNITS else "videos"
    cluster = by_video["unit"] if over == "groups" else by_video.index
    low, high = bootstrap(by_video["right"].to_numpy(), pd.factorize(cluster)[0])
    return {
        "accuracy": float(by_seed.mean()),
        "spread": float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None,
        "low": low,
        "high": high,
        "interval": f"95 %, bootstrap over {over}",
        "by_seed": [float(share) for share in by_seed],
        "by_fold": [float(share) for share in rows.groupby(["seed", "fold"])["right"].mean()],
        # Of all seeds' answers together: the expected calibration error (`sora.core.statistics`).
        "ece": statistics.expected_calibration_error(rows["sure"].to_numpy(), rows["right"].to_numpy()),
        "folds": len(folds),
        "videos": len(by_video),
        "parameters": folds[0].parameters,
        "best_epoch": _median([fold.best_epoch for fold in folds]),
        "clips_per_second": _median([fold.clips_per_second for fold in folds]),
        "training_seconds": sum(fold.seconds for fold in folds),
    }


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def label_of(entry: dict[str, Any]) -> str:
    """An entry's name with what must be said beside it."""
    marks = ["leaks"] if entry["leaks"] else []
    marks += [f"incomplete: {entry['incomplete']}"] if entry.get("incomplete") else []  # older entries have no mark
    return " ".join([entry["name"], *(f"({mark})" for mark in marks)])


def bootstrap(right: np.ndarray, cluster: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean of `right` when whole clusters are drawn anew (Efron 1979; Field & Welsh 2007).

    Where everything is right (or wrong) it is Wilson's interval: redrawing could only repeat it.
    """
    total, size = np.bincount(cluster, weights=right), np.bincount(cluster)
    if right.min() == right.max():
        return statistics.wilson(float(right.sum()), len(right), confidence)
    drawn = np.random.default_rng(0).integers(0, len(size), (DRAWS, len(size)))
    shares = total[drawn].sum(axis=1) / size[drawn].sum(axis=1)
    low, high = np.quantile(shares, ((1 - confidence) / 2, (1 + confidence) / 2))
    return float(low), float(high)


def plot(entries: list[dict[str, Any]]) -> bytes:
    """PNG: a row a run, with its mean and interval, a dot a fold, and marks where others' figures are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.3 + 0.6 * len(entries)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    for row, entry in enumerate(entries):
        colour = "#8b949e" if entry["leaks"] else "#2f6fdb"
        axis.plot(entry["by_fold"], [row + 0.18] * len(entry["by_fold"]), "o", color=colour, alpha=0.35, markersize=3)
        axis.hlines(row, entry["low"], entry["high"], color=colour, alpha=0.35, linewidth=6)
        axis.plot(entry["accuracy"], row, "o", color=colour, markersize=7)
        for _, figure_of_others in entry["known"]:
            axis.plot(figure_of_others, row, "|", color="#d9730d", markersize=14, markeredgewidth=2)
    names = [label_of(entry) for entry in entries]
    axis.set_yticks(range(len(entries)), [name.replace("$", r"\$") for name in names])
    axis.set(xlabel="accuracy: mean, 95% interval; small dots: folds; orange: known figures", ylim=(-0.6, len(names)))
    axis.invert_yaxis()
    axis.grid(alpha=0.2, axis="x")
    axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def store(entry: dict[str, Any], out: Path, name: str) -> list[dict[str, Any]]:
    """Puts the run's entry into OUT/NAME.json in place of an earlier one of its name; returns all.

    A complete figure of another configuration stays where the new one is incomplete.
    """
    file = out / f"{name}.json"
    entries = json.loads(file.read_text("utf-8"))["result"] if file.exists() else []
    places = [number for number, other in enumerate(entries) if other["name"] == entry["name"]]
    if not places:
        entries.append(entry)
    elif entry["incomplete"] and not entries[places[0]].get("incomplete") and not _same(entry, entries[places[0]]):
        say(f"{entry['name']}: {entry['incomplete']} are too few to replace the figure of another configuration")
        return list(entries)
    else:
        entries[places[0]] = entry
    common.write(name, entries, out)
    with atomic(out / f"{name}.png") as picture:
        picture.write(plot(entries))
    return list(entries)


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("configuration", "protocol"))
