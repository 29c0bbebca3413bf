"""Manifest rows made by hand: no file behind them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import PurePosixPath
from typing import Any

import pandas as pd

from sora.core.records import VideoRecord


def row(path: str, *, signature: str | None = None, group: str | None = None, **facts: Any) -> VideoRecord:
    """A good video: the first folder is its label; its bytes and its signature are like no other path's."""
    parts = PurePosixPath(path).parts
    good = VideoRecord(
        path=path,
        sha256=hashlib.sha256(path.encode()).hexdigest(),
        bytes=1000,
        label=parts[0] if len(parts) > 1 else None,
        group=group or None,
        codec="h264",
        width=320,
        height=240,
        rotation=0,
        frames=60,
        fps=25.0,
        duration=2.4,
        audio=False,
        brightness=110.0,
        signature=hashlib.sha384(path.encode()).hexdigest()[:48] if signature is None else signature,
    )
    return replace(good, **facts)


def manifest(rows: Iterable[VideoRecord]) -> pd.DataFrame:
    """The rows as the manifest's table: the columns of `VideoRecord`, sorted by path."""
    columns = [field.name for field in fields(VideoRecord)]
    return pd.DataFrame([asdict(r) for r in rows], columns=columns).sort_values("path", ignore_index=True)
