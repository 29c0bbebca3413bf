"""Who was champion, in order: pure arithmetic on the events of the promotion history.

Every move of the alias is one event, kept as one tag of the registered model (`sora.history.000017`): appended, never
rewritten, so that no move is lost however many nights there are (a tag holds 5,000 characters).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

PREFIX = "sora.history."


@dataclass(frozen=True, slots=True)
class Move:
    """The champion became `version`. `seq` counts the moves of this model from 1."""

    seq: int
    kind: Literal["promote", "rollback"]
    version: int
    left: int | None  # the champion before
    at: str  # ISO 8601, UTC
    by: str
    why: str

    @property
    def key(self) -> str:
        return f"{PREFIX}{self.seq:06d}"

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)


def moves(tags: Mapping[str, str]) -> list[Move]:
    """The history in the registered model's tags, oldest first."""
    moves = [Move(**json.loads(value)) for key, value in tags.items() if key.startswith(PREFIX)]
    return sorted(moves, key=lambda move: move.seq)


def line(history: Iterable[Move]) -> list[int]:
    """The champions that a rollback can return to, oldest first; the last one is the champion.

    A promotion appends. A rollback removes the champion that it left: so a second one goes further back and never
    forward again.
    """
    champions: list[int] = []
    for move in history:
        if move.kind == "promote":
            champions.append(move.version)
            continue
        while champions and champions[-1] != move.version:
            champions.pop()
        if not champions:  # tags edited by hand: only the present champion is known
            champions.append(move.version)
    return champions
