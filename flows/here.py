"""`sora run` and `sora tune`: a flow once, in this process, with the servers that are up or with its own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from sora.config import Project
from sora.core.errors import InputError, RunActive, ServiceError, SoraError
from sora.core.files import remove_abandoned_folders
from sora.core.processes import QUIET_ENV
from sora.core.trials import Found, Metric
from sora.operations.lock import require_free


def run_here(project: Project, *, force: bool = False) -> dict[str, Any]:
    """Returns the contract's JSON of `sora run`.

    Raises:
        RunActive: another run holds the project.
        SoraError: what stopped the run.
    """
    from sora.operations.servers import running

    project.settings()  # report a wrong params.yaml before servers start
    require_free(project)
    standing = "mlflow" in running(project) or project.settings().services.mlflow_tracking_uri
    with _served(project):
        from flows.nightly import nightly

        result: dict[str, Any] = _result(nightly(str(project.root), force=force, return_state=True)).to_dict()
    if not standing:  # nobody answers at that address any longer
        result["pages"] = [page for page in result["pages"] if not page.startswith("MLflow")]
    return result


def tune_here(
    project: Project,
    *,
    trials: int,
    minutes: float,
    folds: int,
    metric: Metric,
    only: Sequence[str] = (),
    apply: bool = False,
) -> Found:
    """`sora tune`: the flow `tune` in this process; with `apply` the change that it proposes is written.

    Raises:
        RunActive: a run, which may be changing `prepared/`, or another search holds the project.
        SoraError: what stopped the search; the same call goes on.
    """
    from sora.learning import study, tuning

    study.require()
    plan = tuning.plan(project, metric=metric, folds=folds, only=only, search=study.SEARCH)  # before servers start
    require_free(project)
    with _served(project):
        from flows.tune import tune

        search: Any = tune
        state = search(
            str(project.root),
            trials=trials,
            minutes=minutes,
            folds=folds,
            metric=metric,
            only=list(only),
            return_state=True,
        )
        found: Found = _result(state)
    return replace(found, applied=tuning.apply(project, plan, found.proposal)) if apply else found


@contextmanager
def _served(project: Project) -> Iterator[None]:
    """Prefect and MLflow for one flow in this process; at the end its lines have arrived."""
    from sora.operations.servers import environment, servers

    for name, value in QUIET_ENV.items():
        os.environ.setdefault(name, value)
    # Prefect's own lines, including tracebacks of failed tasks, go to its server; the terminal shows Sora's.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_DEBUG_LEVEL", "CRITICAL")  # of its own threads
    remove_abandoned_folders()  # of killed ones: this run may end without making one of its own
    with servers(project) as addresses:
        os.environ.update(environment(project, addresses))
        import httpx
        from prefect.logging.handlers import APILogHandler

        try:
            yield
        except httpx.TransportError as error:
            raise ServiceError(
                f"the Prefect server of this run does not answer any more: {error}",
                fix=f"run the same command again: it goes on after its last finished step ({project.log('prefect')} "
                "says how the server ended)",
            ) from error
        finally:
            # While their server is up: at its exit Python would wait a minute for one that is gone, after Ctrl-C too.
            APILogHandler().flush()


def _result(state: Any) -> Any:
    """What the flow returned.

    Raises:
        RunActive: it was cancelled.
        SoraError: what stopped it.
    """
    if state.is_completed():
        return state.result()
    if state.is_cancelled():
        raise RunActive(state.message or "another run is active", fix="wait until it ends, or stop it")
    error = state.result(raise_on_failure=False)
    if isinstance(error, SoraError):
        raise error
    if isinstance(error, PermissionError) and error.filename:
        raise InputError(
            f"{error.filename} can't be used: {error.strerror}",
            fix="give yourself the right to it (`chmod -R u+rwX`), or run as its owner",
        ) from error
    raise ServiceError(f"the run ended as {state.name}: {state.message}") from (
        error if isinstance(error, BaseException) else None
    )
