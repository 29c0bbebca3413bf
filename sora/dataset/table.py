"""The table that training and evaluation read: one row a usable video, with its label and split."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import pandas as pd

from sora.tasks import SINGLE, Task

COLUMNS = ("sha256", "path", "label", "split", "group", "brightness", "duration", "codec")


def join(manifest: pd.DataFrame, rejected: Collection[str], ledger: pd.DataFrame) -> pd.DataFrame:
    """Manifest rows that no rule rejected (`rejected` holds paths), with their split of the ledger.

    Returns a DataFrame with `COLUMNS`, one row a sha256, sorted by it.
    """
    usable = manifest[~manifest["path"].isin(set(rejected))]
    joined = usable.merge(ledger[["sha256", "split"]], on="sha256", how="inner", validate="many_to_one")
    return joined[list(COLUMNS)].drop_duplicates("sha256").sort_values("sha256", ignore_index=True)


def counts(table: pd.DataFrame, task: Task = SINGLE) -> dict[str, int]:
    """Videos a class; a video counts for each class that its label names."""
    found = task.single(table["label"]).value_counts().sort_index()
    return {str(label): int(number) for label, number in found.items()}


def digest(table: pd.DataFrame, split: str | None = None) -> str:
    """Names which video (by its bytes) stands where under which label; of one split, or of all."""
    rows = table if split is None else table[table["split"] == split]
    lines = sorted(f"{row.sha256},{row.split},{row.label}" for row in rows.itertuples())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
