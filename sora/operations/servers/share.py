"""The project's servers for the length of a block: servers that are up are used, the others are started."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from sora.config import Project
from sora.config.credentials import private_state
from sora.core.errors import ServiceError
from sora.core.files import writing
from sora.core.redaction import without_login
from sora.operations import databases
from sora.operations.servers.access import Addresses
from sora.operations.servers.describe import server_of
from sora.operations.servers.process import START_SECONDS, started, wait_ready
from sora.operations.servers.recorded import running

_ANSWER_SECONDS = 15.0  # for a server that is up but busy
_OTHERS_SECONDS = 10.0  # that the owner waits for other processes that use its servers


@contextmanager
def servers(
    project: Project, *, prefect: bool = True, mlflow: bool = True, owner: str = "run", standing: bool = False
) -> Iterator[Addresses]:
    """The addresses of the wanted servers, valid until the block ends.

    Servers that params.yaml names (`services`) and servers that are up are used; the others are started in parallel and
    ended with the block, also on Ctrl-C; if this process is killed, they die with it. Call it from a thread that lives
    as long as the servers should: Linux ends such children with the *thread* that started them.

    Args:
        standing: for a long-lived process (`sora serve`): it copes with a server that goes away, so whoever ends one
            does not wait for it.

    Raises:
        ServiceError: one does not start or does not answer; the end of its log is in the message.
    """
    settings = project.settings().services
    configured = {"prefect": settings.prefect_api_url, "mlflow": settings.mlflow_tracking_uri}
    wanted = [name for name, asked in (("prefect", prefect), ("mlflow", mlflow)) if asked]
    private_state(project)
    for name in wanted:
        if configured[name]:
            _answers_elsewhere(name, str(configured[name]))
    local = [name for name in wanted if not configured[name]]
    with (
        ExitStack() as children,  # it ends them last, when nobody here uses them
        databases.explained(project, local),
        _in_use(project, counts=not standing) as wait_for_others,
    ):
        with _exclusive(project):
            urls = {name: entry.url for name, entry in running(project).items() if name in local}
            for name, url in urls.items():
                wait_ready(project, server_of(project, name), url, seconds=_ANSWER_SECONDS)
            missing = [server_of(project, name) for name in local if name not in urls]
            ours = children.enter_context(started(project, missing, owner=owner))
            urls |= {one.name: one.url for one in ours}
        try:
            yield Addresses(
                prefect_api_url=configured["prefect"] or urls.get("prefect"),
                mlflow_tracking_uri=configured["mlflow"] or urls.get("mlflow"),
            )
        finally:
            if ours:
                wait_for_others()


def _answers_elsewhere(name: str, url: str) -> None:
    import httpx

    probe = f"{url.rstrip('/')}/health"  # the same in both
    try:
        answer = httpx.get(probe, timeout=10, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServiceError(
            f"the {name} server at {without_login(url)} does not answer: {error}",
            fix="start it, or correct or remove its address under `services` in params.yaml",
        ) from error
    if answer.status_code >= 400:
        raise ServiceError(
            f"{without_login(probe)} answers {answer.status_code}: no {name} server is there",
            fix="correct or remove its address under `services` in params.yaml"
            + (" (Prefect's ends with /api)" if name == "prefect" else ""),
        )


@contextmanager
def _exclusive(project: Project) -> Iterator[None]:
    """One process at a time checks which servers are up and starts the rest."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(project.services_lock, timeout=START_SECONDS + 10):
            yield
    except Timeout as error:
        raise ServiceError(
            "another process has been starting the servers for three minutes", fix="look for it with `sora doctor`"
        ) from error


@contextmanager
def _in_use(project: Project, *, counts: bool) -> Iterator[Callable[[], None]]:
    """Marks the servers as used by this process. Yields a function that waits a while until nobody else uses them.

    Without it, a `sora models` beside a `sora run` would lose its server midway when the run ends.
    """
    use = project.services_use
    with writing(use):
        descriptor = os.open(use, os.O_RDWR | os.O_CREAT, 0o644)

    def others_are_done() -> None:
        deadline = time.monotonic() + _OTHERS_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.05)

    try:
        if counts:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield others_are_done
    finally:
        os.close(descriptor)
