"""Where the champion comes from: a port, and its two adapters.

`ModelCache` is a folder, complete in itself: what was served last can be served again without any server. It is also
the cache that `RegistrySource` fills from MLflow's REST interface (no MLflow import: five seconds before ready).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sora.errors import InputError, ServiceError
from sora.records import Recipe


@dataclass(frozen=True, slots=True)
class Champion:
    """Which version is to be served. `digest` is the sha256 of its model file."""

    version: int
    digest: str
    data_version: str = ""
    run_id: str = ""
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[int, str]:
        return self.version, self.digest


class ModelSource(Protocol):
    """The port. Both calls block; the follower makes them off the event loop."""

    def champion(self) -> Champion | None:
        """The version that the alias names, or None if it names none.

        Raises:
            ServiceError: it can't be told now.
        """

    def fetch(self, champion: Champion) -> tuple[Path, Recipe]:
        """The model file and its recipe, complete on this machine.

        Raises:
            ServiceError: not to be had now; a later call may work.
        """


class ModelCache:
    """`<folder>/models/<digest>/{model.keras, recipe.json}` and `<folder>/champion.json`, the last one that served well.

    A `ModelSource` of its own: the one that is left when the registry is down.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def champion(self) -> Champion | None:
        try:
            value = json.loads((self.folder / "champion.json").read_text(encoding="utf-8"))
            return Champion(**value)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise ServiceError(f"{self.folder / 'champion.json'} can't be read: {error}", mend="remove it") from error

    def fetch(self, champion: Champion) -> tuple[Path, Recipe]:
        folder = self.model_folder(champion.digest)
        try:
            recipe = Recipe.from_dict(json.loads((folder / "recipe.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ServiceError(
                f"version {champion.version} is not in the cache {self.folder}", mend="start MLflow (`sora up`)"
            ) from error
        return folder / "model.keras", recipe

    def remember(self, champion: Champion) -> None:
        """Makes `champion` the one that a restart without a registry serves."""
        write_json(self.folder / "champion.json", asdict(champion))

    def model_folder(self, digest: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ServiceError(f"the registry gave {digest[:80]!r} as a digest", mend="register the version again")
        return self.folder / "models" / digest


def write_json(path: Path, value: Any) -> None:
    """Atomic: readers see the old text or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump(value, stream, indent=2)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
