"""`sora doctor`: what is installed, reachable and running, and how to fix what is not.

Every check is a function of its own that returns what it found; one that fails in a way nobody thought of is a finding
too, never a crash. Nothing heavy is imported: versions come from the packages' metadata.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora.config import Project
from sora.core import sandbox
from sora.core.errors import SoraError
from sora.core.redaction import without_login
from sora.dataset import ledger
from sora.operations import databases

if TYPE_CHECKING:
    from sora.registry import Registry

_FREE_DISK = 2e9  # bytes
_FREE_MEMORY = 1.5e9  # bytes: TensorFlow and a small model
_DISTRIBUTION = "sora-video"


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    ok: bool
    detail: str
    fix: str = ""


def doctor(project: Project | None) -> dict[str, Any]:
    """Looks at everything. Never raises.

    Args:
        project: None outside of one; what needs a project is then left out.

    Returns:
        {"checks": [{"name", "ok", "detail", "fix"}]}; `fix` is empty where `ok`.
    """
    looks: list[Callable[[], Check]] = [_python, _packages, _git, _dvc, _ffmpeg, _sandbox, _memory, _gpu]
    if project is None:
        looks.append(_no_project)
    else:
        looks += list(_of_project(project))
    return {"checks": [asdict(_guarded(look)) for look in looks]}


def _guarded(look: Callable[[], Check]) -> Check:
    name = (look.func if isinstance(look, partial) else look).__name__.strip("_")
    if look_at := getattr(look, "args", ())[1:]:  # one check for each of several things
        name = f"{look_at[0]} {name}"
    try:
        return look()
    except SoraError as error:
        return Check(name, False, error.message.splitlines()[0], error.fix or "see the message")
    except Exception as error:
        return Check(name, False, f"could not be looked at: {type(error).__name__}: {error}", "report this finding")


# -- the machine --


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    ok = sys.version_info[:2] == (3, 11)
    return Check("python", ok, found, "" if ok else "use Python 3.11: `make setup` builds .venv with it")


def _packages() -> Check:
    from packaging.requirements import Requirement

    try:
        lines = requires(_DISTRIBUTION) or []
    except PackageNotFoundError:
        return Check("packages", False, f"{_DISTRIBUTION} is not installed", "make setup (or: pip install -e .)")
    wanted = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = []
    for requirement in wanted:
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} is not {requirement.specifier}")
    if wrong:
        return Check("packages", False, "; ".join(wrong), "make setup (or: pip install -r requirements.lock)")
    return Check("packages", True, f"all {len(wanted)} are within their ranges")


def _git() -> Check:
    return _command("git", ["git", "--version"], "install git")


def _dvc() -> Check:
    try:
        return Check("dvc", True, version("dvc"))
    except PackageNotFoundError:
        return Check("dvc", False, "not installed", "make setup")


def _ffmpeg() -> Check:
    # The wheel carries FFmpeg's libraries; whether they load is seen where they are loaded, beside this process.
    code = "import av; print(av.__version__, '.'.join(map(str, av.library_versions['libavcodec'])))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Check(
            "ffmpeg", False, f"PyAV does not load: {last}", "make setup (or: pip install --force-reinstall av)"
        )
    package, codec = done.stdout.split()
    return Check("ffmpeg", True, f"PyAV {package} with libavcodec {codec}")


def _sandbox() -> Check:
    lacks = sandbox.lacking()
    if not lacks:
        return Check("sandbox", True, f"decoders are confined by {sandbox.described()}")
    return Check(
        "sandbox",
        False,
        f"decoders are confined by {sandbox.described()} and by limits on memory, files and time; this machine lacks "
        + ", ".join(lacks),
        "run on Linux 6.12 or later, on x86_64 or aarch64; in a container, let its profile allow both",
    )


def _memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    detail = f"{memory.available / 1e9:.1f} GB of {memory.total / 1e9:.1f} GB free, {os.cpu_count()} processors"
    ok = memory.available >= _FREE_MEMORY
    return Check("memory", ok, detail, "" if ok else "end other programs, or lower train.batch and the clip's size")


def _gpu() -> Check:
    if shutil.which("nvidia-smi") is None:
        return Check("gpu", True, "none found: training runs on the processor")
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
        return Check("gpu", False, f"nvidia-smi fails: {said[0]}", "fix the NVIDIA driver")
    return Check("gpu", True, "; ".join(done.stdout.strip().splitlines()))


def _command(name: str, command: list[str], fix: str) -> Check:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        return Check(name, False, "not found", fix)
    first = (done.stdout or done.stderr).strip().splitlines() or ["no answer"]
    return Check(name, done.returncode == 0, first[0], "" if done.returncode == 0 else fix)


# -- the project --


def _no_project() -> Check:
    return Check(
        "project",
        False,
        "no params.yaml here or above",
        "sora init DIR --data FOLDER, or --project DIR for one you have",
    )


def _of_project(project: Project) -> Iterator[Callable[[], Check]]:
    def params() -> Check:
        settings = project.settings()
        return Check("params", True, f"{settings.name}, classes: {', '.join(settings.classes) or 'none yet'}")

    def disk() -> Check:
        free = shutil.disk_usage(project.root).free
        ok = free >= _FREE_DISK
        return Check("disk", ok, f"{free / 1e9:.1f} GB free", "" if ok else "make room: `sora gc --dry-run`")

    def writable() -> Check:
        folder = project.state if project.state.exists() else project.root
        ok = os.access(folder, os.W_OK)
        fix = "" if ok else f"give yourself the right to write: chmod u+w {folder}"
        if os.statvfs(folder).f_flag & os.ST_RDONLY:
            fix = "the file system is read-only: mount it for writing, or move the project to another disk"
        return Check("writable", ok, str(folder), fix)

    yield params
    yield disk
    yield writable
    yield partial(_data, project)
    yield partial(_lock, project)
    yield partial(_splits, project)
    yield from (partial(_database, project, name) for name in databases.NAMES)
    yield from _servers(project)
    yield partial(_champion, project)
    yield partial(_schedule, project)
    yield partial(_backup, project)


def _data(project: Project) -> Check:
    from sora.dataset.versioning.version import require_whole

    require_whole(project)
    if not project.data.is_dir():
        return Check("data", False, f"{project.data} is missing", "sora run (it fetches what data.dvc names)")
    if not project.data_dvc.is_file():
        return Check("data", False, "data/ has no version yet", "sora run (it writes data.dvc)")
    import yaml

    recorded = yaml.safe_load(project.data_dvc.read_text(encoding="utf-8"))["outs"][0]
    files, size = 0, 0
    for folder, _, names in os.walk(project.data):
        for name in names:
            files += 1
            size += (Path(folder) / name).lstat().st_size
    if (files, size) == (recorded.get("nfiles"), recorded.get("size")):
        return Check("data", True, f"{files} files, {size / 1e6:.1f} MB, as data.dvc says")
    detail = (
        f"data/ holds {files} files of {size} bytes, data.dvc names {recorded.get('nfiles')} of {recorded.get('size')}"
    )
    return Check("data", False, detail, "sora run (a new data version), or `dvc checkout` (back to the recorded one)")


def _lock(project: Project) -> Check:
    from sora.operations.lock import holder

    active = holder(project)
    detail = f"a run is active: process {active['pid']}, since {active['since']}" if active else "no run is active"
    return Check("run", True, detail)


def _splits(project: Project) -> Check:
    """The ledger against what the last judged run recorded, which MLflow knows, or else the copy on this machine."""
    with _open_registry(project) as registry:
        recorded = registry.judged_ledger() if registry else ledger.remembered(project)
        known = recorded is not None or _registry_has_runs(project, registry)
    rows = ledger.require(project.splits_file, recorded)
    if rows and not known:
        return Check(
            "splits",
            False,
            f"splits.csv holds the splits of {len(rows)} videos, but the registry is empty: nothing here was judged on "
            "them",
            "in a new clone: `sora run`; otherwise .sora/ or its mlflow.db was lost: `sora restore` a backup",
        )
    detail = f"{len(rows)} videos" if rows else "none are dealt yet"
    return Check("splits", True, f"{detail}, all that {recorded.name} recorded among them" if recorded else detail)


def _registry_has_runs(project: Project, registry: Registry | None) -> bool:
    if registry is not None:
        return any(True for _ in registry.runs.search_runs(limit=1))
    return databases.file_of(project, "mlflow").exists() or bool(project.settings().services.mlflow_tracking_uri)


def _database(project: Project, name: str) -> Check:
    found, check = databases.look(project, name), f"{name} database"
    if not found.exists:
        return Check(check, True, "none yet")
    if found.damage:
        return Check(check, False, f"{found.file} is damaged: {found.damage}", found.fix)
    seen = "" if found.whole else "; it is busy or large, so it was not looked at to its end"
    return Check(check, True, f"{found.size / 1e6:.1f} MB{seen}")


def _servers(project: Project) -> Iterator[Callable[[], Check]]:
    def one(name: str, configured: str | None, probe: str) -> Check:
        from sora.operations import servers as services

        running = services.running(project).get(name)
        url = without_login(configured) if configured else (running.url if running else None)
        if url is None:
            return Check(name, True, "not running; `sora run` starts one for itself, `sora up` keeps one")
        import httpx

        who = f"process {running.pid}, by `sora {running.owner}`" if running and not configured else "from params.yaml"
        try:
            status = httpx.get(f"{url.rstrip('/')}{probe}", timeout=5, trust_env=False).status_code
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            fix = (
                f"kill {running.pid}, then sora up" if running and not configured else "start it, or correct `services`"
            )
            return Check(name, False, f"{url} ({who}) does not answer: {error}", fix)
        ok = status < 400
        return Check(name, ok, f"{url} ({who})", "" if ok else f"it answers {status}: see .sora/logs/{name}.log")

    def secrets() -> Check:
        return _secrets(project)

    yield secrets

    def prefect() -> Check:
        return one("prefect", project.settings().services.prefect_api_url, "/health")

    def mlflow() -> Check:
        return one("mlflow", project.settings().services.mlflow_tracking_uri, "/health")

    yield prefect
    yield mlflow


# Path below the recorded address → the answer tells whether strangers get one.
_ASKED = {"prefect": "/admin/version", "mlflow": "/api/2.0/mlflow/experiments/get?experiment_id=0"}


def _secrets(project: Project) -> Check:
    """Whether only the owner reads `.sora`, and whether the servers ask who is there."""
    import httpx

    from sora.config.credentials import secret_file
    from sora.operations import servers as services

    for place, wanted in ((project.state, 0o700), (secret_file(project), 0o600)):
        if not place.exists():
            continue
        found = stat.S_IMODE(place.stat().st_mode)
        if found & 0o077:
            return Check("secrets", False, f"others may use {place} (mode {found:o})", f"chmod {wanted:o} {place}")
    asked = []
    for name, entry in sorted(services.running(project).items()):
        if name not in _ASKED:
            continue
        try:
            status = httpx.get(entry.url + _ASKED[name], timeout=5, trust_env=False).status_code
        except httpx.HTTPError:
            continue  # its own check says that it does not answer
        if status not in (401, 403):
            return Check(
                "secrets",
                False,
                f"{name} at {entry.url} answers everybody ({status}): it was started by an older Sora",
                f"end that `sora {entry.owner}` (process {entry.pid}) and start it again",
            )
        asked.append(name)
    servers = f"; {' and '.join(asked)} ask{'s' if len(asked) == 1 else ''} for a login" if asked else ""
    return Check("secrets", True, f"{project.state} is its owner's alone{servers}")


def _champion(project: Project) -> Check:
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
    """The registry where a server of it is known; no server is started."""
    from sora.operations import servers as services
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
    """Without a server, what was served last is known all the same."""
    try:
        kept = json.loads((project.state / "cache" / "champion.json").read_text(encoding="utf-8"))
        return Check("champion", True, f"version {kept['version']} was served last (MLflow is not running)")
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if (project.state / "mlflow" / "mlflow.db").exists():
        return Check("champion", True, "not known while MLflow is not running; `sora models` starts it and tells")
    return Check("champion", False, "none yet: nothing was trained", "sora run")


def _schedule(project: Project) -> Check:
    from sora.operations import nightly_log

    schedule = project.settings().schedule
    said = f"{schedule.cron} ({schedule.timezone})"
    last = nightly_log.read(project)
    if last is None:
        return Check("nightly", True, f"{said}; none ran yet, `sora up` starts the schedule")
    overdue = nightly_log.missed(last, datetime.now(UTC), schedule)
    when = f"{last.finished:%Y-%m-%d %H:%M} UTC"
    good = (
        f"the schedule began {when}"
        if last.outcome == nightly_log.REGISTERED
        else f"last good one {when}: {last.outcome}"
    )
    if overdue is not None:
        return Check(
            "nightly",
            False,
            f"{said}; {good}; that of {overdue:%Y-%m-%d %H:%M %Z} did not happen",
            "see that `sora up` runs, and .sora/logs/worker.log; `sora run` makes up for it",
        )
    return Check("nightly", True, f"{said}; {good}")


def _backup(project: Project) -> Check:
    from sora.operations import backup, nightly_log

    settings, last = project.settings(), backup.last(project)
    wanted = settings.backup
    if last is not None and last.failed is not None:
        return Check(
            "backup",
            False,
            f"{last.failed:%Y-%m-%d %H:%M} UTC: {last.reason.partition(chr(10))[0]}; {_last_backup(last.finished)}",
            "see what the message says, then `sora backup FILE`",
        )
    if last is None or last.finished is None:
        detail = (
            "the next nightly makes the first" if wanted.keep else "none was made (`sora backup FILE`, backup.keep)"
        )
        return Check("backup", True, detail)
    said = f"{_last_backup(last.finished)}: {last.file}"
    if last.damaged:
        return Check(
            "backup", False, f"{said}; {'; '.join(last.damaged)}", "fix that in the project, then back up again"
        )
    made = nightly_log.Nightly(last.finished, "backup")
    overdue = nightly_log.missed(made, datetime.now(UTC), settings.schedule) if wanted.keep else None
    if overdue is not None:
        fix = "see that `sora up` runs, and .sora/logs/worker.log; `sora backup FILE` makes one now"
        return Check("backup", False, f"{said}; none since the nightly of {overdue:%Y-%m-%d %H:%M %Z}", fix)
    folder = project.root / Path(wanted.folder or "").expanduser()
    if wanted.keep and folder.is_dir() and folder.stat().st_dev == project.root.stat().st_dev:
        said += "; backup.folder is on the project's own disk, whose failure takes both"
    return Check("backup", True, said)


def _last_backup(finished: datetime | None) -> str:
    if finished is None:
        return "there is no good one"
    hours = (datetime.now(UTC) - finished).total_seconds() / 3600
    age = f"{hours:.0f} h" if hours < 48 else f"{hours / 24:.0f} days"
    return f"the last good one is {age} old"
