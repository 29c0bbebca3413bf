"""The table that training and evaluation read: one row per usable video, with its label and split."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import pandas as pd

from sora.dataset import splits
from sora.tasks import SINGLE, Task

# `unit`: videos with the same number must not be divided between folds, see `splits.units`.
COLUMNS = ("sha256", "path", "label", "split", "group", "brightness", "duration", "codec", "unit")


def join(
    manifest: pd.DataFrame, rejected: Collection[str], ledger: pd.DataFrame, bits: int | None = None
) -> pd.DataFrame:
    """Manifest rows that no rule rejected (`rejected` holds paths), with their splits from the ledger.

    Args:
        bits: `config.Validate.unit_bits`; None: near-duplicates are not in one unit.

    Returns a DataFrame with `COLUMNS`, one row per sha256, sorted by it.
    """
    usable = manifest[~manifest["path"].isin(set(rejected))]
    usable = usable.assign(unit=splits.units(usable, bits))
    joined = usable.merge(ledger[["sha256", "split"]], on="sha256", how="inner", validate="many_to_one")
    return joined[list(COLUMNS)].drop_duplicates("sha256").sort_values("sha256", ignore_index=True)


def usable(manifest: pd.DataFrame, rejected: Collection[str], bits: int | None) -> pd.DataFrame:
    """Manifest rows that decode and that no rule rejected, one per sha256, sorted by it, with their `unit`.

    Args:
        bits: see `join`.
    """
    rows = manifest[manifest["error"].isna() & ~manifest["path"].isin(set(rejected))]
    rows = rows.drop_duplicates("sha256").sort_values("sha256", ignore_index=True)
    return rows.assign(unit=splits.units(rows, bits))


def counts(table: pd.DataFrame, task: Task = SINGLE) -> dict[str, int]:
    """Videos per class; a video counts for each class that its label names."""
    counts = task.single(table["label"]).value_counts().sort_index()
    return {str(label): int(number) for label, number in counts.items()}


def digest(table: pd.DataFrame, split: str | None = None) -> str:
    """One hash of which video (by its bytes) is in which split under which label; of one split, or of all."""
    rows = table if split is None else table[table["split"] == split]
    lines = sorted(f"{row.sha256},{row.split},{row.label}" for row in rows.itertuples())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
