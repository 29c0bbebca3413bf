"""Checks that ask the project's servers, if they run. No server is started."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sora.config import Project
from sora.config.credentials import secret_file
from sora.core.redaction import without_login
from sora.dataset import ledger
from sora.operations import databases
from sora.operations import servers as services
from sora.operations.checks.check import Check

if TYPE_CHECKING:
    from sora.registry import Registry

# Path below the recorded address → its answer shows whether strangers get in.
_ASKED = {"prefect": "/admin/version", "mlflow": "/api/2.0/mlflow/experiments/get?experiment_id=0"}


def prefect(project: Project) -> Check:
    return _server(project, "prefect", project.settings().services.prefect_api_url)


def mlflow(project: Project) -> Check:
    return _server(project, "mlflow", project.settings().services.mlflow_tracking_uri)


def _server(project: Project, name: str, configured: str | None) -> Check:
    running = services.running(project).get(name)
    url = without_login(configured) if configured else (running.url if running else None)
    if url is None:
        return Check(name, True, "not running; `sora run` starts one for itself, `sora up` keeps one")
    import httpx

    who = f"process {running.pid}, by `sora {running.owner}`" if running and not configured else "from params.yaml"
    try:
        status = httpx.get(f"{url.rstrip('/')}/health", timeout=5, trust_env=False).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        fix = f"kill {running.pid}, then sora up" if running and not configured else "start it, or correct `services`"
        return Check(name, False, f"{url} ({who}) does not answer: {error}", fix)
    ok = status < 400
    return Check(name, ok, f"{url} ({who})", "" if ok else f"it answers {status}: see .sora/logs/{name}.log")


def splits(project: Project) -> Check:
    """The ledger against what the last judged run recorded, according to MLflow or else the copy on this machine."""
    with _open_registry(project) as registry:
        recorded = registry.judged_ledger() if registry else ledger.remembered(project)
        known = recorded is not None or _registry_has_runs(project, registry)
    rows = ledger.require(project.splits_file, recorded)
    if rows and not known:
        return Check(
            "splits",
            False,
            f"splits.csv holds the splits of {len(rows)} videos, but the registry is empty: no model was judged on "
            "them",
            "in a new clone: `sora run`; otherwise .sora/ or its mlflow.db was lost: `sora restore` a backup",
        )
    detail = f"{len(rows)} videos" if rows else "none are assigned yet"
    return Check("splits", True, f"{detail}, all that {recorded.name} recorded among them" if recorded else detail)


def _registry_has_runs(project: Project, registry: Registry | None) -> bool:
    if registry is not None:
        return any(True for _ in registry.runs.search_runs(limit=1))
    return databases.file_of(project, "mlflow").exists() or bool(project.settings().services.mlflow_tracking_uri)


def secrets(project: Project) -> Check:
    """Whether only the owner can read `.sora`, and whether the servers ask for a login."""
    import httpx

    for place, wanted in ((project.state, 0o700), (secret_file(project), 0o600)):
        if not place.exists():
            continue
        mode = stat.S_IMODE(place.stat().st_mode)
        if mode & 0o077:
            return Check("secrets", False, f"others may use {place} (mode {mode:o})", f"chmod {wanted:o} {place}")
    asked = []
    for name, entry in sorted(services.running(project).items()):
        if name not in _ASKED:
            continue
        try:
            status = httpx.get(entry.url + _ASKED[name], timeout=5, trust_env=False).status_code
        except httpx.HTTPError:
            continue  # another check reports that it does not answer
        if status not in (401, 403):
            return Check(
                "secrets",
                False,
                f"{name} at {entry.url} answers everybody ({status}): it was started by an older Sora",
                f"end that `sora {entry.owner}` (process {entry.pid}) and start it again",
            )
        asked.append(name)
    servers = f"; {' and '.join(asked)} ask{'s' if len(asked) == 1 else ''} for a login" if asked else ""
    return Check("secrets", True, f"only its owner can read {project.state}{servers}")


def champion(project: Project) -> Check:
    with _open_registry(project) as registry:
        if registry is None:
            return _cached_champion(project)
        champion = registry.champion_ref()
    if champion is None:
        return Check("champion", False, "none yet", "sora run: the first version that passes its gate becomes champion")
    accuracy = champion.metrics.get("test/accuracy")
    shown = "" if accuracy is None else f", test accuracy {accuracy:.3f}"
    return Check("champion", True, f"version {champion.version}, data version {champion.data_version[:12]}{shown}")


@contextmanager
def _open_registry(project: Project) -> Iterator[Registry | None]:
    """The registry if its server is known; no server is started."""
    from sora.registry import Registry

    settings = project.settings()
    running = services.running(project).get("mlflow")
    address = settings.services.mlflow_tracking_uri or (running.url if running else None)
    if address is None:
        yield None
        return
    registry = Registry(address, settings.name, services.login(project, "mlflow"))
    try:
        yield registry
    finally:
        registry.close()


def _cached_champion(project: Project) -> Check:
    """Without a server, the version served last is still known."""
    try:
        kept = json.loads(project.cache.champion.read_text(encoding="utf-8"))
        return Check("champion", True, f"version {kept['version']} was served last (MLflow is not running)")
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing was served yet, or the file is damaged: the database says more
    if project.database("mlflow").exists():
        return Check("champion", True, "not known while MLflow is not running; `sora models` starts it and shows it")
    return Check("champion", False, "none yet: no model was trained", "sora run")
