"""Moving the champion: promotion, rollback, and repair after a crash in between."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from sora.core.errors import PromotionFailed
from sora.core.records import Recipe
from sora.registry.history import Move, line, moves
from sora.registry.model import CHAMPION, PREVIOUS, RegisteredModel
from sora.registry.runs import user
from sora.registry.versions import Versions, iso_now

_MOVING = "sora.moving"  # on the registered model while the alias moves: what to restore after a crash

Smoke = Callable[[Path, Recipe], object]


class Champion:
    """The alias `champion` of one registered model, its moves and their history.

    Moves must not overlap: the caller holds a lock of the project around `promote`, `rollback` and `recover`.
    """

    def __init__(self, model: RegisteredModel, versions: Versions) -> None:
        self._model = model
        self._versions = versions

    def version(self) -> int | None:
        """The version that is served, or None before the first promotion."""
        return self._model.aliases().get(CHAMPION)

    def previous(self) -> int | None:
        """The champion before the last move."""
        return self._model.aliases().get(PREVIOUS)

    def history(self) -> list[Move]:
        """Every move of the champion, oldest first."""
        return moves(self._model.tags())

    def promote(
        self, version: int, *, cache: Path, smoke: Smoke, reason: str = "", by: str = ""
    ) -> dict[str, int | None]:
        """Makes `version` the champion, tests it, and restores the old champion if it fails.

        The decision about a version that no gate promoted becomes `manual`. A promoted version is no longer marked as
        rolled back. Promoting the champion changes nothing.

        Args:
            cache: folder of fetched models.
            smoke: gets the fetched model file and the recipe, and raises if they do not answer as they should.

        Returns:
            The new {"champion", "previous"}.

        Raises:
            InputError: there is no such version.
            PromotionFailed: the smoke test failed; the old champion was restored.
        """
        self.recover()
        tags = self._versions.tags(version)
        if self.version() != version:
            self._move("promote", version, cache, smoke, reason, by)
            if tags.get("sora.decision") != "promoted":
                self._versions.set_decision(version, "manual", [reason] if reason else [])
            if "sora.rolled_back" in tags:
                self._versions.untag(version, "sora.rolled_back")
        return self._who()

    def rollback(
        self, to: int | None = None, *, cache: Path, smoke: Smoke, reason: str = "", by: str = ""
    ) -> dict[str, int | None]:
        """Returns to the previous champion, or to an earlier one. A second rollback goes further back.

        Raises:
            InputError: there is no such version.
            PromotionFailed: nothing to go back to, `to` was not champion before, or the smoke test failed.
        """
        self.recover()
        if to is not None:
            self._versions.described(to)
        champions = self._line()
        there = self._versions.numbers()
        earlier = [version for version in champions[:-1] if version in there and version != champions[-1]]
        if not earlier:
            raise PromotionFailed("there is no earlier champion to go back to", fix="`sora models` lists all versions")
        if to is not None and to not in earlier:
            raise PromotionFailed(
                f"version {to} was not champion before version {champions[-1]}; these were: {earlier}",
                fix=f"`sora promote {to}` makes it champion anyway",
            )
        self._move("rollback", earlier[-1] if to is None else to, cache, smoke, reason, by)
        return self._who()

    def recover(self) -> bool:
        """Finishes a move that a crash interrupted: completes it if the history has it, else restores the old champion.

        `promote` and `rollback` do this first. True if there was something to do.
        """
        tags = self._model.tags()
        if _MOVING not in tags:
            return False
        moving = json.loads(tags[_MOVING])
        move = Move(**moving["move"])
        if move.key in tags:
            self._complete(move, moving["passed"])
        else:
            self._restore(move.left, moving["previous"])
        return True

    def _move(
        self, kind: Literal["promote", "rollback"], version: int, cache: Path, smoke: Smoke, why: str, by: str
    ) -> None:
        # What to restore is stored first; the history entry comes after the smoke test. From the two,
        # `recover` can tell a complete move from an incomplete one.
        file, recipe = self._versions.fetch(version, cache)
        aliases, known, champions = self._model.aliases(), self.history(), self._line()
        left, previous = aliases.get(CHAMPION), aliases.get(PREVIOUS)
        passed: list[int] = []
        if kind == "rollback":
            back = max(place for place, champion in enumerate(champions[:-1]) if champion == version)
            passed = sorted(set(champions[back + 1 :]) - {version})
        move = Move(
            seq=known[-1].seq + 1 if known else 1,
            kind=kind,
            version=version,
            left=left,
            at=iso_now(),
            by=by or f"{user()}@{socket.gethostname()}",
            why=why[:2000],
        )
        self._model.tag(_MOVING, json.dumps({"move": asdict(move), "previous": previous, "passed": passed}))
        try:
            self._model.set_alias(CHAMPION, version)
            smoke(file, recipe)
        except BaseException as error:
            self._restore(left, previous)
            if not isinstance(error, Exception):
                raise
            now = f"version {left} is champion again" if left else "there is no champion"
            raise PromotionFailed(
                f"version {version} failed its smoke test, {now}: {error}",
                fix="look at the version in MLflow; `sora models` lists the others",
            ) from error
        self._model.tag(move.key, move.to_json())
        self._complete(move, passed)

    def _complete(self, move: Move, passed: list[int]) -> None:
        if move.left is not None:
            self._model.set_alias(PREVIOUS, move.left)
        for version in passed:
            self._versions.tag(version, "sora.rolled_back", move.at)
            self._versions.set_decision(version, "rolled_back", [move.why or f"rolled back to version {move.version}"])
        self._model.untag(_MOVING)

    def _restore(self, champion: int | None, previous: int | None) -> None:
        self._model.set_alias(CHAMPION, champion)
        self._model.set_alias(PREVIOUS, previous)
        self._model.untag(_MOVING)

    def _line(self) -> list[int]:
        """Champions that a rollback can return to; the last is the champion, even if it was set by hand."""
        champions, champion = line(self.history()), self.version()
        return champions if champion is None or champions[-1:] == [champion] else [*champions, champion]

    def _who(self) -> dict[str, int | None]:
        aliases = self._model.aliases()
        return {CHAMPION: aliases.get(CHAMPION), PREVIOUS: aliases.get(PREVIOUS)}
