"""Registered models: versions with their recipes, the decisions about them, and verified files."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from sora.core.errors import AnswerIsNo, DiskFull, InputError, ServiceError
from sora.core.files import temporary_folder
from sora.core.records import EvalReport, ModelVersion, Recipe
from sora.registry import folder
from sora.registry.model import CHAMPION, RegisteredModel
from sora.registry.rest import NotFound, Rest
from sora.registry.runs import Runs, tags_of

JUDGED = ("promoted", "refused")
REFUSED_BY_SERVER = "serving/refused"  # tag of a version
_REASON_CHARS = 2000  # a tag holds 5000
_NOTE_SECONDS = 5.0
_LARGEST = 2**31 - 1  # the largest version number that MLflow's database column holds


@dataclass(frozen=True, slots=True)
class ChampionRef:
    """Which version is champion, and the sha256 of its model file."""

    version: int
    digest: str
    data_version: str = ""
    run_id: str = ""
    metrics: dict[str, float] = field(default_factory=dict)


class Versions:
    """The versions of one registered model.

    Args:
        runs: the experiment whose runs the versions come from.
    """

    def __init__(self, rest: Rest, model: RegisteredModel, runs: Runs) -> None:
        self.name = model.name
        self._rest = rest
        self._model = model
        self._runs = runs

    def register(
        self,
        run_id: str,
        model_file: Path,
        recipe: Recipe,
        reports: EvalReport | Mapping[str, EvalReport],
        data_version: str,
    ) -> int:
        """Stores the model with its recipe and registers it as a new version, whose decision is `pending`.

        Called again for the same run and the same bytes, it returns the existing version.

        Args:
            model_file: a `.keras` file.
            recipe: `model_sha256` may be empty; it is filled in.
            reports: on one or more splits; their metrics are kept with the version as `<split>/<metric>`.

        Raises:
            InputError: the recipe names another model file's digest.
        """
        digest = folder.digest(model_file)
        if recipe.model_sha256 not in ("", digest):
            raise InputError(
                f"the recipe is for a model with sha256 {recipe.model_sha256}, but {model_file} has {digest}",
                fix="evaluate this model file, and register it with that recipe",
            )
        recipe = replace(recipe, model_sha256=digest)
        for there in self._search(f"run_id='{run_id}'"):
            if tags_of(there).get("sora.model_sha256") == digest:
                return int(there["version"])
        model_id = self._log_model(run_id, model_file, recipe)
        self._model.create()
        tags = {
            "sora.model_sha256": digest,
            "sora.recipe_sha256": sha256(folder.recipe_bytes(recipe)).hexdigest(),
            "sora.data_version": data_version,
            "sora.metrics": json.dumps(_metrics(reports)),
            "sora.decision": "pending",
        }
        body = {
            "name": self.name,
            "source": f"models:/{model_id}",
            "model_id": model_id,
            "run_id": run_id,
            "tags": [{"key": key, "value": value} for key, value in tags.items()],
        }
        version = int(self._rest.post("model-versions/create", body)["model_version"]["version"])
        self._runs.set_tags(run_id, {"version": str(version)})
        return version

    def set_decision(self, version: int, decision: str, reasons: Sequence[str]) -> None:
        """Stores what was decided and why. A run whose version was promoted or refused counts as judged."""
        run_id = self.described(version).get("run_id")
        values = {
            "sora.decision": decision,
            "sora.reasons": json.dumps(list(reasons), ensure_ascii=False),
            "sora.decided": iso_now(),
        }
        for key, value in values.items():
            self.tag(version, key, value)
        if decision in JUDGED and run_id:
            self._runs.set_tags(run_id, {"decision": decision, "judged": "true"})

    def note_refusal(self, version: int, reason: str) -> None:
        """Records with the version that a server could not serve it, and why. `all` and `get` show it as the last
        reason.

        One short request is sent, since a server calls this while it answers its own.

        Raises:
            ServiceError: MLflow does not accept it.
        """
        self.tag(version, REFUSED_BY_SERVER, reason[:_REASON_CHARS], timeout=_NOTE_SECONDS)

    def all(self) -> list[ModelVersion]:
        """Every version, the newest first."""
        aliases = self._model.aliases()
        every = [_model_version(item, aliases) for item in self._search()]
        return sorted(every, key=lambda item: item.version, reverse=True)

    def get(self, version: int) -> ModelVersion:
        """One version.

        Raises:
            InputError: there is no such version.
        """
        return _model_version(self.described(version), self._model.aliases())

    def champion_ref(self) -> ChampionRef | None:
        """The champion and what a server says about it, in one request."""
        try:
            champion = self._rest.get("registered-models/alias", name=self.name, alias=CHAMPION)["model_version"]
        except NotFound:
            return None
        except ServiceError as error:
            if "alias" in error.message and "not found" in error.message:  # for MLflow an invalid parameter, not a 404
                return None
            raise
        tags = tags_of(champion)
        return ChampionRef(
            version=int(champion["version"]),
            digest=tags.get("sora.model_sha256", ""),
            data_version=tags.get("sora.data_version", ""),
            run_id=str(champion.get("run_id", "")),
            metrics=json.loads(tags.get("sora.metrics", "{}")),
        )

    def fetch(self, version: int, cache: Path) -> tuple[Path, Recipe]:
        """The model file and the recipe of a version, kept as `cache/<sha256>/model.keras` and `…/recipe.json`.

        Both are verified against the digests that the version was registered with, even in the cache. A file
        appears in the cache whole or not at all, and is replaced only by one with the right digest.

        Raises:
            InputError: there is no such version.
            ServiceError: what MLflow holds is not what was registered.
            DiskFull: no room in the cache.
        """
        tags = self.tags(version)
        wanted, wanted_recipe = tags.get("sora.model_sha256", ""), tags.get("sora.recipe_sha256", "")
        if not _is_digest(wanted) or not _is_digest(wanted_recipe):
            raise ServiceError(
                f"version {version} of {self.name} has no recorded digest: Sora did not register it",
                fix="choose a version that `sora models` lists with a data version",
            )
        file, recipe_file = cache / wanted / "model.keras", cache / wanted / folder.RECIPE_FILE
        missing = [
            (name, target, digest)
            for name, target, digest in (
                (folder.RECIPE_FILE, recipe_file, wanted_recipe),
                (folder.MODEL_FILE, file, wanted),
            )
            if not (target.is_file() and folder.digest(target) == digest)
        ]
        if missing:
            where = self._rest.get("model-versions/get-download-uri", name=self.name, version=str(version))
            for name, target, digest in missing:
                self._download(str(where["artifact_uri"]), name, target, digest, version)
        recipe = Recipe.from_dict(json.loads(recipe_file.read_bytes()))
        if recipe.model_sha256 != wanted:
            raise ServiceError(
                f"the recipe of version {version} belongs to another model", fix="`sora promote` another version"
            )
        return file, recipe

    def digests(self) -> dict[int, str]:
        """Version → sha256 of its model file, by which caches name it."""
        return {int(item["version"]): tags_of(item).get("sora.model_sha256", "") for item in self._search()}

    def numbers(self) -> set[int]:
        """The numbers of the existing versions."""
        return {int(item["version"]) for item in self._search()}

    def run_of(self, version: int) -> str:
        """The id of the run that made a version; "" if MLflow knows none.

        Raises:
            InputError: there is no such version.
        """
        return str(self.described(version).get("run_id", ""))

    def delete(self, version: int) -> None:
        """Removes a version, its model and its run from MLflow's lists (`mlflow gc` then frees the disk).

        Raises:
            AnswerIsNo: it is the champion or the previous one.
        """
        item = self.described(version)
        if version in self._model.aliases().values():
            raise AnswerIsNo(f"version {version} is champion or previous", fix="promote another one first")
        self._rest.delete("model-versions/delete", {"name": self.name, "version": str(version)})
        if str(item.get("source", "")).startswith("models:/"):
            self._rest.delete(f"logged-models/{item['source'].removeprefix('models:/')}", {})
        if item.get("run_id"):
            self._rest.post("runs/delete", {"run_id": item["run_id"]})

    def was_rolled_back(self, version: int) -> bool:
        """Whether this version, or another with the same bytes, was rolled back and not promoted since."""
        wanted = self.tags(version).get("sora.model_sha256")
        every = (tags_of(item) for item in self._search())
        return any("sora.rolled_back" in tags and tags.get("sora.model_sha256") == wanted for tags in every)

    def described(self, version: int) -> dict[str, Any]:
        """A version as MLflow describes it.

        Raises:
            InputError: there is no such version.
        """
        unknown = InputError(f"there is no version {version} of {self.name}", fix="`sora models` lists the versions")
        if not 0 < version <= _LARGEST:
            raise unknown
        try:
            return dict(self._rest.get("model-versions/get", name=self.name, version=str(version))["model_version"])
        except NotFound as error:
            raise unknown from error

    def tags(self, version: int) -> dict[str, str]:
        """The tags of a version; raises as `described`."""
        return tags_of(self.described(version))

    def tag(self, version: int, key: str, value: str, *, timeout: float | None = None) -> None:
        body = {"name": self.name, "version": str(version), "key": key, "value": value}
        self._rest.post("model-versions/set-tag", body, timeout=timeout)

    def untag(self, version: int, key: str) -> None:
        self._rest.delete("model-versions/delete-tag", {"name": self.name, "version": str(version), "key": key})

    # -- MLflow's words for it --

    def _log_model(self, run_id: str, model_file: Path, recipe: Recipe) -> str:
        body = {
            "experiment_id": self._runs.experiment_id(),
            "name": "model",
            "source_run_id": run_id,
            "model_type": "keras",
            "tags": [{"key": "sora.model_sha256", "value": recipe.model_sha256}],
        }
        info = self._rest.post("logged-models", body)["model"]["info"]
        model_id, root = str(info["model_id"]), str(info["artifact_uri"])
        with temporary_folder("model") as temporary:
            written = temporary / "model"
            folder.write(written, model_file, recipe, model_id=model_id, run_id=run_id)
            for file in sorted(written.rglob("*")):
                if file.is_file():
                    self._rest.upload(root, file.relative_to(written).as_posix(), file)
        self._rest.upload(root, folder.MODEL_FILE, model_file)
        self._rest.patch(f"logged-models/{model_id}", {"model_id": model_id, "status": "LOGGED_MODEL_READY"})
        self._rest.post("runs/outputs", {"run_id": run_id, "models": [{"model_id": model_id, "step": 0}]})
        return model_id

    def _download(self, root: str, name: str, target: Path, wanted: str, version: int) -> None:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            kind = DiskFull if error.errno == errno.ENOSPC else ServiceError
            fix = "make room (`sora gc --dry-run`), or make the folder writable"
            raise kind(f"can't make {target.parent}: {error}", fix=fix) from error
        part = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}.part")
        try:
            arrived = self._rest.download(root, name, part)
            if arrived != wanted:
                raise ServiceError(
                    f"{name} of version {version} has sha256 {arrived}, but {wanted} was registered: it was altered",
                    fix="don't use this version; `sora rollback` or `sora promote` another one",
                )
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)

    def _search(self, more: str = "") -> Iterator[dict[str, Any]]:
        wanted = f"name='{self.name}'" + (f" AND {more}" if more else "")
        query = {"filter": wanted, "max_results": 200}
        return self._rest.pages("GET", "model-versions/search", "model_versions", query)


def iso_now() -> str:
    """ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _is_digest(text: str) -> bool:
    return len(text) == 64 and all(c in "0123456789abcdef" for c in text)


def _metrics(reports: EvalReport | Mapping[str, EvalReport]) -> dict[str, float]:
    several = [reports] if isinstance(reports, EvalReport) else list(reports.values())
    return {f"{report.split}/{name}": float(value) for report in several for name, value in report.metrics.items()}


def _model_version(item: Mapping[str, Any], aliases: Mapping[str, int]) -> ModelVersion:
    tags, number = tags_of(item), int(item["version"])
    refused = [f"a server refused it: {tags[REFUSED_BY_SERVER]}"] if REFUSED_BY_SERVER in tags else []
    created = datetime.fromtimestamp(int(item["creation_timestamp"]) / 1000, UTC)
    return ModelVersion(
        version=number,
        aliases=tuple(sorted(alias for alias, version in aliases.items() if version == number)),
        metrics=json.loads(tags.get("sora.metrics", "{}")),
        data_version=tags.get("sora.data_version", ""),
        created=created.isoformat(timespec="seconds"),
        decision=tags.get("sora.decision", "pending"),
        reasons=(*json.loads(tags.get("sora.reasons", "[]")), *refused),
        run_id=str(item.get("run_id", "")),
    )
