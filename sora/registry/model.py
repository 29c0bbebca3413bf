"""The registered model itself: its aliases and its tags. Its versions are in `versions`."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from sora.registry.rest import AlreadyExists, NotFound, Rest
from sora.registry.runs import tags_of

CHAMPION = "champion"
PREVIOUS = "previous"


class RegisteredModel:
    """The registered model `name`, which is created with its first version."""

    def __init__(self, rest: Rest, name: str) -> None:
        self.name = name
        self._rest = rest

    def create(self) -> None:
        """Creates the model if there is none."""
        with suppress(AlreadyExists):
            self._rest.post("registered-models/create", {"name": self.name})

    def aliases(self) -> dict[str, int]:
        """Alias → version."""
        return {item["alias"]: int(item["version"]) for item in self._described().get("aliases", [])}

    def set_alias(self, alias: str, version: int | None) -> None:
        """Moves the alias; None removes it."""
        if version is None:
            with suppress(NotFound):
                self._rest.delete("registered-models/alias", {"name": self.name, "alias": alias})
        else:
            body = {"name": self.name, "alias": alias, "version": str(version)}
            self._rest.post("registered-models/alias", body)

    def tags(self) -> dict[str, str]:
        return tags_of(self._described())

    def tag(self, key: str, value: str) -> None:
        self._rest.post("registered-models/set-tag", {"name": self.name, "key": key, "value": value})

    def untag(self, key: str) -> None:
        self._rest.delete("registered-models/delete-tag", {"name": self.name, "key": key})

    def _described(self) -> dict[str, Any]:
        try:
            return dict(self._rest.get("registered-models/get", name=self.name)["registered_model"])
        except NotFound:
            return {}
