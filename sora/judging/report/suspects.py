"""The page of `sora data audit`: videos whose label is suspect, with frames to look at; one HTML file, no scripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sora.judging.report import page
from sora.judging.report.mistakes import Clips, strip

TEMPLATE = Path(__file__).parent / "suspects.html.j2"


def render(audit: dict[str, Any], shown: Sequence[Any], shards: Clips, *, title: str) -> str:
    """The HTML text.

    Args:
        audit: the result of `audit.audit`.
        shown: the findings to show (`audit.Finding`); one whose clips are missing in the shards is left out.
    """
    rows = shards.index.groupby("sha256").indices
    pictures = [
        (finding, page.jpeg(strip(shards, rows[finding.sha256]))) for finding in shown if finding.sha256 in rows
    ]
    template = page.environment().from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, audit=audit, shown=pictures)
