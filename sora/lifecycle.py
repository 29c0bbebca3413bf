"""What people do with versions between two nightlies: list, promote, roll back, reproduce, ask, clean up.

Each function starts an MLflow server of its own where none is up and ends it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora.errors import InputError, ServiceError
from sora.files import temporary_folder
from sora.progress import say
from sora.records import ModelVersion, Recipe
from sora.settings import Project, parse

if TYPE_CHECKING:
    from sora.registry import Registry

# Metrics that a second evaluation on the same machine must repeat, and how closely.
REPEATED = ("test/accuracy", "test/macro_f1", "test/log_loss", "test/ece")
TOLERANCE = 1e-3


@contextmanager
def open_registry(project: Project) -> Iterator[Registry]:
    """The project's registry, on an MLflow server that lives as long as the block where none is up."""
    from sora.registry import Registry
    from sora.services import servers

    settings = project.settings()
    with servers(project, prefect=False) as addresses:
        yield Registry(str(addresses.mlflow_tracking_uri), settings.name)


@contextmanager
def alias_lock(project: Project) -> Iterator[None]:
    """Moves of the champion must not cross: the nightly's and those by hand."""
    from filelock import FileLock, Timeout

    project.state.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(project.state / "alias.lock", timeout=60):
            yield
    except Timeout as error:
        raise ServiceError("another promotion or rollback has been going on for a minute", mend="try again") from error


def model_cache(project: Project) -> Path:
    return project.state / "cache" / "models"


def models(project: Project) -> list[ModelVersion]:
    """Every registered version, newest first."""
    with open_registry(project) as registry:
        return registry.versions()


def promote(project: Project, version: int) -> dict[str, Any]:
    """Makes `version` the champion. Returns {"champion", "previous"}.

    Raises:
        InputError: there is no such version.
        PromotionFailed: its smoke prediction failed; the old champion serves on.
    """
    from sora.serving.predictor import Smoke

    with alias_lock(project), Smoke() as smoke, open_registry(project) as registry:
        found = registry.get(version)
        if found.decision == "refused":
            say(f"version {version} was refused ({'; '.join(found.reasons)}); you make it the champion all the same")
        return registry.promote(version, cache=model_cache(project), smoke=smoke, reason="by hand")


def rollback(project: Project, to: int | None = None) -> dict[str, Any]:
    """Makes the champion before this one (or `to`) the champion again. Returns {"champion", "previous"}.

    Raises:
        PromotionFailed: nothing to go back to, or the smoke prediction failed.
    """
    from sora.serving.predictor import Smoke

    with alias_lock(project), Smoke() as smoke, open_registry(project) as registry:
        return registry.rollback(to, cache=model_cache(project), smoke=smoke)


def champion(project: Project, registry: Registry) -> tuple[int, Path, Recipe]:
    """The champion's version, its model file in the cache, and its recipe.

    Raises:
        InputError: there is no champion yet.
    """
    version = registry.champion()
    if version is None:
        raise InputError("there is no champion yet", mend="`sora run` trains and promotes the first model")
    return version, *registry.fetch(version, model_cache(project))


def predict(project: Project, files: list[Path]) -> list[dict[str, Any]]:
    """The champion's answers: {"path", "label", "probabilities", "version"} or {"path", "error"} a file, in order.

    Raises:
        InputError: there is no champion yet.
    """
    from sora.serving.predictor import predict_files

    with open_registry(project) as registry:
        version, file, recipe = champion(project, registry)
    return predict_files(files, file, recipe, version, project.settings().serve)


def reproduce(project: Project, version: int) -> dict[str, Any]:
    """Restores the data, parameters and splits of `version` beside the project, evaluates it again and compares.

    Nothing in the project's own folder changes. Returns {"version", "matches", "metrics", "recorded", "notes"}.
    """
    from sora import evaluation
    from sora.data import version as data

    with open_registry(project) as registry:
        recorded_version = registry.get(version)
        state = registry.restore_state(version)
        file, recipe = registry.fetch(version, model_cache(project))
    with temporary_folder("reproduce") as folder:
        restored = data.restore(project, state, folder / "project")
        settings = parse(restored.params_file.read_text(encoding="utf-8"))
        job = evaluation.EvalJob(
            shards=str(restored.shards),
            table=str(_table(restored, folder / "table.parquet")),
            models=[{"name": "version", "file": str(file), "recipe": recipe.to_dict()}],
            classes=list(settings.classes),
            data=str(restored.data),
            out=str(folder / "evaluation"),
        )
        outcome = evaluation.run(job, lambda event: None)
    metrics = {f"test/{n}": v for n, v in outcome["version"].reports["test"].metrics.items()}
    recorded = {name: recorded_version.metrics[name] for name in REPEATED if name in recorded_version.metrics}
    matches = bool(recorded) and all(abs(metrics[name] - value) <= TOLERANCE for name, value in recorded.items())
    return {
        "version": version,
        "matches": matches,
        "metrics": {name: metrics[name] for name in REPEATED if name in metrics},
        "recorded": recorded,
        "notes": data.code_notes(project, state),
    }


def _table(project: Project, target: Path) -> Path:
    import json

    from sora.data import manifest, splits, table

    rows = manifest.read(project.manifest)
    rejected = {item["path"] for item in json.loads(project.quarantine.read_text(encoding="utf-8"))}
    table.join(rows, rejected, splits.read(project.splits_file)).to_parquet(target, index=False)
    return target


def gc(project: Project, *, keep: int, dry_run: bool) -> dict[str, Any]:
    """What no served or recent version needs. Returns {"items": [{"what", "bytes", "why"}], "bytes"}."""
    from sora import gc as collecting

    with open_registry(project) as registry:
        return collecting.collect(project, registry, keep=keep, dry_run=dry_run)
