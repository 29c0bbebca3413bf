"""The result of one check."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check. `fix` says what to do; it is empty if `ok`."""

    name: str
    ok: bool
    detail: str
    fix: str = ""
