"""The page of `sora tune`: the trials, what mattered, and the proposed change; one HTML file, no scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from sora.core.trials import Found, Setting, Trial, plain
from sora.judging.report import page, plots

TEMPLATE = Path(__file__).parent / "search.html.j2"


def render(found: Found, *, title: str, folds: int, videos: int) -> str:
    """The HTML text.

    Args:
        folds: of a complete trial.
        videos: train and validation videos that were judged.
    """
    present = found.baseline.values if found.baseline else {}
    template = page.environment().from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=title,
        found=found,
        folds=folds,
        videos=videos,
        history=page.address("png", plots.search(found.trials, found.metric)),
        importance=page.address("png", plots.importance(found.importance)) if found.importance else "",
        rows=[(trial, _words(trial, present)) for trial in found.trials],
    )


def _words(trial: Trial, present: Mapping[str, Setting]) -> str:
    """What the trial changed."""
    if trial.baseline:
        return "the present settings"
    return ", ".join(
        f"{name} {json.dumps(plain(value))}" for name, value in trial.values.items() if present.get(name) != value
    )
