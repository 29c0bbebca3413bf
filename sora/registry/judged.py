"""Judged runs: the last one, the split ledger that it stored, and how often a test split was used to judge."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from sora.core.errors import InputError
from sora.core.ledger import Recorded, parse
from sora.registry.rest import NotFound
from sora.registry.runs import Runs, own_tags

_JUDGED = "tags.`sora.judged` = 'true'"
_LEDGERS = 20  # most judged runs whose stored ledger is tried


@dataclass(frozen=True, slots=True)
class JudgedRun:
    """A run whose version was promoted or refused."""

    run_id: str
    version: int | None
    metrics: Mapping[str, float] = field(default_factory=dict)  # of the test split: "test/<metric>"
    tags: Mapping[str, str] = field(default_factory=dict)  # Sora's own, without "sora."

    @property
    def data_version(self) -> str:
        return self.tags.get("data_version", "")

    @property
    def decision(self) -> str:
        return self.tags.get("decision", "")


class JudgedRuns:
    """The judged runs among all runs."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs

    def last(self) -> JudgedRun | None:
        """The last run that was promoted or refused."""
        for run in self._runs.search_runs(_JUDGED, limit=1):
            tags = own_tags(run)
            metrics = {
                item["key"]: float(item["value"])
                for item in run["data"].get("metrics", [])
                if item["key"].startswith("test/")
            }
            return JudgedRun(str(run["info"]["run_id"]), _number(tags.get("version")), metrics, tags)
        return None

    def times(self, test_digest: str) -> int:
        """How many runs were judged on the test split with this digest (their tag `test_digest`).

        Raises:
            InputError: it is not a digest; it would become part of a query.
        """
        if not test_digest.isalnum():
            raise InputError(f"{test_digest!r} is not a digest", fix="pass the result of table.digest")
        wanted = f"{_JUDGED} AND tags.`sora.test_digest` = '{test_digest}'"
        return sum(1 for _ in self._runs.search_runs(wanted))

    def ledger(self) -> Recorded | None:
        """The split ledger that the last judged run stored: the newest whole one of the last few runs."""
        for run in self._runs.search_runs(_JUDGED, limit=_LEDGERS):
            with suppress(InputError, NotFound):
                return self.ledger_of(str(run["info"]["run_id"]), _number(own_tags(run).get("version")))
        return None

    def ledger_of(self, run_id: str, version: int | None) -> Recorded:
        """The split ledger that a run stored.

        Raises:
            InputError: the run has no whole ledger.
        """
        text = self._runs.run_state(run_id, only="splits.csv").get("splits.csv")
        if text is None:
            raise InputError(f"run {run_id} has no stored splits.csv", fix="choose another version: --from VERSION")
        return Recorded(run_id, version, tuple(parse(text.encode(), f"splits.csv of run {run_id}")))


def _number(tag: str | None) -> int | None:
    return int(tag) if tag else None
