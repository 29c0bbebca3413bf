"""`sora doctor`: what is installed, reachable and running, and how to fix what is not.

Nothing heavy is imported. A check that fails unexpectedly is a finding too, never a crash.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from sora.config import Project
from sora.core.errors import SoraError
from sora.operations.checks import machine, services
from sora.operations.checks import project as files
from sora.operations.checks.check import Check

# In the order in which they are shown.
MACHINE: tuple[Callable[[], Check], ...] = (
    machine.python,
    machine.packages,
    machine.git,
    machine.dvc,
    machine.ffmpeg,
    machine.sandbox,
    machine.memory,
    machine.gpu,
)
PROJECT: tuple[Callable[[Project], Check], ...] = (
    files.params,
    files.disk,
    files.writable,
    files.data,
    files.run,
    services.splits,
    files.mlflow_database,
    files.prefect_database,
    services.secrets,
    services.prefect,
    services.mlflow,
    services.champion,
    files.nightly,
    files.backup,
)


def examine(project: Project | None) -> list[Check]:
    """Runs every check. Never raises.

    Args:
        project: None outside of one; the checks of a project are then left out.
    """
    checks = [_guarded(look.__name__, look) for look in MACHINE]
    if project is None:
        return [*checks, _NO_PROJECT]
    return checks + [_guarded(look.__name__, partial(look, project)) for look in PROJECT]


def doctor(project: Project | None) -> dict[str, Any]:
    """The JSON of `sora doctor --json`: {"checks": [{"name", "ok", "detail", "fix"}]}."""
    return {"checks": [asdict(check) for check in examine(project)]}


_NO_PROJECT = Check(
    "project", False, "no params.yaml here or above", "sora init DIR --data FOLDER, or --project DIR for one you have"
)


def _guarded(name: str, look: Callable[[], Check]) -> Check:
    name = name.replace("_", " ")
    try:
        return look()
    except SoraError as error:
        return Check(name, False, error.message.splitlines()[0], error.fix or "see the message")
    except Exception as error:
        return Check(name, False, f"could not be checked: {type(error).__name__}: {error}", "report this finding")
