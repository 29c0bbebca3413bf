"""The answer of one check."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Check:
    """What one check saw. `fix` says what to do; it is empty where `ok`."""

    name: str
    ok: bool
    detail: str
    fix: str = ""
