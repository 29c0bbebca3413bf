"""The plots of an evaluation, each a PNG in memory. Figures are drawn without pyplot, which would keep them all alive.

Labels and paths come from folder names: `$` does not start a formula, and missing glyphs cause no warning.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sora import tasks
from sora.core import statistics
from sora.core.records import EvalReport, Tried
from sora.core.trials import Metric, Trial, better
from sora.judging.report import measure
from sora.judging.report.mistakes import Mistake

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, BLUE, ORANGE, GREEN = "#24292f", "#8b949e", "#2f6fdb", "#d9730d", "#1a8a5f"
MANY = 12  # classes; beyond this a legend or a number in every cell does not help
MOST_NAMES = 60


def plain(text: object, most: int = 40) -> str:
    """The text for matplotlib to show literally; the middle of a long one is left out."""
    shown = "".join(c if c.isprintable() else "�" for c in str(text))
    if len(shown) > most:
        shown = f"{shown[: most // 2 - 1]}…{shown[-(most // 2) :]}"
    return shown.replace("$", r"\$")


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        warnings.filterwarnings("ignore", message=r"Matplotlib currently does not support .* natively")
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None}, pil_kwargs={"compress_level": 4})
    return buffer.getvalue()


def _bare(axis: Axes, **texts: Any) -> None:
    axis.set(**texts)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(FAINT)
    axis.tick_params(colors=INK, labelsize=9)
    axis.grid(alpha=0.2)
    axis.set_axisbelow(True)


def confusion(report: EvalReport) -> bytes:
    """Rows: the true class; colour: the share of its videos; numbers: videos."""
    counts = np.array(report.confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = min(12.0, max(4.2, 2.2 + 0.42 * len(counts)))
    figure = _figure(size + 0.8, size)
    axis = figure.add_subplot()
    picture = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = (
        [plain(name, 18) for name in report.classes] if len(counts) <= MOST_NAMES else []
    )  # else nobody could read them
    font = 9 if len(counts) <= MANY else 7
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=font)
    axis.set_yticks(range(len(names)), names, fontsize=font)
    axis.set(xlabel="answered", ylabel="true")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    if len(counts) <= 40:
        for row, column in np.argwhere(counts):
            colour = "white" if shares[row, column] > 0.55 else INK
            axis.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=font)
    figure.colorbar(picture, ax=axis, shrink=0.7, label="share of the true class").outline.set_visible(False)
    return _png(figure)


def precision_recall(report: EvalReport) -> bytes:
    """One curve per class, against all others; with many classes the five worst by average precision are named."""
    curves = sorted(measure.precision_recall(report).items(), key=lambda item: item[1][2])
    figure = _figure(6, 4.4)
    axis = figure.add_subplot()
    from matplotlib import colormaps

    named = curves if len(curves) <= MANY else curves[:5]
    colours = colormaps["tab20" if len(named) > 10 else "tab10"]
    for _, (recall, precision, _) in curves[len(named) :]:
        axis.plot(recall, precision, color=FAINT, alpha=0.4, linewidth=1)
    for number, (name, (recall, precision, average)) in enumerate(named):
        axis.plot(recall, precision, color=colours(number), linewidth=1.8, label=f"{plain(name, 22)}  {average:.2f}")
    _bare(axis, xlim=(-0.02, 1.02), ylim=(-0.02, 1.04), xlabel="recall", ylabel="precision")
    if named:
        title = "average precision" + ("" if len(named) == len(curves) else ", the worst")
        axis.legend(
            title=title, frameon=False, fontsize=8, title_fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5)
        )
    return _png(figure)


def reliability(report: EvalReport, raw: np.ndarray | None) -> bytes:
    """Accuracy against confidence, with the fitted temperature and (`raw`: `(videos, classes)`) without.

    For a multi-label model: how often a class is present against its probability, all classes together.
    """
    task, truth = tasks.of(report.multilabel), measure.truth(report)
    served = np.array([video["probabilities"] for video in report.videos], float).reshape(-1, len(report.classes))
    figure = _figure(5, 4.4)
    axis = figure.add_subplot()
    axis.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=(0, (4, 4)))
    sets = [("calibrated", served, BLUE)]
    if raw is not None and len(raw) == len(truth):
        sets.insert(0, ("as trained", raw, ORANGE))
    for name, probabilities, colour in sets:
        confidence, right = task.decisions(probabilities, truth)
        points = statistics.reliability(confidence, right) if len(right) else []
        error = statistics.expected_calibration_error(confidence, right)
        sizes = [20 + 180 * n / max(len(right), 1) for _, _, n in points]
        axis.plot([p[0] for p in points], [p[1] for p in points], color=colour, alpha=0.5, linewidth=1.2)
        axis.scatter(
            [p[0] for p in points], [p[1] for p in points], s=sizes, color=colour, label=f"{name}: error {error:.3f}"
        )
    words = task.words
    _bare(axis, xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel=words.probability, ylabel=words.share)
    axis.legend(frameon=False, fontsize=9, loc="upper left")
    return _png(figure)


def recalls(report: EvalReport) -> bytes:
    """Recall of every class of the split with its 95 % interval, the worst at the top."""
    known = [(name, values) for name, values in report.per_class.items() if "recall" in values]
    known = sorted(known, key=lambda item: item[1]["recall"])[:MOST_NAMES][::-1]
    figure = _figure(6, max(2.2, 0.9 + 0.3 * len(known)))
    axis = figure.add_subplot()
    rows = range(len(known))
    low, high, recall = ([values[name] for _, values in known] for name in ("low", "high", "recall"))
    axis.hlines(rows, low, high, color=BLUE, alpha=0.35, linewidth=5)
    axis.plot(recall, rows, "o", color=BLUE, markersize=6)
    names = [f"{plain(name, 22)} ({values['support']:.0f})" for name, values in known]
    axis.set_yticks(rows, names)
    _bare(axis, xlim=(-0.02, 1.02), ylim=(-0.6, max(len(known), 1) - 0.4), xlabel="recall, with 95% interval")
    return _png(figure)


def tried(candidates: Sequence[Tried]) -> bytes:
    """A row for each candidate of a search: its accuracy with the 95% interval; the one that was taken is filled."""
    figure = _figure(7.5, 1.0 + 0.42 * len(candidates))
    axis = figure.add_subplot()
    for row, one in enumerate(candidates):
        colour = BLUE if one.chosen else FAINT
        axis.hlines(row, one.low, one.high, color=colour, alpha=0.35, linewidth=6)
        axis.plot(one.accuracy, row, "o", color=colour, markersize=7, fillstyle="full" if one.chosen else "none")
    axis.set_yticks(range(len(candidates)), [plain(one.name) for one in candidates])
    _bare(axis, xlabel="accuracy on videos that were held out", ylim=(-0.6, len(candidates) - 0.4))
    axis.invert_yaxis()
    axis.grid(alpha=0.2, axis="x")
    return _png(figure)


def history(epochs: Sequence[dict[str, float]]) -> bytes:
    """Loss and accuracy of training and validation per epoch; a dot marks the best validation loss."""
    figure = _figure(9, 3.4)
    for axis, measured in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for name, key, colour in (("training", measured, FAINT), ("validation", f"val_{measured}", BLUE)):
            points = [(number, epoch[key]) for number, epoch in enumerate(epochs, 1) if epoch.get(key) is not None]
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    linewidth=1.8,
                    label=name,
                    marker="." if len(points) < 40 else "",
                )
        losses = [
            (epoch["val_loss"], number) for number, epoch in enumerate(epochs, 1) if epoch.get("val_loss") is not None
        ]
        if losses and (best := min(losses)[1]) and epochs[best - 1].get(f"val_{measured}") is not None:
            axis.plot(
                best, epochs[best - 1][f"val_{measured}"], "o", color=GREEN, markersize=8, label=f"best (epoch {best})"
            )
        _bare(axis, xlabel="epoch", ylabel=measured)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=9)
    return _png(figure)


def contact_sheet(mistakes: Sequence[Mistake]) -> bytes:
    """The worst mistakes, two per row: a strip of frames each, with the truth, the answer, and the path."""
    if not mistakes:
        figure = _figure(6, 1)
        figure.text(0.5, 0.5, "no mistakes", ha="center", va="center", color=FAINT, fontsize=12)
        return _png(figure)
    rows, ratio = -(-len(mistakes) // 2), mistakes[0].strip.shape[0] / mistakes[0].strip.shape[1]
    figure = _figure(13, rows * (6.2 * ratio + 0.75))
    figure.suptitle("true  →  answered, with its confidence", x=0.005, ha="left", fontsize=9, color=FAINT)
    axes = figure.subplots(rows, 2, squeeze=False).ravel()
    for axis, mistake in zip(axes, mistakes, strict=False):
        axis.imshow(mistake.strip)
        axis.set_title(
            f"{plain(mistake.label, 24)}  →  {plain(mistake.predicted, 24)}  {mistake.confidence:.0%}",
            fontsize=10, loc="left", color=INK, fontweight="bold",
        )  # fmt: skip
        axis.set_xlabel(plain(mistake.path, 80), fontsize=8, color=FAINT, loc="left")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    for axis in axes[len(mistakes) :]:
        axis.set_axis_off()
    return _png(figure)


def search(trials: Sequence[Trial], metric: Metric) -> bytes:
    """Each trial's mean over its folds, by number; the best so far as a line, the present settings as a dashed one."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(9, 3.6)
    axis = figure.add_subplot()
    complete = [(trial.number, trial.score) for trial in trials if trial.state == "complete" and trial.folds]
    pruned = [(trial.number, trial.score) for trial in trials if trial.state == "pruned" and trial.folds]
    if pruned:
        axis.plot(*zip(*pruned, strict=True), "x", color=FAINT, markersize=6, label="given up early")
    if complete:
        numbers, scores = zip(*complete, strict=True)
        best = (np.maximum if better(metric) > 0 else np.minimum).accumulate(np.array(scores, float))
        axis.plot(numbers, scores, "o", color=BLUE, markersize=6, label="complete")
        axis.step(numbers, best, where="post", color=GREEN, linewidth=1.8, label="best so far")
    for trial in trials:
        if trial.baseline and trial.score is not None:
            axis.axhline(trial.score, color=ORANGE, linewidth=1.2, linestyle=(0, (4, 4)), label="present settings")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _bare(axis, xlabel="trial", ylabel=f"{metric.replace('_', ' ')}, mean over folds")
    if axis.get_legend_handles_labels()[1]:
        axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return _png(figure)


def importance(shares: Mapping[str, float]) -> bytes:
    """Settings and the share of the variance that each explains, the largest at the top."""
    known = sorted(shares.items(), key=lambda item: item[1])
    figure = _figure(7, 0.9 + 0.28 * max(len(known), 1))
    axis = figure.add_subplot()
    axis.barh(range(len(known)), [share for _, share in known], color=BLUE, height=0.6)
    axis.set_yticks(range(len(known)), [plain(name) for name, _ in known])
    _bare(axis, xlim=(0, 1), xlabel="share of the variance that it explains (fANOVA)")
    return _png(figure)
