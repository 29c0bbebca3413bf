"""`sora run` in this process: what it clears away, and what it says when its server dies."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from flows import here
from sora.config import Project
from sora.core.errors import InputError, ServiceError
from sora.core.processes import QUIET_ENV
from sora.operations import servers
from sora.operations.servers import Addresses


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    @contextmanager
    def standing(project: Project) -> Iterator[Addresses]:
        yield Addresses("http://127.0.0.1:9/api", "http://127.0.0.1:9")

    monkeypatch.setattr(servers, "servers", standing)
    monkeypatch.setattr(servers, "environment", lambda *_: {})
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in [name for name in os.environ if name.startswith(("PREFECT_", "GX_", "DVC_"))]:
        monkeypatch.delenv(name)
    for name in QUIET_ENV:
        monkeypatch.setenv(name, QUIET_ENV[name])
    for kind in ("CONSOLE", "DEBUG"):
        monkeypatch.setenv(f"PREFECT_LOGGING_HANDLERS_{kind}_LEVEL", "CRITICAL")
    return Project(tmp_path)


def test_folders_of_killed_servers_are_swept(project: Project, tmp_path: Path) -> None:
    left = tmp_path / "sora-tmp-uploads-abc"
    left.mkdir(mode=0o700)
    with here._served(project):
        assert not left.exists()


def test_a_server_that_dies_is_named_with_the_way_on(project: Project) -> None:
    with pytest.raises(ServiceError, match="does not answer any more") as caught, here._served(project):
        raise httpx.ConnectError("Connection refused")
    assert "run the same command again" in (caught.value.fix or "")


def test_a_folder_of_somebody_else_is_named_with_the_fix() -> None:
    class Failed:
        name, message = "Failed", "Flow run encountered an exception"

        def is_completed(self) -> bool:
            return False

        def is_cancelled(self) -> bool:
            return False

        def result(self, raise_on_failure: bool) -> BaseException:
            return PermissionError(13, "Permission denied", "/data/dark")

    with pytest.raises(InputError, match="/data/dark can't be used: Permission denied") as caught:
        here._result(Failed())
    assert "chmod" in (caught.value.fix or "")
