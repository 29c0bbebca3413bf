"""The registry as its callers see it: the runs, versions and champion of one project over one connection to MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sora.config.credentials import Login
from sora.core import ledger
from sora.core.records import EvalReport, ModelVersion, Recipe
from sora.registry.champion import Champion, Smoke
from sora.registry.history import Move
from sora.registry.judged import JudgedRun, JudgedRuns
from sora.registry.model import RegisteredModel
from sora.registry.rest import Rest
from sora.registry.runs import Runs
from sora.registry.versions import ChampionRef, Versions

SEARCHES = "/tune"  # no project's name holds a slash


class Registry:
    """Everything that Sora keeps in MLflow. Cheap to make: no request is sent before the first call.

    `runs` is the experiment. `searches` is another one, for `sora tune`: what looks for judged runs, for the newest run
    or for a history must not find trials. The registry itself has the methods for versions and the champion; each hands
    the call to the part that does it, which has the details.

    Moves of the champion must not overlap: the caller holds a lock of the project around `promote`, `rollback` and
    `recover`.

    Args:
        tracking_uri: http address of the MLflow server.
        name: the name of the experiment and of the registered model.
        login: what the server asks for; default: from the environment or the address.

    Raises (every method):
        ServiceError: MLflow does not answer, or refuses.
    """

    def __init__(self, tracking_uri: str, name: str, login: Login | None = None) -> None:
        self.name = name
        self._rest = Rest(tracking_uri, login)
        self.tracking_uri = self._rest.uri
        self.runs = Runs(self._rest, name)
        self.searches = Runs(self._rest, f"{name}{SEARCHES}")
        self._judged = JudgedRuns(self.runs)
        self._model = RegisteredModel(self._rest, name)
        self._versions = Versions(self._rest, self._model, self.runs)
        self._champion = Champion(self._model, self._versions)

    def close(self) -> None:
        self._rest.close()

    # -- versions: sora/registry/versions.py --

    def register(
        self,
        run_id: str,
        model_file: Path,
        recipe: Recipe,
        reports: EvalReport | Mapping[str, EvalReport],
        data_version: str,
    ) -> int:
        """Registers the model file as a new version; see `Versions.register`."""
        return self._versions.register(run_id, model_file, recipe, reports, data_version)

    def set_decision(self, version: int, decision: str, reasons: Sequence[str]) -> None:
        """Stores what was decided and why; see `Versions.set_decision`."""
        self._versions.set_decision(version, decision, reasons)

    def note_refusal(self, version: int, reason: str) -> None:
        """Stores why a server could not serve the version; see `Versions.note_refusal`."""
        self._versions.note_refusal(version, reason)

    def versions(self) -> list[ModelVersion]:
        """Every version, the newest first."""
        return self._versions.all()

    def get(self, version: int) -> ModelVersion:
        """One version; see `Versions.get`."""
        return self._versions.get(version)

    def fetch(self, version: int, cache: Path) -> tuple[Path, Recipe]:
        """The verified model file and recipe of a version; see `Versions.fetch`."""
        return self._versions.fetch(version, cache)

    def digests(self) -> dict[int, str]:
        """Version → sha256 of its model file, by which caches name it."""
        return self._versions.digests()

    def delete_version(self, version: int) -> None:
        """Removes a version from MLflow's lists; see `Versions.delete`."""
        self._versions.delete(version)

    def was_rolled_back(self, version: int) -> bool:
        """Whether these bytes were rolled back and not promoted since; see `Versions.was_rolled_back`."""
        return self._versions.was_rolled_back(version)

    def restore_state(self, version: int) -> dict[str, Any]:
        """What `Runs.log_state` stored with a version's run.

        Raises:
            InputError: no such version, or its run has none.
        """
        return self.runs.run_state(self._versions.run_of(version))

    # -- the champion: sora/registry/champion.py --

    def champion(self) -> int | None:
        """The version that is served, or None before the first promotion."""
        return self._champion.version()

    def previous(self) -> int | None:
        """The champion before the last move."""
        return self._champion.previous()

    def champion_ref(self) -> ChampionRef | None:
        """The champion and what a server says about it, in one request."""
        return self._versions.champion_ref()

    def history(self) -> list[Move]:
        """Every move of the champion, oldest first."""
        return self._champion.history()

    def promote(
        self, version: int, *, cache: Path, smoke: Smoke, reason: str = "", by: str = ""
    ) -> dict[str, int | None]:
        """Makes `version` the champion if it passes `smoke`; see `Champion.promote`."""
        return self._champion.promote(version, cache=cache, smoke=smoke, reason=reason, by=by)

    def rollback(
        self, to: int | None = None, *, cache: Path, smoke: Smoke, reason: str = "", by: str = ""
    ) -> dict[str, int | None]:
        """Makes an earlier champion the champion again; see `Champion.rollback`."""
        return self._champion.rollback(to, cache=cache, smoke=smoke, reason=reason, by=by)

    def recover(self) -> bool:
        """Finishes a move that a crash interrupted; see `Champion.recover`."""
        return self._champion.recover()

    # -- judged runs: sora/registry/judged.py --

    def last_judged(self) -> JudgedRun | None:
        """The last run that was promoted or refused."""
        return self._judged.last()

    def judged_ledger(self) -> ledger.Recorded | None:
        """The split ledger of the last judged run that has a whole one; see `JudgedRuns.ledger`."""
        return self._judged.ledger()

    def version_ledger(self, version: int) -> ledger.Recorded:
        """The split ledger that a version's run stored.

        Raises:
            InputError: there is no such version, or no whole ledger with it.
        """
        return self._judged.ledger_of(self._versions.run_of(version), version)

    def times_judged(self, test_digest: str) -> int:
        """How many runs were judged on the test split with this digest; see `JudgedRuns.times`."""
        return self._judged.times(test_digest)


def champion_over_rest(tracking_uri: str, name: str) -> ChampionRef | None:
    """Which version is champion, and the digest of its file."""
    registry = Registry(tracking_uri, name)
    try:
        return registry.champion_ref()
    finally:
        registry.close()


def fetch_over_rest(tracking_uri: str, name: str, version: int, cache: Path) -> tuple[Path, Recipe]:
    """`Registry.fetch` for one call."""
    registry = Registry(tracking_uri, name)
    try:
        return registry.fetch(version, cache)
    finally:
        registry.close()
