"""What people do with versions between two nightlies: list, promote, roll back, reproduce, predict, clean up, back up.

Each function starts its own MLflow server if none is up, and ends it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora.config import Project, parse
from sora.config.credentials import private_state
from sora.core.errors import AnswerIsNo, InputError, ServiceError
from sora.core.files import temporary_folder
from sora.core.progress import say
from sora.core.records import ModelVersion, Recipe

if TYPE_CHECKING:
    from sora.core.progress import Bar
    from sora.dataset.ledger import Restored
    from sora.operations.backup import Made
    from sora.registry import Registry

# Metrics that a second evaluation on the same machine must repeat, and how closely.
REPEATED = ("test/accuracy", "test/macro_f1", "test/log_loss", "test/ece")
TOLERANCE = 1e-3


@contextmanager
def open_registry(project: Project) -> Iterator[Registry]:
    """The project's registry; if no MLflow server is up, one runs for the length of the block."""
    from sora.operations.servers import login, servers
    from sora.registry import Registry

    settings = project.settings()
    with servers(project, prefect=False) as addresses:
        yield Registry(str(addresses.mlflow_tracking_uri), settings.name, login(project, "mlflow"))


@contextmanager
def alias_lock(project: Project) -> Iterator[None]:
    """A lock: moves of the champion by the nightly and by hand must not overlap."""
    from filelock import FileLock, Timeout

    private_state(project)
    try:
        with FileLock(project.alias_lock, timeout=60):
            yield
    except Timeout as error:
        raise ServiceError("another promotion or rollback has been running for a minute", fix="try again") from error


def model_cache(project: Project) -> Path:
    return project.cache.models


def models(project: Project) -> list[ModelVersion]:
    """Every registered version, newest first."""
    with open_registry(project) as registry:
        return registry.versions()


def promote(project: Project, version: int) -> dict[str, Any]:
    """Makes `version` the champion. Returns {"champion", "previous"}.

    Raises:
        InputError: there is no such version.
        PromotionFailed: its smoke prediction failed; the old champion is still served.
    """
    from sora.runtime.predictor import Smoke

    with alias_lock(project), Smoke() as smoke, open_registry(project) as registry:
        candidate = registry.get(version)
        if candidate.decision == "refused":
            say(f"version {version} was refused ({'; '.join(candidate.reasons)}); you make it the champion anyway")
        return registry.promote(version, cache=model_cache(project), smoke=smoke, reason="by hand")


def rollback(project: Project, to: int | None = None) -> dict[str, Any]:
    """Makes the champion before this one (or `to`) the champion again. Returns {"champion", "previous"}.

    Raises:
        PromotionFailed: nothing to go back to, or the smoke prediction failed.
    """
    from sora.runtime.predictor import Smoke

    with alias_lock(project), Smoke() as smoke, open_registry(project) as registry:
        return registry.rollback(to, cache=model_cache(project), smoke=smoke)


def champion(project: Project, registry: Registry) -> tuple[int, Path, Recipe]:
    """The champion's version, its model file in the cache, and its recipe.

    Raises:
        InputError: there is no champion yet.
    """
    version = registry.champion()
    if version is None:
        raise InputError("there is no champion yet", fix="`sora run` trains and promotes the first model")
    return version, *registry.fetch(version, model_cache(project))


def predict(project: Project, files: list[Path]) -> list[dict[str, Any]]:
    """The champion's answers: {"path", "label", "probabilities", "version"} or {"path", "error"} per file, in order.

    Raises:
        InputError: there is no champion yet.
    """
    from sora.runtime.predictor import predict_files

    with open_registry(project) as registry:
        version, file, recipe = champion(project, registry)
    return predict_files(files, file, recipe, version, project.settings().serve)


def reproduce(project: Project, version: int) -> dict[str, Any]:
    """Restores the data, parameters and splits of `version` outside the project, evaluates it again and compares.

    Nothing in the project's own folder changes. Returns {"version", "matches", "metrics", "recorded", "notes"}.
    """
    from sora.dataset import versioning
    from sora.judging import evaluation

    with open_registry(project) as registry:
        recorded_version = registry.get(version)
        state = registry.restore_state(version)
        file, recipe = registry.fetch(version, model_cache(project))
    with temporary_folder("reproduce") as folder:
        restored = versioning.restore(project, state, folder / "project")
        settings = parse(restored.params_file.read_text(encoding="utf-8"))
        job = evaluation.EvalJob(
            shards=str(restored.shards),
            table=str(_table(restored, folder / "table.parquet")),
            models=[evaluation.EvalModel("version", str(file), recipe)],
            classes=list(settings.classes),
            data=str(restored.data),
            bounds=settings.validate_.model_dump(),
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
        "notes": versioning.code_notes(project, state),
    }


def _table(project: Project, target: Path) -> Path:
    from sora.dataset import manifest, splits, table
    from sora.dataset.quality import quarantine

    rows = manifest.read(project.manifest)
    rejected = quarantine.rejected_paths(project)
    table.join(rows, rejected, splits.read(project.splits_file)).to_parquet(target, index=False)
    return target


def restore_splits(project: Project, version: int | None = None) -> Restored:
    """Brings back the rows of the split ledger that `version` (default: the last judged run) recorded.

    Raises:
        InputError: there is no such version, or it has no whole ledger.
        AnswerIsNo: nothing has been judged yet, so there is nothing to restore.
        RunActive: a run is active.
    """
    from sora.dataset import ledger
    from sora.operations.lock import run_lock

    with run_lock(project), open_registry(project) as registry:
        recorded = registry.version_ledger(version) if version is not None else registry.judged_ledger()
        recorded = recorded or ledger.remembered(project)
        if recorded is None:
            raise AnswerIsNo(
                "no judged run holds a copy of splits.csv", fix="`git checkout splits.csv`, or `sora restore` a backup"
            )
        return ledger.restore(project.splits_file, recorded, copies=project.splits_copies)


def gc(project: Project, *, keep: int, dry_run: bool) -> dict[str, Any]:
    """What no served or recent version needs. Returns {"items": [{"what", "bytes", "why"}], "bytes"}."""
    from sora.operations import gc as collecting

    return collecting.collect(project, lambda: open_registry(project), keep=keep, dry_run=dry_run)


def backup(
    project: Project, target: Path, *, keep: int | None = None, data: bool = True, progress: Bar | None = None
) -> Made:
    """Writes the whole project into the new file `target`; raises what `sora.operations.backup.backup` does."""
    from sora.operations import backup as backups
    from sora.operations.needed import KEEP

    backups.check_target(project, target)  # before a server starts
    with open_registry(project) as registry:
        return backups.backup(
            project, registry, target, keep=KEEP if keep is None else keep, data=data, progress=progress
        )
