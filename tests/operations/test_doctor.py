from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from sora.config import Project
from sora.operations import nightly_log
from sora.operations import servers as services
from sora.operations.doctor import doctor
from sora.operations.lock import run_lock
from tests.servers import make_project


def found(project: Project | None) -> dict[str, dict[str, Any]]:
    checks = doctor(project)["checks"]
    json.dumps(checks)
    assert all(set(check) == {"name", "ok", "detail", "fix"} for check in checks)
    assert all(check["ok"] or check["fix"] for check in checks), checks
    assert len({check["name"] for check in checks}) == len(checks)
    return {check["name"]: check for check in checks}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = make_project(tmp_path / "größe 1", "name: tested\nclasses: [a, b]\n")
    for name in ("a/1.mp4", "b/2.mp4"):
        (project.data / name).parent.mkdir(parents=True)
        (project.data / name).write_bytes(b"12345")
    project.data_dvc.write_text(f"outs:\n- md5: {'0' * 32}.dir\n  nfiles: 2\n  size: 10\n  path: data\n")
    return project


def test_outside_a_project() -> None:
    checks = found(None)
    assert {"python", "packages", "git", "dvc", "ffmpeg", "sandbox", "memory", "gpu", "project"} == set(checks)
    assert not checks["project"]["ok"]
    assert "sora init" in checks["project"]["fix"]
    assert checks["python"]["ok"]
    assert checks["ffmpeg"]["ok"]


def test_a_new_project(project: Project) -> None:
    checks = found(project)
    assert checks["params"]["detail"] == "tested, classes: a, b"
    assert checks["data"]["ok"]
    assert checks["run"]["detail"] == "no run is active"
    assert not checks["champion"]["ok"]
    assert checks["nightly"]["ok"]


def test_broken_settings_break_nothing_else(project: Project) -> None:
    project.params_file.write_text("clip: {frames: 1000}\n")
    checks = found(project)
    assert not checks["params"]["ok"]
    assert "clip.frames" in checks["params"]["detail"]
    assert checks["disk"]["detail"].endswith("free")


def test_data_that_is_not_what_was_versioned(project: Project) -> None:
    (project.data / "a" / "new.mp4").write_bytes(b"1")
    assert "3 files" in found(project)["data"]["detail"]
    project.data_dvc.write_text("outs: []")
    assert not found(project)["data"]["ok"]
    project.data_dvc.unlink()
    assert "no version" in found(project)["data"]["detail"]


@pytest.mark.parametrize("name", ["data.dvc", "dvc.lock"])
def test_torn_files_of_dvc_are_named(project: Project, name: str) -> None:
    (project.root / name).write_text("outs:\n- md5: 12")
    check = found(project)["data"]
    assert not check["ok"]
    assert name in check["detail"] and "is torn" in check["detail"]
    assert f"remove {name}" in check["fix"]


def test_a_run_that_is_active_is_named(project: Project) -> None:
    with run_lock(project):
        assert f"process {os.getpid()}" in found(project)["run"]["detail"]


def test_a_nightly_that_did_not_happen(project: Project) -> None:
    nightly_log.write(project, "promoted", "r", finished=datetime.now(UTC) - timedelta(days=3))
    check = found(project)["nightly"]
    assert not check["ok"]
    assert "did not happen" in check["detail"]
    nightly_log.write(project, "unchanged", "r")
    assert found(project)["nightly"]["ok"]


def test_a_server_that_is_recorded_and_silent(project: Project) -> None:
    project.state.mkdir()
    url = f"http://127.0.0.1:{services.free_port('127.0.0.1')}"
    services.record(project, "mlflow", os.getpid(), url, owner="up")
    checks = found(project)
    assert not checks["mlflow"]["ok"]
    assert f"kill {os.getpid()}" in checks["mlflow"]["fix"]
    assert not checks["champion"]["ok"]


def test_without_git(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert found(project)["git"] == {"name": "git", "ok": False, "detail": "not found", "fix": "install git"}


def test_it_imports_nothing_heavy(project: Project) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom sora.operations.doctor import doctor\n"
        "from sora.config import Project\n"
        f"doctor(Project(Path({str(project.root)!r})))\n"
        "print({'tensorflow', 'keras', 'mlflow', 'prefect', 'great_expectations', 'dvc', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
