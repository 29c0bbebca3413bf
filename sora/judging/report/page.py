"""The page of an evaluation: one self-contained HTML file, and the plots as PNG files beside it for other uses.

Labels, paths and groups come from strangers' file names: the template escapes all of them, the page's policy forbids
scripts and every outside address.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sora import tasks
from sora.core.files import atomic
from sora.core.records import EvalReport, Tried
from sora.judging.report import mistakes as mistakes_
from sora.judging.report import plots

if TYPE_CHECKING:
    import jinja2

TEMPLATE = Path(__file__).parent / "page.html.j2"
MOST_CLASSES = 200  # rows of the table; the PNG files and report.json hold all


def write(
    folder: Path,
    reports: dict[str, EvalReport],
    *,
    shards: mistakes_.Clips,
    raw_test: np.ndarray | None = None,
    history: Sequence[dict[str, float]] = (),
    tried: Sequence[Tried] = (),
    title: str = "",
) -> list[Path]:
    """Writes index.html, the plots and mistakes.png into `folder`; returns their paths.

    Args:
        reports: of "test" and, if there is one, of "val".
        raw_test: `(videos, classes)` probabilities of the test split before calibration, in the report's order.
        history: metrics of each epoch of the training.
        tried: what a search compared before it.
    """
    test = reports["test"]
    worst = mistakes_.worst(test, shards)
    images = {"recall": plots.recalls(test)}
    if tasks.of(test.multilabel).exclusive:
        images["confusion"] = plots.confusion(test)
    if test.videos:
        images |= {"precision_recall": plots.precision_recall(test), "reliability": plots.reliability(test, raw_test)}
    if history:
        images["history"] = plots.history(history)
    if tried:
        images["tried"] = plots.tried(tried)
    files = {f"{name}.png": content for name, content in images.items()}
    files["mistakes.png"] = plots.contact_sheet(worst)
    files["index.html"] = render(reports, images, worst, title=title, tried=tried).encode()
    for name, content in files.items():
        with atomic(folder / name) as file:
            file.write(content)
    return [folder / name for name in files]


def render(
    reports: dict[str, EvalReport],
    images: dict[str, bytes],
    worst: Sequence[mistakes_.Mistake],
    *,
    title: str,
    tried: Sequence[Tried] = (),
) -> str:
    """The HTML text."""
    test, val = reports["test"], reports.get("val")
    classes = sorted(test.per_class.items(), key=lambda item: (item[1].get("recall", 2), item[0]))
    return (
        environment()
        .from_string(TEMPLATE.read_text(encoding="utf-8"))
        .render(
            title=title or "Evaluation",
            test=test,
            val=val,
            words=tasks.of(test.multilabel).words,
            cards=_cards(test),
            classes=classes[:MOST_CLASSES],
            left_out=max(0, len(classes) - MOST_CLASSES),
            slices=_grouped(test.slices),
            images={name: address("png", content) for name, content in images.items()},
            mistakes=[(mistake, jpeg(mistake.strip)) for mistake in worst],
            tried=tried,
            wrong=sum(video["predicted"] != video["label"] for video in test.videos),
        )
    )


def _cards(test: EvalReport) -> list[tuple[str, str, str]]:
    """(name, value, remark) of the figures at the top."""
    known, words = test.metrics, tasks.of(test.multilabel).words
    if not test.videos:
        return [("test videos", "0", "nothing can be said")]
    cards = [
        (
            words.accuracy,
            f"{known['accuracy']:.1%}",
            f"95% interval {known['accuracy_low']:.1%} to {known['accuracy_high']:.1%}",
        ),
        ("macro-F1", f"{known['macro_f1']:.3f}", "mean over classes"),
        (
            words.majority,
            f"{known['majority']:.1%}",
            words.always,
        ),
        (
            "calibration error",
            f"{known['ece']:.3f}",
            f"by chance up to {known['ece_noise']:.3f}; temperature {test.temperature:.2f}",
        ),
        ("test videos", f"{len(test.videos)}", f"{len(test.classes)} classes"),
        ("latency", f"{known['latency_ms']:.1f} ms" if "latency_ms" in known else "–", "one clip, warmed model call"),
    ]
    if "mean_average_precision" in known:
        cards.append(("mean average precision", f"{known['mean_average_precision']:.3f}", "over the classes"))
    if "coverage" in known:
        right = f"{known['sure_precision']:.1%} of them right" if "sure_precision" in known else "none is sure"
        cards.append(("sure answers", f"{known['coverage']:.1%}", right))
    return cards


def _grouped(slices: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Slices by their kind, in the order given."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for part in slices:
        kinds.setdefault(part["slice"], []).append(part)
    return list(kinds.items())


def environment() -> jinja2.Environment:
    """Jinja's environment: it escapes everything that is put into a page, and has the filters `share` and `number`."""
    import jinja2

    made = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters["share"] = lambda value: "–" if value is None else f"{value:.1%}"
    made.filters["number"] = lambda value, digits=3: "–" if value is None else f"{value:.{digits}f}"
    return made


def jpeg(pixels: np.ndarray) -> str:
    """`(height, width, rgb) uint8` as a data URI for the page."""
    import cv2

    encoded = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
    return address("jpeg", encoded.tobytes())


def address(kind: str, content: bytes) -> str:
    """A picture (`png`, `jpeg`) as a data URI for a page."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
