"""`sora run`: the nightly flow once, in this process, with the servers that are up or with its own."""

from __future__ import annotations

import os
from typing import Any

from sora.config import Project
from sora.core.errors import RunActive, ServiceError, SoraError
from sora.core.processes import QUIET_ENV
from sora.operations.lock import require_free


def run_here(project: Project, *, force: bool = False) -> dict[str, Any]:
    """Returns the contract's JSON of `sora run`.

    Raises:
        RunActive: another run holds the project.
        SoraError: what stopped the run.
    """
    from sora.operations.servers import environment, running, servers

    project.settings()  # report a wrong params.yaml before servers start
    require_free(project)
    for name, value in QUIET_ENV.items():
        os.environ.setdefault(name, value)
    # Prefect's own lines, including tracebacks of failed tasks, go to its server; the terminal shows Sora's.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    standing = "mlflow" in running(project) or project.settings().services.mlflow_tracking_uri
    with servers(project) as addresses:
        os.environ.update(environment(project, addresses))
        from prefect.logging.handlers import APILogHandler

        from flows.nightly import nightly

        state: Any = nightly(str(project.root), force=force, return_state=True)
        APILogHandler().flush()  # while the server that receives the lines is up
        if state.is_completed():
            result: dict[str, Any] = state.result().to_dict()
            if not standing:  # nobody answers at that address any longer
                result["pages"] = [page for page in result["pages"] if not page.startswith("MLflow")]
            return result
        if state.is_cancelled():
            raise RunActive(state.message or "another run is active", fix="wait until it ends, or stop it")
        error = state.result(raise_on_failure=False)
        if isinstance(error, SoraError):
            raise error
        raise ServiceError(f"the run ended as {state.name}: {state.message}") from (
            error if isinstance(error, BaseException) else None
        )
