"""Where the champion comes from, and where refusals are recorded: a port, and its two adapters.

`ModelCache` is a self-contained folder: what was served last can be served again without any server. It is also
the cache that `RegistrySource` fills from MLflow's REST interface (no MLflow import: five seconds before ready).
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from sora.config import CacheFolder
from sora.config.credentials import Login
from sora.core.errors import ServiceError
from sora.core.files import atomic
from sora.core.records import ModelVersion, Recipe
from sora.registry import ChampionRef, Registry


class ModelSource(Protocol):
    """The port. Its calls block; callers make them off the event loop."""

    def champion(self) -> ChampionRef | None:
        """The version that the alias names, or None if it names none.

        Raises:
            ServiceError: it can't be told now.
        """

    def fetch(self, champion: ChampionRef) -> tuple[Path, Recipe]:
        """The model file and its recipe, complete on this machine.

        Raises:
            ServiceError: not available now; a later call may work.
        """

    def refused(self, champion: ChampionRef, reason: str) -> None:
        """Records with the version why a server could not serve it.

        Raises:
            ServiceError: it can't be recorded now.
        """

    def decision(self, champion: ChampionRef) -> ModelVersion | None:
        """What was decided about the version and why; None if this source does not keep it.

        Raises:
            ServiceError: it can't be told now.
        """


class ModelCache:
    """`<folder>/models/<digest>/{model.keras, recipe.json}`, and `<folder>/champion.json`: the last good one.

    Also a `ModelSource`: the one that is left when the registry is down. Several servers may share one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def champion(self) -> ChampionRef | None:
        file = CacheFolder(self.folder).champion
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
            return ChampionRef(**value)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise ServiceError(f"{file} can't be read: {error}", fix="remove it") from error

    def fetch(self, champion: ChampionRef) -> tuple[Path, Recipe]:
        folder = self.model_folder(champion.digest)
        try:
            recipe = Recipe.from_dict(json.loads((folder / "recipe.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ServiceError(
                f"version {champion.version} is not in the cache {self.folder}", fix="start MLflow (`sora up`)"
            ) from error
        return folder / "model.keras", recipe

    def refused(self, champion: ChampionRef, reason: str) -> None:
        """Writes `refused.txt` beside the model."""
        with atomic(self.model_folder(champion.digest) / "refused.txt", shared=True) as file:
            file.write(reason.encode())

    def decision(self, champion: ChampionRef) -> ModelVersion | None:
        return None

    def remember(self, champion: ChampionRef) -> None:
        """Makes `champion` the version that a restart without a registry serves."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic(CacheFolder(self.folder).champion, shared=True) as file:
            file.write(json.dumps(asdict(champion), indent=1).encode())

    @property
    def models(self) -> Path:
        """The folder for `Registry.fetch`."""
        return CacheFolder(self.folder).models

    def model_folder(self, digest: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ServiceError(f"the registry gave {digest[:80]!r} as a digest", fix="register the version again")
        return self.models / digest


class RegistrySource:
    """The champion of a registered model in MLflow; its files are fetched into `cache`.

    Arguments:
        address: the present tracking address; None while no server runs. Called every time, since the project's own
            MLflow comes and goes with `sora run` and `sora up`.
        name: of the registered model.
        login: what that server asks for now.
    """

    def __init__(
        self,
        address: Callable[[], str | None],
        name: str,
        cache: ModelCache,
        login: Callable[[], Login | None] = lambda: None,
    ) -> None:
        self._address = address
        self._login = login
        self._name = name
        self._cache = cache
        self._registry: Registry | None = None
        self._known: tuple[str, Login | None] | None = None
        self._lock = threading.Lock()

    def champion(self) -> ChampionRef | None:
        return self._connected().champion_ref()

    def fetch(self, champion: ChampionRef) -> tuple[Path, Recipe]:
        return self._connected().fetch(champion.version, self._cache.models)

    def refused(self, champion: ChampionRef, reason: str) -> None:
        self._connected().note_refusal(champion.version, reason)

    def decision(self, champion: ChampionRef) -> ModelVersion | None:
        return self._connected().get(champion.version)

    def _connected(self) -> Registry:
        """One client per address: making one costs more than a request."""
        uri = self._address()
        if uri is None:
            raise ServiceError("no MLflow server is running for this project", fix="start one: `sora up`")
        known = (uri, self._login())
        with self._lock:
            if self._registry is None or known != self._known:
                self._registry, self._known = Registry(uri, self._name, known[1]), known
            return self._registry
